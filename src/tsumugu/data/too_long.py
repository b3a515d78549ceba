"""What becomes of a supervised example that is longer than it may be. An answer is never cut without being counted."""

from typing import Literal

import numpy as np

Example = tuple[np.ndarray, np.ndarray]

PROMPT_CUT = "shortened: prompt cut from the left"
SPLIT = "shortened: split, its answers may be cut"


def fit(
    ids: np.ndarray,
    mask: np.ndarray,
    max_length: int,
    policy: Literal["drop", "truncate_prompt", "split"],
    head: int = 0,
) -> tuple[list[Example], str | None]:
    """The examples that are stored in place of one that is too long.

    drop: none. truncate_prompt: the first prompt, which is all before the first supervised token, loses tokens on its
    left, behind the first `head` ones; of it at least one token stays, and nothing else is cut: where that is not
    enough, none. split: consecutive stretches of `max_length` tokens, each of which begins with the last token of the
    one before it, so that every token is a label in one of them at most; those without a supervised token are left out.

    Args:
        ids: (tokens,), more than max_length.
        mask: (tokens,), 1 = supervised.
        max_length: Tokens that an example may have, at least 2.
        policy: As above.
        head: Tokens at the beginning that stay, such as a beginning-of-text token.

    Returns:
        The examples, and under what they are to be counted: PROMPT_CUT, SPLIT or None.
    """
    if policy == "truncate_prompt":
        excess = len(ids) - max_length
        prompt = int(np.argmax(mask)) if mask.any() else len(ids)
        if head + excess < prompt:
            kept = np.r_[0:head, head + excess : len(ids)]
            return [(ids[kept], mask[kept])], PROMPT_CUT
    if policy == "split":
        examples = []
        for start in range(0, len(ids) - 1, max_length - 1):
            part = mask[start : start + max_length].copy()
            part[: start > 0] = 0  # it is a label in the stretch before
            if part[1:].any():
                examples.append((ids[start : start + max_length], part))
        return examples, SPLIT if examples else None
    return [], None

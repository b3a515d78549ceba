"""Pieces of conversations to ids and a supervision mask, and whether a tokenizer can express a template at all.

Text between special tokens is encoded in one go, as stock transformers encodes a rendered chat template, but for one
place: a reply begins anew, as generation does.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import chain, groupby
from pathlib import Path

import numpy as np

from tsumugu.data.instructions.chat import ChatTemplate
from tsumugu.data.instructions.records import Message, UnusableError
from tsumugu.data.instructions.templates import EOS, Segment, Template, cut
from tsumugu.errors import UserError
from tsumugu.tokenizer.contract import Contract
from tsumugu.tokenizer.load import BulkEncoder, load_tokenizer

_Encode = Callable[[list[str]], Sequence]

# What a template is tried on.
PROBE = [
    Message("user", "日本の首都はどこですか？"),
    Message("assistant", "東京です。"),
    Message("user", "Is it large?"),
    Message("assistant", "Yes, very."),
]


def special_ids(folder: Path) -> dict[str, int]:
    """The special tokens of a tokenizer.json."""
    layout = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    return {token["content"]: token["id"] for token in layout["added_tokens"] if token["special"]}


def stop_id(template: Template | ChatTemplate, tokenizer: Path) -> int | None:
    """The token behind a reply where it is the template's own; None where it is eos, or no token of this tokenizer."""
    return None if template.stop == EOS else special_ids(tokenizer).get(template.stop)


def encode_conversations(
    conversations: Sequence[Sequence[Message]],
    template: Template | ChatTemplate,
    encode: _Encode,
    bos: list[int],
    eos: int | None,
    train_on: str,
    specials: Mapping[str, int] | None = None,
) -> list[tuple[np.ndarray, np.ndarray] | UnusableError]:
    """Ids and supervision mask of each conversation, by one call of `encode` for all.

    Args:
        conversations: Of `messages_of`.
        template: Of `find_template`.
        encode: Texts to ids, no special tokens added, special tokens spelt in them taken for text.
        bos: Ids before the first prompt ([] or [bos]).
        eos: The tokenizer's end-of-text token, where the template stops at that.
        train_on: "responses", "last_response" or "everything" (bos and prompts too). What a message with `train: false`
            adds is never supervised. With a reply, the stop token behind it is always supervised.
        specials: Of `special_ids`, where the template has special tokens.

    Returns:
        ids (tokens,) int64 and mask (tokens,) uint8 of each; in place of both, why a conversation cannot be used.

    Raises:
        UserError: As of the template's `segments`, by which a caller finds out beforehand.
    """
    ids_of = {EOS: eos, **(specials or {})}
    checked = isinstance(template, ChatTemplate)
    results: list = []
    texts: list[str] = []
    for messages in conversations:
        try:
            segments = template.segments(messages)
        except UnusableError as error:
            results.append(error)
            continue
        sections = _sections(segments, _supervised(segments, train_on))
        whole = _joined(sections) if checked else []
        results.append((sections, whole))
        texts += [text for text, special, _ in chain(sections, whole) if not special]
    encoded = iter(encode(texts))

    def ids(sections: list[tuple[str, bool, bool]]) -> list[np.ndarray]:
        return [
            np.atleast_1d(np.asarray(ids_of[text] if special else next(encoded), np.int64))
            for text, special, _ in sections
        ]

    for index, result in enumerate(results):
        if isinstance(result, UnusableError):
            continue
        sections, whole = result
        parts = ids(sections)
        if checked and not np.array_equal(np.concatenate(parts), np.concatenate(ids(whole))):
            results[index] = UnusableError("a reply merges with the chat template's text in front of it")
            continue
        parts = [np.array(bos, np.int64), *parts]
        flags = [train_on == "everything", *(flag for *_, flag in sections)]
        mask = np.repeat(np.array(flags, np.uint8), [len(part) for part in parts])
        results[index] = (np.concatenate(parts), mask)
    return results


def prompt_ids(
    messages: Sequence[Message],
    template: Template | ChatTemplate,
    encode: _Encode,
    bos: list[int],
    specials: Mapping[str, int],
) -> list[int]:
    """The ids of a conversation that ends with a question, up to where the reply begins, as they are in training.

    Args:
        messages, template, encode, bos: As of `encode_conversations`.
        specials: Special tokens and EOS to ids.
    """
    segments = template.segments(messages)
    sections = _sections(segments, [False] * len(segments))
    encoded = iter(encode([text for text, special, _ in sections if not special]))
    return [*bos, *chain.from_iterable([specials[text]] if special else next(encoded) for text, special, _ in sections)]


def _supervised(segments: list[Segment], train_on: str) -> list[bool]:
    last = max((segment.turn for segment in segments if segment.reply), default=-1)
    chosen = {
        "responses": lambda segment: segment.reply,
        "last_response": lambda segment: segment.reply and segment.turn == last,
        "everything": lambda segment: True,
    }[train_on]
    return [segment.train and chosen(segment) for segment in segments]


def _sections(segments: list[Segment], supervised: list[bool]) -> list[tuple[str, bool, bool]]:
    """What is encoded in one go: (text, whether it is a special token, whether it is supervised)."""
    sections: list[tuple[str, bool, bool]] = []
    begins = True
    for segment, flag in zip(segments, supervised, strict=True):
        if segment.special or begins or sections[-1][2] != flag or segment.reply:
            sections.append((segment.text, segment.special, flag))
        else:
            sections[-1] = (sections[-1][0] + segment.text, False, flag)
        begins = segment.special
    return sections


def _joined(sections: list[tuple[str, bool, bool]]) -> list[tuple[str, bool, bool]]:
    """The same with all text between special tokens in one."""
    joined = []
    for special, own in groupby(sections, key=lambda section: section[1]):
        texts = [text for text, *_ in own]
        joined += [(text, True, False) for text in texts] if special else [("".join(texts), False, False)]
    return joined


def check_template(template: Template | ChatTemplate, name: str, tokenizer: Path, contract: Contract) -> None:
    """Refuses a tokenizer that cannot express a template as it was meant.

    Args:
        template: Of `find_template`.
        name: What the configuration calls it.
        tokenizer: The tokenizer's folder.
        contract: Of that folder.

    Raises:
        UserError: No end-of-text token; a marker of the template that is no single token; newlines that would be lost;
            text that is encoded otherwise in whole than around the template's special tokens.
    """
    if contract.eos_id is None:
        raise UserError(
            f"{tokenizer} has no end-of-text token, which ends every response", "use a tokenizer with an eos_token"
        )
    specials = special_ids(tokenizer)
    encoder = BulkEncoder(tokenizer)
    fast = load_tokenizer(tokenizer)
    if isinstance(template, Template):
        if missing := missing_tokens(template, tokenizer):
            raise UserError(
                f"template {name} needs tokens that {tokenizer} does not have as single ones: {' '.join(missing)}",
                f"add them by `tsumugu tokenizer extend {tokenizer} --template {name} --output DIR`"
                + (', or import it with --newline "<NL>"' if missing == ["<NL>"] else ", and prepare with that folder"),
            )
        own = [
            getattr(template, key) or "" for key in ("without_input", "with_input", "system", "assistant", "after_stop")
        ]
        spelt = {piece for form in own for piece, special in cut(form, list(specials)) if special}
        if unlisted := sorted(spelt - set(template.special_tokens)):
            raise UserError(
                f"template {name} spells {' '.join(unlisted)}, special in {tokenizer}", "list it in special_tokens"
            )
    probe = PROBE[:2] if isinstance(template, Template) and template.several_turns == "no" else PROBE
    segments = template.segments(probe)
    if contract.newline == "lost" and any("\n" in segment.text for segment in segments):
        raise UserError(
            f"template {name} has newlines, which the tokenizer {tokenizer} cannot express",
            "use a tokenizer with a newline",
        )
    eos = next((token for token, id in specials.items() if id == contract.eos_id), None)
    (found,) = encode_conversations([probe], template, encoder, [], contract.eos_id, "responses", specials)
    if isinstance(found, UnusableError):
        assert isinstance(template, ChatTemplate)
        raise UserError(f"the chat template of {tokenizer} cannot be used: {found.message}", template.replacement())
    prompt = template.segments(probe[:1])
    if any(segment.special for segment in prompt):
        text = "".join((eos or "") if segment.text == EOS else segment.text for segment in prompt)
        ids = prompt_ids(probe[:1], template, encoder, [], {EOS: contract.eos_id, **specials})
        fast.encode_special_tokens = False
        if [int(id) for id in ids] != fast.encode(text, add_special_tokens=False).ids:
            raise UserError(
                f"{tokenizer} encodes the text of template {name} otherwise in whole than between its special tokens",
                "its special tokens take white space along (lstrip, rstrip): use another tokenizer or template",
            )


def missing_tokens(template: Template, tokenizer: Path) -> list[str]:
    """The tokens of a template that a tokenizer does not have as single ones."""
    specials, encode, fast = special_ids(tokenizer), BulkEncoder(tokenizer), load_tokenizer(tokenizer)
    missing = [token for token in template.special_tokens if token not in specials]
    for token in template.text_tokens:
        (ids,) = encode([f"あ{token}い"])
        if fast.token_to_id(token) not in ids.tolist():
            missing.append(token)
    return missing

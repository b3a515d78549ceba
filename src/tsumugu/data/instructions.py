"""Prompt templates: from an instruction record to pieces of text, each supervised or not, and from those to ids.

The mask is built from the pieces, each encoded for itself, and never by searching the finished ids. The ids of a prompt
in training are therefore exactly the ids of that prompt in generation.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tsumugu.errors import UserError

FIELDS = ("instruction", "input", "output")


@dataclass(frozen=True)
class Template:
    """A single-turn prompt in two forms; the response follows it directly."""

    with_input: str
    without_input: str

    def prompt(self, instruction: str, input: str = "") -> str:
        form = self.with_input if input else self.without_input
        # not str.format: braces in the user's text stay what they are, and are never filled in themselves
        head, tail = form.split("{instruction}")
        return head + instruction + tail.replace("{input}", input)

    def chat_template(self) -> str:
        """The same prompt as a Jinja chat template: one user message in, `prompt` out, then the reply and eos."""
        head, tail = (repr(part) for part in self.without_input.split("{instruction}"))
        return (
            "{%- if messages | length > 2 or messages[0]['role'] != 'user' -%}"
            "{{ raise_exception('This model was trained on single questions: one user message, one reply') }}"
            "{%- endif -%}"
            f"{{{{- {head} + messages[0]['content'] + {tail} -}}}}"
            "{%- if messages | length == 2 -%}{{- messages[1]['content'] + eos_token -}}{%- endif -%}"
        )


# The Alpaca prompt as published with Stanford Alpaca (2023), and its Japanese form as used by Japanese models since.
TEMPLATES = {
    "alpaca-en": Template(
        with_input=(
            "Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request.\n\n"
            "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
        ),
        without_input=(
            "Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request.\n\n"
            "### Instruction:\n{instruction}\n\n### Response:"
        ),
    ),
    "alpaca-ja": Template(
        with_input=(
            "以下は、タスクを説明する指示と、文脈のある入力の組み合わせです。要求を適切に満たす応答を書きなさい。\n\n"
            "### 指示:\n{instruction}\n\n### 入力:\n{input}\n\n### 応答:"
        ),
        without_input=(
            "以下は、タスクを説明する指示です。要求を適切に満たす応答を書きなさい。\n\n"
            "### 指示:\n{instruction}\n\n### 応答:"
        ),
    ),
}


def find_template(name: str) -> Template:
    """The template of that name, or a UserError that lists the names."""
    if name not in TEMPLATES:
        raise UserError(f"no template {name}", f"known: {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def encode_example(
    prompt: str, response: str, encode: Callable[[list[str]], Sequence], bos: list[int], eos: int, train_on: str
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and supervision mask of one example.

    Args:
        prompt: The rendered prompt.
        response: The reply, without a stop token.
        encode: Texts to ids, no special tokens added.
        bos: Ids before the prompt ([] or [bos]).
        eos: The stop token, always there and always supervised.
        train_on: "responses" or "everything".

    Returns:
        ids (tokens,) int64 and mask (tokens,) uint8.
    """
    prompt_ids, response_ids = encode([prompt, response])
    ids = np.concatenate([bos, prompt_ids, response_ids, [eos]]).astype(np.int64)
    mask = np.ones(len(ids), dtype=np.uint8)
    if train_on == "responses":
        mask[: len(bos) + len(prompt_ids)] = 0
    return ids, mask

"""A tokenizer's own chat template, rendered in transformers' sandbox: to the same pieces as a built-in template's.

Where it has generation markers, they say what is supervised. Where it has none, the conversation is rendered up to each
reply, with the generation prompt, and up to the end of that reply: each rendering must begin with the one before it,
and the pieces are what each one adds. Token ids are never searched.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from tsumugu.data.instructions.records import Message, UnusableError
from tsumugu.data.instructions.templates import Segment, cut
from tsumugu.errors import UserError
from tsumugu.tokenizer.contract import marks_replies, read_chat_template, special_tokens

# The built-in template to take in place of one that cannot be used, by what it spells.
_REPLACEMENTS = (
    ("<think>", "qwen3"),
    ("<|im_start|>", "chatml"),
    ("<|start_header_id|>", "llama3"),
    ("<start_of_turn>", "gemma"),
    ("### 応答", "llm-jp"),
    ("システム: ", "rinna"),
)


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template and the special tokens of its tokenizer.

    Attributes:
        jinja: The template.
        names: bos_token, eos_token and so on, as the template sees them.
        special_tokens: Every special token of the tokenizer; those that the template spells are single ids.
        stop: The token behind a reply.
    """

    jinja: str
    names: dict[str, str]
    special_tokens: tuple[str, ...]
    stop: str = ""

    @classmethod
    def of(cls, tokenizer: Path) -> "ChatTemplate":
        """The chat template in a tokenizer's folder.

        Raises:
            UserError: There is none; its text depends on the day; nothing behind a reply says where it ends; or what it
                lets a reply begin with is not what would be generated.
        """
        from tsumugu.data.instructions.encode import PROBE, special_ids

        jinja = read_chat_template(tokenizer)
        if jinja is None:
            raise UserError(f"{tokenizer} has no chat template", "choose a built-in template, such as chatml")
        template = cls(jinja, special_tokens(tokenizer), tuple(special_ids(tokenizer)))
        if "strftime_now" in jinja:
            raise UserError(
                f"the chat template of {tokenizer} shows the day on which it is used", template.replacement()
            )
        stop = next(segment.text for segment in reversed(template.segments(PROBE[:2])) if segment.reply)
        template.check_start()
        return cls(jinja, template.names, template.special_tokens, stop)

    def check_start(self) -> None:
        """Refuses a template whose replies, as they are learned, do not begin where a generated one would.

        Raises:
            UserError: It ignores add_generation_prompt although something of its own stands in front of a reply, or its
                generation markers begin before or behind the end of the generation prompt.
        """
        from tsumugu.data.instructions.encode import PROBE

        segments = self.segments(PROBE[:2])
        first = [segment.reply for segment in segments].index(True)
        head = "".join(segment.text for segment in segments[:first])
        reply = "".join(segment.text for segment in segments[first:])
        prompt, _ = self._render(PROBE[:1], prompt=True)
        if head != prompt:
            raise UserError(
                "what the chat template marks of a reply does not begin where its generation prompt ends: that ends in "
                f"{prompt[-30:]!r}, and {head[-30:]!r} stands in front of what would be learned",
                self.replacement(),
            )
        if prompt == self._render(PROBE[:1])[0]:  # it has no generation prompt, and then the reply is all that follows
            begun = re.sub(r"\s*<think>\s*</think>", "", reply).lstrip()
            if not begun.startswith(PROBE[1].content):
                raise UserError(
                    f"the chat template ignores add_generation_prompt, and begins a reply with {begun[:30]!r}, which "
                    "would be learned as a part of it",
                    self.replacement(),
                )

    def segments(self, messages: Sequence[Message]) -> list[Segment]:
        """The conversation as pieces; one that ends with the user's message is a prompt, up to where the reply begins.

        Raises:
            UnusableError: A message spells a special token, which the template's text would turn into one.
            UserError: The template refuses the conversation; a rendering does not begin with the one before it; no stop
                token stands behind a reply.
        """
        for message in messages:
            for text in (message.content, message.input):
                if any(special for _, special in cut(text, self.special_tokens)):
                    raise UnusableError("a message spells a special token")
        if messages[-1].role != "assistant":
            return self._pieces(self._render(messages, prompt=True)[0], False, True, len(messages))
        segments = []
        before = 0
        parts = self._by_markers(messages) if marks_replies(self.jinja) else self._by_prefixes(messages)
        for text, reply, turn in parts:
            if not reply:
                train = all(message.train for message in messages[before:turn])
                segments += self._pieces(text, False, train, turn)
                continue
            end = len(text.rstrip())
            pieces = self._pieces(text[:end], True, messages[turn].train, turn)
            if not pieces or not pieces[-1].special:
                raise UserError("the chat template writes no stop token behind a reply", self.replacement())
            segments += [*pieces, *self._pieces(text[end:], False, messages[turn].train, turn)]
            before = turn + 1
        return segments

    def chat_template(self) -> str:
        """The template itself."""
        return self.jinja

    def replacement(self) -> str:
        """What to do in place of using this template, as a hint."""
        found = next((name for text, name in _REPLACEMENTS if text in self.jinja), None)
        if found:
            return f"use the built-in template {found}, whose replies are marked, or one of your own (a YAML file)"
        return "put {% generation %} markers around its replies, or use a template of your own (a YAML file)"

    def _pieces(self, text: str, reply: bool, train: bool, turn: int) -> list[Segment]:
        return [
            Segment(piece, reply, train, turn, special) for piece, special in cut(text, self.special_tokens) if piece
        ]

    def _by_prefixes(self, messages: Sequence[Message]) -> list[tuple[str, bool, int]]:
        """(text, whether it is a reply with what follows it, which message)."""
        pieces, done = [], ""
        for turn, message in enumerate(messages):
            if message.role != "assistant":
                continue
            prompt, _ = self._render(messages[:turn], prompt=True)
            whole, _ = self._render(messages[: turn + 1])
            if not prompt.startswith(done) or not whole.startswith(prompt):
                raise UserError(
                    "the chat template shows earlier messages otherwise once others follow, and marks no replies",
                    self.replacement(),
                )
            pieces += [(prompt[len(done) :], False, turn), (whole[len(prompt) :], True, turn)]
            done = whole
        return pieces

    def _by_markers(self, messages: Sequence[Message]) -> list[tuple[str, bool, int]]:
        text, spans = self._render(messages)
        turns = [turn for turn, message in enumerate(messages) if message.role == "assistant"]
        if len(spans) == 1:  # a template that shows earlier replies otherwise marks the last one alone
            turns = turns[-1:]
        if len(spans) != len(turns):
            raise UserError(
                f"the chat template marks {len(spans)} parts of a conversation with {len(turns)} replies",
                self.replacement(),
            )
        pieces, done = [], 0
        for (start, stop), turn in zip(spans, turns, strict=True):
            if not self._ends_special(text[start:stop]):
                following = cut(text[stop:], self.special_tokens)[:1]
                stop += len(following[0][0]) if following and following[0][1] else 0  # the stop token is learned too
            pieces += [(text[done:start], False, turn), (text[start:stop], True, turn)]
            done = stop
        return [*pieces, (text[done:], False, len(messages))]

    def _ends_special(self, text: str) -> bool:
        pieces = cut(text.rstrip(), self.special_tokens)
        return bool(pieces) and pieces[-1][1]

    def _render(self, messages: Sequence[Message], prompt: bool = False) -> tuple[str, list[tuple[int, int]]]:
        """The text, and the spans of it that generation markers enclose."""
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        turns: list[Any] = [
            {"role": m.role, "content": f"{m.content}\n\n{m.input}" if m.input else m.content} for m in messages
        ]
        marked = marks_replies(self.jinja)
        try:
            rendered, spans = cast(Any, render_jinja_template)(
                conversations=[turns],
                chat_template=self.jinja,
                add_generation_prompt=prompt,
                return_assistant_tokens_mask=marked,
                **self.names,
            )
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"the chat template refuses the conversation: {reason}", self.replacement()) from None
        return rendered[0], spans[0] if marked else []

"""Pieces of conversations to ids and a supervision mask, and whether a tokenizer can express a template at all.

Text between special tokens has the ids that stock transformers gives it in a rendered chat template, as long as the ids
of a prompt are those of the prompt alone, from which generation goes on.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tsumugu.data.instructions.chat import ChatTemplate
from tsumugu.data.instructions.records import Message, UnusableError
from tsumugu.data.instructions.templates import EOS, Segment, Template, cut
from tsumugu.errors import UserError
from tsumugu.tokenizer.contract import Contract
from tsumugu.tokenizer.load import BulkEncoder, load_tokenizer

_Encode = Callable[[list[str]], Sequence]


class _Section(NamedTuple):
    """What is encoded in one go: text, or the name of one special token."""

    text: str
    special: bool
    supervised: bool


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


def writes_bos(template: Template | ChatTemplate, tokenizer: Path, contract: Contract) -> bool:
    """Whether a template by itself begins a conversation with the tokenizer's bos token."""
    first = template.segments(PROBE[:1])[0]
    return first.special and contract.bos_id is not None and special_ids(tokenizer).get(first.text) == contract.bos_id


def learns_earlier_replies(template: Template | ChatTemplate) -> bool:
    """Whether replies before the last one are replies, and not shown in another form than they are generated in."""
    if isinstance(template, Template) and template.several_turns == "no":
        return True
    return len({segment.turn for segment in template.segments(PROBE) if segment.reply}) > 1


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
    apart = isinstance(template, Template) and template.reply_apart
    results: list = []
    texts: list[str] = []
    for messages in conversations:
        try:
            segments = template.segments(messages)
        except UnusableError as error:
            results.append(error)
            continue
        sections = _sections(segments, _supervised(segments, train_on))
        results.append(sections)
        texts += chain.from_iterable(_texts(sections, apart))
    encoded = iter(encode(texts))
    for index, sections in enumerate(results):
        if isinstance(sections, UnusableError):
            continue
        parts, merged = _ids(sections, [list(islice(encoded, len(own))) for own in _texts(sections, apart)], ids_of)
        if merged and isinstance(template, ChatTemplate):
            results[index] = UnusableError("a reply merges with the chat template's text in front of it")
            continue
        parts = [np.array(bos, np.int64), *parts]
        flags = [train_on == "everything", *(section.supervised for section in sections)]
        mask = np.repeat(np.array(flags, np.uint8), [len(part) for part in parts])
        results[index] = (np.concatenate(parts), mask)
    return results


def _texts(sections: list[_Section], apart: bool) -> list[list[str]]:
    """What is to be encoded for each section: nothing for a special token; where text follows text, also that text, and
    both together."""
    wanted, before = [], ""
    for section in sections:
        if section.special:
            wanted.append([])
            before = ""
        else:
            wanted.append([section.text, before, before + section.text] if before and not apart else [section.text])
            before += section.text
    return wanted


def _ids(
    sections: list[_Section], encoded: list[list[np.ndarray]], ids_of: Mapping[str, Any]
) -> tuple[list[np.ndarray], bool]:
    """The ids of each section, and whether text merges with text before it.

    Text that follows text has the ids that it adds: so the whole is encoded as stock transformers does. Where the whole
    does not begin with the ids of what comes before, it has its own: what comes before is a prompt, of which generation
    knows no more.
    """
    parts, merged = [], False
    for section, own in zip(sections, encoded, strict=True):
        arrays = [np.asarray(ids, np.int64) for ids in own]
        if section.special:
            parts.append(np.atleast_1d(np.asarray(ids_of[section.text], np.int64)))
        elif len(arrays) == 1:
            parts.append(arrays[0])
        else:
            alone, before, whole = arrays
            follows = np.array_equal(whole[: len(before)], before) and len(whole) > len(before)
            parts.append(whole[len(before) :] if follows else alone)
            merged = merged or not follows
    return parts, merged


def prompt_ids(
    messages: Sequence[Message],
    template: Template | ChatTemplate,
    encode: _Encode,
    bos: list[int],
    specials: Mapping[str, Any],
) -> list[int]:
    """The ids of a conversation that ends with a question, up to where the reply begins, as they are in training.

    Args:
        messages, template, encode, bos: As of `encode_conversations`.
        specials: Special tokens and EOS to ids.
    """
    segments = template.segments(messages)
    sections = _sections(segments, [False] * len(segments))
    texts = _texts(sections, isinstance(template, Template) and template.reply_apart)
    encoded = iter(encode(list(chain.from_iterable(texts))))
    parts, _ = _ids(sections, [list(islice(encoded, len(own))) for own in texts], specials)
    return np.concatenate([np.array(bos, np.int64), *parts]).tolist()


def _supervised(segments: list[Segment], train_on: str) -> list[bool]:
    last = max((segment.turn for segment in segments if segment.reply), default=-1)
    chosen = {
        "responses": lambda segment: segment.reply,
        "last_response": lambda segment: segment.reply and segment.turn == last,
        "everything": lambda segment: True,
    }[train_on]
    return [segment.train and chosen(segment) for segment in segments]


def _sections(segments: list[Segment], supervised: list[bool]) -> list[_Section]:
    """Segments, text joined with text before it where both are supervised or neither, but for a reply."""
    sections: list[_Section] = []
    for segment, flag in zip(segments, supervised, strict=True):
        last = sections[-1] if sections else None
        if last is None or last.special or segment.special or segment.reply or last.supervised != flag:
            sections.append(_Section(segment.text, segment.special, flag))
        else:
            sections[-1] = _Section(last.text + segment.text, False, flag)
    return sections


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
                ", and prepare with that folder",
            )
        keys = ("without_input", "with_input", "next_without_input", "next_with_input")
        own = [getattr(template, key) or "" for key in (*keys, "system", "assistant", "after_stop")]
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
            "import it with --newline TOKEN, add one by `tsumugu tokenizer extend --tokens FILE` (with a line of "
            '"\\n", a tab and the word text), or choose a template without newlines, such as rinna',
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

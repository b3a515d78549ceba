"""Supervised records of every usual form: to conversations, through prompt templates to text, to ids and mask.

The mask is built from segments, each encoded for itself, and never by searching the finished ids. The ids of a prompt
in training are therefore exactly the ids of that prompt in generation.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np

from tsumugu.errors import UserError
from tsumugu.tokenizer.load import check_unicode

# The columns that make up a record, by form. Where a record has several forms, the caller's `fields` say which counts.
_FORMS = (("messages",), ("conversations",), ("instruction", "output"), ("prompt", "response"))
FIELDS = ("instruction", "input", "output", "prompt", "response", "messages", "conversations")

# Whose turn it is, as data sets call it.
_ROLES = {
    "system": "system",
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model"), "assistant"),
}


class UnusableError(UserError):
    """A conversation that can be read but teaches nothing, such as one without a reply; one message for each reason."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: system, user or assistant.
        train: Whether it may be supervised; the caller's `train_on` chooses among those that may.
        input: What the instruction is about, where a record keeps that apart.
    """

    role: str
    content: str
    train: bool = True
    input: str = ""


@dataclass(frozen=True)
class Segment:
    """A stretch of a rendered conversation, encoded for itself. The stop token behind a reply is not part of it."""

    text: str
    reply: bool
    train: bool


# --- records ---------------------------------------------------------------------------------------------------------


def columns_for(fields: dict[str, str]) -> list[str]:
    """The columns that records of any form may need.

    Args:
        fields: Names of FIELDS to the columns that are called otherwise.
    """
    return [fields.get(field, field) for field in FIELDS]


def messages_of(values: dict, fields: dict[str, str]) -> list[Message]:
    """The conversation in one record: an optional system message, then user and assistant in turn.

    Forms: instruction, input (may be absent or null) and output; prompt and response; messages (a list of role, content
    and, if some are not to be learned, train); ShareGPT's conversations (a list of from and value).

    Args:
        values: Columns to values.
        fields: As of `columns_for`.

    Raises:
        UserError: What is wrong with the record, without its place. What many records of a corpus have (`empty reply`,
            `empty question`, `the last turn is not the assistant's`, `the turns do not alternate`) is an
            UnusableError, to be counted.
    """
    form = _form_of(values, fields)
    if form in (("messages",), ("conversations",)):
        names = ("role", "content") if form == ("messages",) else ("from", "value")
        messages = _turns(values[fields.get(form[0], form[0])], fields.get(form[0], form[0]), *names)
    else:
        question, reply = (_text(values[fields.get(name, name)], fields.get(name, name)) for name in form)
        column = fields.get("input", "input")
        if "input" in fields and column not in values:
            raise UserError(f"no column {column}", f"it has: {', '.join(map(str, values))}")
        input = _text(values.get(column), column) if form[0] == "instruction" else ""
        messages = [Message("user", question, input=input), Message("assistant", reply)]
    check_turns(messages)
    return messages


def _form_of(values: dict, fields: dict[str, str]) -> tuple[str, ...]:
    has = f"it has: {', '.join(map(str, values))}"
    named = [form for form in _FORMS if any(field in fields for field in (*form, *_optional(form)))]
    wanted = named or _FORMS
    complete = [form for form in wanted if all(fields.get(field, field) in values for field in form)]
    if len(complete) > 1:  # tables of several sources leave the other form's columns empty
        filled = [form for form in complete if all(values[fields.get(field, field)] is not None for field in form)]
        complete = filled or complete[:1]
    if len(complete) > 1:
        both = " and ".join("/".join(form) for form in complete)
        raise UserError(f"the record has both {both}", "name the columns of one of them in fields")
    if not complete and len(named) == 1:
        missing = [fields.get(field, field) for field in named[0] if fields.get(field, field) not in values]
        raise UserError(f"no column {' and no column '.join(missing)}", has)
    if not complete:
        forms = ", ".join("/".join(form) for form in _FORMS)
        raise UserError(f"no instruction record: its columns are none of {forms}", f"name them in fields; {has}")
    return complete[0]


def _optional(form: tuple[str, ...]) -> tuple[str, ...]:
    return ("input",) if form[0] == "instruction" else ()


def _text(value: object, what: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"{what} holds {type(value).__name__}, not text", "give plain text")
    check_unicode(value, what)
    return value


def _turns(turns: object, column: str, role_name: str, content_name: str) -> list[Message]:
    turns = [] if turns is None else turns
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise UserError(f"{column} is no list of turns", f"each turn is an object with {role_name} and {content_name}")
    messages = []
    for number, turn in enumerate(turns, start=1):
        if role_name not in turn or content_name not in turn:
            missing = content_name if role_name in turn else role_name
            raise UserError(f"{column}, turn {number}: no {missing}", f"it has: {', '.join(map(str, turn))}")
        role, train = turn[role_name], turn.get("train")
        if not isinstance(role, str) or role not in _ROLES:
            raise UserError(f"{column}, turn {number}: unknown role {role!r}", f"known: {', '.join(_ROLES)}")
        if not isinstance(train, bool | None):
            raise UserError(f"{column}, turn {number}: train is {train!r}", "use true or false")
        content = _text(turn[content_name], f"{column}, turn {number}: {content_name}")
        messages.append(Message(_ROLES[role], content, train is not False))
    if messages and messages[0].role == "system" and not messages[0].content:
        del messages[0]
    return messages


def check_turns(messages: list[Message]) -> None:
    """Raises UnusableError where a conversation teaches nothing, and says why."""
    turns = messages[1:] if messages and messages[0].role == "system" else messages
    if not turns:
        raise UnusableError("no turns", "give a question and a reply")
    if turns[-1].role != "assistant":
        raise UnusableError("the last turn is not the assistant's", "remove what follows the last reply")
    if [turn.role for turn in turns] != ["user", "assistant"] * (len(turns) // 2):
        hint = "after an optional system message, user and assistant take turns, and user begins"
        raise UnusableError("the turns do not alternate", hint)
    for turn in turns:
        if not turn.content.strip():
            raise UnusableError("empty reply" if turn.role == "assistant" else "empty question")


def to_json(messages: Sequence[Message]) -> str:
    """A conversation on one line, for `from_json`. Equal conversations, and only they, give equal strings."""
    return json.dumps([[m.role, m.content, m.train, m.input] for m in messages], ensure_ascii=False)


def from_json(text: str) -> list[Message]:
    """What `to_json` was given."""
    return [Message(*message) for message in json.loads(text)]


def question_key(messages: Sequence[Message]) -> str:
    """What decides on which side of the validation split a conversation goes: all of it up to its first reply, so that
    no conversation lies on the other side of one that it goes on from."""
    question = messages[: [message.role for message in messages].index("assistant")]
    if len(question) == 1:
        return json.dumps([question[0].content, question[0].input], ensure_ascii=False)
    return json.dumps([[turn.role, turn.content, turn.input] for turn in question], ensure_ascii=False)


# --- templates -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Template:
    """A prompt in two forms; the reply follows it directly.

    They are published for one question. A further one follows the stop token of the reply before it, as the same prompt
    without what stands in front of its first heading.
    """

    with_input: str
    without_input: str

    def prompt(self, instruction: str, input: str = "", first: bool = True) -> str:
        form = self.with_input if input else self.without_input
        if not first:
            form = form[form.index("\n\n### ") :]
        # not str.format: braces in the user's text stay what they are, and are never filled in themselves
        head, tail = form.split("{instruction}")
        return head + instruction + tail.replace("{input}", input)

    def segments(self, messages: Sequence[Message]) -> list[Segment]:
        """The conversation as prompts and replies.

        Raises:
            UserError: A system message, for which no form of this template is known.
        """
        if messages[0].role == "system":
            raise UserError(
                "the template has no place for a system message", "choose another template, or remove that message"
            )
        return [
            Segment(turn.content, True, turn.train)
            if turn.role == "assistant"
            else Segment(self.prompt(turn.content, turn.input, first=index == 0), False, turn.train)
            for index, turn in enumerate(messages)
        ]

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


# --- ids and mask ----------------------------------------------------------------------------------------------------


def encode_conversations(
    conversations: Sequence[Sequence[Message]],
    template: Template,
    encode: Callable[[list[str]], Sequence],
    bos: list[int],
    eos: int,
    train_on: str,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Ids and supervision mask of each conversation, by one call of `encode` for all.

    Args:
        conversations: Of `messages_of`.
        template: Of `find_template`.
        encode: Texts to ids, no special tokens added.
        bos: Ids before the first prompt ([] or [bos]).
        eos: The stop token, which follows every reply and is supervised where the reply is.
        train_on: "responses", "last_response" or "everything" (bos and prompts too). What a message with `train: false`
            adds is never supervised.

    Returns:
        ids (tokens,) int64 and mask (tokens,) uint8 of each.

    Raises:
        UserError: As of `Template.segments`, by which a caller finds out beforehand.
    """
    rendered = [template.segments(messages) for messages in conversations]
    encoded = iter(encode([segment.text for segment in chain.from_iterable(rendered)]))
    results = []
    for segments in rendered:
        parts = [np.array(bos, np.int64)]
        flags = [train_on == "everything"]
        for index, (segment, own) in enumerate(zip(segments, islice(encoded, len(segments)), strict=True)):
            last = index == len(segments) - 1
            chosen = {"responses": segment.reply, "last_response": last, "everything": True}[train_on]
            parts.append(np.append(own, eos) if segment.reply else np.asarray(own))
            flags.append(segment.train and chosen)
        ids = np.concatenate(parts).astype(np.int64)
        results.append((ids, np.repeat(np.array(flags, np.uint8), [len(part) for part in parts])))
    return results

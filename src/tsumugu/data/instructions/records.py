"""Supervised records of every usual form become conversations, which are kept as JSON until they are encoded."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from tsumugu.errors import UserError
from tsumugu.tokenizer.load import check_unicode

# The columns that make up a record, by form. Where a record has several forms, the caller's `fields` say which counts.
_FORMS = (("messages",), ("conversations",), ("instruction", "output"), ("prompt", "response"))
FIELDS = ("instruction", "input", "output", "prompt", "response", "messages", "conversations", "system")

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


def columns_for(fields: dict[str, str]) -> list[str]:
    """The columns that records of any form may need.

    Args:
        fields: Names of FIELDS to the columns that are called otherwise.
    """
    return [fields.get(field, field) for field in FIELDS]


def messages_of(values: dict, fields: dict[str, str]) -> list[Message]:
    """The conversation in one record: an optional system message, then user and assistant in turn.

    Forms: instruction, input (may be absent or null) and output; prompt and response; messages (a list of role, content
    and, if some are not to be learned, `train: false` or `weight: 0`); ShareGPT's conversations (a list of from and
    value). Beside each, system (may be absent or null) is a system message. A turn's reasoning_content goes in front of
    its content, between <think> and </think>.

    Args:
        values: Columns to values.
        fields: As of `columns_for`.

    Raises:
        UserError: What is wrong with the record, without its place. What many records of a corpus have (`empty reply`,
            `empty question`, `unclosed <think>`, `the last turn is not the assistant's`, `the turns do not alternate`)
            is an UnusableError, to be counted.
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
    column = fields.get("system", "system")
    if "system" in fields and column not in values:
        raise UserError(f"no column {column}", f"it has: {', '.join(map(str, values))}")
    if system := _text(values.get(column), column):
        if messages and messages[0].role == "system":
            raise UserError(f"both {column} and the first turn are system messages", "keep one of them")
        messages = [Message("system", system), *messages]
    check_turns(messages)
    return messages


def prompt_of(record: object) -> list[Message]:
    """The conversation in a record up to a reply that is to be generated; one that the record ends with is left out.

    Forms: as of `messages_of`, replies being optional; the short ones may have `system` too.

    Raises:
        UserError: What is wrong with the record, without its place.
    """
    if not isinstance(record, dict):
        raise UserError("no object", 'each line holds one, such as {"instruction": "…"}')
    listed = {"messages": ("role", "content"), "conversations": ("from", "value")}
    column = next((name for name in (*listed, "instruction", "prompt") if record.get(name) is not None), None)
    if column is None:
        raise UserError("no prompt: its columns are none of messages, conversations, instruction, prompt", "name one")
    if column in listed:
        messages = _turns(record[column], column, *listed[column])
        messages = messages[:-1] if messages and messages[-1].role == "assistant" else messages
    else:
        input = _text(record.get("input"), "input") if column == "instruction" else ""
        messages = [Message("user", _text(record[column], column), input=input)]
        if system := _text(record.get("system"), "system"):
            messages.insert(0, Message("system", system))
    turns = messages[1:] if messages and messages[0].role == "system" else messages
    if len(turns) % 2 == 0 or [turn.role for turn in turns] != (["user", "assistant"] * len(turns))[: len(turns)]:
        raise UserError("the turns do not alternate", "user and assistant take turns, and user begins and ends")
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
        role, train, weight = turn[role_name], turn.get("train"), turn.get("weight")
        if not isinstance(role, str) or role not in _ROLES:
            raise UserError(f"{column}, turn {number}: unknown role {role!r}", f"known: {', '.join(_ROLES)}")
        if not isinstance(train, bool | None):
            raise UserError(f"{column}, turn {number}: train is {train!r}", "use true or false")
        if weight not in (None, 0, 1):
            raise UserError(f"{column}, turn {number}: weight is {weight!r}", "use 0 (not learned) or 1")
        content = _text(turn[content_name], f"{column}, turn {number}: {content_name}")
        thoughts = _text(turn.get("reasoning_content"), f"{column}, turn {number}: reasoning_content")
        if thoughts and _ROLES[role] == "assistant":
            content = f"<think>\n{thoughts}\n</think>\n\n{content}" if content.strip() else ""
        messages.append(Message(_ROLES[role], content, train is not False and weight != 0))
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
        if turn.role == "user":
            if not turn.content.strip():
                raise UnusableError("empty question")
            continue
        thinks = turn.content.lstrip().startswith("<think>")
        if thinks and turn.content.rfind("</think>") < turn.content.rfind("<think>"):
            raise UnusableError("unclosed <think>", "close the reply's thoughts and give what follows them")
        if not split_thoughts(turn.content)[1].strip():
            raise UnusableError("empty reply")


def split_thoughts(content: str) -> tuple[str, str]:
    """What stands between <think> and </think> in a reply, and what follows, as Qwen3's published template reads it."""
    if "</think>" not in content:
        return "", content
    parts = content.split("</think>")
    return parts[0].split("<think>")[-1].strip("\n"), parts[-1].lstrip("\n")


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

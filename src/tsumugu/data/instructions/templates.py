"""Prompt templates: conversations to pieces of text, each supervised or not, and the same as a Jinja chat template.

A template is data: forms with places for the user's text. What a user's text holds is never read as a form, and never
becomes a special token. The published forms that are built in are named where they stand.
"""

import dataclasses
import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from tsumugu.data.instructions.records import Message, split_thoughts
from tsumugu.errors import UserError

if TYPE_CHECKING:
    from tsumugu.data.instructions.chat import ChatTemplate

EOS = "eos"  # as a stop token: the tokenizer's own end-of-text token, whatever it is called

_PLACES = ("system", "instruction", "input", "content")
_PLACE = re.compile(rf"\{{({'|'.join(_PLACES)})\}}")


@dataclass(frozen=True)
class Segment:
    """A piece of a rendered conversation.

    Attributes:
        text: Text; or, if `special`, the content of one special token, or EOS.
        reply: Whether it is what the assistant says: a reply as it would be generated, or the stop token behind it.
            What the assistant said before is part of the prompt where a template shows it in another form.
        train: Whether it may be supervised, as its message says.
        turn: Which message it belongs to.
        special: Whether it is one special token.
    """

    text: str
    reply: bool
    train: bool
    turn: int = 0
    special: bool = False


@dataclass(frozen=True, kw_only=True)
class Template:
    """The forms of a conversation. The fields are also the keys of a template of one's own, a YAML file.

    `{instruction}` and `{input}` stand for the two parts of a user's message, `{content}` for a system message. A bos
    token is no part of a template: prepare.add_bos sets it.

    Attributes:
        without_input: A user's message, with {instruction}; with {system} where the system message stands inside it.
        with_input: The same with {input}; by default the input follows the instruction after an empty line.
        next_without_input, next_with_input: The same for further messages; by default as the first.
        system: A system message, with {content}, in front of the first message; by default there is no place for one.
        default_system: The content where a conversation has no system message; "" for none.
        assistant: What stands between a user's message and the reply.
        stop: The token behind a reply, at which generation stops: eos, or one of `special_tokens`.
        after_stop: What follows it; never supervised with train_on responses.
        special_tokens: Tokens in these forms that must be special tokens of the tokenizer, one id each.
        text_tokens: Strings that must be one id each, and may be found in text.
        newline: What newlines in messages become.
        strip: Whether messages lose white space at both ends.
        reply_apart: Whether a reply is encoded as a text for itself (alpaca, since ever), with the space that some
            tokenizers put in front of every text; else as what follows the prompt.
        earlier_replies: How replies before the last one are shown: as_generated; without_stop (rinna); without_thoughts
            (what stands between <think> and </think> is left out, and the last reply always has it, if empty). Where
            they are not shown as they are generated they are no longer replies, but part of the prompt.
        several_turns: yes; no (refused); trained (may be trained on, but the published form knows one question only,
            and so does the exported chat template).
    """

    without_input: str
    with_input: str = ""
    next_without_input: str = ""
    next_with_input: str = ""
    system: str | None = None
    default_system: str = ""
    assistant: str = ""
    stop: str = EOS
    after_stop: str = ""
    special_tokens: tuple[str, ...] = ()
    text_tokens: tuple[str, ...] = ()
    newline: str = "\n"
    strip: bool = False
    reply_apart: bool = False
    earlier_replies: Literal["as_generated", "without_stop", "without_thoughts"] = "as_generated"
    several_turns: Literal["yes", "trained", "no"] = "yes"

    def segments(self, messages: Sequence[Message]) -> list[Segment]:
        """The conversation as pieces; one that ends with the user's message is a prompt, up to where the reply begins.

        Raises:
            UserError: A system message or several turns, for which this template has no form.
        """
        system, turns = self.default_system, messages
        if messages[0].role == "system":
            if self.system is None:
                raise UserError(
                    "the template has no place for a system message", "choose another template, or remove that message"
                )
            system, turns = messages[0].content, messages[1:]
        if self.several_turns == "no" and len(turns) > 2:
            raise UserError("the template is for one question and one reply", "choose another template")
        offset = len(messages) - len(turns)
        segments: list[Segment] = []

        def add(pieces: Iterable[tuple[str, bool]], turn: int, train: bool, reply: bool = False) -> None:
            segments.extend(Segment(text, reply, train, turn, special) for text, special in pieces if text)

        shown = list(self._filled(self.system or "", content=self._system_text(system))) if system else []
        if not self._system_inside:
            add(shown, 0, messages[0].train)
        for index, turn in enumerate(turns):
            if turn.role == "user":
                first = index == 0
                # a message with the system message inside it is to be learned where both of them are
                add(
                    self._user(turn, shown if first else (), first),
                    index + offset,
                    turn.train and (not first or messages[0].train),
                )
                add(
                    self._filled(self.assistant),
                    index + offset + 1,
                    turns[index + 1].train if turns[index + 1 :] else True,
                )
                continue
            last = index == len(turns) - 1
            generated = last or self.earlier_replies == "as_generated"
            add([(self._reply_text(turn.content, last), False)], index + offset, turn.train, generated)
            if generated or self.earlier_replies != "without_stop":
                add([(self.stop, True)], index + offset, turn.train, generated)
            add(self._filled(self.after_stop), index + offset, turn.train)
        return segments

    @property
    def _system_inside(self) -> bool:
        return "{system}" in self.without_input

    def _text(self, text: str) -> str:
        return self._newlines(text.strip() if self.strip else text)

    def _system_text(self, text: str) -> str:
        return self._newlines(text) if self._system_inside else self._text(text)

    def _newlines(self, text: str) -> str:
        return text.replace("\r\n", self.newline).replace("\n", self.newline) if self.newline != "\n" else text

    def _reply_text(self, content: str, last: bool) -> str:
        if self.earlier_replies == "without_thoughts":
            thoughts, content = split_thoughts(content)
            if last:
                content = f"<think>\n{thoughts}\n</think>\n\n{content.lstrip(chr(10))}"
        return self._text(content)

    def _user(self, turn: Message, system: Iterable[tuple[str, bool]], first: bool) -> Iterable[tuple[str, bool]]:
        form = self._form(bool(turn.input), first)
        instruction = turn.content
        if turn.input and "{input}" not in form:
            instruction = f"{turn.content}\n\n{turn.input}"
        yield from self._filled(form, system, instruction=self._text(instruction), input=self._text(turn.input))

    def _form(self, with_input: bool, first: bool) -> str:
        forms = [self.without_input] if first else [self.next_without_input, self.without_input]
        if with_input:
            forms = [*([] if first else [self.next_with_input]), self.with_input, *forms]
        return next(filter(None, forms))

    def _filled(self, form: str, system: Iterable[tuple[str, bool]] = (), **values: str) -> Iterable[tuple[str, bool]]:
        """The pieces (text, whether it is a special token) of a form; only what the form itself spells is special."""
        # one pass: braces and tokens in the user's text stay what they are, and are never filled in themselves
        text = ""
        for index, part in enumerate(_PLACE.split(form)):
            if index % 2 and part == "system":
                pieces = system
            elif index % 2:
                pieces = [(values[part], False)] if part in values else [(f"{{{part}}}", False)]
            else:
                pieces = cut(part, self.special_tokens)
            for piece, special in pieces:
                if not special:
                    text += piece
                    continue
                yield text, False
                yield piece, True
                text = ""
        yield text, False

    # --- Jinja ---

    def chat_template(self) -> str:
        """The same as a Jinja chat template, without bos; what is supervised stands between generation markers."""
        messages = [
            "{%- set turns = messages -%}",
            "{%- set system = " + repr(self.default_system) + " -%}",
        ]
        if self.several_turns != "yes":
            messages.append(
                "{%- if messages | length > 2 or messages[0]['role'] != 'user' -%}"
                "{{ raise_exception('This model was trained on single questions: one user message, one reply') }}"
                "{%- endif -%}"
            )
        elif self.system is None:
            messages.append(
                "{%- if messages[0]['role'] == 'system' -%}"
                "{{ raise_exception('This model was trained without a system message') }}"
                "{%- endif -%}"
            )
        else:
            text = self._jinja_text("messages[0]['content']", self.strip and not self._system_inside)
            messages.append(
                "{%- if messages[0]['role'] == 'system' -%}"
                f"{{%- set system = {text} -%}}{{%- set turns = messages[1:] -%}}"
                "{%- endif -%}"
            )
            if not self._system_inside:
                messages.append("{%- if system -%}{{- " + _jinja(self.system, content="system") + " -}}{%- endif -%}")
        inside = f"({_jinja(self.system or '', content='system')} if system else '')"
        first = _jinja(self._form(False, True), system=inside, instruction="content")
        further = _jinja(self._form(False, False), system="''", instruction="content")
        reply = "content"
        if self.earlier_replies == "without_thoughts":
            reply = r"'<think>\n' + thoughts + '\n</think>\n\n' + content.lstrip('\n')"
        stop = "eos_token" if self.stop == EOS else repr(self.stop)
        after = _output(repr(self.after_stop)) if self.after_stop else ""
        header = _output(repr(self.assistant)) if self.assistant else ""
        generated = f"{{%- generation -%}}{{{{- {self._jinja_text(reply)} + {stop} -}}}}{{%- endgeneration -%}}{after}"
        if self.earlier_replies == "as_generated":
            shown = generated
        else:
            earlier = self._jinja_text("content") + (f" + {stop}" if self.earlier_replies != "without_stop" else "")
            shown = f"{{%- if loop.last -%}}{generated}{{%- else -%}}{_output(earlier)}{after}{{%- endif -%}}"
        return "".join(
            [
                *messages,
                "{%- for message in turns -%}",
                "{%- if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}",
                "{{ raise_exception('user and assistant must take turns, and user begins') }}",
                "{%- endif -%}",
                "{%- set content = message['content'] -%}",
                "{%- if message['role'] == 'user' -%}",
                f"{{%- set content = {self._jinja_text('content')} -%}}",
                f"{{%- if loop.first -%}}{_output(first)}{{%- else -%}}{_output(further)}{{%- endif -%}}",
                "{%- else -%}",
                self._jinja_thoughts(),
                header,
                shown,
                "{%- endif -%}",
                "{%- endfor -%}",
                f"{{%- if add_generation_prompt -%}}{header}{{%- endif -%}}" if header else "",
            ]
        )

    def _jinja_text(self, expression: str, strip: bool | None = None) -> str:
        if self.strip if strip is None else strip:
            expression = f"({expression}) | trim"
        if self.newline != "\n":
            expression = rf"({expression}).replace('\r\n', {self.newline!r}).replace('\n', {self.newline!r})"
        return f"({expression})"

    def _jinja_thoughts(self) -> str:
        """As `split_thoughts`; a message may also have its thoughts in reasoning_content."""
        if self.earlier_replies != "without_thoughts":
            return ""
        return (
            "{%- set thoughts = '' -%}"
            "{%- if message['reasoning_content'] is string -%}"
            r"{%- set thoughts = message['reasoning_content'].strip('\n') -%}"
            "{%- elif '</think>' in content -%}"
            r"{%- set thoughts = content.split('</think>')[0].split('<think>')[-1].strip('\n') -%}"
            r"{%- set content = content.split('</think>')[-1].lstrip('\n') -%}"
            "{%- endif -%}"
        )


def cut(text: str, tokens: Sequence[str]) -> list[tuple[str, bool]]:
    """Text and the tokens spelt in it, in turn, the longest of those that begin first: (text, whether a token)."""
    if not tokens:
        return [(text, False)]
    pattern = "|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))
    return [(part, index % 2 == 1) for index, part in enumerate(re.split(f"({pattern})", text)) if part]


def _output(expression: str) -> str:
    return f"{{{{- {expression} -}}}}"


def _jinja(form: str | None, **expressions: str) -> str:
    """A form as a Jinja expression."""
    parts = _PLACE.split(form or "")
    return " + ".join(
        expressions.get(part, repr(f"{{{part}}}")) if index % 2 else repr(part)
        for index, part in enumerate(parts)
        if part
    )


# --- the built-in ones -----------------------------------------------------------------------------------------------


def _alpaca(first: str, first_with_input: str, turn: str, turn_with_input: str) -> Template:
    """They are published for one question. A further one follows the stop token of the reply before it, as the same
    prompt without what stands in front of its first heading."""
    return Template(
        without_input=first + turn,
        with_input=first_with_input + turn_with_input,
        next_without_input=turn,
        next_with_input=turn_with_input,
        several_turns="trained",
        reply_apart=True,
    )


def _chatml(**changes) -> Template:
    """ChatML as OpenAI described it (2023) and as most open models have it since."""
    return Template(
        system="<|im_start|>system\n{content}<|im_end|>\n",
        without_input="<|im_start|>user\n{instruction}<|im_end|>\n",
        assistant="<|im_start|>assistant\n",
        stop="<|im_end|>",
        after_stop="\n",
        special_tokens=("<|im_start|>", "<|im_end|>"),
        **changes,
    )


TEMPLATES = {
    # The Alpaca prompt as published with Stanford Alpaca (2023), and its Japanese form as Japanese models use it since.
    "alpaca-en": _alpaca(
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.",
        "\n\n### Instruction:\n{instruction}\n\n### Response:",
        "\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:",
    ),
    "alpaca-ja": _alpaca(
        "以下は、タスクを説明する指示です。要求を適切に満たす応答を書きなさい。",
        "以下は、タスクを説明する指示と、文脈のある入力の組み合わせです。要求を適切に満たす応答を書きなさい。",
        "\n\n### 指示:\n{instruction}\n\n### 応答:",
        "\n\n### 指示:\n{instruction}\n\n### 入力:\n{input}\n\n### 応答:",
    ),
    # Nothing but the two texts; nothing would tell a further question from the answer before it.
    "plain": Template(without_input="{instruction}", several_turns="no"),
    # The model cards of rinna/japanese-gpt-neox-3.6b-instruction-*: utterances joined by <NL>, which also stands for
    # newlines in them; earlier replies of the system carry no stop token.
    "rinna": Template(
        without_input="ユーザー: {instruction}<NL>",
        next_without_input="<NL>ユーザー: {instruction}<NL>",
        assistant="システム: ",
        text_tokens=("<NL>",),
        newline="<NL>",
        earlier_replies="without_stop",
    ),
    # llm-jp-3 instruct models' chat template: it shows one system text, whatever the system message is, and their cards
    # always give that. Here it is the default, and another one is shown as it is.
    "llm-jp": Template(
        system="{content}",
        default_system="以下は、タスクを説明する指示です。要求を適切に満たす応答を書きなさい。",
        without_input="\n\n### 指示:\n{instruction}",
        assistant="\n\n### 応答:\n",
    ),
    "chatml": _chatml(),
    # Qwen3's chat template (2025) without tools: thoughts stand in front of the last reply, if empty, and are left out
    # of earlier ones.
    "qwen3": _chatml(earlier_replies="without_thoughts", text_tokens=("<think>", "</think>")),
    # Meta's Llama 3 prompt format (2024): messages are stripped; <|begin_of_text|> is the tokenizer's bos.
    "llama3": Template(
        system="<|start_header_id|>system<|end_header_id|>\n\n{content}<|eot_id|>",
        without_input="<|start_header_id|>user<|end_header_id|>\n\n{instruction}<|eot_id|>",
        assistant="<|start_header_id|>assistant<|end_header_id|>\n\n",
        stop="<|eot_id|>",
        special_tokens=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        strip=True,
    ),
    # Google's Gemma 3 chat template (2025): the system message opens the first message of the user.
    "gemma": Template(
        system="{content}\n\n",
        without_input="<start_of_turn>user\n{system}{instruction}<end_of_turn>\n",
        assistant="<start_of_turn>model\n",
        stop="<end_of_turn>",
        after_stop="\n",
        special_tokens=("<start_of_turn>", "<end_of_turn>"),
        strip=True,
    ),
}


def find_template(name: str | dict, tokenizer: Path | None = None) -> "Template | ChatTemplate":
    """A template.

    Args:
        name: Of a built-in one; a YAML file with the fields of `Template`; `chat` for the tokenizer's own chat
            template; or what `definition` gave.
        tokenizer: The tokenizer's folder, for `chat`.

    Raises:
        UserError: There is none, with the names of those that there are; or it cannot be used, and why.
    """
    from tsumugu.data.instructions.chat import ChatTemplate

    if isinstance(name, dict):
        return ChatTemplate(**name) if "jinja" in name else _from_keys(name, "the template of the model")
    if name in TEMPLATES:
        return TEMPLATES[name]
    if name == "chat" and tokenizer:
        return ChatTemplate.of(tokenizer)
    if name.endswith((".yaml", ".yml")):
        return _read(Path(name))
    raise UserError(f"no template {name}", f"known: {', '.join(TEMPLATES)}, chat, or a .yaml file of your own")


def definition(name: str, template: "Template | ChatTemplate") -> str | dict:
    """What `find_template` gives the same template for, wherever it is asked: the name of a built-in one, or all of
    it."""
    if name in TEMPLATES:
        return name
    keys = dataclasses.asdict(template)
    return {key: list(value) if isinstance(value, tuple) else value for key, value in keys.items()}


def jinja_of(template: "Template | ChatTemplate", add_bos: bool) -> str:
    """The chat template that goes with a tokenizer: what was trained, bos included."""
    return ("{{- bos_token -}}" if add_bos else "") + template.chat_template()


def _read(path: Path) -> Template:
    try:
        keys = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"template {path} cannot be read: {error}", "give a YAML file") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UserError(f"{where}: not YAML: {getattr(error, 'problem', error)}", "mend that line") from None
    if not isinstance(keys, dict):
        raise UserError(f"{path} holds no template", "write `without_input: ...` and other keys")
    return _from_keys(keys, str(path))


_CHOICES = {
    "earlier_replies": ("as_generated", "without_stop", "without_thoughts"),
    "several_turns": ("yes", "trained", "no"),
}


def _from_keys(keys: dict, place: str) -> Template:
    """A template from its fields, checked."""
    names = [field.name for field in dataclasses.fields(Template)]
    if unknown := [key for key in keys if key not in names]:
        near = difflib.get_close_matches(str(unknown[0]), names, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(names)}"
        raise UserError(f"{place}: unknown key {unknown[0]}", hint)
    if "without_input" not in keys:
        raise UserError(f"{place}: no without_input", "give the form of a user's message, with {instruction}")
    template = Template(**{key: _value(key, value, place) for key, value in keys.items()})
    for key in names:
        value = getattr(template, key)
        texts = value if isinstance(value, tuple) else [value] if isinstance(value, str) else []
        if any("\\n" in text for text in texts):
            raise UserError(f"{place}: {key} has a backslash and an n", "write it in double quotes for a newline")
        if texts and key not in _CHOICES and (value or key == "without_input"):
            _check_places(key, "".join(texts), place)
    if template.with_input and ("{system}" in template.with_input) != template._system_inside:
        raise UserError(
            f"{place}: of without_input and with_input only one has {{system}}", "the system message stands in both"
        )
    if template._system_inside and template.system is None:
        raise UserError(f"{place}: without_input has {{system}}, but there is no system", "give system: with {content}")
    if template.stop != EOS and template.stop not in template.special_tokens:
        raise UserError(f"{place}: stop {template.stop!r} is not in special_tokens", "list it there, or use eos")
    if template.default_system and template.system is None:
        raise UserError(f"{place}: default_system without system", "give system: with {content}")
    return template


# The places that a form must have, and those that it may have; other keys have none.
_PLACES_OF = {
    "without_input": (("instruction",), ("system",)),
    "with_input": (("instruction", "input"), ("system",)),
    "next_without_input": (("instruction",), ()),
    "next_with_input": (("instruction", "input"), ()),
    "system": (("content",), ()),
}


def _check_places(key: str, form: str, place: str) -> None:
    """Refuses a form in which a part of the conversation is missing, stands twice, or is none that it can have."""
    needed, further = _PLACES_OF.get(key, ((), ()))
    for name in needed:
        if form.count(f"{{{name}}}") != 1:
            raise UserError(f"{place}: {key} must have {{{name}}} once", f"it is {form!r}")
    found = re.findall(r"\{\s*\w+\s*\}", form)
    known = [f"{{{name}}}" for name in (*needed, *further)]
    if unknown := [word for word in found if word not in known] or [word for word in found if found.count(word) > 1]:
        hint = f"it may have {' and '.join(known)}, once" if known else "it is written as it stands"
        raise UserError(f"{place}: {key} has {unknown[0]}, for which nothing would be put there", hint)


def _value(key: str, value: Any, place: str) -> Any:
    if key == "several_turns" and isinstance(value, bool):  # what YAML makes of yes and no
        value = "yes" if value else "no"
    if key.endswith("_tokens"):
        if isinstance(value, list) and all(isinstance(token, str) and token for token in value):
            return tuple(value)
        right, wanted = False, "a list of tokens"
    elif key in _CHOICES:
        right, wanted = value in _CHOICES[key], " or ".join(_CHOICES[key])
    elif key in ("strip", "reply_apart"):
        right, wanted = isinstance(value, bool), "true or false"
    else:
        right, wanted = isinstance(value, str) or (key == "system" and value is None), "text, in quotes"
    if not right:
        raise UserError(f"{place}: {key} is {value!r}", f"give {wanted}")
    return value

"""Text from a model: an exported folder, or a checkpoint of a run, through stock transformers' own generation.

One prompt, a file of prompts, or a session of several turns. The ids of a prompt are those that it has in training, and
generation stops at the stop token of the template.
"""

import contextlib
import json
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from tsumugu.data.instructions import Message, find_template, prompt_ids, prompt_of
from tsumugu.data.instructions.encode import special_ids, stop_id
from tsumugu.data.instructions.templates import EOS
from tsumugu.errors import UserError
from tsumugu.export import merged_weights, read_origin
from tsumugu.model import adapter, build, lora
from tsumugu.model.build import quiet
from tsumugu.tokenizer.contract import read_contract
from tsumugu.tokenizer.load import check_unicode
from tsumugu.training import checkpoint

_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")  # SentencePiece's byte fallback
_CONTEXT = 16  # ids of a prompt that are decoded along with what follows it: more than one character has bytes
_SHORTEN = "shorten it"


@dataclass(frozen=True)
class Source:
    """A model that is yet to be loaded.

    Attributes:
        folder: A Hugging Face folder, one of adapters, or a run.
        step: Of a run.
        tokenizer: The folder of its tokenizer.
        origin: What is known about the training: `template` and `add_bos`, of a run and its exports also `step`.
    """

    folder: Path
    step: int | None
    tokenizer: Path
    origin: dict


def find_source(name: str, tokenizer: Path | None = None) -> Source:
    """What a name stands for.

    Args:
        name: A Hugging Face folder, one of adapters, RUN or RUN@STEP (the newest complete checkpoint).
        tokenizer: In place of the one in a Hugging Face folder.

    Raises:
        UserError: No model there.
    """
    folder = Path(name)
    if is_folder(folder):
        if not tokenizer and adapter.is_adapter(folder) and not (folder / "tokenizer_config.json").is_file():
            tokenizer = adapter.find_base(folder)  # other tools leave it there
        return Source(folder, None, tokenizer or folder, read_origin(folder))
    if not (folder / "checkpoints").is_dir() and "@" not in folder.name:
        raise UserError(f"{folder} holds no model", "give a run, or a folder that `tsumugu export` has made")
    run_dir, step = checkpoint.resolve(name)
    state = checkpoint.read_state(run_dir, step)
    origin = {"step": step, "template": state["template"], "add_bos": state["add_bos"]}
    return Source(run_dir, step, run_dir / "tokenizer", origin)


def is_folder(folder: Path) -> bool:
    """Whether this is a Hugging Face folder: of a model, or of adapters."""
    return (folder / "config.json").is_file() or adapter.is_adapter(folder)


def load_model(source: Source, dtype: str | None = None) -> PreTrainedModel:
    """A model for inference, on the GPU where there is one.

    Args:
        source: Of `find_source`.
        dtype: bfloat16, float16 or float32; None: as stored, which for a run is float32.

    Raises:
        UserError: A damaged model, or adapters without their base model.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if source.step is None:
        model: Any = load_folder(source.folder, source.origin, build.DTYPES[dtype] if dtype else None)
        return model.to(device)
    return _load_checkpoint(source.folder, source.step, dtype or "float32", device)


def load_folder(folder: Path, origin: dict, dtype: torch.dtype | None) -> PreTrainedModel:
    """The model of a Hugging Face folder, adapters merged into their base model, with its generation settings.

    Args:
        folder: Of a model or of adapters.
        origin: What the folder says of itself.
        dtype: None: as stored; of adapters, as their base model.

    Raises:
        UserError: It cannot be loaded, or its generation_config.json cannot, which transformers would not say.
    """
    try:
        with quiet():
            if adapter.is_adapter(folder):
                return _with_own_settings(adapter.load(folder, origin, dtype), folder, origin).eval()
            if (folder / "generation_config.json").exists():
                GenerationConfig.from_pretrained(folder)
            load: Any = AutoModelForCausalLM.from_pretrained
            options = {"trust_remote_code": False, "local_files_only": True, "dtype": dtype or "auto"}
            model, info = load(folder, **options, output_loading_info=True)
    except (OSError, ValueError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{folder} cannot be loaded: {reason}", "export or copy it anew") from None
    if missing := sorted(info["missing_keys"]):  # which transformers fills with random numbers
        raise UserError(f"{folder} lacks weights: {', '.join(missing[:3])}", "export or copy it anew")
    return model.eval()


def _with_own_settings(model: PreTrainedModel, folder: Path, origin: dict) -> PreTrainedModel:
    """A base model with the generation settings of its adapters' tokenizer, where it is one of ours."""
    if (folder / "contract.json").is_file():
        contract = read_contract(folder)
        build.take_special_ids(model.config, contract)
        template = find_template(origin["template"], folder) if origin.get("template") else None
        own = stop_id(template, folder) if template else None
        model.generation_config = build.generation_config(model.config, contract, [] if own is None else [own])
    return model


def _load_checkpoint(run_dir: Path, step: int, dtype: str, device: str) -> PreTrainedModel:
    path = checkpoint.folder(run_dir, step)
    checkpoint.check(path)
    state = checkpoint.read_state(run_dir, step)

    def fill(model: PreTrainedModel) -> None:
        build.rebuild_buffers(model)
        tied = build.tied_names(model)
        _load_weights({name: tensor for name, tensor in model.state_dict().items() if name not in tied}, path)

    return model_of_run(run_dir, path, state, dtype, device, fill).eval()


def model_of_run(
    run_dir: Path,
    path: Path,
    state: dict,
    dtype: str,
    device: torch.device | str,
    fill: Callable[[PreTrainedModel], None],
) -> PreTrainedModel:
    """The whole model of a checkpoint on one device, adapters merged, with the generation settings of its export.

    Args:
        run_dir: The run folder.
        path: The checkpoint.
        state: Of the checkpoint.
        dtype: bfloat16, float16, float32 or float64.
        device: Where it will be.
        fill: Sets the weights, of a run without adapters.
    """
    tokenizer = run_dir / "tokenizer"
    contract, config = read_contract(tokenizer), build.read_config(str(run_dir / "model"))
    build.take_special_ids(config, contract)
    model = build.meta_model(config, build.DTYPES[dtype])
    model.to_empty(device=device)
    model.tie_weights()
    if state.get("lora"):
        lora.check_installed()
        build.rebuild_buffers(model)
        read, tied = merged_weights(config, lora.Adapters(**state["lora"]), path, dtype), build.tied_names(model)
        for name, tensor in model.state_dict().items():
            if name not in tied:
                tensor.copy_(read(name))
    else:
        fill(model)
    model.tie_weights()
    template = find_template(state["template"], tokenizer) if state["template"] else None
    stop = stop_id(template, tokenizer) if template else None
    model.generation_config = build.generation_config(config, contract, [] if stop is None else [stop])
    return model


def _load_weights(tensors: dict[str, torch.Tensor], path: Path) -> None:
    stored = checkpoint.read_metadata(path).state_dict_metadata
    if missing := sorted(name for name in tensors if f"model.{name}" not in stored):
        raise UserError(
            f"{path}: its weights are not those of its configuration: it lacks {', '.join(missing[:3])}",
            "use the transformers version that it was trained with",
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as asked for, by no_dist
        checkpoint.load({"model": tensors}, path)


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How ids are chosen, by the names of transformers' GenerationConfig; None: as the model's own says, or else as
    transformers does. Greedy by default.

    Raises:
        UserError: A value that cannot be, or that would have no effect.
    """

    max_new_tokens: int = 128
    do_sample: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    num_beams: int | None = None

    def __post_init__(self):
        for name, least in (("max_new_tokens", 1), ("num_beams", 1), ("top_k", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{_flag(name)} is {value}", f"use {least} or more")
        for name, most in (("temperature", None), ("top_p", 1), ("repetition_penalty", None)):
            value = getattr(self, name)
            if value is not None and not (value > 0 and (most is None or value <= most)):
                raise UserError(f"{_flag(name)} is {value}", "use more than 0" + (f", up to {most}" if most else ""))
        unused = [name for name in ("temperature", "top_p", "top_k") if getattr(self, name) is not None]
        if unused and not self.do_sample:
            raise UserError(f"{_flag(unused[0])} has no effect on greedy decoding", "add --do-sample")

    def arguments(self) -> dict[str, Any]:
        """For `generate` of transformers, but for the number of tokens."""
        chosen = ("temperature", "top_p", "top_k", "repetition_penalty", "num_beams")
        given = {name: getattr(self, name) for name in chosen if getattr(self, name) is not None}
        # what a model's own generation_config says about sampling would be warned of
        neutral = {} if self.do_sample else {"temperature": 1.0, "top_p": 1.0, "top_k": 50}
        return {"do_sample": self.do_sample, **neutral, **given}


@dataclass(frozen=True)
class Reply:
    """Text, and whether it ended by itself."""

    text: str
    stopped: bool


class Prompts:
    """The tokenizer of a model and the template of its prompts: what they become, before the model itself is loaded.

    Args:
        name: As of `find_source`.
        template: What `find_template` takes, "none", or None for the template that the model was trained with.
        tokenizer: As of `find_source`.

    Raises:
        UserError: No model there, no tokenizer that can be read, or no template of that name.
    """

    def __init__(self, name: Path | str, template: str | None = None, tokenizer: Path | None = None):
        self.source = find_source(str(name), tokenizer)
        folder, origin = self.source.tokenizer, self.source.origin
        self.tokenizer: Any
        try:
            with quiet():
                self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{folder} cannot be loaded: {reason}", "export it anew") from None
        known = template or origin.get("template")
        self.template = find_template(known, folder) if known and known != "none" else None
        self.add_bos: bool | None = origin.get("add_bos")  # None: as the tokenizer itself does
        self.specials: dict[str, int] = {}
        if self.template:
            self.specials = {EOS: self.tokenizer.eos_token_id, **special_ids(folder)}
            if missing := [t for t in getattr(self.template, "special_tokens", ()) if t not in self.specials]:
                raise UserError(f"{name} lacks {' '.join(missing)} of the template", "choose another --template")

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """The ids that a conversation, up to where the reply begins, has in training: special tokens spelt in it are
        text, and no eos follows it.

        Raises:
            UserError: Several messages or an input, and no template; text that is none; nothing at all.
        """
        whats = {"system": "the system message", "user": "the prompt", "assistant": "a reply"}
        for message in messages:
            check_unicode(message.content, whats[message.role])
            check_unicode(message.input, "the input")
        bos = [self.tokenizer.bos_token_id] if self.add_bos else []
        if self.template:
            own = [self.tokenizer.bos_token_id]
            by_tokenizer = self.add_bos is None and self.tokenizer("あ")["input_ids"][:1] == own
            ids = prompt_ids(messages, self.template, self._ids, [], self.specials)
            if by_tokenizer and getattr(self.template, "jinja", None) is None and ids[:1] != own:
                bos = own
            return [*bos, *ids]
        extra = {"an input": messages[-1].input, "a system message": messages[0].role == "system"}
        extra["a conversation"] = len(messages) > 1
        for what in (what for what, there in extra.items() if there):
            raise UserError(f"{what} is given, but no prompt template", "name one with --template")
        text = messages[0].content
        ids = self.tokenizer(text, add_special_tokens=self.add_bos is None, split_special_tokens=True)["input_ids"]
        if not [*bos, *ids]:
            raise UserError("the prompt is empty", "give some text to continue")
        return [*bos, *ids]

    def read(self, path: Path, positions: int | None, system: str = "") -> list[tuple[Any, list[int]]]:
        """The prompts of a file, as they stand there and as ids.

        Args:
            path, system: As of `read_prompts`.
            positions: How many the model has; None: no limit.

        Raises:
            UserError: As of `read_prompts`, or a prompt that cannot be used, by its place.
        """
        encoded = []
        for number, (record, messages) in enumerate(read_prompts(path, system), start=1):
            try:
                ids = self.encode(messages)
                _check_room(ids, positions)
            except UserError as error:
                raise UserError(f"{path}, prompt {number}: {error.message}", error.hint) from None
            encoded.append((record, ids))
        return encoded

    def _encode(self, prompt: str, input: str = "", system: str = "") -> list[int]:
        return self.encode(conversation(prompt, input, system))

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return [self.tokenizer(t, add_special_tokens=False, split_special_tokens=True)["input_ids"] for t in texts]


class Generator(Prompts):
    """A loaded model and the template of its prompts.

    Args:
        name, template, tokenizer: As of `Prompts`.
        dtype: As of `load_model`.

    Raises:
        UserError: No model there that can be read, or no template of that name.
    """

    def __init__(
        self,
        name: Path | str,
        template: str | None = None,
        dtype: str | None = None,
        tokenizer: Path | None = None,
    ):
        super().__init__(name, template, tokenizer)
        self.model: Any = load_model(self.source, dtype)
        self.stop_ids = _ids(self.model.generation_config.eos_token_id)
        own = stop_id(self.template, self.source.tokenizer) if self.template else None
        self.stop_ids += [own] if own is not None and own not in self.stop_ids else []

    @property
    def positions(self) -> int | None:
        """How many the model has."""
        return getattr(self.model.config, "max_position_embeddings", None)

    def generate(self, prompt: str, input: str = "", max_new_tokens: int = 128, system: str = "") -> tuple[str, bool]:
        """The greedy continuation of a prompt (with a template: the reply), and whether it ended by itself."""
        reply = self.reply(self._encode(prompt, input, system), Decoding(max_new_tokens=max_new_tokens))
        return reply.text, reply.stopped

    def reply(self, ids: list[int], decoding: Decoding, write: Callable[[str], None] | None = None) -> Reply:
        """What follows the ids of a prompt.

        Args:
            ids: Of `encode`.
            decoding: How ids are chosen.
            write: Is given the text piece by piece as it comes (by beams: at the end), whole characters only. The
                pieces together are the reply.
        """
        (reply,) = self._replies([ids], decoding, write)
        return reply

    def replies(self, prompts: Sequence[list[int]], decoding: Decoding, batch_size: int = 1) -> Iterator[Reply]:
        """What follows each of several prompts, in their order; padded on the left, so that it is the same as alone.

        (In float32, that is: in bfloat16, two ids that are all but equally likely may change places.)
        """
        for row in prompts:
            _check_room(row, self.positions)
        if self.model.generation_config.no_repeat_ngram_size:
            batch_size = 1  # padding would count as n-grams
        waiting: list[list[int]] = []
        for row in prompts:
            whole = self._room(row) >= decoding.max_new_tokens
            if waiting and (not whole or len(waiting) == batch_size):
                yield from self._replies(waiting, decoding)
                waiting = []
            if whole:
                waiting.append(row)
            else:  # it has room for fewer tokens than others
                yield from self._replies([row], decoding)
        if waiting:
            yield from self._replies(waiting, decoding)

    @torch.no_grad()
    def _replies(
        self, batch: list[list[int]], decoding: Decoding, write: Callable[[str], None] | None = None
    ) -> list[Reply]:
        for row in batch:
            _check_room(row, self.positions)
        width = max(map(len, batch))
        # A row is padded with its own first id, which a repetition penalty sees anyway.
        padded = [[row[0]] * (width - len(row)) + row for row in batch]
        mask = [[0] * (width - len(row)) + [1] * len(row) for row in batch]
        contexts = [[] if self.template else row[-_CONTEXT:] for row in batch]
        streams = write and (decoding.num_beams or self.model.generation_config.num_beams or 1) == 1
        stream = _Stream(self, contexts[0], write) if write and streams else None
        pad_id = self.model.generation_config.pad_token_id
        output = self.model.generate(
            torch.tensor(padded, device=self.model.device),
            attention_mask=torch.tensor(mask, device=self.model.device),
            max_new_tokens=min(decoding.max_new_tokens, *map(self._room, batch)),
            eos_token_id=self.stop_ids or None,
            pad_token_id=pad_id if pad_id is not None else self.stop_ids[0] if self.stop_ids else 0,
            streamer=stream,
            **decoding.arguments(),
        )
        replies = []
        for ids, context in zip(output[:, width:].tolist(), contexts, strict=True):
            end = next((place for place, id in enumerate(ids) if id in self.stop_ids), None)
            replies.append(Reply(self.text(ids[:end], context), end is not None))
        if write and not stream:
            write(replies[0].text)
        return replies

    def text(self, ids: list[int], context: list[int]) -> str:
        """The text that ids add to that of the ids before them: after text, a tokenizer that begins every text with a
        space means the spaces that it writes."""
        before, whole = (self._decode(ids) for ids in (context, [*context, *ids]))
        text = whole[len(before) :] if whole.startswith(before) else self._decode(ids)
        return text.replace(self.newline, "\n")

    @property
    def newline(self) -> str:
        """What stands for a newline in the template."""
        return getattr(self.template, "newline", "\n")

    @property
    def remembers(self) -> bool:
        """Whether there is a form for several turns."""
        return self.template is not None and getattr(self.template, "several_turns", "yes") != "no"

    def is_byte(self, id: int) -> bool:
        """Whether an id is one byte of a character."""
        return bool(_BYTE_PIECE.fullmatch(self.tokenizer.convert_ids_to_tokens(id) or ""))

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _room(self, ids: list[int]) -> int:
        return self.positions - len(ids) if self.positions else 2**31


class _Stream(BaseStreamer):
    """Writes a reply while it is generated, holding back what the next id may still change: bytes of a character, and
    the beginning of what stands for a newline."""

    def __init__(self, generator: Generator, context: list[int], write: Callable[[str], None]):
        self.generator, self.context, self.write = generator, context, write
        self.ids: list[int] | None = None
        self.written = ""

    def put(self, value: torch.Tensor) -> None:
        if self.ids is None:  # the prompt
            self.ids = []
            return
        self.ids += [id for id in value.tolist() if id not in self.generator.stop_ids]
        # a run of bytes is decoded as one: a later one may spoil those before it
        if self.ids and not self.generator.is_byte(self.ids[-1]):
            text = self.generator.text(self.ids, self.context).rstrip("\ufffd")
            newline = self.generator.newline
            held = next((n for n in range(len(newline) - 1, 0, -1) if text.endswith(newline[:n])), 0)
            self._write(text[: len(text) - held])

    def end(self) -> None:
        self._write(self.generator.text(self.ids or [], self.context))

    def _write(self, text: str) -> None:
        if len(text) > len(self.written):
            self.write(text[len(self.written) :])
            self.written = text


def conversation(prompt: str, input: str = "", system: str = "") -> list[Message]:
    """A prompt as messages."""
    return [*([Message("system", system)] if system else []), Message("user", prompt, input=input)]


def read_prompts(path: Path, system: str = "") -> list[tuple[Any, list[Message]]]:
    """The prompts of a file, as they stand there and as messages.

    Args:
        path: .jsonl, with records of the forms that `prompt_of` takes; else a prompt a line.
        system: A system message for those that have none.

    Raises:
        UserError: No such file, or a line that is no prompt.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # other line ends may stand inside a prompt
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}", "give a file of prompts") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 at byte {error.start}", "save it as UTF-8") from None
    prompts: list[tuple[Any, list[Message]]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            prompts.append((line.rstrip("\r"), conversation(line.rstrip("\r"), system=system)))
            continue
        try:
            record = json.loads(line)
            messages = prompt_of(record)
        except (ValueError, UserError) as error:
            reason = error.message if isinstance(error, UserError) else "not JSON"
            raise UserError(f"{path}:{number}: {reason}", getattr(error, "hint", "")) from None
        if system and messages[0].role != "system":
            messages.insert(0, Message("system", system))
        prompts.append((record, messages))
    if not prompts:
        raise UserError(f"{path} holds no prompt", "write one a line")
    return prompts


def answer(
    generator: Generator,
    path: Path,
    decoding: Decoding,
    batch_size: int,
    system: str = "",
    part: slice = slice(None),
) -> Iterator[dict]:
    """The prompts of a file (`prompt`, as it stands there), with `reply` and whether it `stopped` by itself.

    Args:
        part: Which of them.

    Raises:
        UserError: As of `Prompts.read`, before anything is generated.
    """
    prompts = generator.read(path, generator.positions, system)[part]
    replies = generator.replies([ids for _, ids in prompts], decoding, batch_size)
    for (record, _), reply in zip(prompts, replies, strict=True):
        yield {"prompt": record, "reply": reply.text, "stopped": reply.stopped}


def converse(
    generator: Generator,
    decoding: Decoding,
    read: Callable[[], str],
    write: Callable[[str], None],
    system: str = "",
) -> None:
    """A session: prompts and replies in turn, with what was said before, until /exit or the end of the input.

    Args:
        read: The next line of the user; raises EOFError at the end.
        write: Shows text.
        system: A system message.
    """
    write(f"{'/reset begins anew, ' if generator.remembers else ''}/exit or Ctrl-D ends, Ctrl-C stops a reply.\n")
    if not generator.remembers:
        write("Every line stands for itself: the model has no form for several turns.\n")
    start = [Message("system", system)] if system else []
    messages = start
    while True:
        try:
            line = read().strip()
        except (EOFError, KeyboardInterrupt):
            write("\n")
            return
        if line == "/exit":
            return
        if line == "/reset":
            messages = start
            write("(begun anew)\n")
        if not line or line == "/reset":
            continue
        asked, said = [*messages, Message("user", line)], []

        def show(text: str, said: list[str] = said) -> None:
            said.append(text)
            write(text)

        try:
            with contextlib.suppress(KeyboardInterrupt):
                generator.reply(generator.encode(asked), decoding, show)
        except UserError as error:
            write(f"{error}{'; /reset begins anew' if error.hint == _SHORTEN and messages != start else ''}\n")
            continue
        write("\n")
        if generator.remembers:
            messages = [*asked, Message("assistant", "".join(said))]


def _check_room(ids: list[int], positions: int | None) -> None:
    if positions and len(ids) >= positions:
        raise UserError(f"the prompt has {len(ids)} tokens, the model has {positions} positions", _SHORTEN)


def _ids(ids: int | list[int] | None) -> list[int]:
    return [] if ids is None else list(ids) if isinstance(ids, list) else [ids]


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"

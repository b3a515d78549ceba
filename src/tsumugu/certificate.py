"""The certificate of an export: proof that what stock transformers makes of a folder is what was trained.

The expected side is computed here, from the checkpoint's own tensors in the names of memory, which are read once more;
the found side by `reload.py` in a fresh process, from the folder alone. Neither holds a whole model: see there.

What stays in the folder holds no text of anyone's: of the validation rows it has a hash and figures, not the ids.
"""

import copy
import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from tsumugu import __version__
from tsumugu.data.instructions import Message, prompt_ids
from tsumugu.data.instructions.chat import ChatTemplate
from tsumugu.data.instructions.encode import special_ids
from tsumugu.data.instructions.templates import EOS, Template
from tsumugu.errors import UserError
from tsumugu.model import adapter as adapter_folder
from tsumugu.model import build, lora
from tsumugu.reload import (
    buffers,
    computing_in_float32,
    device_at_hand,
    generation_settings,
    is_tied,
    real_logits,
    vocabulary_sha256,
)
from tsumugu.tokenizer.contract import Contract
from tsumugu.tokenizer.load import BulkEncoder, load_tokenizer

FILE = "certificate.json"
VERSION = 2
SCRATCH, ASKED = ".certificate-", "asked.json"  # the folder beside an export through which it is reloaded

# Of the largest logit. In one environment the logits are equal to the last bit; other versions of torch and
# transformers order the same sums otherwise: float32 has 1.2e-7, and a deep model adds up some hundred of them.
_LOGITS = 1e-4
_PERPLEXITY = 0.05  # relative: what the dtype of the export may cost (bfloat16 costs well below 1 %)
_ROW_TOKENS = 64

Read = Callable[[str], torch.Tensor]  # a name in memory → the whole tensor, in the dtype of the checkpoint


# Of a certificate, what is read again.
_PARTS = {"failures": list, "verified": list, "expected": dict, "sample": dict, "tensors": dict}
_PARTS |= {"files": dict, "origin": dict}
_EXPECTED = {"dtype", "rows", "losses", "largest_logit", "tied", "buffers", "config", "adapter", "texts", "golden"}
_EXPECTED |= {"decoded", "default", "vocabulary", "tokenizer_json", "conversations", "prompts", "special", "generation"}


class ReloadError(Exception):
    """A folder that a Python's transformers cannot load."""


@dataclass(frozen=True)
class Subject:
    """What an export is to be.

    Attributes:
        model: On the meta device, of the configuration that was trained.
        read: The trained tensors, adapters merged.
        unmerged: Of a run with adapters: these beside the weights of their base model.
        dtype: Of the export.
        parts: What the files are to hold, by the names on disk, read again part by part.
        tokenizer: The folder of the one it was trained with; None where there is none.
        contract: Of that tokenizer.
        template: What it was trained with, if anything.
        add_bos: Whether bos was in front in training.
        generation: What generation_config.json is to say; None where there is none.
        sample: Rows of ids of the validation data, where they are at hand.
        drawn: What the certificate says about these rows.
        base: Of adapters alone: the model that they are reloaded beside, whose settings are its own.
    """

    model: PreTrainedModel
    read: Read
    unmerged: lora.Unmerged | None
    dtype: torch.dtype
    parts: Callable[[], Iterator[dict[str, torch.Tensor]]]
    tokenizer: Path | None
    contract: Contract | None
    template: Template | ChatTemplate | None
    add_bos: bool
    generation: GenerationConfig | None
    sample: list[list[int]]
    drawn: dict
    base: Path | None


def describe(tensor: torch.Tensor) -> dict:
    """dtype, shape and the sha256 of a tensor's values."""
    values = tensor.detach().contiguous().flatten().view(torch.uint8).numpy()
    return {
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "sha256": hashlib.sha256(values.data).hexdigest(),
    }


def certify(folder: Path, subject: Subject, python: str | None = None) -> dict:
    """Compares a folder with what it is to be.

    Args:
        folder: The export.
        subject: What it is to be.
        python: A further interpreter to reload it with.

    Returns:
        The certificate, without its list of files: `seal` adds that. Its `failures` are empty where all is well.
    """
    tensors = {name: describe(tensor) for part in subject.parts() for name, tensor in part.items()}
    expected, merged, rounded = _expected(subject)
    public = len(expected["rows"]) - len(subject.sample)
    private = json.dumps(expected["rows"][public:])
    trained = _unmerged_logits(subject, expected["rows"]) if subject.unmerged else merged
    failures = [*_tensor_faults(folder, tensors), *_tokenizer_faults(folder, expected)]
    if not (apart := _difference(merged, trained)) <= _LOGITS * max(map(_largest, trained)):
        failures.append(f"merged, the adapters give logits that differ by up to {apart:.3g} from those beside the base")
    verified: list[dict] = []
    for interpreter in [sys.executable, *([python] if python else [])]:
        try:
            found, logits = _reloaded(folder, expected, interpreter, subject.base)
        except ReloadError as error:
            failures.append(str(error))
            continue
        faults, figures = _differences(expected, found, logits)
        largest = max(map(_largest, rounded))
        difference = _difference(logits, rounded)
        if not difference <= _LOGITS * largest and not faults:
            faults.append(f"logits differ by up to {difference:.3g} from those of the checkpoint's tensors")
        figures |= {"logit_difference": difference, "largest_logit": largest}
        agreeing = sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in zip(logits, trained, strict=True))
        figures["greedy_agreement_with_checkpoint"] = agreeing / sum(map(len, trained))
        was = _perplexity(_losses(trained, expected["rows"]))
        figures["perplexity_of_checkpoint"] = was
        if not faults and not abs(figures["perplexity"] / was - 1) <= _PERPLEXITY:
            faults.append(
                f"as {expected['dtype']} the perplexity is {figures['perplexity']:.4g}, in training it was {was:.4g}: "
                "export with --dtype float32"
            )
        failures += [fault for fault in faults if fault not in failures]
        verified.append({**found["versions"], **figures})
    return {
        "version": VERSION,
        "tsumugu": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "failures": failures,
        "verified": verified,
        # of the validation data, whose rows are the last ones, neither ids nor losses: they are somebody's text
        "expected": expected | {key: expected[key][:public] for key in ("rows", "losses")},
        "sample": subject.drawn | {"sha256": hashlib.sha256(private.encode()).hexdigest()},
        "tensors": tensors,
    }


def seal(folder: Path, certificate: dict) -> None:
    """Writes the certificate, with the sha256 of every file of the folder."""
    files = {name: _sha256(folder / name) for name in _files(folder)}
    content = certificate | {"files": files}
    (folder / FILE).write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")


def read(folder: Path) -> dict:
    """The certificate of a folder.

    Raises:
        UserError: There is none that can be read.
    """
    try:
        content = json.loads((folder / FILE).read_text(encoding="utf-8"))
        whole = content["version"] == VERSION and all(isinstance(content[key], kind) for key, kind in _PARTS.items())
        if whole and content["expected"].keys() >= _EXPECTED | {"stops"}:
            return content
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder} holds no {FILE}", "only folders of `tsumugu export` can be verified") from None
    except (ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{folder / FILE} is damaged or of another version", "export again")


def verify(folder: Path, python: str | None = None) -> tuple[list[str], list[dict]]:
    """Checks a folder again, anywhere: its files, its tensors, and what stock transformers makes of it.

    Args:
        folder: Of an export.
        python: The interpreter to reload it with; default: this one.

    Returns:
        What is wrong, and the figures of the reload.

    Raises:
        UserError: It has no certificate, or is adapters whose base model is not there.
    """
    certificate = read(folder)
    base = None
    if certificate["expected"]["adapter"]:
        base = adapter_folder.find_base(folder)
        adapter_folder.check_base(base, certificate["origin"])
    failures = [*certificate["failures"], *file_faults(folder), *_tensor_faults(folder, certificate["tensors"])]
    failures += _tokenizer_faults(folder, certificate["expected"])
    try:
        found, logits = _reloaded(folder, certificate["expected"], python or sys.executable, base)
    except ReloadError as error:
        return [*failures, str(error)], []
    faults, figures = _differences(certificate["expected"], found, logits)
    return failures + faults, [{**found["versions"], **figures}]


def file_faults(folder: Path) -> list[str]:
    """Files of a folder that are missing, changed or new, by its certificate."""
    files, present = read(folder)["files"], _files(folder)
    lost = [f"file {name} is missing" for name in files if name not in present]
    changed = [name for name in files if name in present and _sha256(folder / name) != files[name]]
    return [
        *lost,
        *(f"file {name} is not the one that was exported" for name in changed),
        *(f"file {name} was not exported" for name in present if name not in files),
    ]


def _expected(subject: Subject) -> tuple[dict, list[torch.Tensor], list[torch.Tensor]]:
    """What a reload must find, and logits of every row: of the trained tensors, and of those cast to the export's."""
    model, contract = subject.model, subject.contract
    rows = [[id * 7919 % model.config.vocab_size for id in range(64)], *_golden_rows(subject), *subject.sample]
    limit = min(_ROW_TOKENS, getattr(model.config, "max_position_embeddings", None) or _ROW_TOKENS)
    rows = [row[:limit] for row in rows]
    trained, rounded, rotary = _logits_of(subject, rows)
    conversations, prompts = _prompts(subject)
    golden: dict[str, list[int]] = {}
    if subject.tokenizer and contract and contract.golden:
        golden = _without_special_tokens(subject.tokenizer, contract)
    expected = {
        "dtype": str(subject.dtype).removeprefix("torch."),
        "rows": rows,
        "losses": [losses.tolist() for losses in _losses(rounded, rows)],
        "largest_logit": max(map(_largest, rounded)),
        "tied": is_tied(model),
        "buffers": rotary,
        "config": {} if subject.base else _comparable(model.config),
        "adapter": subject.base is not None,
        "texts": list(golden),
        "golden": list(golden.values()),
        "decoded": [],
        "default": [],
        "vocabulary": "",
        "tokenizer_json": "",
        "conversations": conversations,
        "prompts": prompts,
        "special": {},
        "generation": generation_settings(subject.generation) if subject.generation else None,
        "stops": (subject.generation and subject.generation.eos_token_id) or [],
    }
    if golden and subject.tokenizer and contract:
        expected["special"] = {name: getattr(contract, f"{name}_id") for name in ("unk", "bos", "eos", "pad")}
        tokenizer = load_tokenizer(subject.tokenizer)
        expected["decoded"] = [tokenizer.decode(ids, skip_special_tokens=False) for ids in expected["golden"]]
        expected["default"] = tokenizer.encode("あ").ids
        expected["vocabulary"] = vocabulary_sha256(tokenizer.get_vocab(with_added_tokens=True))
        expected["tokenizer_json"] = _sha256(subject.tokenizer / "tokenizer.json")
    return expected, trained, rounded


def _without_special_tokens(tokenizer: Path, contract: Contract) -> dict[str, list[int]]:
    """The golden strings with their ids, but for those that spell a special token, such as `<reserved_0>`: that is text
    in a document, and the token for whoever calls the tokenizer."""
    added = load_tokenizer(tokenizer).get_added_tokens_decoder().values()
    special = [token.content for token in added if token.special]
    return {text: list(ids) for text, ids in contract.golden if not any(token in text for token in special)}


def _golden_rows(subject: Subject) -> list[list[int]]:
    golden = subject.contract.golden if subject.contract else ()
    return [list(ids) for _, ids in golden if len(ids) > 1]


def _logits_of(subject: Subject, rows: list[list[int]]) -> tuple[list[torch.Tensor], list[torch.Tensor], dict]:
    """Logits of the trained tensors, and of those cast to the export's dtype; and the model's own buffers."""

    def cast(name: str) -> torch.Tensor:
        values = subject.read(name)
        return values.to(subject.dtype) if values.is_floating_point() else values

    trained, rounded = _computing(subject.model, subject.read), _computing(subject.model, cast)
    device = device_at_hand()
    return real_logits(trained, rows, device), real_logits(rounded, rows, device), buffers(rounded)


def _unmerged_logits(subject: Subject, rows: list[list[int]]) -> list[torch.Tensor]:
    """Logits as in training: in each adapted layer A and B of its adapter (Hu et al., 2021) beside the base weight."""
    unmerged = subject.unmerged
    assert unmerged
    model, device = _computing(subject.model, unmerged.weight), device_at_hand()
    for layer, factors in unmerged.factors.items():
        first, second = (factor.float().to(device) for factor in factors)

        def beside(module, inputs, output, first=first, second=second):
            return output + unmerged.scale * (inputs[0] @ first.T @ second.T)

        model.get_submodule(layer).register_forward_hook(beside)
    return real_logits(model, rows, device)


def _computing(meta: PreTrainedModel, read: Read) -> PreTrainedModel:
    """A model that holds nothing, and has each module's tensors read for the moment in which it computes."""
    model = copy.deepcopy(meta).eval()
    names = {module: prefix for prefix, module in model.named_modules()}
    saved, ties = model.state_dict().keys(), dict(model.all_tied_weights_keys)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.zeros_like(buffer, device="cpu")
    build.rebuild_buffers(model)

    def fetch(module: nn.Module, name: str, tensor: torch.Tensor) -> torch.Tensor:
        full = f"{names[module]}.{name}".removeprefix(".")
        full = ties.get(full, full)
        return read(full) if full in saved else tensor

    computing_in_float32(model, device_at_hand(), fetch)
    return model


def _prompts(subject: Subject) -> tuple[list[list[dict]], list[list[int]]]:
    """Conversations that end with a question, and the ids that each has in training."""
    template, contract, folder = subject.template, subject.contract, subject.tokenizer
    if not template or not contract or not contract.golden or not folder:
        return [], []
    first = [Message("user", "日本の首都はどこですか？"), Message("assistant", "東京です。")]
    question = Message("user", "{braces} '引用' \"符\"\n Is it large?")
    tried = [first[:1], [question]]
    if getattr(template, "several_turns", "yes") == "yes":  # else the exported template refuses the other ones
        tried += [[*first, question], [Message("system", "簡潔に。"), *first, question]]
    specials: dict[str, Any] = {EOS: contract.eos_id, **special_ids(folder)}
    encode, bos = BulkEncoder(folder), [contract.bos_id] if subject.add_bos and contract.bos_id is not None else []
    conversations, prompts = [], []
    for messages in tried:
        try:
            ids = prompt_ids(messages, template, encode, bos, specials)
        except UserError:  # a system message, for which this template has no place
            continue
        conversations.append([{"role": message.role, "content": message.content} for message in messages])
        prompts.append(ids)
    return conversations, prompts


def _reloaded(folder: Path, expected: dict, python: str, base: Path | None) -> tuple[dict, list[torch.Tensor]]:
    """What another process makes of a folder (of adapters: beside their base model), and its logits."""
    keys = ("rows", "texts", "conversations", "stops")
    with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=folder.resolve().parent) as scratch:
        asked, answer, logits = (Path(scratch) / name for name in (ASKED, "answer.json", "logits.npy"))
        request = {key: expected[key] for key in keys} | {
            "folder": str(folder.resolve()),
            "logits": str(logits),
            "base": str(base.resolve()) if base else None,
            "has_tokenizer": bool(expected["texts"]),
        }
        asked.write_text(json.dumps(request), encoding="utf-8")
        _run(python, asked, answer)
        with open(logits, "rb") as file:
            found = [torch.from_numpy(np.load(file)) for _ in expected["rows"]]
        return json.loads(answer.read_text(encoding="utf-8")), found


def _run(python: str, asked: Path, answer: Path) -> None:
    """`reload.py` in a process of its own."""
    command = [python, "-I", str(Path(__file__).with_name("reload.py")), str(asked), str(answer)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONUTF8": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, errors="replace")
    except OSError as error:
        raise UserError(f"{python} cannot be run: {error.strerror}", "give a Python with transformers") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        last = lines[-1] if lines else f"it ended with {done.returncode}"
        raise ReloadError(f"it cannot be reloaded with {python}: {last}")


def _differences(expected: dict, found: dict, logits: list[torch.Tensor]) -> tuple[list[str], dict]:
    """What is wrong with what was found, the cause before its effects; and the figures."""
    faults = [f"tensor {name} is missing" for name in found["missing_keys"]]
    faults += [f"tensor {name} is in the files, and not in the model" for name in found["unexpected_keys"]]
    if found["dtypes"] != [expected["dtype"]] and not expected["adapter"]:
        faults.append(f"the model loads as {', '.join(found['dtypes'])}, not {expected['dtype']}: config dtype")
    if found["tied"] != expected["tied"] and not expected["adapter"]:
        now, was = (
            "the input embedding" if tied else "a matrix of its own" for tied in (found["tied"], expected["tied"])
        )
        faults.append(f"config tie_word_embeddings: the head is {now}, in training it was {was}")
    for name, value in expected["config"].items():
        if name in found["config"] and not _same_setting(value, found["config"][name]):
            faults.append(f"config {name} is {found['config'][name]!r}, in training it was {value!r}")
    if not _same_buffers(expected["buffers"], found["buffers"]):
        faults.append("rotary base, fraction or scaling: the frequencies are not those of training")
    tokens = found["tokenizer"]
    if tokens:
        for text, ids, text_ids in zip(expected["texts"], expected["golden"], tokens["golden"], strict=True):
            if ids != text_ids:
                faults.append(f"tokenizer: {text!r} gives {text_ids}, in training it gave {ids}")
                break
        for text, was in zip(tokens["decoded"], expected["decoded"], strict=True):
            if text != was:
                faults.append(f"tokenizer: decodes to {text!r} what was {was!r} in training")
                break
        if tokens["vocabulary"] != expected["vocabulary"]:
            faults.append("tokenizer: its tokens and their ids are not those of training")
        if tokens["default"] != expected["default"]:
            faults.append(f"tokenizer: puts {tokens['default']} for あ by default, and did {expected['default']}")
        for conversation, ids, prompt in zip(
            expected["conversations"], expected["prompts"], tokens["prompts"], strict=True
        ):
            if ids != prompt:
                faults.append(f"chat template: {conversation} gives {prompt}, in training {ids}")
                break
        for name, id in expected["special"].items():
            if tokens["special"][name] != id:
                faults.append(f"tokenizer: {name}_token has id {tokens['special'][name]}, in training it had {id}")
    faults += _generation_faults(expected, found) if expected["generation"] is not None else []
    losses = _losses(logits, expected["rows"])
    tolerance = 2 * _LOGITS * expected["largest_logit"]  # log of a softmax moves by two of the logit's steps at most
    differences = [
        float((own - torch.tensor(was, dtype=torch.float64)).abs().max())
        for own, was in zip(losses, expected["losses"], strict=True)
    ]
    worst = float(np.max(differences))  # nan stays nan
    if not worst <= tolerance and not faults:
        faults.append(f"losses differ by up to {worst:.3g} from those of the checkpoint's tensors")
    return faults, {"perplexity": _perplexity(losses), "loss_difference": worst}


def _generation_faults(expected: dict, found: dict) -> list[str]:
    """Every setting of generation_config.json; stop ids as a set, and whether generation ends at each."""
    ours, theirs = expected["generation"], found["generation"]
    stops = theirs.get("eos_token_id")
    stops = stops if isinstance(stops, list) else [] if stops is None else [stops]
    missing = [
        stop for stop, ends in zip(expected["stops"], found["ends"], strict=True) if stop not in stops or not ends
    ]
    faults = [
        f"generation_config eos_token_id: generation does not end at token {stop}, which ends a reply"
        for stop in missing
    ]
    if added := sorted(set(stops) - set(expected["stops"])):
        faults.append(f"generation_config eos_token_id: generation also ends at {added}, which end no reply")
    for name in sorted((ours.keys() | theirs.keys()) - {"eos_token_id"}):
        if ours.get(name) != theirs.get(name):
            said, was = (textwrap.shorten(repr(side.get(name)), 80) for side in (theirs, ours))
            faults.append(f"generation_config {name} is {said}, exported was {was}")
    return faults


def _same_setting(value: Any, other: Any) -> bool:
    """Dictionaries (of rotary settings) by the keys that both have: versions add their own."""
    if isinstance(value, dict) and isinstance(other, dict):
        return all(_same_setting(value[key], other[key]) for key in value.keys() & other.keys())
    return value == other


def _same_buffers(expected: dict[str, list[float]], found: dict[str, list[float]]) -> bool:
    """By value: their names differ between versions of transformers, which also repeat them in every layer."""
    sides = [{tuple(values) for values in side.values()} for side in (expected, found)]
    return all(any(_close(values, other) for other in sides[1]) for values in sides[0]) and all(
        any(_close(values, other) for other in sides[0]) for values in sides[1]
    )


def _close(values: Sequence[float], other: Sequence[float]) -> bool:
    return len(values) == len(other) and np.allclose(values, other, rtol=1e-5, atol=1e-8)


def _comparable(config: PretrainedConfig) -> dict:
    """The settings of a model that change what it computes, as JSON has them."""
    other = (
        "transformers_version",
        "_name_or_path",
        "dtype",
        "architectures",
        "use_cache",
        "return_dict",
        "pad_token_id",
    )
    content = json.loads(json.dumps(config.to_dict(), default=str))
    return {key: value for key, value in content.items() if key not in other}


def _losses(logits: list[torch.Tensor], rows: list[list[int]]) -> list[torch.Tensor]:
    """Of every token but the first, (tokens - 1,) float64 of each row."""
    return [
        nn.functional.cross_entropy(row_logits[:-1].double(), torch.tensor(row[1:]), reduction="none")
        for row_logits, row in zip(logits, rows, strict=True)
    ]


def _perplexity(losses: list[torch.Tensor]) -> float:
    return math.exp(float(torch.cat(losses).mean()))


def _difference(logits: list[torch.Tensor], others: list[torch.Tensor]) -> float:
    """The largest one; nan where there is one."""
    return float(np.max([_largest(a - b) for a, b in zip(logits, others, strict=True)]))


def _largest(tensor: torch.Tensor) -> float:
    return float(tensor.abs().max())


def _tokenizer_faults(folder: Path, expected: dict) -> list[str]:
    """tokenizer.json to the byte: golden strings do not meet every merge and score."""
    file = folder / "tokenizer.json"
    same = not expected["tokenizer_json"] or (file.is_file() and _sha256(file) == expected["tokenizer_json"])
    return [] if same else ["tokenizer: tokenizer.json is not the one of training"]


def _tensor_faults(folder: Path, expected: dict[str, dict]) -> list[str]:
    """Every tensor of the folder's files against what was written, one by one."""
    faults, seen = [], set()
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    seen.add(name)
                    found, was = describe(opened.get_tensor(name)), expected.get(name)
                    if was is None:
                        faults.append(f"tensor {name} of {file.name} is none of the checkpoint's")
                        continue
                    for key, what in (("dtype", "is"), ("shape", "has shape"), ("sha256", "has other values:")):
                        if found[key] != was[key]:
                            faults.append(f"tensor {name} {what} {found[key]}, not {was[key]}")
                            break
        except SafetensorError as error:
            faults.append(f"file {file.name} cannot be read: {error}")
    return faults + [f"tensor {name} is missing" for name in expected if name not in seen]


def _files(folder: Path) -> list[str]:
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() and path.name != FILE
    )


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

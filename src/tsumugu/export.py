"""From a run (or a state dict) to a Hugging Face folder: what `save_pretrained` would write, without ever holding the
whole model, and with a certificate that it is what was trained.

transformers 4 reads it too: transformers 5 alone writes only `rope_parameters`, which 4.57 ignores silently, so the
older names are written beside them.
"""

import glob
import itertools
import json
import os
import pickle
import re
import shutil
import tempfile
import warnings
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PretrainedConfig, PreTrainedModel

from tsumugu import certificate
from tsumugu import config as configuration
from tsumugu.data.instructions import find_template, jinja_of
from tsumugu.data.instructions.chat import ChatTemplate
from tsumugu.data.instructions.encode import stop_id
from tsumugu.data.instructions.templates import Template
from tsumugu.data.store import open_store, sha256
from tsumugu.errors import UserError
from tsumugu.model import adapter as adapter_folder
from tsumugu.model import build, lora, nf4
from tsumugu.model_card import model_card
from tsumugu.tokenizer.contract import CHAT_TEMPLATE, Contract, copy_tokenizer, read_contract
from tsumugu.training import checkpoint

ORIGIN = "tsumugu.json"
MAX_FILE_BYTES = 5 * 10**9

_SAMPLE_ROWS = 4

# What the GPT-NeoX and GPT-2 of older transformers had in their state dicts, and what is no weight.
_OLD_BUFFERS = re.compile(r"\.(attention|attn)\.(bias|masked_bias)$|rotary_emb\.(inv_freq|cos_cached|sin_cached)$")


class CertificateError(Exception):
    """An export that is not what was trained.

    Args:
        folder: Where it was left.
        failures: What is wrong.
    """

    def __init__(self, folder: Path, failures: list[str]):
        self.folder, self.failures = folder, failures
        super().__init__(f"{folder}: {'; '.join(failures)}")


@dataclass(frozen=True)
class _Source:
    """What is exported.

    Attributes:
        model: On the meta device, of `config` and in the dtype of the export.
        read: Gives its trained tensors by name.
        tokenizer: The folder of its tokenizer, if it has one.
        unmerged: Of a run with adapters: these beside the weights of their base model.
        adapters: For an export of the adapters alone.
        run_dir, path: Of a run: its folder, and that of the checkpoint.
    """

    config: PretrainedConfig
    model: PreTrainedModel
    read: certificate.Read
    tokenizer: Path | None
    contract: Contract | None
    template: Template | ChatTemplate | None = None
    add_bos: bool = False
    unmerged: lora.Unmerged | None = None
    adapters: lora.Adapters | None = None
    run_dir: Path | None = None
    path: Path | None = None


def export(
    run: str,
    output: Path,
    step: int | None = None,
    dtype: str | None = None,
    adapter: bool = False,
    verify_with: str | None = None,
) -> bool:
    """Writes the model of a checkpoint as a Hugging Face folder, with its certificate.

    Adapters (of a run with `model.lora`) are merged: base + alpha / rank · B A, computed in float32 and then cast. For
    that the whole base model is read into memory, in its own dtype.

    Args:
        run: RUN or RUN@STEP.
        output: The folder to make; it appears when it is whole.
        step: The same as @STEP.
        dtype: bfloat16, float16, float32 or float64; default: bfloat16, of an adapter float32.
        adapter: Writes the adapters alone, as a folder that peft loads.
        verify_with: A further Python with transformers, to reload the folder with.

    Returns:
        False where `output` already is this export.

    Raises:
        UserError: No such checkpoint, a damaged one, an output folder that holds something else, a base model that is
            not the one beside which the adapters were trained, or no adapters where they are asked for.
        CertificateError: The folder, now OUTPUT.failed, is not what was trained.
    """
    dtype = dtype or ("float32" if adapter else "bfloat16")
    run_dir, step = checkpoint.resolve(f"{run}@{step}" if step is not None else run)
    path = checkpoint.folder(run_dir, step)
    marker = json.loads((path / checkpoint.COMPLETE).read_text(encoding="utf-8"))
    state = checkpoint.read_state(run_dir, step)
    contract = read_contract(run_dir / "tokenizer")
    data = {key: value for key, value in state["identity"].items() if key.startswith("data.store")}
    origin = {
        "step": step,
        "tokens_seen": state["tokens_seen"],
        "dtype": dtype,
        "checkpoint": {name: entry["sha256"] for name, entry in marker.items()},
        "configuration": sha256(run_dir / "config.yaml"),
        "data": data,
        "tokenizer": contract.fingerprint,
        "template": state["template"],
        "add_bos": state["add_bos"],
    }
    adapters = lora.Adapters(**state["lora"]) if state.get("lora") else None
    if adapter and adapters is None:
        raise UserError(f"{run_dir} was trained without model.lora, and has no adapters", "export without --adapter")
    config = build.read_config(str(run_dir / "model"))
    build.take_special_ids(config, contract)
    if adapters:
        lora.check_installed()
        base = adapter_folder.base_name(adapters.base)
        origin |= {"adapter": adapter, "base": base, "base_sha256": adapters.base_sha256}
        origin |= {"vocab_size": config.vocab_size, "quantize": adapters.quantize}
    if _is_done(output, origin):
        return False
    checkpoint.check(path)
    model = build.meta_model(config, build.DTYPES[dtype])
    unmerged = None
    if adapters:
        adapted, quantized = _adapted(config, adapters, path, dtype)
        read = lora.merged(adapted, lora.merging_dtype(build.DTYPES[dtype]), quantized)
        unmerged = lora.unmerged(adapted, adapters, quantized)
    else:
        read = _stored(model, path)
    source = _Source(
        config=config,
        model=model,
        read=read,
        tokenizer=run_dir / "tokenizer",
        contract=contract,
        template=find_template(state["template"]) if state["template"] else None,
        add_bos=state["add_bos"],
        unmerged=unmerged,
        adapters=adapters if adapter else None,
        run_dir=run_dir,
        path=path,
    )
    _write(source, output, origin, verify_with)
    return True


def export_state_dict(
    file: Path,
    model_config: str,
    output: Path,
    dtype: str,
    tokenizer: Path | None = None,
    verify_with: str | None = None,
) -> bool:
    """Writes a state dict that torch saved, such as the sample's fullmodel.pt, as a Hugging Face folder.

    Args:
        file: Of `torch.save`: names to tensors, or these under `model` or `state_dict`. Nothing else is unpickled.
        model_config: A config.json, or a folder that has one.
        output, dtype, verify_with: As of `export`.
        tokenizer: The folder of its tokenizer, of `tsumugu tokenizer import`; without one the export has none.

    Returns:
        False where `output` already is this export.

    Raises:
        UserError: A file that is no state dict, or not that of the configuration.
        CertificateError: As of `export`.
    """
    config = build.read_config(model_config)
    contract = read_contract(tokenizer) if tokenizer else None
    if contract:
        build.take_special_ids(config, contract)
    origin = {
        "dtype": dtype,
        "state_dict": sha256(file) if file.is_file() else None,
        "configuration": json.loads(json.dumps(config.to_dict(), default=str)),
        "tokenizer": contract.fingerprint if contract else None,
    }
    if _is_done(output, origin):
        return False
    model = build.meta_model(config, build.DTYPES[dtype])
    source = _Source(config, model, _in_memory(model, _state_dict(file), file), tokenizer, contract)
    _write(source, output, origin, verify_with)
    return True


def push_to_hub(folder: Path, name: str, public: bool) -> str:
    """Uploads an exported folder that is as its certificate says.

    Args:
        folder: Of an export.
        name: OWNER/NAME on the hub (HF_ENDPOINT); it is made if need be.
        public: Else it is private.

    Returns:
        Where it is.

    Raises:
        UserError: A folder that was changed, a repository that is public against the user's word, or the hub's refusal.
    """
    from huggingface_hub import HfApi

    if faults := certificate.file_faults(folder) + certificate.read(folder)["failures"]:
        raise UserError(f"{folder} is not pushed: {faults[0]}", "export again")
    api = HfApi()
    try:
        api.create_repo(name, private=not public, exist_ok=True)
        if not public and not api.repo_info(name).private:
            raise UserError(f"{name} exists on the hub and is public", "give --public, or another name")
        return str(api.upload_folder(repo_id=name, folder_path=folder, commit_message=f"Export of {folder.name}"))
    except UserError:
        raise
    except Exception as error:  # of the hub's answers, its client and the network: each has its own kinds
        reason = " ".join(str(error).split())
        raise UserError(f"the hub refuses {name}: {reason}", "log in with `hf auth login`, or check the name") from None


def read_origin(folder: Path) -> dict:
    """What an exported folder says of itself in tsumugu.json; {} of the folders of others.

    Raises:
        UserError: It is damaged.
    """
    try:
        content = json.loads((folder / ORIGIN).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{folder / ORIGIN} is damaged", "export the model anew")
    return content


def leftovers(output: Path) -> list[Path]:
    """What exports to `output` that were killed, or are still running, hold beside it: folders that have the hidden
    name of one and no certificate yet; and what one was reloaded with."""

    def named(prefix: str) -> list[Path]:
        pattern = re.compile(rf"{re.escape(prefix)}[a-z0-9_]{{8}}")
        return sorted(path for path in output.parent.glob(f"{glob.escape(prefix)}*") if pattern.fullmatch(path.name))

    written = (path for path in named(f".{output.name}-") if not (path / certificate.FILE).exists())
    asked = (path for path in named(certificate.SCRATCH) if (path / certificate.ASKED).is_file())
    return [*(path for path in written if (path / ORIGIN).is_file()), *asked]


def _is_done(output: Path, origin: dict) -> bool:
    if not output.exists():
        return False
    if read_origin(output) == origin:
        return True
    raise UserError(f"{output} exists already", "choose another --output, or delete it")


def _write(source: _Source, output: Path, origin: dict, verify_with: str | None) -> None:
    """The folder under a hidden name, its certificate, then its own name."""
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    temporary.chmod(0o777 & ~_umask())
    try:
        (temporary / ORIGIN).write_text(json.dumps(origin, indent=1), encoding="utf-8")  # first: see `leftovers`
        config, contract, template = source.config, source.contract, source.template
        model, read, dtype = source.model, source.read, build.DTYPES[origin["dtype"]]
        if source.tokenizer:
            copy_tokenizer(source.tokenizer, temporary)
        own = stop_id(template, temporary) if template else None
        generation = build.generation_config(config, contract, [] if own is None else [own])
        adapters, path = source.adapters, source.path
        if adapters and path:
            _write_adapter(build.meta_model(config, dtype), adapters, path, temporary)
            parts = lambda: iter([_adapter_tensors(build.meta_model(config, dtype), adapters, path)])  # noqa: E731
        else:
            parts = lambda: _read_again(source, dtype)  # noqa: E731
            _write_weights(model, read, temporary)
            _write_config(model, config, origin["dtype"], temporary)
            generation.save_pretrained(temporary)
        if template:  # what it was trained with, in place of the tokenizer's own
            (temporary / CHAT_TEMPLATE).write_text(jinja_of(template, source.add_bos), encoding="utf-8")
        sample, drawn = _sample(source)
        subject = certificate.Subject(
            model=model,
            read=read,
            unmerged=source.unmerged,
            dtype=dtype,
            parts=parts,
            tokenizer=source.tokenizer,
            contract=contract,
            template=template,
            add_bos=source.add_bos,
            generation=None if adapters else generation,
            sample=sample,
            drawn=drawn,
            base=build.find_pretrained(adapters.base) if adapters else None,
        )
        certified: dict[str, Any] = certificate.certify(temporary, subject, verify_with) | {"origin": origin}
        card = model_card(model, origin, certified, source.run_dir, adapters)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        certificate.seal(temporary, certified)
        if certified["failures"]:
            failed = output.with_name(f"{output.name}.failed")
            shutil.rmtree(failed, ignore_errors=True)
            raise CertificateError(temporary.rename(failed), certified["failures"])
        temporary.rename(output)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if checkpoint.is_disk_full(error):
            raise UserError(f"no space left to write {output}", "free space, then export again") from None
        raise


def _umask() -> int:
    """Of this process; mkdtemp's folders are for their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sample(source: _Source) -> tuple[list[list[int]], dict]:
    """Rows of the validation data of a run's stores in turn (or of their training data, where none has any), and what
    the certificate says about them: how many of which store, or why there are none."""
    if not source.run_dir or not source.contract:
        return [], {"rows": 0, "missing": ["a state dict names no data"]}
    missing, stores = [], {}
    try:
        entries = configuration.load(configuration.TrainingRun, [str(source.run_dir / "config.yaml")]).data.entries
    except UserError:  # whose message may hold a path, which is nobody's business
        entries, missing = [], ["the run's config.yaml cannot be read"]
    for entry in entries:
        name = entry.name or Path(entry.path).name
        try:
            store = open_store(Path(entry.path))
        except (UserError, OSError):
            missing.append(f"the store {name} cannot be opened where the run has read it")
            continue
        if store.fingerprint == source.contract.fingerprint:
            stores[name] = store
        else:
            missing.append(f"the store {name} is made with another tokenizer by now")
    split = "validation" if any(store.validation.documents for store in stores.values()) else "train"
    rows: dict[str, list[list[int]]] = {}
    for name, store in stores.items():
        documents = store.validation if split == "validation" else store.train
        some = (documents.document(index)[0].tolist() for index in range(documents.documents))
        rows[name] = list(itertools.islice((row for row in some if len(row) > 1), _SAMPLE_ROWS))
        if not rows[name]:
            missing.append(f"the store {name} has no {split} document of two tokens")
    turns = itertools.zip_longest(*([(name, row) for row in found] for name, found in rows.items()))
    taken = [pair for turn in turns for pair in turn if pair][:_SAMPLE_ROWS]
    counts = {name: [of for of, _ in taken].count(name) for name in rows}
    return [row for _, row in taken], {"rows": len(taken), "split": split, "stores": counts, "missing": missing}


def _stored(model: PreTrainedModel, path: Path) -> certificate.Read:
    """The weights as a checkpoint holds them."""
    names = [name for name in model.state_dict() if name not in build.tied_names(model)]
    stored: dict[str, Any] = checkpoint.read_metadata(path).state_dict_metadata
    differing = {f"model.{name}" for name in names} ^ {key for key in stored if key.startswith("model.")}
    if differing:
        raise UserError(
            f"{path}: its weights are not those of its configuration: {', '.join(sorted(differing)[:3])}",
            "export with the transformers version that it was trained with",
        )

    def read(name: str) -> torch.Tensor:
        entry = stored[f"model.{name}"]
        return _load({name: torch.empty(entry.size, dtype=entry.properties.dtype)}, path)[name]

    return read


def merged_weights(config: PretrainedConfig, adapters: lora.Adapters, path: Path, dtype: str) -> certificate.Read:
    """The weights of the base model, with the adapters of a checkpoint added.

    Args:
        config: Of the model.
        adapters: Of the checkpoint's state.
        path: The checkpoint.
        dtype: Of the export: they are added in float32, or in float64 for that.

    Raises:
        UserError: The base model is not there, or not the one beside which the adapters were trained.
    """
    model, quantized = _adapted(config, adapters, path, dtype)
    return lora.merged(model, lora.merging_dtype(build.DTYPES[dtype]), quantized)


def _adapted(
    config: PretrainedConfig, adapters: lora.Adapters, path: Path, dtype: str
) -> tuple[PreTrainedModel, Collection[str]]:
    """The base model of a checkpoint in memory with its adapters, and the names of the weights that were in NF4."""
    folder = build.find_pretrained(adapters.base)
    if build.weights_sha256(folder) != adapters.base_sha256:
        raise UserError(
            f"{adapters.base} is not the model beside which the adapters of {path} were trained: its weights differ",
            "put that model back in its place",
        )
    merging = lora.merging_dtype(build.DTYPES[dtype])
    model = build.adapted_model(config, folder, adapters, merging)
    _load({name: parameter.data for name, parameter in lora.trained(model).items()}, path)
    quantized = set()
    if adapters.quantize:
        nf4.check([], torch.device("cpu"))
        quantized = build.quantized_names(build.meta_model(config, merging))
    return model, quantized


def _load(tensors: dict[str, torch.Tensor], path: Path) -> dict[str, torch.Tensor]:
    """Fills tensors from a checkpoint, casting to the dtype of each."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as asked for, by no_dist
        checkpoint.load({"model": tensors}, path)
    return tensors


def _state_dict(file: Path) -> dict[str, torch.Tensor]:
    try:
        try:
            content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        except RuntimeError:  # the format of before torch 1.6
            content = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{file} does not exist", "check --from-state-dict") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{file} is no state dict of torch: {reason}", "save model.state_dict() with torch.save"
        ) from None
    for key in ("model", "state_dict", "module"):
        content = content[key] if isinstance(content, dict) and isinstance(content.get(key), dict) else content
    if not build.is_state_dict(content) or not content:
        raise UserError(
            f"{file} is no state dict: not all in it are tensors by name", "save model.state_dict() with torch.save"
        )
    tensors = dict(content)
    while all(name.startswith("module.") for name in tensors):  # of DistributedDataParallel
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return tensors


def _in_memory(model: PreTrainedModel, tensors: dict[str, torch.Tensor], file: Path) -> certificate.Read:
    """The tensors of a state dict by their names in memory; it may have those, or the names on disk."""
    wanted = model.state_dict()
    found: dict[str, torch.Tensor] = {}
    for name in wanted:
        on_disk = list(build.disk_names(model, {name: wanted[name]}))
        for alias in (name, *on_disk):
            if alias in tensors and len(on_disk) == 1:
                found[name] = tensors.pop(alias)
    own = model.all_tied_weights_keys
    found |= {own[name]: found[name] for name in own if name in found and own[name] not in found}
    missing = [name for name in wanted if name not in found and name not in own]
    left = [name for name in tensors if not _OLD_BUFFERS.search(name)]
    shapes = [name for name in found if found[name].shape != wanted[name].shape]
    untied = [name for name in own if name in found and not torch.equal(found[name], found[own[name]])]
    for names, what in (
        (missing, "lacks"),
        (left, "has, unlike the model of that configuration,"),
        (shapes, "has in another shape than the configuration's"),
        (untied, "has with values of its own, which the configuration ties:"),
    ):
        if names:
            raise UserError(
                f"{file} {what} {', '.join(sorted(names)[:3])}", "give the configuration it was trained with"
            )
    return lambda name: found[name]


def _write_weights(model: PreTrainedModel, read: certificate.Read, output: Path) -> None:
    """Weights file by file, each with whole decoder layers, so that what transformers merges on disk stays together."""
    groups = _file_groups(model)
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    weight_map, total_size = {}, 0
    for number, group in enumerate(groups, start=1):
        file = "model.safetensors" if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        tensors = {name: read(name).to(dtypes[name]) for name in group}
        for name, tensor in tensors.items():
            if tensor.dtype == torch.float16 and tensor.isinf().any():
                raise UserError(f"{name} has values that float16 cannot hold", "use --dtype bfloat16")
        on_disk = {name: tensor.contiguous() for name, tensor in build.disk_names(model, tensors).items()}
        del tensors
        save_file(on_disk, output / file, {"format": "pt"})
        weight_map |= dict.fromkeys(on_disk, file)
        total_size += sum(tensor.nbytes for tensor in on_disk.values())
    if len(groups) > 1:
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        (output / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def _read_again(source: _Source, dtype: torch.dtype) -> Iterator[dict[str, torch.Tensor]]:
    """What the files of `_write_weights` are to hold, from the checkpoint once more, a decoder layer at a time.

    Of a run with adapters, whatever no adapter changes comes from the base model by itself.
    """
    unmerged = source.unmerged

    def trained(name: str) -> torch.Tensor:
        alone = unmerged and name.removesuffix(".weight") not in unmerged.factors
        return (unmerged.weight if unmerged and alone else source.read)(name)

    for names in build.parts(source.model):
        tensors = {name: trained(name) for name in names}
        cast = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
        yield build.disk_names(source.model, cast)


def _write_adapter(model: PreTrainedModel, adapters: lora.Adapters, path: Path, output: Path) -> None:
    """What was trained under the names that peft gives it, and peft's configuration."""
    described = lora.peft_config(model, adapters)
    described.inference_mode = True
    described.base_model_name_or_path = adapter_folder.base_name(adapters.base)
    described.save_pretrained(output)
    save_file(_adapter_tensors(model, adapters, path), output / "adapter_model.safetensors", {"format": "pt"})


def _adapter_tensors(model: PreTrainedModel, adapters: lora.Adapters, path: Path) -> dict[str, torch.Tensor]:
    """What was trained, by peft's names on disk; `model` is given adapters."""
    lora.add_adapters(model, adapters, model.dtype)
    parameters = lora.trained(model)
    tensors = _load({name: torch.empty_like(p, device="cpu") for name, p in parameters.items()}, path)
    return {f"base_model.model.{lora.disk_name(name)}": tensor for name, tensor in tensors.items()}


def _file_groups(model: PreTrainedModel) -> list[list[str]]:
    """Names in memory, by output file: none over MAX_FILE_BYTES, unless one layer is, and no layer in two files."""
    state_dict = model.state_dict()
    groups: list[list[str]] = [[]]
    size = 0
    for unit in build.parts(model):
        unit_size = sum(state_dict[name].nbytes for name in unit)
        if groups[-1] and size + unit_size > MAX_FILE_BYTES:
            groups.append([])
            size = 0
        groups[-1] += unit
        size += unit_size
    return groups


def _write_config(model: PreTrainedModel, config: PretrainedConfig, dtype: str, output: Path) -> None:
    """config.json for transformers 5, and beside it the names that transformers 4 and others read."""
    config.dtype = dtype
    config.architectures = [type(model).__name__]
    config.save_pretrained(output)
    file = output / "config.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["torch_dtype"] = dtype
    rope = content.get("rope_parameters") or {}
    if "rope_theta" in rope:  # not where every kind of layer has its own, which transformers 4 names by the model
        share = rope.get("partial_rotary_factor", 1.0)
        content |= {"rope_theta": rope["rope_theta"], "partial_rotary_factor": share}
        if config.model_type == "gpt_neox":
            content |= {"rotary_emb_base": rope["rope_theta"], "rotary_pct": share}
        if rope.get("rope_type", "default") != "default":
            content["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    if config.model_type == "gpt2":
        content["n_ctx"] = content["n_positions"]  # llama.cpp's converter knows it by this name
    file.write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8")

"""The Hugging Face module on the mesh: built on the meta device, sharded, then initialised or loaded in place.

No process ever holds the whole model. Everything that leans on transformers' internals is in this file, and is tested
with the oldest and the newest transformers that the package allows.
"""

import contextlib
import copy
import hashlib
import inspect
import json
import pickle
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers import logging as transformers_logging
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model, revert_weight_conversion
from transformers.modeling_utils import LoadStateDictConfig

from tsumugu.config import ParallelConfig
from tsumugu.distributed.parallelize import parallelize
from tsumugu.errors import UserError
from tsumugu.model import lora, masters, nf4
from tsumugu.model.lora import NewRows
from tsumugu.tokenizer.contract import Contract

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}


def read_config(path: str) -> PretrainedConfig:
    """The configuration in a Hugging Face folder, a config.json, or on the hub.

    Raises:
        UserError: There is none, or none that this transformers can read without running code of the folder's.
    """
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # OSError, ValueError, KeyError or a validation error, by the kind of mistake
        reason = " ".join(str(error).split())
        raise UserError(f"no model configuration at {path}: {reason}", "give a folder with a config.json") from None


def take_special_ids(config: PretrainedConfig, contract: Contract) -> None:
    """Gives the configuration the tokenizer's special ids; further stop ids stay where they are markers without text.

    What the configuration says by itself may be of another tokenizer, and its padding id is a row that never learns.
    """
    config.bos_token_id, config.pad_token_id = contract.bos_id, contract.pad_id
    markers = {id for id, size in enumerate(contract.token_bytes) if size == 0} - {contract.unk_id, contract.eos_id}
    ids = [contract.eos_id, *(id for id in stop_ids(config) if id in markers)]
    ids = [id for id in ids if id is not None]
    config.eos_token_id = ids if len(ids) > 1 else next(iter(ids), None)


def stop_ids(config: PretrainedConfig) -> list[int]:
    """The ids at which generation stops; a configuration names none, one or several."""
    ids = config.eos_token_id
    return ids if isinstance(ids, list) else [] if ids is None else [ids]


def generation_config(
    config: PretrainedConfig, contract: Contract | None, template_stops: Sequence[int] = ()
) -> GenerationConfig:
    """Stops at eos and a template's own stop token; ids that stand for no text (reserved ones, padding of the
    vocabulary) are never generated.

    Args:
        config: With the special ids of the tokenizer, by `take_special_ids`.
        contract: Of the tokenizer, if there is one.
        template_stops: The stop token of the template, where it is not eos.
    """
    stops = list(dict.fromkeys([*template_stops, *stop_ids(config)]))
    never: set[int] = set()
    if contract:
        textless = {id for id, size in enumerate(contract.token_bytes) if size == 0}
        never = (textless | set(range(contract.vocab_size, config.vocab_size))) - set(stops)
    return GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=stops or None,
        pad_token_id=config.pad_token_id,
        suppress_tokens=sorted(never) or None,
    )


def meta_model(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The causal language model of a configuration on the meta device: names and shapes, no memory.

    Raises:
        UserError: The configuration is none of a causal language model, or contradicts itself.
    """
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except (ValueError, AssertionError) as error:  # torch asserts that the padding id is one of the vocabulary
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"no causal language model of type {config.model_type}: {reason}", "mend its config") from None


def weight_bytes(config: PretrainedConfig, dtype: torch.dtype, quantize: str | None = None) -> int:
    """Of the whole model as it is used; a tied head counts once.

    Args:
        config: Of the model.
        dtype: Of the computation.
        quantize: Of `model.lora`.
    """
    model = meta_model(config, dtype).requires_grad_(False)
    if quantize:
        nf4.replace(decoder_layers(model), dtype)
    return sum(parameter.nbytes for parameter in model.parameters())


def build_model(
    config: PretrainedConfig,
    mesh: DeviceMesh,
    device: torch.device,
    master_dtype: torch.dtype,
    compute_dtype: torch.dtype,
    fill: Callable[[PreTrainedModel, list], None],
    parallel: ParallelConfig | None = None,
    adapters: lora.Adapters | None = None,
) -> PreTrainedModel:
    """A model, sharded unless parallel.fsdp is false, whose parameters `fill` sets.

    Not sharded, they are in `compute_dtype`; the 16 bits that bfloat16 lacks of its masters are beside them then (see
    `model.masters`).

    Args:
        config: What to build.
        mesh: Axes (replicate, shard), and perhaps tensor.
        device: What this process computes on; its shards live there, or with parallel.offload_optimizer on the host.
        master_dtype: dtype of the parameters.
        compute_dtype: dtype in which they are gathered and used.
        fill: `initialised(seed)`, `pretrained(folder)`, or a function that loads a checkpoint; it is given the model
            and transformers' conversion mapping, taken before sharding renames the classes by which it is found.
        parallel: With nothing left to decide (see `distributed.paths`).
        adapters: What is trained, in `master_dtype`, beside weights that stay as they are, in `compute_dtype`.
    """
    parallel = parallel or ParallelConfig()
    model = meta_model(config, compute_dtype if adapters else master_dtype)
    mapping, transformers_module = get_model_conversion_mapping(model), type(model).__module__
    if adapters:
        lora.add_adapters(model, adapters, master_dtype)
        if adapters.quantize:
            nf4.replace(decoder_layers(model), compute_dtype)
    parallelize(model, decoder_layers(model), mesh, compute_dtype, parallel)
    # transformers takes fully_shard's class for custom code, and does not initialise what GPT-2's attention asks for
    type(model).__module__ = transformers_module
    if parallel.offload_optimizer:
        model.to_empty(device="cpu")
        for module in model.modules():
            module._buffers |= {name: b.to(device) for name, b in module._buffers.items() if b is not None}
    else:
        model.to_empty(device=device)
    with lora.unwrapped(model):
        model.tie_weights()
    fill(model, mapping)
    if parallel.fsdp is False and compute_dtype != master_dtype:
        masters.split(model)
    return model


def adapted_model(
    config: PretrainedConfig, folder: Path, adapters: lora.Adapters, dtype: torch.dtype
) -> PreTrainedModel:
    """A folder's model whole in this process's memory, in its own dtype, with adapters of `dtype` without values."""
    model = meta_model(config, own_dtype(folder))
    mapping = get_model_conversion_mapping(model)
    lora.add_adapters(model, adapters, dtype)
    model.to_empty(device="cpu")
    with lora.unwrapped(model):
        model.tie_weights()
        pretrained(folder, adapters.new_rows)(model, mapping)
        model.requires_grad_(False)  # transformers has put other parameters in their places
    return model


def own_dtype(folder: Path) -> torch.dtype:
    """In which a folder's model is stored, as its configuration says."""
    own = read_config(str(folder)).dtype
    return own if isinstance(own, torch.dtype) else torch.float32


def _device_type(model: PreTrainedModel) -> str:
    """Of the device that computes, also where shards are on the host."""
    parameter = next(model.parameters())
    return parameter.device_mesh.device_type if isinstance(parameter, DTensor) else parameter.device.type


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The modules that transformers names as not to be split: the decoder layers (FSDP2 derives classes of theirs)."""
    names = set(model._no_split_modules or ())
    return [module for module in model.modules() if any(base.__name__ in names for base in type(module).__mro__)]


def parts(model: PreTrainedModel) -> list[list[str]]:
    """The names of what is saved, in pieces that are converted to names on disk by themselves: whole decoder layers,
    and what is in none, tensor by tensor."""
    layers, tied = set(decoder_layers(model)), tied_names(model)
    prefixes = [f"{prefix}." for prefix, module in model.named_modules() if module in layers]
    found: dict[str, list[str]] = {}
    for name in model.state_dict():
        if name not in tied:
            found.setdefault(next(filter(name.startswith, prefixes), name), []).append(name)
    return list(found.values())


def takes_positions(model: PreTrainedModel) -> bool:
    """Whether the forward pass of a model has an argument for positions."""
    return "position_ids" in inspect.signature(model.forward).parameters


def attention_implementation(model: PreTrainedModel) -> str:
    """transformers' name of it: sdpa, eager, ..."""
    return str(model.config._attn_implementation)


def initialised(seed: int) -> Callable[[PreTrainedModel, list], None]:
    """Fills a model by transformers' own initialisation, as a function of the seed alone: equal for every mesh."""

    def fill(model: PreTrainedModel, mapping: list) -> None:
        on_gpu = _device_type(model) == "cuda"
        with torch.random.fork_rng([torch.cuda.current_device()] if on_gpu else []), _WholeDraws():
            torch.manual_seed(seed)
            _run_init_weights(model)
        for module in model.modules():
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                _zero_row(module.weight, module.padding_idx)

    return fill


def with_adapters(base: Callable[[PreTrainedModel, list], None], seed: int) -> Callable[[PreTrainedModel, list], None]:
    """Fills a model that has adapters: its frozen weights by `base`, adapters as a function of the seed alone.

    New rows of the vocabulary begin as those of the frozen weights.
    """

    def fill(model: PreTrainedModel, mapping: list) -> None:
        with lora.unwrapped(model):
            base(model, mapping)
            model.requires_grad_(
                False
            )  # transformers has put other parameters in their places, unless they are sharded
        on_gpu = _device_type(model) == "cuda"
        with torch.random.fork_rng([torch.cuda.current_device()] if on_gpu else []), _WholeDraws():
            torch.manual_seed(seed)
            lora.reset(model)
        for frozen, rows, ids in lora.new_rows(model):
            whole: torch.Tensor = frozen.detach()
            if isinstance(frozen, DTensor):
                local = frozen.to_local().detach().to(frozen.device_mesh.device_type)  # also where it is on the host
                whole = DTensor(local, frozen._spec, requires_grad=False).full_tensor()
            place(whole[ids], rows)

    return fill


def pretrained(folder: Path, new_rows: NewRows = ()) -> Callable[[PreTrainedModel, list], None]:
    """Fills a model from the weights of a Hugging Face folder, each process reading its own slices.

    Args:
        folder: Of the weights.
        new_rows: Ids that the folder's tokenizer lacks, and the earlier ids that each stands for: its rows of the input
            embedding and of the head are the mean of theirs, or of all rows before the first new one where it stands
            for none. The folder's rows may be too few, or have been spare until now.

    The filling raises UserError, on every process, where weights are missing, unexpected or of another shape.
    """

    def fill(model: PreTrainedModel, mapping: list) -> None:
        device = next(model.parameters()).device
        rebuild_buffers(model)
        tied = tied_names(model)
        with _weights(folder) as state_dict, quiet():
            if new_rows:
                state_dict |= _grown(model, state_dict, dict(new_rows))
            load_config = LoadStateDictConfig(device_map={"": device}, weight_mapping=mapping, dtype=model.dtype)
            report, _ = convert_and_load_state_dict_in_model(model, state_dict, load_config)
            _move_shards(model, device)
            model.tie_weights(missing_keys=report.missing_keys, recompute_mapping=False)
        model._adjust_missing_and_unexpected_keys(report)
        faults = {
            "missing": report.missing_keys,
            "unexpected": report.unexpected_keys,
            "of another shape": {key for key, *_ in report.mismatched_keys},
            "not convertible": set(report.conversion_errors),
            "tied by the config, yet of other values": tied - tied_names(model),  # transformers unties them
        }
        everywhere: list = [faults]
        if dist.is_initialized():
            everywhere = [None] * dist.get_world_size()
            dist.all_gather_object(everywhere, faults)  # a shape can differ on one process's slice alone
        for fault in faults:
            keys = sorted(set().union(*(faults[fault] for faults in everywhere)))
            if keys:
                shown = ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
                raise UserError(f"{folder}: weights {fault}: {shown}", "the folder is not a checkpoint of its config")

    return fill


def quantized(folder: Path, new_rows: NewRows = ()) -> Callable[[PreTrainedModel, list], None]:
    """As `pretrained`, for a model whose frozen linear layers are held in NF4, made from the folder's own dtype.

    Each process reads its shards into host memory, and quantises them there layer by layer, on its device.
    """

    def fill(model: PreTrainedModel, mapping: list) -> None:
        rebuild_buffers(model)
        own, device, first = own_dtype(folder), torch.device(_device_type(model)), next(model.parameters())
        shape, names = (1, 1), ("replicate", "shard")
        if isinstance(first, DTensor):
            shape, names = tuple(first.device_mesh.shape), first.device_mesh.mesh_dim_names
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        config, parallel = copy.deepcopy(model.config), ParallelConfig(fsdp=isinstance(first, DTensor))
        source = build_model(config, mesh, torch.device("cpu"), own, own, pretrained(folder, new_rows), parallel)
        for name, module in model.named_modules():
            for key, stored in source.get_submodule(name)._parameters.items():
                if stored is None:
                    continue
                if key == "weight" and isinstance(module, nf4.Linear):
                    nf4.fill(module, _local(stored).to(device))
                else:
                    _local(module.get_parameter(key)).detach().copy_(_local(stored))

    return fill


def quantized_names(model: PreTrainedModel) -> set[str]:
    """Of a model without adapters the weights that `quantized` would quantise."""
    modules = {module for layer in decoder_layers(model) for module in layer.modules() if isinstance(module, nn.Linear)}
    return {f"{name}.weight" for name, module in model.named_modules() if module in modules}


def _move_shards(model: PreTrainedModel, device: torch.device) -> None:
    """Puts shards where they were: transformers makes them on the device of the mesh, also those that are offloaded."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if isinstance(parameter, DTensor) and parameter.to_local().device.type != device.type:
                local = parameter.to_local().detach().to(device)
                moved = DTensor(local, parameter._spec, requires_grad=False)
                module._parameters[name] = nn.Parameter(moved, requires_grad=parameter.requires_grad)


def _grown(model: PreTrainedModel, state_dict: dict[str, Any], new_rows: dict[int, Sequence[int]]) -> dict[str, Any]:
    """The tensors on disk of the embedding and the head, with new rows."""
    whole = meta_model(model.config, torch.float32)
    names = vocabulary_names(whole)
    on_disk = [disk for name in names for disk in disk_names(whole, {name: whole.get_parameter(name)})]
    # A folder of the model without its head leaves the prefix out.
    found = {key for key in state_dict for name in on_disk if name == key or name.endswith(f".{key}")}
    return {key: _Grown(state_dict[key], model.config.vocab_size, new_rows) for key in found}


def vocabulary_names(model: PreTrainedModel) -> set[str]:
    """Names of the parameters that have a row for every id: those of the input embedding and of the head."""
    modules = [module for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module is not None]
    parameters = {id(parameter) for module in modules for parameter in module.parameters()}
    return {name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in parameters}


def grown(tensor: torch.Tensor, size: int, new_rows: NewRows) -> torch.Tensor:
    """A whole tensor (ids, ...) with `size` rows, the new ones made as `pretrained` says."""
    return _Grown(tensor, size, dict(new_rows))[...]


def place(whole: torch.Tensor, parameter: torch.Tensor) -> None:
    """Copies a tensor that every process has whole into a parameter, or into this process's shard of it."""
    with torch.no_grad():
        if isinstance(parameter, DTensor):
            parameter.to_local().copy_(own_slice(whole, parameter))
        else:
            parameter.copy_(whole)


def own_slice(whole: torch.Tensor, sharded: DTensor) -> torch.Tensor:
    """The part of a tensor like `sharded` (or one that broadcasts to it) that this process holds of that.

    It is one block also where a dimension is split twice, by shard and tensor: `distributed.tensor` sees to it that the
    latter's parts are equal. torch's `distribute_tensor` would communicate, and has known that case only lately.
    """
    shape, offsets = compute_local_shape_and_global_offset(sharded.shape, sharded.device_mesh, sharded.placements)
    for dimension, (size, offset) in enumerate(zip(shape, offsets, strict=True)):
        if whole.shape[dimension] != 1 or sharded.shape[dimension] == 1:
            whole = whole.narrow(dimension, min(offset, whole.shape[dimension]), size)
    return whole


class _Grown:
    """A tensor on disk with rows replaced or added, each read when it is sliced, as transformers asks for it."""

    def __init__(self, stored: Any, size: int, new_rows: dict[int, Sequence[int]]):
        self.stored, self.new_rows = stored, new_rows
        shape = list(stored.shape) if isinstance(stored, torch.Tensor) else stored.get_shape()
        self.rows, self.shape = shape[0], [size, *shape[1:]]

    def get_shape(self) -> list[int]:
        return self.shape

    def __getitem__(self, index: Any) -> torch.Tensor:
        rows, *columns = (slice(None),) if index is ... else index
        start, stop, _ = rows.indices(self.shape[0])
        part = torch.zeros(stop - start, *self.shape[1:])  # rows that neither had a meaning nor get one
        end = max(start, min(stop, self.rows))
        part[: end - start] = self.stored[start:end]
        for row in range(start, stop):
            if row in self.new_rows:
                part[row - start] = self._row(row)
        return part[(slice(None), *columns)]

    def _row(self, row: int) -> torch.Tensor:
        if row not in self.new_rows:
            return self.stored[row : row + 1][0].float()
        first = min(self.new_rows)
        if not self.new_rows[row]:
            return self.stored[: min(first, self.rows)].float().mean(0)
        return torch.stack([self._row(earlier) for earlier in self.new_rows[row]]).mean(0)


def find_pretrained(name: str) -> Path:
    """The local folder of a model: the folder itself, or a snapshot of the hub's (safetensors where it has them)."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        folder = Path(
            snapshot_download(name, allow_patterns=["*.json", "*.jinja", "*.model", "model*.safetensors", "README.md"])
        )
        if not any(folder.glob("model*.safetensors")):
            snapshot_download(name, allow_patterns="pytorch_model*.bin")
        return folder
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"model.pretrained {name}: no such folder, nor on the hub: {reason}", "check it") from None


def weights_sha256(folder: Path) -> str:
    """Of the contents of a folder's weight files, whatever their names; it reads them whole."""
    digests = []
    for file in _weight_files(folder):
        with open(file, "rb") as stream:
            digests.append(hashlib.file_digest(stream, "sha256").digest())
    return hashlib.sha256(b"".join(digests)).hexdigest()


def disk_names(model: PreTrainedModel, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict in memory's names as transformers' `save_pretrained` would write it."""
    return revert_weight_conversion(model, state_dict)


def tied_names(model: PreTrainedModel) -> set[str]:
    """Names of parameters that are another parameter under a second name, and are not saved."""
    return set(model.all_tied_weights_keys)


def rebuild_buffers(model: PreTrainedModel) -> None:
    """Recomputes the buffers that no checkpoint holds, such as rotary frequencies; parameters stay as they are."""
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    _run_init_weights(model)


def _run_init_weights(model: PreTrainedModel) -> None:
    embeddings = {module: module.padding_idx for module in model.modules() if isinstance(module, nn.Embedding)}
    for module in embeddings:
        module.padding_idx = None  # transformers would zero that row of a slice that DTensor makes, a copy or an error
    model.init_weights()
    for module, row in embeddings.items():
        module.padding_idx = row
    for module in model.modules():  # so that it can be run again
        module.__dict__.pop("_is_hf_initialized", None)


class _WholeDraws(TorchDispatchMode):
    """Draws what fills a sharded tensor whole, on every process alike, and keeps this process's slice.

    By itself a DTensor on CPUs draws each shard from the same seed, so that the shards of a matrix would be identical.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags or not (args and isinstance(args[0], DTensor)):
            return func(*args, **kwargs)
        assert func.overloadpacket.__name__.endswith("_"), f"{func} draws a new tensor, which is not sliced here"
        tensor = args[0]
        # on the device that computes, also where the shards are on the host: the numbers are those of its generator
        whole = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device_mesh.device_type)
        func(whole, *args[1:], **kwargs)
        tensor.to_local().copy_(own_slice(whole, tensor))
        return tensor


def _zero_row(weight: torch.Tensor, row: int) -> None:
    keep = torch.ones(weight.shape[0], 1, dtype=weight.dtype, device=weight.device)
    keep[row] = 0
    with torch.no_grad():
        if isinstance(weight, DTensor):
            weight.to_local().mul_(own_slice(keep, weight))
        else:
            weight.mul_(keep)


@contextlib.contextmanager
def _weights(folder: Path) -> Iterator[dict[str, Any]]:
    """Every tensor of a folder by its name on disk, read when it is sliced."""
    with contextlib.ExitStack() as stack:
        state_dict: dict[str, Any] = {}
        for file in _weight_files(folder):
            try:
                if file.suffix == ".safetensors":
                    opened = stack.enter_context(safe_open(file, framework="pt"))
                    state_dict |= {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
                else:  # torch before 1.6 wrote no zip file, and only those can be mapped
                    mapped = zipfile.is_zipfile(file)
                    content = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
                    if not is_state_dict(content):
                        raise TypeError("not tensors by name")
                    state_dict |= content
            except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, TypeError) as error:
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise UserError(f"{file} holds no plain weights: {reason}", "copy the model anew") from None
        yield state_dict


def is_state_dict(content: Any) -> bool:
    """Whether something that torch has loaded is tensors by name, and nothing else."""
    return isinstance(content, dict) and all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in content.items()
    )


def _weight_files(folder: Path) -> list[Path]:
    """The files that stock `from_pretrained` would read, in its order of preference."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).exists():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.exists():
            try:
                names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError):
                raise UserError(f"{index} is no index of weights", "copy the model anew") from None
            astray = [file for file in names if Path(file).name != file or not (folder / file).is_file()]
            if astray:
                raise UserError(f"{index} names files that are not in the folder: {', '.join(astray)}", "copy them")
            return [folder / file for file in names]
    raise UserError(f"{folder} holds no weights", "it needs model*.safetensors or pytorch_model*.bin")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' own progress bars, of which every process would draw one, and its tables of keys."""
    was_on, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if was_on:
            transformers_logging.enable_progress_bar()


def barrier_first(local_rank: int, action: Callable[[], Any]) -> Any:
    """Runs `action` on the first process of each host before the others, so that a download happens once."""
    result, error = None, None
    if local_rank == 0:
        try:
            result = action()
        except Exception as raised:  # the others must not wait for it
            error = raised
    errors: list = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    for error in errors:
        if error is not None:
            raise error
    return result if local_rank == 0 else action()

"""LoRA: small matrices beside frozen linear layers, by the peft library (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

peft wraps modules, so that the names of the frozen weights change; `unwrapped` lays the wrappers aside for whatever
knows a model by transformers' own names. Rows of the vocabulary that the base model lacks are trained beside the
adapters, and its other rows are frozen. peft is imported where it is used: it is an extra.
"""

import contextlib
import importlib.util
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tsumugu.errors import UserError
from tsumugu.model import nf4

NAME = "default"  # peft's for the only adapter of a model

NewRows = Sequence[tuple[int, Sequence[int]]]


@dataclass(frozen=True, kw_only=True)
class Adapters:
    """What the adapters of a run are, but for their weights: checkpoints keep it as JSON."""

    rank: int
    alpha: float
    dropout: float
    targets: list[str]
    """Last parts of the names of the adapted layers."""
    new_rows: NewRows
    """Ids that the base model lacks, and the earlier ids that each stood for, as for `model.build.pretrained`."""
    base: str
    """The folder or hub name of the base model."""
    base_sha256: str
    """Of its weights."""
    quantize: str | None
    """How the frozen linear layers are held: nf4, or as the computation uses them."""


def check_installed() -> None:
    """Raises UserError where peft is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise UserError("model.lora needs the peft package", "pip install 'tsumugu[lora]'")


def find_targets(layers: Sequence[nn.Module], asked: Sequence[str] | None) -> list[str]:
    """The last parts of the names of the layers to adapt: those asked for, by default every linear layer.

    Args:
        layers: The decoder layers.
        asked: From the configuration.

    Raises:
        UserError: A name that no linear layer has.
    """
    linear = [name for layer in layers for name, m in layer.named_modules() if isinstance(m, (nn.Linear, Conv1D))]
    known = list(dict.fromkeys(name.rpartition(".")[2] for name in linear))
    for name in asked or ():
        if name not in known:
            raise UserError(
                f"model.lora.targets names {name}, which is no linear layer of the model's decoder",
                f"it has: {', '.join(known)}",
            )
    return [name for name in known if asked is None or name in asked]


def add_adapters(model: PreTrainedModel, adapters: Adapters, master_dtype: torch.dtype) -> None:
    """Freezes a model on the meta device, and puts adapters of `master_dtype` into it, without values.

    Raises:
        UserError: New rows of a head that has a bias, which peft would leave out.
    """
    from peft import inject_adapter_in_model

    head: Any = model.get_output_embeddings()
    if adapters.new_rows and head.bias is not None:
        raise UserError(
            "model.lora cannot train new rows of the vocabulary where the model's head has a bias",
            "train without model.lora, or with the model's own tokenizer",
        )
    config = peft_config(model, adapters)
    with warnings.catch_warnings():
        # what to do about tied weights when saving the adapter's embedding, which is not saved
        warnings.filterwarnings("ignore", module="peft")
        inject_adapter_in_model(config, model, NAME, low_cpu_mem_usage=True)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(master_dtype)


def peft_config(model: PreTrainedModel, adapters: Adapters) -> Any:
    """peft's description of the adapters of a model without them."""
    import peft

    ids = [id for id, _ in adapters.new_rows]
    names = {module: name for name, module in model.named_modules()}
    ends = [names[model.get_input_embeddings()]]
    if not model.config.tie_word_embeddings:  # else peft finds the head by itself
        ends.append(names[model.get_output_embeddings()])
    return peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=adapters.rank,
        lora_alpha=adapters.alpha,  # type: ignore[arg-type]  # which peft does no more with than to divide it
        lora_dropout=adapters.dropout,
        target_modules=adapters.targets,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        trainable_token_indices=dict.fromkeys(ends, ids) if ids else None,
        base_model_name_or_path=adapters.base,
    )


@contextlib.contextmanager
def unwrapped(model: nn.Module) -> Iterator[None]:
    """Inside, a model has the modules and names that it had before `add_adapters`; without adapters nothing changes."""
    layers, vocabulary = _wrappers(model)
    for name, wrapper in layers.items():
        model.set_submodule(name, wrapper.base_layer)
    for name, wrapper in vocabulary.items():
        model.set_submodule(name, wrapper.token_adapter.base_layer)
    try:
        yield
    finally:
        for name, wrapper in (layers | vocabulary).items():
            model.set_submodule(name, wrapper)


def is_adapted(model: nn.Module) -> bool:
    """Whether a model has adapters, and is not `unwrapped`."""
    return any(_wrappers(model))


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained, by name; once where embedding and head are tied."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def disk_name(name: str) -> str:
    """peft's name on disk, but for its prefix, of a parameter of `trained`."""
    return ".".join(part for part in name.split(".") if part != NAME)


def reset(model: nn.Module) -> None:
    """Gives adapters their first values: B is zero, A is drawn as peft does, in the order of the modules."""
    layers, _ = _wrappers(model)
    for wrapper in layers.values():
        wrapper.reset_lora_parameters(NAME, True)


def new_rows(model: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter, list[int]]]:
    """For embedding and head, once where they are tied: the frozen weight, the rows trained in its place, their ids."""
    _, vocabulary = _wrappers(model)
    adapters = [wrapper.token_adapter for wrapper in vocabulary.values()]
    return [
        (adapter.base_layer.weight, adapter.trainable_tokens_delta[NAME], adapter.token_indices[NAME])
        for adapter in adapters
        if adapter.tied_adapter is None
    ]


def merged(
    model: PreTrainedModel, dtype: torch.dtype, quantized: Collection[str] = ()
) -> Callable[[str], torch.Tensor]:
    """A function that gives a weight of the base model by its name, with what was trained.

    Args:
        model: Whole, with adapters in `merging_dtype(dtype)`, in which they are multiplied and added.
        dtype: Of the result.
        quantized: Names of weights that were held in NF4, and are what that made of them.
    """
    layers, vocabulary = _wrappers(model)
    with unwrapped(model):
        base = model.state_dict()
    held = {name: nf4.quantize(base.pop(name)) for name in quantized}

    @torch.no_grad()
    def weight(name: str) -> torch.Tensor:
        module = name.removesuffix(".weight")
        tensor = nf4.dequantize(*held[name], torch.float32) if name in held else base[name]
        tensor = tensor.to(merging_dtype(dtype))
        if module in layers and name.endswith(".weight"):
            tensor = tensor + layers[module].get_delta_weight(NAME)
        if module in vocabulary:
            adapter = vocabulary[module].token_adapter
            ids = torch.tensor(adapter.token_indices[NAME])
            tensor = tensor.index_copy(0, ids, adapter.trainable_tokens_delta[NAME])
        return tensor.to(dtype)

    return weight


@dataclass(frozen=True)
class Unmerged:
    """A model with its adapters beside its weights, as it computes in training.

    Attributes:
        weight: A weight of the base model by its name, with the rows of new ids, and without adapters.
        factors: By the name of a layer its A (rank, inputs) and B (outputs, rank).
        scale: Of B · A.
    """

    weight: Callable[[str], torch.Tensor]
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]]
    scale: float


def unmerged(model: PreTrainedModel, adapters: Adapters, quantized: Collection[str] = ()) -> Unmerged:
    """What `merged` adds up, kept apart, by the names of what was trained alone and no code of peft: to compare with.

    Args:
        model, quantized: As of `merged`.
        adapters: What the model was made with.
    """
    factors: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    rows = {}
    for name, parameter in trained(model).items():
        if ".token_adapter." in name:
            rows[f"{name.partition('.token_adapter.')[0]}.weight"] = parameter.detach()
        else:
            layer, factor, _ = re.split(r"\.(lora_[AB])\.", name)
            factors[layer][factor] = parameter.detach()
    with unwrapped(model):
        base = model.state_dict()
    ids = [id for id, _ in adapters.new_rows]

    def weight(name: str) -> torch.Tensor:
        tensor = base[name]
        if name in quantized:
            tensor = nf4.dequantize(*nf4.quantize(tensor), torch.float32)
        if name in rows:
            tensor = tensor.to(rows[name].dtype, copy=True)
            tensor[ids] = rows[name]
        return tensor

    pairs = {layer: (pair["lora_A"], pair["lora_B"]) for layer, pair in factors.items()}
    return Unmerged(weight, pairs, adapters.alpha / adapters.rank)


def merging_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which adapters are merged for an export in `dtype`."""
    return torch.promote_types(dtype, torch.float32)


def _wrappers(model: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """peft's modules in place of linear layers, and in place of the embedding and the head, by name."""
    modules = dict(model.named_modules())
    layers = {name: module for name, module in modules.items() if "lora_A" in module._modules}
    return layers, {name: module for name, module in modules.items() if "token_adapter" in module._modules}

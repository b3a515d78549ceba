"""Tensor parallelism: transformers' own plan for an architecture, carried out by torch's parallel styles.

A tensor group reads the same rows. Each of its processes holds some heads, some columns of the MLP and some rows of the
vocabulary; what the plan does not name, it holds whole. The plan is the model's `tp_plan`: names of modules with * for
numbers → names of styles. It leaves the embedding open, which is split by the vocabulary as the head is, so that both
can be one parameter.
"""

import re
import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module
from transformers import PreTrainedModel

from tsumugu.errors import UserError

_PARTIAL = "replicated_with_grad_allreduce"  # norms of heads: whole everywhere, but each process sees its heads alone
_EMBEDDING = "embedding_rowwise"
_HINT = "set parallel.tensor_degree to 1"


def check_plan(model: PreTrainedModel, degree: int) -> None:
    """Raises UserError where a model cannot be split exactly, or not in so many parts."""
    config, plan = model.config, _plan(model)
    if not any("*" in name for name in plan):  # some have one of the head alone
        raise UserError(f"transformers has no plan for tensor parallelism of a {config.model_type} model", _HINT)
    unknown = sorted(set(plan.values()) - {"colwise", "rowwise", "colwise_gather_output", _PARTIAL, _EMBEDDING})
    if unknown:
        raise UserError(
            f"transformers' plan for tensor parallelism of a {config.model_type} model has {', '.join(unknown)}, which "
            "tsumugu cannot carry out",
            _HINT,
        )
    for name in _left_out(model, plan):
        raise UserError(f"transformers' plan for tensor parallelism of a {config.model_type} model lacks {name}", _HINT)
    for key in ("num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size"):
        size = getattr(config, key, None)
        if size is not None and size % degree:
            raise UserError(
                f"parallel.tensor_degree {degree} does not divide the model's {key} {size}",
                "choose a degree that divides it",
            )
    for key, value in config.to_dict().items():
        dropout = re.search("drop(out)?$|dropout_prob$", key) and not key.startswith("classifier")
        if dropout and isinstance(value, float) and value > 0:
            raise UserError(
                f"the model's {key} is {value}, and dropout cannot be drawn alike on the parts of a split model",
                f"set {key} to 0 in the model's configuration, or parallel.tensor_degree to 1",
            )


def split(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Splits a model, checked and on the meta device, over a mesh of one axis, before anything wraps its modules."""
    # the gathered logits, which nothing changes in place
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for name, style in _plan(model).items():
        for module in _named(model, name):
            if (parallel := _style(style)) is not None:
                parallelize_module(module, mesh, parallel)
    model.tie_weights()


def whole_parameters(model: PreTrainedModel) -> list[tuple[nn.Parameter, bool]]:
    """What every process of a tensor group holds whole, and whether each has only a part of its gradient."""
    plan = _plan(model)
    partial = {id(p) for name in plan if plan[name] == _PARTIAL for m in _named(model, name) for p in m.parameters()}
    return [(p, id(p) in partial) for p in model.parameters() if not _is_split(p)]


def reduce_gradients(parameters: list[tuple[nn.Parameter, bool]], mesh: DeviceMesh) -> None:
    """Sums the partial gradients of `whole_parameters` over the tensor group, and takes the mean of the others.

    Those are equal but for rounding, in which compiled kernels may differ between processes; without the mean the
    copies of a parameter could drift apart.
    """
    gradients = [(p.grad, partial) for p, partial in parameters if p.grad is not None]
    if not gradients:
        return  # a model whose norms have no weights
    local = [(g.to_local() if isinstance(g, DTensor) else g, partial) for g, partial in gradients]
    flat = torch.cat([(g if partial else g / mesh.size()).flatten() for g, partial in local])
    dist.all_reduce(flat, group=mesh.get_group())
    parts = flat.split([g.numel() for g, _ in local])
    torch._foreach_copy_([g for g, _ in local], [part.view_as(g) for (g, _), part in zip(local, parts, strict=True)])


def _plan(model: PreTrainedModel) -> dict[str, str]:
    """By full names of modules, with that of the embedding where the head is split."""
    plan: dict[str, str] = dict(model._tp_plan or {})
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    plan = {name: style for name, style in plan.items() if style != _EMBEDDING}
    splits_head = any(module is head for name in plan for module in _named(model, name))
    if splits_head:
        plan |= {name: _EMBEDDING for name, module in model.named_modules() if module is embedding}
    return plan


def _named(model: nn.Module, pattern: str) -> list[nn.Module]:
    expression = re.compile(re.escape(pattern).replace(r"\*", "[0-9]+"))
    return [module for name, module in model.named_modules() if expression.fullmatch(name)]


def _left_out(model: nn.Module, plan: dict[str, str]) -> list[str]:
    """Parameters that stand beside those that are split and are not in the plan: they would see a part of the heads."""
    planned = {module for name in plan if plan[name] != _EMBEDDING for module in _named(model, name)}
    found = []
    for name, module in model.named_modules():
        if module is model or planned.isdisjoint(module.children()):
            continue
        beside = [("", module), *((f".{n}", m) for n, m in module.named_children() if m not in planned)]
        found += [f"{name}{n}.{p}" for n, m in beside for p, _ in m.named_parameters(recurse=False)]
    return found


def _style(name: str) -> ParallelStyle | None:
    """torch's style of that name; None: the module is left whole."""
    match name:
        case "colwise":
            return ColwiseParallel()
        case "colwise_gather_output":
            return ColwiseParallel(output_layouts=Replicate())
        case "rowwise":
            return RowwiseParallel()
        case "embedding_rowwise":
            return RowwiseParallel(input_layouts=Replicate())
    return None


def _is_split(parameter: torch.Tensor) -> bool:
    """Whether the processes of a tensor group hold different parts of it."""
    assert isinstance(parameter, DTensor)
    axes = parameter.device_mesh.mesh_dim_names or ()
    return "tensor" in axes and not parameter.placements[axes.index("tensor")].is_replicate()

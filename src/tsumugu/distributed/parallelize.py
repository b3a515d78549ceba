"""Laying a model on the meta device over the mesh: splitting (or fp8) → recomputation → compile → offloading → FSDP2.

All but the first wrap the `forward` of a decoder layer, so that the hooks of FSDP2 stay outside and no parameter
changes its name. None changes what is computed, but for rounding where the compiler fuses operations.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch._functorch.config as functorch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from tsumugu.config import ParallelConfig
from tsumugu.distributed.tensor import check_plan, split
from tsumugu.errors import UserError
from tsumugu.kernels.linear import SummedLinear

# Matrix products and attention, by the names of torch's operators, whichever of them this torch has.
_KEPT = {
    *("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear", "aten::_scaled_mm"),
    *("aten::_scaled_dot_product_flash_attention", "aten::_scaled_dot_product_flash_attention_for_cpu"),
    *("aten::_scaled_dot_product_efficient_attention", "aten::_scaled_dot_product_cudnn_attention"),
    *("aten::_scaled_dot_product_fused_attention_overrideable", "aten::_flash_attention_forward"),
    *("aten::_efficient_attention_forward", "torch_attn::_varlen_attn", "flex_attention"),
    "tsumugu::nf4_product",
}
SMALLEST_OFFLOADED = 2**20  # bytes; a copy of less costs more than the memory is worth


def parallelize(
    model: PreTrainedModel,
    layers: list[nn.Module],
    mesh: DeviceMesh,
    compute_dtype: torch.dtype,
    config: ParallelConfig,
) -> None:
    """Shards `model` in place: every decoder layer is a group of its own, the rest is the root's.

    With parallel.fsdp false parameters stay plain tensors, and the rest is done.

    Parameters keep their dtype (the master weights); they are gathered in `compute_dtype`. Frozen ones may have another
    dtype than those that are trained. Gradients are reduced in
    the parameters' dtype as plain sums: the loss is already divided by the global token count, gloo has no
    pre-multiplied sum, and NCCL's rounds in bf16.

    Args:
        model: On the meta device.
        layers: Its decoder layers, in their order.
        mesh: Axes (replicate, shard), and perhaps tensor.
        compute_dtype: In which weights are gathered and used.
        config: With nothing left to decide (see `distributed.paths`).

    Raises:
        UserError: The model cannot be split by parallel.tensor_degree, has nothing that parallel.fp8 multiplies, or
            recomputation would draw another dropout than forward did.
    """
    budget = config.activation_memory_budget  # torch knows it as a setting of the whole process
    functorch.activation_memory_budget = 1.0 if budget is None else budget
    split_by_tensor = "tensor" in (mesh.mesh_dim_names or ())
    if split_by_tensor:
        check_plan(model, mesh["tensor"].size())
        split(model, mesh["tensor"])
    attention_drops = any(getattr(model.config, name, 0) for name in ("attention_dropout", "attn_pdrop"))
    if attention_drops and mesh.device_type == "cuda":
        _check_dropout(config)
    for index, layer in enumerate(layers):
        if config.fp8:
            _multiply_in_fp8(layer, config.fp8)
        if is_recomputed(index, config):
            layer.forward = recomputed(layer.forward, config.activation_checkpointing == "selective")
        if config.compile:
            # with changing sizes, torch's compiler does not come to an end for layers that are split
            layer.forward = torch.compile(layer.forward, dynamic=False if split_by_tensor else None)
        if config.offload_activations and mesh.device_type == "cuda":
            layer.forward = _offloaded(layer.forward, layer)

    if config.fsdp is False:
        return
    master_dtype = next(parameter.dtype for parameter in model.parameters() if parameter.requires_grad)
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype if compute_dtype != master_dtype else None, reduce_dtype=master_dtype
    )
    offload = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if config.offload_optimizer else OffloadPolicy()
    shard = functools.partial(fully_shard, mesh=mesh["replicate", "shard"], mp_policy=policy, offload_policy=offload)
    for layer in layers:
        shard(layer, reshard_after_forward=config.reshard_after_forward != "never")
    shard(model)  # the root stays gathered after forward: its head is the first to be used by backward
    for module in fsdp_modules(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    if config.prefetch > 1:
        _prefetch([module for module in layers if isinstance(module, FSDPModule)], config.prefetch)


def is_recomputed(index: int, config: ParallelConfig) -> bool:
    """Whether backward computes again what the decoder layer of that number keeps otherwise."""
    return config.activation_checkpointing != "none" and index % config.checkpoint_every_nth_layer == 0


def _multiply_in_fp8(layer: nn.Module, recipe: str) -> None:
    def fits(module: nn.Module, name: str = "") -> bool:
        return isinstance(module, nn.Linear) and module.in_features % 16 == module.out_features % 16 == 0

    if not any(map(fits, layer.modules())):  # such as GPT-2's, which are Conv1D
        raise UserError(
            f"parallel.fp8 is {recipe}, but {type(layer).__name__} has no linear layer of sizes that 16 divides",
            "leave it out",
        )
    from torchao.float8 import (  # pyright: ignore[reportMissingImports]
        Float8LinearConfig,
        convert_to_float8_training,
    )

    convert_to_float8_training(layer, config=Float8LinearConfig.from_recipe_name(recipe), module_filter_fn=fits)


def _check_dropout(config: ParallelConfig) -> None:
    """Refuses the two combinations that, on a GPU, do not repeat what attention's dropout drew (on a CPU both do).

    Kept attention does not draw again, so that what follows it in an eager layer drops otherwise (gradients off by
    31 %); and compiled full recomputation took numbers that no seed decided.
    """
    recomputation, compiled = config.activation_checkpointing, bool(config.compile)
    if (recomputation, compiled) in (("selective", False), ("full", True)):
        other = "full" if recomputation == "selective" else "selective"
        raise UserError(
            f"the model has dropout in attention, which parallel.activation_checkpointing {recomputation} "
            f"{'with' if compiled else 'without'} parallel.compile does not repeat",
            f"set parallel.activation_checkpointing {other}, or parallel.compile {str(not compiled).lower()}",
        )


def reshard(model: nn.Module) -> None:
    """Drops gathered weights, which forward without backward leaves in memory."""
    for module in fsdp_modules(model):
        module.reshard()


def fsdp_modules(model: nn.Module) -> list[FSDPModule]:
    """Those whose parameters are gathered and exchanged together: the decoder layers, and the root with the rest."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _prefetch(layers: list[FSDPModule], count: int) -> None:
    """Gathers `count` layers ahead, where FSDP2 by itself gathers one while the one before it is computed."""
    for index, layer in enumerate(layers):
        layer.set_modules_to_forward_prefetch(layers[index + 1 : index + 1 + count])
        layer.set_modules_to_backward_prefetch(layers[max(0, index - count) : index][::-1])


def recomputed(forward: Callable[..., Any], selective: bool) -> Callable[..., Any]:
    """`forward` whose intermediate results are computed again by backward, with the same dropout.

    Selectively: all but the results of matrix products and attention, which cost most time and are kept.
    """
    options: dict[str, Any] = {"use_reentrant": False}
    if selective:
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)

    @functools.wraps(forward)
    def again(*args, **kwargs):
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, **options, **kwargs)

    return again


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = operator.name() if isinstance(operator, torch._ops.OpOverload) else str(operator)
    kept = name.partition(".")[0] in _KEPT
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _offloaded(forward: Callable[..., Any], layer: nn.Module) -> Callable[..., Any]:
    """`forward` whose tensors for backward wait in pinned host memory, copied on a stream of their own.

    What is not of the activations is left alone (see `_storages`). Backward queues the copies back ahead of its work,
    as far as the host is ahead of the device.
    """
    stream: torch.cuda.Stream | None = None

    @functools.wraps(forward)
    def offloaded(*args, **kwargs):
        nonlocal stream
        copies = stream = stream or torch.cuda.Stream()
        own = _storages(layer)

        def pack(tensor: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.device, tuple[int, ...]]:
            small = tensor.nbytes < SMALLEST_OFFLOADED or 0 in tensor.stride()
            if small or not tensor.is_cuda or tensor.untyped_storage().data_ptr() in own:
                return tensor
            copies.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(copies):
                packed = torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
            tensor.record_stream(copies)
            return packed, tensor.device, tensor.stride()

        def unpack(packed: torch.Tensor | tuple[torch.Tensor, torch.device, tuple[int, ...]]) -> torch.Tensor:
            if isinstance(packed, torch.Tensor):
                return packed
            host, device, strides = packed
            with torch.cuda.stream(copies):
                # as it lay, which compiled code relies on, also where it was a part of another tensor
                tensor = torch.empty_strided(host.shape, strides, dtype=host.dtype, device=device)
                tensor.copy_(host, non_blocking=True)
            torch.cuda.current_stream().wait_stream(copies)
            tensor.record_stream(torch.cuda.current_stream())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return forward(*args, **kwargs)

    return offloaded


def _storages(layer: nn.Module) -> set[int]:
    """Where the weights of a layer lie, which FSDP2 has gathered again, and the sums of their gradients: to those
    backward adds, and would add to a copy."""
    local = [p.to_local() if isinstance(p, DTensor) else p for p in layer.parameters()]
    sums = [module.weight_sum.total for module in layer.modules() if isinstance(module, SummedLinear)]
    return {tensor.untyped_storage().data_ptr() for tensor in local + sums}

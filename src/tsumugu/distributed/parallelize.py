"""Laying a model on the meta device over the mesh with FSDP2."""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard


def shard(model: nn.Module, layers: list[nn.Module], mesh: DeviceMesh, compute_dtype: torch.dtype) -> None:
    """Shards `model` in place: every decoder layer is a group of its own, the rest is the root's.

    Parameters keep their dtype (the master weights); they are gathered in `compute_dtype`. Gradients are reduced in
    the parameters' dtype as plain sums: the loss is already divided by the global token count, gloo has no
    pre-multiplied sum, and NCCL's rounds in bf16.
    """
    master_dtype = next(model.parameters()).dtype
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype if compute_dtype != master_dtype else None, reduce_dtype=master_dtype
    )
    for module in [*layers, model]:
        fully_shard(module, mesh=mesh, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)

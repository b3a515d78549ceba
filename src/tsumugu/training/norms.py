"""Norms of parameters and gradients by part of the model, over all processes."""

import math
import re
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from tsumugu.model import masters


def parts(model: PreTrainedModel) -> dict[str, list[nn.Parameter]]:
    """What is trained, by part: embedding, layer.0 and so on, head (if it is not tied), and the rest by module name."""
    where = {}
    for name, parameter in model.named_parameters():
        layer = re.search(r"\.([0-9]+)\.", name)
        where[id(parameter)] = f"layer.{layer[1]}" if layer else name.split(".")[-2]
    head = model.get_output_embeddings()
    where |= {id(parameter): "head" for parameter in (head.parameters() if head is not None else ())}
    where |= {id(parameter): "embedding" for parameter in model.get_input_embeddings().parameters()}
    result: dict[str, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            result.setdefault(where[id(parameter)], []).append(parameter)
    return result


def squared_norms(model: PreTrainedModel) -> torch.Tensor:
    """(2, parts) on the device, in float64: the squared norms of parameters and gradients, over all processes.

    Every process calls it, between backward and `zero_grad`; it does not wait for the device.
    """
    of_parts = parts(model).values()
    sums = torch.stack(
        [
            torch.stack([_own_shares([_whole(parameter) for parameter in part]) for part in of_parts]),
            torch.stack([_own_shares([p.grad for p in part if p.grad is not None]) for part in of_parts]),
        ]
    )
    dist.all_reduce(sums)
    return sums


def total_norm(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The norm of all tensors together, over all processes, whichever meshes they lie on; in their dtype."""
    squared = _own_shares(tensors)
    dist.all_reduce(squared)
    return squared.sqrt().to(tensors[0].dtype)


def _whole(parameter: nn.Parameter) -> torch.Tensor:
    master = masters.of(parameter)
    return master.whole() if master else parameter


def _own_shares(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack([_own_share(tensor) for tensor in tensors]).sum()


def _own_share(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a squared norm: what is replicated is counted by each of its owners in part."""
    owners = dist.get_world_size()
    if isinstance(tensor, DTensor):
        sizes = zip(tensor.device_mesh.shape, tensor.placements, strict=True)
        owners //= math.prod(size for size, placement in sizes if not placement.is_replicate())
        tensor = tensor.to_local()
    return torch.linalg.vector_norm(tensor.detach(), dtype=torch.float64).square() / owners


def figures(model: PreTrainedModel, squared: torch.Tensor, grad_scale: float) -> dict[str, float]:
    """The norms as figures of metrics.jsonl; waits for the device.

    Args:
        model: Whose `squared_norms` they are.
        squared: (2, parts).
        grad_scale: What the gradients were multiplied by.
    """
    parameters, gradients = squared.sqrt().tolist()
    names = list(parts(model))
    return {
        "parameter_norm": math.sqrt(math.fsum(norm**2 for norm in parameters)),
        **{f"parameter_norm/{name}": norm for name, norm in zip(names, parameters, strict=True)},
        **{f"grad_norm/{name}": norm / grad_scale for name, norm in zip(names, gradients, strict=True)},
    }

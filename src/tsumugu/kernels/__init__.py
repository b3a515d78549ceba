"""What is computed in fewer passes over memory than torch takes: each with torch's own operations as its equal."""

import functools
import importlib.util

import torch


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def fused(tensor: torch.Tensor) -> bool:
    """Whether the kernels in Triton are used on a tensor; torch's operations are elsewhere."""
    return tensor.is_cuda and has_triton()

"""NF4: frozen linear layers of four bits a weight (QLoRA, Dettmers et al. 2023, https://arxiv.org/abs/2305.14314).

Every 64 weights of a row share a scale, their greatest magnitude, in float32; each weight is one of sixteen multiples
of it. The multiples and the kernel that multiplies them out are those of bitsandbytes, so that a model which it holds
in NF4 itself (scales not quantised again) is the same. Quantising is done here, by operations that round alike on every
device. bitsandbytes is imported where it is used: it is an extra.
"""

import functools
import importlib.util
import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from tsumugu.errors import UserError

BLOCK = 64  # weights that share a scale

# Where bitsandbytes is installed, peft imports it, and on some processors it tells of a kernel for inference.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def check(layers: Sequence[nn.Module], device: torch.device) -> None:
    """Raises UserError where bitsandbytes is missing or wrong on `device`, or a layer cannot be quantised.

    Args:
        layers: The decoder layers.
        device: Which computes.
    """
    what = "model.lora.quantize"
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"{what} needs the bitsandbytes package", "pip install 'tsumugu[lora]'")
    for layer in layers:
        for name, module in layer.named_modules():
            if isinstance(module, Conv1D):
                raise UserError(
                    f"{what} knows linear layers alone, and {name} is a {type(module).__name__}", "leave it out"
                )
            if isinstance(module, nn.Linear) and module.in_features % BLOCK:
                raise UserError(
                    f"{what} needs layers with a multiple of {BLOCK} inputs; {name} has {module.in_features}",
                    "leave it out",
                )
    try:
        table = _table().to(device)
        codes, scales = quantize(torch.linspace(-1, 1, 16 * BLOCK, device=device).view(16, BLOCK))
        found = dequantize(codes, scales, torch.float32)
    except Exception as error:  # whatever bitsandbytes raises where it has no kernel, or cannot load it
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{what}: bitsandbytes does not work on {device.type}: {reason}", "leave it out") from None
    both = torch.stack([codes >> 4, codes & 15], -1).int().flatten(1)
    if not torch.equal(found, table[both] * scales):
        raise UserError(f"{what}: bitsandbytes computes other weights on {device.type}", "install another version")


@functools.cache
def _table() -> torch.Tensor:
    import bitsandbytes.functional

    return bitsandbytes.functional.get_4bit_type("nf4", device="cpu")


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (outputs, inputs / 2) as bytes of two, and scales (outputs, inputs / 64) in float32, of a weight."""
    table = _table().to(weight.device)
    blocks = weight.detach().float().unflatten(1, (-1, BLOCK))
    scales = blocks.abs().amax(-1)
    scaled = blocks * (1 / scales.clamp(min=torch.finfo(torch.float32).tiny)).unsqueeze(-1)
    nearest = torch.bucketize(scaled, (table[:-1] + table[1:]) / 2, out_int32=True)
    codes = nearest.to(torch.uint8).flatten(1)
    return codes[:, ::2] << 4 | codes[:, 1::2], scales


def dequantize(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The weight (outputs, inputs) that `quantize` made of one."""
    shape = codes.shape[0], 2 * codes.shape[1]
    known = torch.float32 if dtype == torch.float64 else dtype  # bitsandbytes has no float64
    weight = torch.ops.bitsandbytes.dequantize_4bit(codes, scales.flatten(), BLOCK, "nf4", shape, known)
    return weight.to(dtype)


class Linear(nn.Module):
    """A linear layer that holds its weight in NF4, and computes with it in the dtype of its input.

    FSDP2 shards floating-point parameters, and casts what is not in the dtype of the computation. So the bytes of codes
    and scales are kept as if they were numbers of that dtype, of which no use is made.

    Args:
        linear: A frozen one, of whose shape it is.
        dtype: Of the computation.
    """

    def __init__(self, linear: nn.Linear, dtype: torch.dtype):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        dtype = torch.float32 if dtype == torch.float64 else dtype  # whose rows need not be whole numbers of float64
        for name, row in (("codes", self.in_features // 2), ("scales", 4 * self.in_features // BLOCK)):
            held = torch.empty(self.out_features, row // dtype.itemsize, dtype=dtype, device=linear.weight.device)
            self.register_parameter(name, nn.Parameter(held, requires_grad=False))
        self.bias = linear.bias

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.ops.tsumugu.nf4_product(hidden, self.codes, self.scales, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


# Operators of their own, so that the compiler does not see the weights that they multiply out: it would find the same
# in backward, and keep those of forward for it.
@torch.library.custom_op("tsumugu::nf4_product", mutates_args=())
def _product(
    hidden: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    return F.linear(hidden, _held(codes, scales, hidden.dtype), bias)


@torch.library.custom_op("tsumugu::nf4_gradient", mutates_args=())
def _gradient(gradient: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return gradient @ _held(codes, scales, gradient.dtype)


@_product.register_fake
def _(hidden: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return hidden.new_empty(*hidden.shape[:-1], codes.shape[0])


@_gradient.register_fake
def _(gradient: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return gradient.new_empty(*gradient.shape[:-1], 2 * codes.shape[1] * codes.element_size())


def _keep(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    _, codes, scales, _ = inputs
    ctx.save_for_backward(codes, scales)


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple:
    return torch.ops.tsumugu.nf4_gradient(gradient, *ctx.saved_tensors), None, None, None


_product.register_autograd(_backward, setup_context=_keep)


def _held(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return dequantize(codes.view(torch.uint8), scales.view(torch.float32), dtype)


def fill(linear: Linear, weight: torch.Tensor) -> None:
    """Quantises the rows of a weight that are this process's, and puts them into its shard of a layer."""
    with torch.no_grad():
        for held, made in zip((linear.codes, linear.scales), quantize(weight), strict=True):
            local: Any = held.to_local() if isinstance(held, DTensor) else held
            local.copy_(made.contiguous().view(local.dtype))


def replace(layers: Sequence[nn.Module], dtype: torch.dtype) -> None:
    """Puts NF4 layers without values in the place of every frozen linear layer.

    Args:
        layers: The decoder layers, on the meta device.
        dtype: Of the computation.
    """
    for layer in layers:
        for name, module in list(layer.named_modules()):
            if isinstance(module, nn.Linear) and not module.weight.requires_grad:
                layer.set_submodule(name, Linear(module, dtype))

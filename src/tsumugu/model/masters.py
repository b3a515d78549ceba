"""Models whose trained weights are in bfloat16, with the rest of their float32 masters beside them.

A parameter of such a model has the 16 bits that its master has beyond it as an attribute, so that weights are never
cast and masters take no memory twice. Checkpoints hold the masters, whole.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from tsumugu.kernels import masters

_LOW = "low_bits"


@dataclass(frozen=True)
class Master:
    """A master in two parts (see `kernels.masters`)."""

    weight: torch.Tensor
    low: torch.Tensor

    def whole(self) -> torch.Tensor:
        """It, in float32."""
        return masters.join(self.weight, self.low)


def split(model: nn.Module) -> None:
    """Turns every trained float32 parameter into a bfloat16 one, one at a time."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32
            parameter.data, low = masters.split(parameter.data)
            setattr(parameter, _LOW, low)


def of(parameter: torch.Tensor) -> Master | None:
    """The master of a parameter that is split, sharing its memory."""
    low = getattr(parameter, _LOW, None)
    return None if low is None else Master(parameter.detach(), low)


@contextlib.contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Inside, the parameters of a model that is split are in float32, to be written to."""
    was_split = False
    for parameter in model.parameters():
        if master := of(parameter):
            parameter.data, was_split = master.whole(), True
            delattr(parameter, _LOW)
    try:
        yield
    finally:
        if was_split:
            split(model)

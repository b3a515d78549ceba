"""float32 masters kept as bfloat16 weights and the 16 bits that those lack, and AdamW on them in one pass.

A master's bits are the weight's, with sixteen zeros behind them, plus the low bits as a signed number: so the weight is
the master rounded to the nearest bfloat16 (halfway cases away from zero), and the master is known exactly, in four
bytes altogether.
"""

import torch

from tsumugu.kernels import fused

_HALF = 1 << 15


def split(master: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Finite float32 numbers as bfloat16 weights and low bits (int16)."""
    bits = master.view(torch.int32)
    high = (bits + _HALF) >> 16
    low = (bits - (high << 16)).to(torch.int16)
    return high.to(torch.int16).view(torch.bfloat16), low


def join(weight: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """The masters (float32) that `split` made these of."""
    return ((weight.view(torch.int16).to(torch.int32) << 16) + low.to(torch.int32)).view(torch.float32)


def adamw(
    weight: torch.Tensor,
    low: torch.Tensor,
    gradient: torch.Tensor,
    moments: tuple[torch.Tensor, torch.Tensor],
    scalars: "Scalars",
    learning_rate: float,
    weight_decay: float,
    epsilon: float,
) -> None:
    """A step of torch's fused AdamW on masters, in place, unless `scalars` says that it is skipped.

    Args:
        weight: bfloat16.
        low: Its low bits.
        gradient: float32; torch's operations leave the clipped gradient in it.
        moments: First and second, float32.
        scalars: What is known on the device alone.
        learning_rate: Of this step.
        weight_decay: Decoupled.
        epsilon: Added to the root of the second moment.
    """
    if fused(weight):
        from tsumugu.kernels import triton_kernels

        beta1, beta2 = scalars.betas
        numbers = (learning_rate, weight_decay, beta1, beta2, epsilon)
        triton_kernels.adamw(weight, low, gradient, *moments, scalars.on_device(), *numbers)
        return
    master = join(weight, low)
    torch._fused_adamw_(
        [master], [gradient.mul_(scalars.clip)], [moments[0]], [moments[1]], [], [scalars.step.clone()],
        lr=learning_rate, beta1=scalars.betas[0], beta2=scalars.betas[1], weight_decay=weight_decay, eps=epsilon,
        amsgrad=False, maximize=False, grad_scale=None, found_inf=scalars.skip,
    )  # fmt: skip
    for kept, new in zip((weight, low), split(master), strict=True):
        kept.copy_(new)


class Scalars:
    """What a step needs of which the host knows nothing, as float32 scalars on the device.

    Args:
        step: Steps taken, with this one.
        clip: Factor of the gradients.
        skip: 1 where the step is to have no effect, else 0.
        betas: Decays of the moments.
    """

    def __init__(self, step: torch.Tensor, clip: torch.Tensor, skip: torch.Tensor, betas: tuple[float, float]):
        self.step, self.clip, self.skip, self.betas = step, clip, skip, betas
        self._stacked: torch.Tensor | None = None

    def on_device(self) -> torch.Tensor:
        """(4,): skip, clip, one minus beta1 to the power of the step, and the root of that of beta2."""
        if self._stacked is None:
            step = self.step.double()
            first, second = (1 - beta**step for beta in self.betas)
            self._stacked = torch.stack([self.skip.double(), self.clip.double(), first, second.sqrt()]).float()
        return self._stacked


def accumulate(total: torch.Tensor, gradient: torch.Tensor, first: bool) -> None:
    """Adds a gradient to a float32 total, or puts it there if it is the `first` of a step."""
    if fused(total) and total.numel() >= _HALF and total.is_contiguous() and gradient.is_contiguous():
        from tsumugu.kernels import triton_kernels

        triton_kernels.accumulate(total, gradient, first)
    elif first:
        total.copy_(gradient)
    else:
        total.add_(gradient)

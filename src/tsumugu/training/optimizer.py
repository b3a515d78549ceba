"""AdamW with decay on matrices only, and gradient clipping by the global norm."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from tsumugu.config import OptimizerConfig
from tsumugu.training.norms import total_norm


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Fused AdamW; biases and norms (everything with fewer than two dimensions) have no weight decay."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=True,
    )


def clip_gradients(
    parameters: Iterable[nn.Parameter], max_norm: float, scale: torch.Tensor | None = None
) -> torch.Tensor:
    """Scales gradients down to `max_norm` and returns their global norm before that.

    Args:
        parameters: Those with gradients.
        max_norm: Of the gradients without the loss scale.
        scale: What the gradients are multiplied by, and stay multiplied by; the returned norm is not.
    """
    with_gradient = [p for p in parameters if p.grad is not None]
    by_mesh: dict[Any, list[nn.Parameter]] = {}  # with parallel.tensor_degree there are two, which torch does not mix
    for parameter in with_gradient:
        by_mesh.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    gradients = [p.grad for p in with_gradient if p.grad is not None]
    if len(by_mesh) > 1:
        norm = total_norm(gradients)
    else:
        norm = nn.utils.get_total_norm(gradients)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
    if scale is not None:
        norm = norm / scale
    for alike in by_mesh.values():
        nn.utils.clip_grads_with_norm_(alike, max_norm, norm)
    return norm


def take_step(optimizer: torch.optim.AdamW, skip: torch.Tensor, grad_scale: torch.Tensor | None) -> None:
    """The optimizer's step, without effect on weights and moments where `skip` is true.

    Nothing waits for the device, but where parameters are on the host and `skip` has to come there.

    Args:
        optimizer: A fused one: its kernel reads both tensors, as it does for torch's own GradScaler.
        skip: A scalar on the device that computes.
        grad_scale: What the gradients are multiplied by.
    """
    device = optimizer.param_groups[0]["params"][0].device
    grad_scale = None if grad_scale is None else grad_scale.to(device)
    vars(optimizer).update(found_inf=skip.float().to(device), grad_scale=grad_scale)
    optimizer.step()


class LossScale:
    """The factor that keeps float16 gradients within its range: halved at an overflow, doubled after a quiet while.

    Args:
        device: Where it is used.
        state: `state()` of the run at the step from which it goes on.
    """

    QUIET_STEPS = 2000  # the interval and the factors of torch.amp.GradScaler

    def __init__(self, device: torch.device, state: list[float] | None = None):
        scale, quiet = state or (2.0**16, 0)
        self.scale = torch.tensor(scale, dtype=torch.float32, device=device)
        self._quiet = torch.tensor(int(quiet), dtype=torch.int32, device=device)

    def update(self, grad_norm: torch.Tensor) -> None:
        """After a step whose gradients had this norm, or overflowed."""
        finite = torch.isfinite(grad_norm)
        quiet = torch.where(finite, self._quiet + 1, 0)
        grow = quiet == self.QUIET_STEPS
        self.scale = torch.where(finite, torch.where(grow, self.scale * 2, self.scale), self.scale / 2)
        self._quiet = torch.where(grow, 0, quiet)

    def state(self) -> list[float]:
        """What a checkpoint keeps."""
        return [self.scale.item(), self._quiet.item()]

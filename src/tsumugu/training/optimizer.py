"""AdamW with decay on matrices only, and gradient clipping by the global norm."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from tsumugu.config import OptimizerConfig
from tsumugu.kernels import masters as kernels
from tsumugu.kernels.linear import Sum
from tsumugu.model import masters
from tsumugu.training.norms import total_norm


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW; biases and norms (everything with fewer than two dimensions) have no weight decay."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    is_split = any(masters.of(parameter) for parameter in matrices + vectors)
    return (MasterAdamW if is_split else torch.optim.AdamW)(
        [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=True,
    )


class MasterAdamW(torch.optim.AdamW):
    """AdamW on a model whose weights are split from their masters, with the state and numbers of torch's fused one.

    Gradients of micro batches are summed in float32, as soon as backward has made each of them; `collect` makes the
    sums the parameters' gradients. The factor of clipping is applied where they are read, by the step.
    """

    found_inf: torch.Tensor
    """1 where a step is to have no effect, else 0; set before every step."""
    sums: dict[torch.Tensor, Sum]
    """The gradients' sums of every parameter, whose memory is kept from step to step."""

    def __init__(self, params: Any, **options: Any):
        super().__init__(params, **options)
        self._parameters = [p for group in self.param_groups for p in group["params"]]
        self._parameters.sort(key=torch.Tensor.numel, reverse=True)  # the host gets ahead of the device at once
        self._groups = {p: group for group in self.param_groups for p in group["params"]}
        self.sums = {}
        self._factor = torch.ones((), device=self._parameters[0].device)
        step = torch.zeros((), device=self._parameters[0].device)
        for parameter in self._parameters:
            zeros = (torch.zeros_like(parameter, dtype=torch.float32) for _ in range(2))
            first, second = (tensor.contiguous() for tensor in zeros)
            self.state[parameter] = {"step": step, "exp_avg": first, "exp_avg_sq": second}
            self.sums[parameter] = Sum(torch.zeros_like(first), torch.tensor(False))
            parameter.grad_dtype = None  # the sums are in float32
            parameter.register_post_accumulate_grad_hook(self._add)

    def _add(self, parameter: torch.Tensor) -> None:
        if parameter.grad is None:  # of a SummedLinear: torch 2.11 calls all the same where layers are compiled
            return
        held = self.sums[parameter]
        kernels.accumulate(held.total, parameter.grad, first=not held.begun.item())
        held.begun.fill_(True)
        parameter.grad = None

    def collect(self) -> None:
        """After the last backward pass of a step."""
        for parameter, held in self.sums.items():
            if held.begun.item():
                parameter.grad = held.total

    def clip_gradients(self, parameters: Iterable[nn.Parameter], max_norm: float) -> torch.Tensor:
        """As the function of that name, at the next step."""
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        self._factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch's clip_grads_with_norm_
        return norm

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        step = self.state[self._parameters[0]]["step"]
        step += 1
        scalars = {}
        for parameter in self._parameters:
            master, group, state = masters.of(parameter), self._groups[parameter], self.state[parameter]
            if parameter.grad is None:
                continue
            assert master is not None
            if group["betas"] not in scalars:
                scalars[group["betas"]] = kernels.Scalars(step, self._factor, self.found_inf, group["betas"])
            kernels.adamw(
                master.weight,
                master.low,
                parameter.grad,
                (state["exp_avg"], state["exp_avg_sq"]),
                scalars[group["betas"]],
                group["lr"],
                group["weight_decay"],
                group["eps"],
            )
        step -= self.found_inf

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for held in self.sums.values():
            held.begun.fill_(False)

    def forget(self) -> None:
        """Back to the state of before the first step."""
        for parameter in self._parameters:
            for tensor in self.state[parameter].values():
                tensor.zero_()


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

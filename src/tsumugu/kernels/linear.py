"""Linear layers whose weight's gradient is added to its float32 sum by the matrix product that makes it.

Otherwise a product writes it in 16 bits, and a pass over memory reads it again and adds it. Here it is neither rounded
nor ever in memory beside the sum. It is not for layers that are recomputed: torch's compiler keeps what an autograd
function saves there, so that nothing would be won.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class Sum:
    """The sum of a parameter's gradients over the micro batches of a step.

    `total` is float32, of the parameter's shape; `begun`, a bool on the host, says whether it holds any of this step.
    """

    total: torch.Tensor
    begun: torch.Tensor


class SummedLinear(nn.Linear):
    """A linear layer that computes as it did, but gives its weight no gradient: that goes into `weight_sum`.

    Where its input needs no gradient it is a plain one.
    """

    weight_sum: Sum

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not input.requires_grad:
            return super().forward(input)
        return _Linear.apply(input, self.weight, self.bias, self.weight_sum.total, self.weight_sum.begun)


def sum_in_products(module: nn.Module, sums: dict[torch.Tensor, Sum]) -> None:
    """Makes every linear layer within `module` whose weight is in `sums` a `SummedLinear`."""
    for layer in module.modules():
        if type(layer) is nn.Linear and layer.weight in sums:
            layer.__class__ = SummedLinear
            layer.weight_sum = sums[layer.weight]  # type: ignore[assignment]


def add_product(total: torch.Tensor, gradient_NO: torch.Tensor, rows_NI: torch.Tensor, first: bool = False) -> None:
    """Adds gradientᵀ · rows to `total` (O, I), or puts it there if it is the `first`.

    Sums are not rounded to the dtype of the two factors.
    """
    if total.dtype != rows_NI.dtype and not total.is_cuda:
        gradient_NO, rows_NI = gradient_NO.to(total.dtype), rows_NI.to(total.dtype)
    wider: dict[str, Any] = {} if total.dtype == rows_NI.dtype else {"out_dtype": total.dtype}
    if first:
        torch.mm(gradient_NO.T, rows_NI, out=total, **wider)
    else:
        torch.addmm(total, gradient_NO.T, rows_NI, out=total, **wider)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        total: torch.Tensor,
        begun: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(input, weight, total, begun)
        ctx.trains_bias = bias is not None and bias.requires_grad
        return F.linear(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor):  # type: ignore[override]
        input, weight, total, begun = ctx.saved_tensors
        gradient_NO, rows_NI = gradient.flatten(0, -2), input.flatten(0, -2)
        if ctx.trains_bias:
            zero = torch.ops.tsumugu.add_to_sum(gradient_NO, rows_NI, total, begun)
            d_rows, d_bias = gradient_NO @ weight, gradient_NO.sum(0) + zero
        else:
            d_rows, d_bias = torch.ops.tsumugu.linear_backward(gradient_NO, rows_NI, weight, total, begun), None
        return d_rows.view(input.shape), None, d_bias, None, None


def _add(gradient_NO: torch.Tensor, rows_NI: torch.Tensor, total: torch.Tensor, begun: torch.Tensor) -> None:
    # .data: a layer that is used twice has them saved twice, and may write to them at both
    add_product(total.data, gradient_NO, rows_NI, first=not begun.item())
    begun.data.fill_(True)


# To the compiler these are functions of their arguments alone, and would be left out if their results were not used.
# They write to two of them, which nothing else in the graph reads, and are called once: backward is not recomputed. The
# product that makes the gradient of the rows is the compiler's own where a bias leaves it the choice: GPT-NeoX's
# gradient of queries, keys and values is then written in half the time.
@torch.library.custom_op("tsumugu::add_to_sum", mutates_args=())
def _add_to_sum(
    gradient_NO: torch.Tensor, rows_NI: torch.Tensor, total: torch.Tensor, begun: torch.Tensor
) -> torch.Tensor:
    _add(gradient_NO, rows_NI, total, begun)
    return gradient_NO.new_zeros(())


@_add_to_sum.register_fake
def _(gradient_NO: torch.Tensor, rows_NI: torch.Tensor, total: torch.Tensor, begun: torch.Tensor) -> torch.Tensor:
    return gradient_NO.new_zeros(())


@torch.library.custom_op("tsumugu::linear_backward", mutates_args=())
def _linear_backward(
    gradient_NO: torch.Tensor, rows_NI: torch.Tensor, weight: torch.Tensor, total: torch.Tensor, begun: torch.Tensor
) -> torch.Tensor:
    _add(gradient_NO, rows_NI, total, begun)
    return gradient_NO @ weight


@_linear_backward.register_fake
def _(
    gradient_NO: torch.Tensor, rows_NI: torch.Tensor, weight: torch.Tensor, total: torch.Tensor, begun: torch.Tensor
) -> torch.Tensor:
    return gradient_NO @ weight

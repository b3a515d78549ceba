"""The head and the loss over chunks of tokens, so that logits never exist whole.

Each chunk's logits become their own gradients at once, from which those of the hidden states and of the head's weight
are made: backward has them ready, and nothing is computed twice.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from tsumugu.kernels import fused
from tsumugu.kernels.linear import add_product

LOGITS_AT_A_TIME = 2**27  # 256 MiB in 16 bits: matrix products of that size run at full rate


def summed_cross_entropy(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, labels_N: torch.Tensor
) -> torch.Tensor:
    """The sum of the cross entropies (nats) of tokens whose logits are a linear function of `hidden_ND`.

    In float32, or in float64 where that is what the logits are in. The weight's gradient is summed in float32, and
    stays so where the weight's `grad_dtype` allows it.

    Args:
        hidden_ND: (tokens, hidden size).
        weight_VD: (vocabulary, hidden size), of the head.
        bias_V: (vocabulary,), if it has one.
        labels_N: (tokens,), each an id.
    """
    if not torch.is_grad_enabled():  # of which needs_input_grad knows nothing
        weight_VD, bias_V = weight_VD.detach(), None if bias_V is None else bias_V.detach()
    return _SummedCrossEntropy.apply(hidden_ND, weight_VD, bias_V, labels_N)


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        of_hidden, of_weight, of_bias, _ = ctx.needs_input_grad
        d_hidden = torch.empty_like(hidden) if of_hidden else None
        d_weight = torch.zeros_like(weight, dtype=wide) if of_weight else None
        d_bias = torch.zeros_like(bias, dtype=wide) if of_bias and bias is not None else None
        total = torch.zeros((), dtype=wide, device=hidden.device)
        chunks = -(-hidden.shape[0] * weight.shape[0] // LOGITS_AT_A_TIME)
        size = -(-hidden.shape[0] // max(1, chunks)) or 1
        for start in range(0, hidden.shape[0], size):
            chunk = slice(start, start + size)
            rows = hidden[chunk]
            nats, gradient = _differentiated(F.linear(rows, weight, bias), labels[chunk], any(ctx.needs_input_grad))
            total += nats.sum()
            if d_hidden is not None:
                torch.mm(gradient, weight, out=d_hidden[chunk])
            if d_weight is not None:
                add_product(d_weight, gradient, rows)
            if d_bias is not None:
                d_bias += gradient.sum(0, dtype=wide)
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        return total

    @staticmethod
    @once_differentiable  # type: ignore[override]
    def backward(ctx: Any, *gradients: torch.Tensor):  # type: ignore[override]
        (d_total,) = gradients
        scaled = (  # in float32, in which the number of supervised tokens is not rounded
            None if saved is None else (saved.to(d_total.dtype) * d_total).to(saved.dtype)
            for saved in ctx.saved_tensors
        )
        return *scaled, None


def _differentiated(logits: torch.Tensor, labels: torch.Tensor, wanted: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropies, and in place of the logits their gradients, in the logits' dtype, if they are wanted."""
    if fused(logits) and logits.dtype != torch.float64:
        from tsumugu.kernels import triton_kernels

        nats = torch.empty(len(labels), dtype=torch.float32, device=logits.device)
        triton_kernels.cross_entropy(logits, labels, nats, wanted)
        return nats, logits
    chances = F.log_softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))
    nats = -chances.gather(1, labels[:, None])
    if wanted:
        chances = chances.exp_()
        chances.scatter_add_(1, labels[:, None], torch.full_like(nats, -1))
    return nats, chances.to(logits.dtype)

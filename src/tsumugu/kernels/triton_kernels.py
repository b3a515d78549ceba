"""The kernels in Triton. Only `tsumugu.kernels` imports this, where Triton is installed."""

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

_BLOCK = 2048


def adamw(
    weight: torch.Tensor,
    low: torch.Tensor,
    gradient: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    scalars: torch.Tensor,
    learning_rate: float,
    weight_decay: float,
    beta1: float,
    beta2: float,
    epsilon: float,
) -> None:
    """See `masters.adamw`; every tensor is contiguous."""
    for tensor in (weight, low, gradient, first, second):
        assert tensor.is_contiguous()
        assert tensor.numel() == weight.numel()
    size = weight.numel()
    _adamw[(triton.cdiv(size, _BLOCK),)](  # type: ignore[index]
        weight.view(torch.int16), low, gradient, first, second, scalars,
        learning_rate, learning_rate * weight_decay, beta1, 1 - beta1, beta2, 1 - beta2, epsilon,
        size, BLOCK=_BLOCK, num_warps=8,
    )  # fmt: skip


def accumulate(total: torch.Tensor, gradient: torch.Tensor, first: bool) -> None:
    """See `masters.accumulate`."""
    size = total.numel()
    grid = (triton.cdiv(size, _BLOCK),)
    _accumulate[grid](total, gradient, size, FIRST=first, BLOCK=_BLOCK, num_warps=8)  # type: ignore[index]


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, nats: torch.Tensor, differentiate: bool) -> None:
    """Cross entropies of rows of logits, which become their gradients in place if wanted.

    Args:
        logits: (rows, vocabulary), each row contiguous.
        labels: (rows,), int64.
        nats: (rows,), float32, written.
        differentiate: Whether the logits are overwritten by the gradients of the sum of `nats`.
    """
    rows, vocabulary = logits.shape
    assert logits.stride(1) == 1
    block = min(8192, triton.next_power_of_2(vocabulary))
    _cross_entropy[(rows,)](  # type: ignore[index]
        logits, logits.stride(0), labels, nats,
        VOCABULARY=vocabulary, DIFFERENTIATE=differentiate, BLOCK=block, num_warps=16,
    )  # fmt: skip


@triton.jit
def _adamw(
    weight_ptr, low_ptr, gradient_ptr, first_ptr, second_ptr, scalars_ptr,
    rate, decay, beta1, one_minus_beta1, beta2, one_minus_beta2, epsilon,
    size, BLOCK: tl.constexpr,
):  # fmt: skip
    if tl.load(scalars_ptr) == 0:
        clip, correction1, root_correction2 = (
            tl.load(scalars_ptr + 1),
            tl.load(scalars_ptr + 2),
            tl.load(scalars_ptr + 3),
        )
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < size
        bits = (tl.load(weight_ptr + at, inside, 0).to(tl.int32) << 16) + tl.load(low_ptr + at, inside, 0).to(tl.int32)
        master = bits.to(tl.float32, bitcast=True)
        gradient = tl.load(gradient_ptr + at, inside, 0.0) * clip
        master -= decay * master
        first = beta1 * tl.load(first_ptr + at, inside, 0.0) + one_minus_beta1 * gradient
        second = beta2 * tl.load(second_ptr + at, inside, 0.0) + one_minus_beta2 * gradient * gradient
        denominator = tl.sqrt(second) / root_correction2 + epsilon
        master -= (rate / correction1) * first / denominator
        bits = master.to(tl.int32, bitcast=True)
        high = (bits + 32768) >> 16
        tl.store(first_ptr + at, first, inside)
        tl.store(second_ptr + at, second, inside)
        tl.store(weight_ptr + at, high.to(tl.int16), inside)
        tl.store(low_ptr + at, (bits - (high << 16)).to(tl.int16), inside)


@triton.jit
def _accumulate(total_ptr, gradient_ptr, size, FIRST: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.load(gradient_ptr + at, inside, 0.0).to(tl.float32)
    if not FIRST:
        total += tl.load(total_ptr + at, inside, 0.0)
    tl.store(total_ptr + at, total, inside)


@triton.jit
def _cross_entropy(
    logits_ptr, stride, labels_ptr, nats_ptr,
    VOCABULARY: tl.constexpr, DIFFERENTIATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    label = tl.load(labels_ptr + row)
    label_logit = tl.load(logits_ptr + label).to(tl.float32)
    columns = tl.arange(0, BLOCK)
    largest, total = tl.full((), float("-inf"), tl.float32), tl.full((), 0.0, tl.float32)
    for start in range(0, VOCABULARY, BLOCK):
        logits = tl.load(logits_ptr + start + columns, start + columns < VOCABULARY, float("-inf")).to(tl.float32)
        before, largest = largest, tl.maximum(largest, tl.max(logits, 0))
        total = total * tl.exp(before - largest) + tl.sum(tl.exp(logits - largest), 0)
    normaliser = largest + tl.log(total)
    tl.store(nats_ptr + row, normaliser - label_logit)
    if DIFFERENTIATE:
        tl.debug_barrier()  # the label's logit has been read
        for start in range(0, VOCABULARY, BLOCK):
            at, inside = start + columns, start + columns < VOCABULARY
            logits = tl.load(logits_ptr + at, inside, float("-inf")).to(tl.float32)
            gradient = tl.exp(logits - normaliser) - tl.where(at == label, 1.0, 0.0)
            tl.store(logits_ptr + at, gradient.to(logits_ptr.dtype.element_ty), inside)

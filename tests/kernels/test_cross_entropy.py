"""The head and the loss in chunks against torch's cross entropy on whole logits."""

import pytest
import torch
import torch.nn.functional as F

from tsumugu.kernels import cross_entropy

TOKENS, HIDDEN, VOCABULARY = 50, 24, 131


def tensors(dtype: torch.dtype, bias: bool) -> tuple[list[torch.Tensor], torch.Tensor]:
    torch.manual_seed(2)
    shapes = [(TOKENS, HIDDEN), (VOCABULARY, HIDDEN), (VOCABULARY,)][: 2 + bias]
    made = [torch.randn(shape, dtype=torch.float64).mul_(2).to(dtype).requires_grad_() for shape in shapes]
    return made, torch.randint(VOCABULARY, (TOKENS,))


def expected(
    inputs: list[torch.Tensor], labels: torch.Tensor, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, ...]:
    """The loss and its gradients by torch: products in `dtype`, the loss in float64."""
    exact = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
    loss = F.cross_entropy(F.linear(*exact).double(), labels, reduction="sum") / 7
    return loss, *torch.autograd.grad(loss, exact)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("dtype", "allowed"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-3), (torch.float16, 1e-3)]
)
@pytest.mark.parametrize("at_a_time", [VOCABULARY * 13, 1, 2**27])
def test_loss_and_gradients_are_those_of_whole_logits(monkeypatch, dtype, allowed, bias, at_a_time):
    monkeypatch.setattr(cross_entropy, "LOGITS_AT_A_TIME", at_a_time)
    inputs, labels = tensors(dtype, bias)
    hidden, weight, *rest = inputs
    loss = cross_entropy.summed_cross_entropy(hidden, weight, rest[0] if bias else None, labels) / 7
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    loss.backward()
    right, theirs = expected(inputs, labels), expected(inputs, labels, dtype)
    for found, exact, rounded in zip([loss, *(tensor.grad for tensor in inputs)], right, theirs, strict=True):
        error, by_rounding = ((value.double() - exact).norm() / exact.norm() for value in (found, rounded))
        assert error < by_rounding + allowed


def test_no_gradient_is_made_for_what_is_frozen_or_evaluated(monkeypatch):
    (hidden, weight), labels = tensors(torch.float32, False)
    weight.requires_grad_(False)
    cross_entropy.summed_cross_entropy(hidden, weight, None, labels).backward()
    right = expected([hidden, weight], labels)
    torch.testing.assert_close(hidden.grad, right[1].float() * 7, rtol=1e-4, atol=1e-4)
    assert weight.grad is None
    weight.requires_grad_()
    monkeypatch.setattr(cross_entropy, "add_product", None)
    with torch.no_grad():
        loss = cross_entropy.summed_cross_entropy(hidden, weight, None, labels)
    torch.testing.assert_close(loss, right[0].float() * 7)


def test_no_token_has_no_loss():
    (hidden, weight), labels = tensors(torch.float32, False)
    loss = cross_entropy.summed_cross_entropy(hidden[:0], weight, None, labels[:0])
    loss.backward()
    assert loss.item() == 0
    assert not weight.grad.any()

"""The summed loss."""

import torch

from tsumugu.training.loss import summed_loss


def by_hand(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Sum of -log p(label), in float64."""
    probabilities = torch.softmax(logits.double(), dim=-1)
    rows, columns = torch.where(labels != -100)
    return -sum(
        float(probabilities[b, t, labels[b, t]].log()) for b, t in zip(rows.tolist(), columns.tolist(), strict=True)
    )


def test_the_loss_is_the_sum_over_supervised_tokens():
    torch.manual_seed(0)
    logits = torch.randn(3, 5, 11)
    labels = torch.randint(0, 11, (3, 5))
    labels[0, :3] = labels[2] = -100
    expected = by_hand(logits, labels)
    torch.testing.assert_close(summed_loss(logits, labels).item(), expected, rtol=1e-6, atol=0)
    exact = summed_loss(logits.double(), labels)
    assert exact.dtype == torch.float64
    torch.testing.assert_close(exact.item(), expected, rtol=1e-14, atol=0)


def test_bfloat16_logits_are_added_up_in_float32():
    torch.manual_seed(0)
    logits, labels = torch.randn(4, 64, 101).bfloat16(), torch.randint(0, 101, (4, 64))
    loss = summed_loss(logits, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.item(), by_hand(logits, labels), rtol=1e-6, atol=0)


def test_rows_without_a_supervised_token_add_nothing():
    logits = torch.randn(2, 3, 7, requires_grad=True)
    loss = summed_loss(logits, torch.full((2, 3), -100))
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad is not None
    assert (logits.grad == 0).all()

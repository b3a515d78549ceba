"""Masters in two parts: what they are, and AdamW on them against torch's on plain float32."""

import pytest
import torch
from torch import nn

from tsumugu.config import OptimizerConfig
from tsumugu.kernels import has_triton
from tsumugu.kernels import masters as kernels
from tsumugu.model import masters
from tsumugu.training.optimizer import MasterAdamW, build_optimizer, clip_gradients, take_step


def every_kind() -> torch.Tensor:
    """Random floats of every size, those halfway between two bfloat16, and the ends."""
    bits = torch.randint(-(2**31), 2**31, (1 << 16,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    numbers = torch.cat([bits, bits & ~0xFFFF | 0x8000, bits & ~0xFFFF]).view(torch.float32)
    edges = torch.tensor([0.0, -0.0, 1.0, 1e-45, -1e-38, 3.3e38])
    return torch.cat([numbers[numbers.abs() < 3.3e38], edges])


def test_a_master_is_known_exactly_from_its_weight_and_sixteen_bits():
    master = every_kind()
    weight, low = kernels.split(master)
    assert (weight.dtype, low.dtype) == (torch.bfloat16, torch.int16)
    assert torch.equal(kernels.join(weight, low).view(torch.int32), master.view(torch.int32))


def test_a_weight_is_its_master_rounded_to_the_nearest_bfloat16():
    master = every_kind()
    weight, _ = kernels.split(master)
    halfway = (master.view(torch.int32) & 0xFFFF) == 0x8000
    assert torch.equal(weight[~halfway], master[~halfway].to(torch.bfloat16))
    away = master[halfway].view(torch.int32) + 0x8000
    assert torch.equal(weight[halfway].float().view(torch.int32), away)


def models() -> tuple[nn.Module, nn.Module]:
    """A model whose weights are split, and one with plain float32 masters."""
    torch.manual_seed(1)
    plain = nn.Sequential(nn.Linear(37, 53), nn.LayerNorm(53), nn.Linear(53, 11, bias=False))
    split = nn.Sequential(nn.Linear(37, 53), nn.LayerNorm(53), nn.Linear(53, 11, bias=False))
    split.load_state_dict(plain.state_dict())
    masters.split(split)
    return split, plain


def test_many_steps_are_bit_for_bit_those_of_adamw_on_float32_masters():
    split, plain = models()
    config = OptimizerConfig(learning_rate=3e-3, max_grad_norm=0.5)
    own, other = build_optimizer(split, config), build_optimizer(plain, config)
    assert isinstance(own, MasterAdamW)
    for step in range(60):
        for micro_batch in range(3):
            torch.manual_seed(100 * step + micro_batch)
            inputs = torch.randn(8, 37)
            loss = split(inputs.to(torch.bfloat16)).float().square().sum() * (100.0 if step % 7 else 1e-3)
            before = [p.detach().clone() for p in split.parameters()]
            loss.backward()
            rounded = nn.Sequential(nn.Linear(37, 53), nn.LayerNorm(53), nn.Linear(53, 11, bias=False)).bfloat16()
            for parameter, weight in zip(rounded.parameters(), before, strict=True):
                parameter.data.copy_(weight)
            (rounded(inputs.to(torch.bfloat16)).float().square().sum() * (100.0 if step % 7 else 1e-3)).backward()
            for parameter, copied in zip(plain.parameters(), rounded.parameters(), strict=True):
                gradient = copied.grad.float()  # type: ignore[union-attr]
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        own.collect()
        skip = torch.tensor(step % 10 == 9)
        norms = own.clip_gradients(split.parameters(), 0.5), clip_gradients(plain.parameters(), 0.5)
        assert torch.equal(*norms)
        for optimizer in (own, other):
            take_step(optimizer, skip, None)
            optimizer.zero_grad()
        for parameter, reference in zip(split.parameters(), plain.parameters(), strict=True):
            master = masters.of(parameter)
            assert master is not None
            assert torch.equal(master.whole(), reference)
            for key in ("exp_avg", "exp_avg_sq", "step"):
                assert torch.equal(own.state[parameter][key], other.state[reference][key])


@pytest.mark.skipif(not has_triton(), reason="Triton is not installed")
def test_the_kernels_give_what_torch_gives(monkeypatch):
    """On a GPU, or with TRITON_INTERPRET=1 anywhere."""
    import os

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not os.environ.get("TRITON_INTERPRET"):
        pytest.skip("there is no GPU, and Triton does not interpret")
    from tsumugu.kernels import triton_kernels

    torch.manual_seed(0)
    size = 5000
    master = torch.randn(size, device=device)
    reference = nn.Parameter(master.clone())
    weight, low = kernels.split(master)
    first, second = torch.zeros(size, device=device), torch.zeros(size, device=device)
    optimizer = torch.optim.AdamW([reference], lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(1, 9):
        gradient = torch.randn(size, device=device)
        clip, skip = torch.tensor(0.25, device=device), torch.tensor(float(step == 5), device=device)
        taken = torch.tensor(float(step - (step > 5)), device=device)
        scalars = kernels.Scalars(taken, clip, skip, (0.9, 0.95)).on_device()
        numbers = (1e-3, 0.1, 0.9, 0.95, 1e-8)
        triton_kernels.adamw(weight, low, gradient, first, second, scalars, *numbers)
        if step != 5:
            reference.grad = gradient * clip
            optimizer.step()
        torch.testing.assert_close(kernels.join(weight, low), reference.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(first, optimizer.state[reference]["exp_avg"], rtol=1e-6, atol=1e-7)
    total, gradients = torch.full((size,), float("nan"), device=device), torch.randn(2, size, device=device).bfloat16()
    triton_kernels.accumulate(total, gradients[0], True)
    triton_kernels.accumulate(total, gradients[1], False)
    assert torch.equal(total, gradients[0].float() + gradients[1].float())
    for vocabulary in (100, 9001):
        logits, labels = torch.randn(7, vocabulary, device=device) * 9, torch.randint(vocabulary, (7,), device=device)
        expected = logits.clone().requires_grad_()
        loss = torch.nn.functional.cross_entropy(expected, labels, reduction="none")
        loss.sum().backward()
        nats = torch.empty(7, device=device)
        triton_kernels.cross_entropy(logits, labels, nats, True)
        torch.testing.assert_close(nats, loss.detach())
        torch.testing.assert_close(logits, expected.grad, rtol=1e-5, atol=1e-7)

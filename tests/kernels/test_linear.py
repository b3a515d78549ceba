"""Linear layers that sum their weights' gradients in float32, against plain ones in float64."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tsumugu.kernels.linear import Sum, SummedLinear, sum_in_products

MICRO_BATCHES = 3


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.down(nn.functional.gelu(self.up(hidden)))


class Layers(nn.Module):
    """Two blocks of one class, of which the compiler makes one graph."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return functools.reduce(lambda states, block: block(states), self.blocks, hidden)


def gradients(model: Layers, inputs_needing: bool) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
    """Sums of the gradients of all micro batches, and the gradient of the last inputs."""
    dtype, hidden = model.blocks[0].up.weight.dtype, None
    for micro_batch in range(MICRO_BATCHES):
        draw = torch.Generator().manual_seed(micro_batch)
        hidden = torch.randn(4, 5, 16, generator=draw).bfloat16().to(dtype).requires_grad_(inputs_needing)
        (model(hidden).square().sum() / 10).backward()
    assert hidden is not None
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, hidden.grad


@pytest.mark.parametrize(
    ("dtype", "way", "inputs_needing"),
    [
        (torch.float32, "eager", True),
        (torch.float32, "recomputed", False),
        (torch.bfloat16, "recomputed", True),
        (torch.bfloat16, "compiled", False),
        (torch.bfloat16, "compiled and recomputed", True),
    ],
)
def test_sums_are_those_of_exact_gradients(dtype: torch.dtype, way: str, inputs_needing: bool):
    torch.manual_seed(0)
    model = Layers().to(dtype)
    exact = copy.deepcopy(model).double()
    sums = {
        block.get_parameter(name): Sum(
            torch.full_like(block.get_parameter(name), torch.nan).float(), torch.tensor(False)
        )
        for block in model.blocks
        for name in ("up.weight", "down.weight")
    }
    sum_in_products(model, sums)
    assert type(model.blocks[1].up) is SummedLinear
    for block in model.blocks:
        if "recomputed" in way:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        if "compiled" in way:
            block.forward = torch.compile(block.forward)
    found, of_inputs = gradients(model, inputs_needing)
    right, of_exact_inputs = gradients(exact, inputs_needing)
    names = {parameter: name for name, parameter in model.named_parameters()}
    # the first layer of all has inputs without gradient, and so is a plain one
    plain = set() if inputs_needing else {"blocks.0.up.weight"}
    assert set(found) == {"blocks.0.up.bias", "blocks.1.up.bias"} | plain
    summed = {names[parameter]: held.total for parameter, held in sums.items() if held.begun}
    assert set(summed) == set(names.values()) - set(found)
    allowed = 1e-6 if dtype == torch.float32 else 8e-3
    for name, gradient in {**found, **summed}.items():
        error = (gradient.double() - right[name]).norm() / right[name].norm()
        assert error < allowed, name
    if inputs_needing:
        torch.testing.assert_close(of_inputs.double(), of_exact_inputs, rtol=0, atol=allowed * 4)


def test_the_compiler_leaves_no_sum_out_where_a_bias_is_not_trained():
    layer = nn.Linear(8, 4)
    layer.bias.requires_grad_(False)
    held = Sum(torch.empty(4, 8), torch.tensor(False))
    sum_in_products(layer, {layer.weight: held})
    torch.compile(layer)(torch.ones(3, 8, requires_grad=True)).sum().backward()
    assert torch.equal(held.total, torch.full((4, 8), 3.0))


def test_a_sum_is_not_rounded_to_the_dtype_of_the_weights():
    layer = nn.Linear(8, 4, bias=False, dtype=torch.bfloat16)
    held = Sum(torch.empty(4, 8), torch.tensor(False))
    sum_in_products(layer, {layer.weight: held})
    for _ in range(3):
        layer(torch.ones(301, 8, dtype=torch.bfloat16, requires_grad=True)).sum().backward()
    assert torch.equal(held.total, torch.full((4, 8), 903.0))  # bfloat16 has 900 and 904


def test_no_sum_is_made_without_gradients():
    layer = nn.Linear(8, 4, dtype=torch.bfloat16)
    held = Sum(torch.empty(4, 8), torch.tensor(False))
    states = torch.randn(3, 8).bfloat16()
    right = layer(states)
    sum_in_products(layer, {layer.weight: held})
    with torch.no_grad():
        assert torch.equal(layer(states.requires_grad_()), right)
    assert not held.begun


class Twice(nn.Module):
    """One linear layer that a pass goes through two times."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(16, 16, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.inner(torch.tanh(self.inner(hidden)))


@pytest.mark.parametrize("recomputed", [False, True])
def test_a_layer_that_is_used_twice_adds_both_gradients(recomputed: bool):
    torch.manual_seed(0)
    model = Twice()
    exact = copy.deepcopy(model).double()
    held = Sum(torch.full((16, 16), torch.nan), torch.tensor(False))
    sum_in_products(model, {model.inner.weight: held})
    hidden = torch.randn(5, 16, requires_grad=True)
    forward = functools.partial(checkpoint, model, use_reentrant=False) if recomputed else model
    forward(hidden).sum().backward()
    exact(hidden.double()).sum().backward()
    torch.testing.assert_close(held.total.double(), exact.inner.weight.grad, rtol=1e-5, atol=1e-6)

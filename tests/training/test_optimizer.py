"""Which parameters decay, and how gradients are clipped."""

import pytest
import torch
from support.models import ARCHITECTURES, stock_model, tiny_config
from torch import nn

from tsumugu.config import OptimizerConfig
from tsumugu.training.optimizer import build_optimizer, clip_gradients

CONFIG = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1, beta1=0.8, beta2=0.9, epsilon=1e-6)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_matrices_and_embeddings_decay_but_biases_and_norms_do_not(architecture: str, tied: bool):
    model = stock_model(tiny_config(architecture, tied))
    decay = {
        parameter: group["weight_decay"]
        for group in build_optimizer(model, CONFIG).param_groups
        for parameter in group["params"]
    }
    norms = [module for module in model.modules() if "norm" in type(module).__name__.lower()]
    undecayed = {id(parameter) for norm in norms for parameter in norm.parameters()}
    undecayed |= {id(parameter) for name, parameter in model.named_parameters() if name.endswith("bias")}
    assert len(norms) >= 5
    assert len(decay) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        assert decay[parameter] == (0.0 if id(parameter) in undecayed else 0.1), name


def test_frozen_parameters_are_left_out():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].requires_grad_(False)
    groups = build_optimizer(model, CONFIG).param_groups
    assert [parameter for group in groups for parameter in group["params"]] == [model[1].weight, model[1].bias]


def test_steps_are_adamw_by_hand():
    """Loshchilov and Hutter, "Decoupled weight decay regularization", 2019, algorithm 2."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2, dtype=torch.float64)
    optimizer = build_optimizer(model, CONFIG)
    weight, m, v = model.weight.detach().clone(), 0.0, 0.0
    for step in range(1, 4):
        gradient = torch.randn(2, 3, dtype=torch.float64)
        model.weight.grad, model.bias.grad = gradient.clone(), torch.zeros_like(model.bias)
        optimizer.step()
        m = 0.8 * m + 0.2 * gradient
        v = 0.9 * v + 0.1 * gradient**2
        update = (m / (1 - 0.8**step)) / ((v / (1 - 0.9**step)).sqrt() + 1e-6)
        weight = weight - 1e-2 * (update + 0.1 * weight)
    torch.testing.assert_close(model.weight.detach(), weight, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize(("max_norm", "scale"), [(1.0, 1 / 13), (13.1, 1.0)])
def test_gradients_are_scaled_down_to_the_norm_and_never_up(max_norm: float, scale: float):
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(4))]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 4.0]), torch.tensor([12.0])  # the last one has none
    assert clip_gradients(parameters, max_norm).item() == 13.0
    torch.testing.assert_close(parameters[0].grad, scale * torch.tensor([3.0, 4.0]), rtol=1e-6, atol=0)
    torch.testing.assert_close(parameters[1].grad, scale * torch.tensor([12.0]), rtol=1e-6, atol=0)

"""What is recomputed, that dropout is drawn alike, and how often is compiled (test_equivalence compares numbers)."""

import os
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from support.models import tiny_config
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from tsumugu.config import ParallelConfig
from tsumugu.distributed.environment import process_group
from tsumugu.distributed.mesh import build_mesh
from tsumugu.distributed.parallelize import _storages, reshard
from tsumugu.errors import UserError
from tsumugu.kernels.linear import Sum, sum_in_products
from tsumugu.model import build

LAYERS = 4
MODES = ("none", "selective", "full")
DROPOUT = {"hidden_dropout": 0.2, "attention_dropout": 0.1}


class Counted(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    with process_group():
        yield


def built(changes: dict | None = None, architecture: str = "gpt_neox", **parallel) -> PreTrainedModel:
    options = ParallelConfig(**parallel)
    model_config = tiny_config(architecture, False, num_hidden_layers=LAYERS, **(changes or {}))
    mesh, cpu = build_mesh(options, 1, "cpu"), torch.device("cpu")
    model = build.build_model(model_config, mesh, cpu, torch.float32, torch.float32, build.initialised(1), options)
    return model.train()


def gradients(model: PreTrainedModel, width: int = 12) -> tuple[float, dict[str, torch.Tensor]]:
    torch.manual_seed(5)
    loss = model(input_ids=torch.arange(2 * width).reshape(2, width) + 4, use_cache=False).logits.square().mean()
    loss.backward()
    return loss.item(), {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}


def counted(**parallel) -> Counter:
    model = built(**parallel)
    with Counted() as counting:
        gradients(model)
    return counting.calls


def test_full_recomputes_everything_and_selective_all_but_products_and_attention():
    none, selective, full = (counted(activation_checkpointing=mode) for mode in MODES)
    assert none["gelu"] == LAYERS
    assert selective["gelu"] == full["gelu"] == 2 * LAYERS
    assert selective["addmm"] == none["addmm"] < full["addmm"]
    [attention] = [name for name in none if name.startswith("_scaled_dot") and "backward" not in name]
    assert (none[attention], selective[attention], full[attention]) == (LAYERS, LAYERS, 2 * LAYERS)


def test_every_nth_layer_recomputes_alone():
    full = counted(activation_checkpointing="full", checkpoint_every_nth_layer=3)
    assert full["gelu"] == LAYERS + 2  # layers 0 and 3


def test_nothing_is_kept_for_backward_where_there_is_none():
    model = built(activation_checkpointing="selective").eval()
    with torch.no_grad(), Counted() as counting:
        model(input_ids=torch.arange(8)[None] + 4, use_cache=False)
    assert counting.calls["gelu"] == LAYERS


@pytest.mark.parametrize("mode", MODES[1:])
def test_what_is_recomputed_drops_the_same(mode: str):
    loss, expected = gradients(built(DROPOUT))
    assert loss != gradients(built())[0]
    again, found = gradients(built(DROPOUT, activation_checkpointing=mode))
    assert again == loss
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert found.keys() == expected.keys()


@pytest.mark.skipif(os.environ.get("TSUMUGU_EQUIVALENCE") != "all", reason="make equivalence")
def test_compiled_layers_with_dropout_are_recomputed_with_the_same_dropout(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    losses, norms = [], []
    for mode in ("none", "full"):
        torch.compiler.reset()
        loss, found = gradients(built(DROPOUT, compile=True, activation_checkpointing=mode))
        losses.append(loss)
        norms.append(torch.stack([gradient.norm() for gradient in found.values()]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    torch.testing.assert_close(norms[0], norms[1], rtol=1e-5, atol=1e-7)


def test_layers_and_lengths_share_their_graphs(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.compiler.reset()
    counters.clear()
    model = built(compile=True)
    for width in (16, 9, 12, 7, 30, 21, 5, 11, 28, 13, 17, 8):
        gradients(model, width)
    assert counters["stats"]["unique_graphs"] == 2  # the first length, then any
    assert not counters["graph_break"]


def test_weights_gathered_by_forward_alone_are_dropped():
    model = built(reshard_after_forward="never")
    with torch.no_grad():
        model(input_ids=torch.arange(8)[None] + 4, use_cache=False)
    gathered = {type(p).__name__ for p in model.parameters()}
    reshard(model)
    assert "Parameter" in gathered
    assert {type(p.data).__name__ for p in model.parameters()} == {"DTensor"}


@pytest.mark.parametrize("compiled", [False, True])
def test_what_is_moved_for_backward_does_not_take_the_sums_of_gradients_along(
    compiled: bool, tmp_path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.GELU(), torch.nn.Linear(8, 8, bias=False))
    hidden, weight = torch.randn(3, 8, requires_grad=True), layer[1].weight
    (expected,) = torch.autograd.grad(layer(hidden).sum(), weight)
    held = Sum(torch.full((8, 8), torch.nan), torch.tensor(False))
    sum_in_products(layer, {weight: held})
    forward = torch.compile(layer.forward) if compiled else layer.forward
    own, moved = _storages(layer), []

    def copied(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() in own:
            return tensor
        moved.append(tensor)
        return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(copied, lambda tensor: tensor):
        forward(hidden).sum().backward()
    assert moved
    torch.testing.assert_close(held.total, expected)


def test_a_model_without_linear_layers_does_not_train_in_fp8_without_a_word():
    with pytest.raises(UserError, match=r"parallel\.fp8 is tensorwise, but GPT2Block has no linear layer"):
        built(architecture="gpt2", fp8="tensorwise")

"""How often devices exchange gradients and weights in a step, and that what is exchanged is the step's
(test_equivalence compares whole runs)."""

from collections import Counter

import pytest
import torch
from support.models import tiny_config
from support.ranks import run_ranks
from torch.utils._python_dispatch import TorchDispatchMode

from tsumugu.config import ParallelConfig
from tsumugu.distributed.environment import process_group
from tsumugu.distributed.exchange import Exchange
from tsumugu.distributed.mesh import build_mesh
from tsumugu.errors import UserError
from tsumugu.kernels.linear import SummedLinear
from tsumugu.model import build

LAYERS, MICRO_BATCHES, RANKS = 3, 4, 2
ONCE = {"sync_each_micro_batch": False, "fsdp": True}


class Counted(TorchDispatchMode):
    """Counts collectives by name."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional"):
            self.calls[func.overloadpacket.__name__.strip("_")] += 1
        return func(*args, **(kwargs or {}))


def built(processes: int, **parallel):
    config = ParallelConfig(**parallel)
    model_config = tiny_config("gpt_neox", False, num_hidden_layers=LAYERS)
    mesh, cpu = build_mesh(config, processes, "cpu"), torch.device("cpu")
    model = build.build_model(model_config, mesh, cpu, torch.float32, torch.float32, build.initialised(1), config)
    layers = build.decoder_layers(model)
    return model.train(), layers, Exchange(model, layers, config, torch.float32, cpu, MICRO_BATCHES)


def take_micro_batches(model, exchange: Exchange) -> None:
    for number in range(1, MICRO_BATCHES + 1):
        exchange.before(last=number == MICRO_BATCHES)
        ids = (torch.arange(24).reshape(2, 12) * number) % 80 + 4
        model(input_ids=ids, use_cache=False).logits.square().mean().backward()
    exchange.after()


def collectives(reshard: str, sync: bool) -> tuple[Counter, int]:
    """Of the second step of a run, and how many linear layers make sums."""
    with process_group():
        model, layers, exchange = built(RANKS, reshard_after_forward=reshard, sync_each_micro_batch=sync, fsdp=True)
        take_micro_batches(model, exchange)
        model.zero_grad()
        with Counted() as seen:
            take_micro_batches(model, exchange)
        return seen.calls, sum(isinstance(module, SummedLinear) for layer in layers for module in layer.modules())


@pytest.mark.parametrize(
    ("reshard", "sync", "gathers", "reduces"),
    [
        ("never", True, (LAYERS + 1) * MICRO_BATCHES, (LAYERS + 1) * MICRO_BATCHES),
        ("never", False, LAYERS + 1, LAYERS + 1),
        ("always", False, (2 * LAYERS + 1) * MICRO_BATCHES, LAYERS + 1),
    ],
)
def test_collectives_of_a_step(reshard: str, sync: bool, gathers: int, reduces: int):
    counts, summed = run_ranks(collectives, RANKS, reshard, sync)[0]
    # among the replicas, of which there is one, what was reduced is reduced again
    assert counts == {"allgather_base": gathers, "reduce_scatter_base": reduces, "allreduce": reduces}
    assert summed == (0 if sync else 4 * LAYERS)


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_are_those_of_all_micro_batches_and_of_one_step_alone(compiled: bool):
    with process_group():
        model, _, exchange = built(1, **ONCE, compile=compiled)
        plain, _, each = built(1, sync_each_micro_batch=True, fsdp=True)
        for _ in range(2):
            model.zero_grad()
            plain.zero_grad()
            take_micro_batches(model, exchange)
            take_micro_batches(plain, each)
            for (name, found), right in zip(model.named_parameters(), plain.parameters(), strict=True):
                torch.testing.assert_close(found.grad.full_tensor(), right.grad.full_tensor(), msg=name)


def test_a_layer_that_takes_no_part_in_a_step_is_refused():
    with process_group():
        model, layers, exchange = built(1, **ONCE)
        take_micro_batches(model, exchange)
        layers[1].forward = lambda hidden, *args, **kwargs: hidden
        with pytest.raises(UserError, match="takes no part in some steps"):
            take_micro_batches(model, exchange)


def test_a_layer_that_is_used_twice_in_a_pass_is_refused():
    with process_group():
        model, layers, exchange = built(1, **ONCE)
        model.base_model.layers = torch.nn.ModuleList([*layers, layers[0]])
        with pytest.raises(UserError, match="used more than once in a pass"):
            take_micro_batches(model, exchange)


def test_sums_are_left_to_fsdp_where_weights_are_frozen_or_layers_recomputed():
    with process_group():
        _, layers, _ = built(1, **ONCE, activation_checkpointing="full", checkpoint_every_nth_layer=2)
        summed = [any(isinstance(module, SummedLinear) for module in layer.modules()) for layer in layers]
        assert summed == [False, True, False]
        model, layers, _ = built(1, sync_each_micro_batch=True, fsdp=True)
        model.get_input_embeddings().requires_grad_(False)
        Exchange(model, layers, ParallelConfig(**ONCE), torch.float32, torch.device("cpu"), MICRO_BATCHES)
        assert not any(isinstance(module, SummedLinear) for module in model.modules())

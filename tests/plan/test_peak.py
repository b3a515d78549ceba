"""Predicted memory, against the bytes of all tensors that a process has while it trains."""

import gc
import weakref
from pathlib import Path

import pytest
import torch
from support.models import tiny_config
from support.ranks import run_ranks
from support.runs import run_config
from support.stores import random_documents, write_store
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tsumugu.distributed.environment import process_group
from tsumugu.distributed.paths import Device
from tsumugu.errors import UserError
from tsumugu.model.build import read_config
from tsumugu.model.presets import sized_config
from tsumugu.plan import instances, memory
from tsumugu.training.signals import StopRequest
from tsumugu.training.trainer import Trainer

CPU = Device(type="cpu", name="CPU")
LENGTH = 64


class AllTensors(TorchDispatchMode):
    """The bytes of all storages that there are, looked up after every operator: also those that are resized.

    Args:
        others: Storages that are not counted.
    """

    def __init__(self, others: set[int]):
        super().__init__()
        self.storages: weakref.WeakValueDictionary[int, torch.UntypedStorage] = weakref.WeakValueDictionary()
        self.others, self.peak = others, 0
        for tensor in all_tensors():
            self.note(tensor)

    def note(self, tensor: torch.Tensor) -> None:
        tensor = local(tensor)
        storage = tensor.untyped_storage()
        if tensor.device.type == "cpu" and storage._cdata not in self.others:
            self.storages[storage._cdata] = storage

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves((args, result)):
            if isinstance(value, torch.Tensor):
                self.note(value)
        self.peak = max(self.peak, sum(storage.nbytes() for storage in self.storages.values()))
        return result


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def all_tensors() -> list[torch.Tensor]:
    gc.collect()
    return [local(thing) for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    make(folder)
    return folder


def make(folder: Path) -> None:
    """The store and the models."""
    write_store(folder / "text", random_documents(900, seed=1, shortest=40, longest=90))
    sizes = {"hidden_size": 64, "num_hidden_layers": 4, "intermediate_size": 128}
    tiny_config("gpt_neox", tied=False, **sizes).save_pretrained(folder / "gpt_neox")
    tiny_config("llama", tied=True, **sizes).save_pretrained(folder / "llama")
    tiny_config("qwen3", tied=False, **sizes).save_pretrained(folder / "qwen3")
    tiny_config("gpt2", tied=True, n_embd=64, n_layer=4).save_pretrained(folder / "gpt2")


def run(made: Path, model: str, changes: dict, processes: int, micro_batches: int):
    rows = 4
    common = {"model.config": str(made / model), "data.sequence_length": LENGTH, "train.max_steps": 9}
    common |= {"train.micro_batch_size": rows, "train.global_batch_size": rows * processes * micro_batches}
    return run_config(made / "text", common | changes)


def measured(made: Path, model: str, changes: dict, processes: int, micro_batches: int) -> int:
    """The peak of the second step of this process."""
    others = all_tensors()  # of tests before this one; held, so that nothing takes their place
    with process_group() as environment:
        trainer = Trainer(run(made, model, changes, processes, micro_batches), made / "run", environment)
        step(trainer)
        tracker = AllTensors({tensor.untyped_storage()._cdata for tensor in others})
        with tracker:
            step(trainer)
    return tracker.peak


def all_measured(made: Path, cases: list[tuple[str, dict, int]], processes: int) -> list[int]:
    return [measured(made, model, changes, processes, count) for model, changes, count in cases]


def step(trainer: Trainer) -> None:
    launched = trainer.train_step(StopRequest())
    assert launched is not None
    launched.figures()
    trainer.step += 1


def predicted(made: Path, model: str, changes: dict, processes: int, micro_batches: int) -> int:
    config = run(made, model, changes, processes, micro_batches)
    setup = memory.set_up(config, read_config(str(made / model)), CPU, processes)
    parts = memory.peak(setup, memory.trace_model(setup, 4), 4)
    return sum(parts.values())


ONE = [
    ("gpt_neox", {}, 1),
    ("gpt_neox", {}, 2),
    ("gpt_neox", {"train.dtype": "bfloat16"}, 2),
    ("llama", {"parallel.activation_checkpointing": "full"}, 2),
    ("llama", {"parallel.activation_checkpointing": "selective"}, 1),
    ("qwen3", {"parallel.chunked_loss": False}, 2),
    ("gpt2", {"parallel.activation_checkpointing": "full", "parallel.checkpoint_every_nth_layer": 2}, 2),
]
ONCE, NEVER, HALF = (
    {"parallel.sync_each_micro_batch": False}, {"parallel.reshard_after_forward": "never"}, {"train.dtype": "bfloat16"},
)  # fmt: skip
EACH, ALWAYS = {"parallel.sync_each_micro_batch": True}, {"parallel.reshard_after_forward": "always"}
REPLICATED = {"parallel.shard_degree": 2, "parallel.replicate_degree": 2}
SHARDED = {
    2: [
        ("qwen3", NEVER | HALF | EACH, 2),
        ("llama", EACH | {"parallel.activation_checkpointing": "full"}, 2),
        ("qwen3", NEVER | HALF | ONCE, 3),
        ("gpt_neox", ALWAYS | HALF | ONCE, 2),
    ],
    4: [
        ("llama", REPLICATED | {"parallel.activation_checkpointing": "full"}, 1),
        ("qwen3", REPLICATED | EACH, 2),
        ("gpt_neox", NEVER | ONCE | HALF, 2),
        ("llama", REPLICATED | ALWAYS | ONCE, 3),
    ],
}


@pytest.mark.parametrize(("model", "changes", "micro_batches"), ONE)
def test_one_process(made: Path, model: str, changes: dict, micro_batches: int):
    found = measured(made, model, changes, 1, micro_batches)
    assert predicted(made, model, changes, 1, micro_batches) == pytest.approx(found, rel=0.05)


@pytest.mark.parametrize("processes", list(SHARDED))
def test_sharded_processes(made: Path, processes: int):
    cases = SHARDED[processes]
    found = run_ranks(all_measured, processes, made, cases, processes)
    for index, (model, changes, micro_batches) in enumerate(cases):
        most = max(of_rank[index] for of_rank in found)
        assert predicted(made, model, changes, processes, micro_batches) == pytest.approx(most, rel=0.05), cases[index]


def test_what_plan_does_not_know_is_refused(made: Path):
    config = run(made, "llama", {"parallel.tensor_degree": 2}, 2, 1)
    with pytest.raises(UserError, match="plan does not know parallel"):
        memory.set_up(config, read_config(str(made / "llama")), CPU, 2)


def on_an_h100(rows: int, changes: dict) -> memory.Setup:
    """3.6b, four micro batches of so many rows a step."""
    common = {"model.preset": "3.6b", "data.sequence_length": 2048, "train.max_steps": 1}
    common |= {"train.micro_batch_size": rows, "train.global_batch_size": 4 * rows}
    h100 = instances.gpu("H100").device()
    return memory.set_up(run_config(Path("x"), common | changes), sized_config("3.6b", 32000), h100, 1)


def test_the_figures_that_were_measured_on_an_h100():
    """benchmarks/RESULTS.md, 2026-11-24: GiB at the peak of 3.6b with 3 rows, and with 2 and whole logits."""
    like = None
    for rows, changes, found in ((3, {}, 75.5), (2, {"parallel.chunked_loss": False}, 69.3)):
        setup = on_an_h100(rows, changes)
        traces = memory.trace_model(setup, rows, like)
        like = traces, rows
        parts = memory.peak(setup, traces, rows)
        assert sum(parts.values()) / 2**30 == pytest.approx(found, abs=0.1)


@pytest.mark.parametrize(("each", "found", "held"), [(True, 55.5, 62.9), (False, 62.2, 70.1)])
def test_the_figures_that_were_measured_on_two_h200(each: bool, found: float, held: float):
    """benchmarks/RESULTS.md, 2026-11-29: GiB at the peak of 3.6b with 3 rows, and what torch's allocator held."""
    common = {"model.preset": "3.6b", "data.sequence_length": 2048, "train.max_steps": 1}
    common |= {"train.micro_batch_size": 3, "train.global_batch_size": 24, "parallel.sync_each_micro_batch": each}
    h200 = instances.gpu("H200").device()
    setup = memory.set_up(run_config(Path("x"), common), sized_config("3.6b", 32000), h200, 2)
    parts, holds = memory.peak_and_held(setup, memory.trace_model(setup, 3), 3)
    total, margin = sum(parts.values()), memory.margin(setup, parts, holds)
    assert total / 2**30 == pytest.approx(found, abs=0.1)
    assert holds / 2**30 == pytest.approx(held, abs=0.7)
    beside = (1320 + 1024) / 1024  # CUDA and NCCL
    assert held < (total + margin) / 2**30 - beside < held + 2


def test_other_micro_batches_follow_from_a_trace():
    """The graphs of 3 rows say of 6 what those of 6 do, also by way of 4; but of time only those of 6 tell."""
    three = memory.trace_model(on_an_h100(3, {}), 3)
    four = memory.trace_model(on_an_h100(4, {}), 4, (three, 3))
    setup = on_an_h100(6, {})
    from_three = memory.trace_model(setup, 6, (three, 3)).layers[0]
    from_four = memory._trace_model(setup, 6, False, (four, 4)).layers[0]
    anew = memory.trace_model(setup, 6).layers[0]
    for name in ("forward", "saved", "backward", "output"):
        assert getattr(from_three, name) == pytest.approx(getattr(anew, name), rel=1e-3)
        assert getattr(from_four, name) == pytest.approx(getattr(anew, name), rel=1e-3)
    weights, tokens = 12 * 2816**2, 6 * 2048
    assert sum(flops for kind, flops, _ in anew.forward_work if kind == "matrix") == 2 * weights * tokens

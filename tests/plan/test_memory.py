"""Predicted memory, against the bytes of all tensors that a process has while it trains."""

import gc
import weakref
from pathlib import Path

import pytest
import torch
from support.models import VOCABULARY, tiny_config
from support.ranks import run_ranks
from support.runs import run_config
from support.stores import random_documents, write_store
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tsumugu.distributed.environment import process_group
from tsumugu.distributed.paths import Device
from tsumugu.errors import UserError
from tsumugu.model.build import read_config
from tsumugu.plan import memory
from tsumugu.training.signals import StopRequest
from tsumugu.training.trainer import Trainer

CPU = Device(type="cpu", name="CPU")
LENGTH = 64


class AllTensors(TorchDispatchMode):
    """The bytes of all storages that there are, looked up after every operator: also those that are resized."""

    def __init__(self):
        super().__init__()
        self.storages: weakref.WeakValueDictionary[int, torch.UntypedStorage] = weakref.WeakValueDictionary()
        self.peak = 0
        for thing in gc.get_objects():
            if isinstance(thing, torch.Tensor):
                self.note(thing)

    def note(self, tensor: torch.Tensor) -> None:
        if hasattr(tensor, "_local_tensor"):
            tensor = tensor._local_tensor  # type: ignore[attr-defined]
        if tensor.device.type == "cpu":
            storage = tensor.untyped_storage()
            self.storages[storage._cdata] = storage

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves((args, result)):
            if isinstance(value, torch.Tensor):
                self.note(value)
        self.peak = max(self.peak, sum(storage.nbytes() for storage in self.storages.values()))
        return result


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    write_store(folder / "text", random_documents(900, seed=1, shortest=40, longest=90))
    sizes = {"hidden_size": 64, "num_hidden_layers": 4, "intermediate_size": 128}
    tiny_config("gpt_neox", tied=False, **sizes).save_pretrained(folder / "gpt_neox")
    tiny_config("llama", tied=True, **sizes).save_pretrained(folder / "llama")
    tiny_config("qwen3", tied=False, **sizes).save_pretrained(folder / "qwen3")
    tiny_config("gpt2", tied=True, n_embd=64, n_layer=4).save_pretrained(folder / "gpt2")
    return folder


def run(made: Path, model: str, changes: dict, processes: int, micro_batches: int):
    rows = 4
    common = {"model.config": str(made / model), "data.sequence_length": LENGTH, "train.max_steps": 9}
    common |= {"train.micro_batch_size": rows, "train.global_batch_size": rows * processes * micro_batches}
    return run_config(made / "text", common | changes)


def measured(made: Path, model: str, changes: dict, processes: int, micro_batches: int) -> int:
    """The peak of the second step of this process."""
    with process_group() as environment:
        trainer = Trainer(run(made, model, changes, processes, micro_batches), made / "run", environment)
        for step in range(2):
            gc.collect()
            tracker = AllTensors()
            with tracker:
                launched = trainer.train_step(StopRequest())
                assert launched is not None
                launched.figures()
            trainer.step = step + 1
    return tracker.peak


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
SHARDED = [
    ("gpt_neox", {}, 2, 1),
    ("gpt_neox", {"train.dtype": "bfloat16"}, 4, 2),
    ("llama", {"parallel.activation_checkpointing": "full"}, 4, 2),
    ("qwen3", {"parallel.reshard_after_forward": "never"}, 2, 2),
    ("llama", {"parallel.shard_degree": 2, "parallel.replicate_degree": 2}, 4, 1),
]


@pytest.mark.parametrize(("model", "changes", "micro_batches"), ONE)
def test_one_process(made: Path, model: str, changes: dict, micro_batches: int):
    found = measured(made, model, changes, 1, micro_batches)
    assert predicted(made, model, changes, 1, micro_batches) == pytest.approx(found, rel=0.05)


@pytest.mark.parametrize(("model", "changes", "processes", "micro_batches"), SHARDED)
def test_sharded_processes(made: Path, model: str, changes: dict, processes: int, micro_batches: int):
    found = max(run_ranks(measured, processes, made, model, changes, processes, micro_batches))
    assert predicted(made, model, changes, processes, micro_batches) == pytest.approx(found, rel=0.05)

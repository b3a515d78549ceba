"""A run goes on from any checkpoint of another one, with its full state: longer, or on other stores."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.ranks import run_ranks
from support.runs import StopAfter, figures, run_config, whole
from support.stores import random_documents, write_store

from tsumugu.config import MixedStore
from tsumugu.data.sampler import row_at
from tsumugu.distributed.environment import process_group
from tsumugu.errors import UserError
from tsumugu.training import checkpoint
from tsumugu.training.trainer import Outcome, Trainer, train

COMMON = {
    "train.global_batch_size": 4,
    "optimizer.learning_rate": 1e-2,
    "schedule.kind": "wsd",
    "schedule.warmup_steps": 2,
    "schedule.decay_steps": 2,
    "guard.spike": "skip",
}


def config_of(made: Path, steps: int, start_from: str | None = None, **changes: Any):
    origin = {"model.config": str(made / "gpt2")}
    if start_from:
        origin = {"train.start_from": start_from, "train.start_state": "full"}
    return run_config(made / "text", {**COMMON, **origin, "train.max_steps": steps, **changes})


def state_after(config, run_dir: Path, stop: int | None = None) -> dict[str, torch.Tensor]:
    """Weights and moments at the end."""
    with process_group() as environment:
        trainer = Trainer(config, run_dir, environment)
        trainer.train(StopAfter(stop))
        state = {name: whole(weight) for name, weight in trainer.model.named_parameters()}
        for name, weight in trainer.model.named_parameters():
            state |= {f"{name} {key}": whole(value) for key, value in trainer.optimizer.state[weight].items()}
        return state


def extend(made: Path, folder: Path) -> None:
    """A run of ten steps, extended to twelve from the start of its decay, and one that had twelve from the start."""
    expected = state_after(config_of(made, 12), folder / "long")
    state_after(config_of(made, 10), folder / "short")
    longer = config_of(made, 12, f"{folder / 'short'}@8")
    state_after(longer, folder / "extended", stop=3)
    if torch.distributed.get_rank() == 0:
        (folder / "short").rename(folder / "elsewhere")
    found = state_after(longer, folder / "extended")
    assert not [name for name in expected if not torch.equal(found[name], expected[name])]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_extended_from_before_its_decay_is_the_long_run_to_the_bit(ranks: int, made: Path, tmp_path: Path):
    run_ranks(extend, ranks, made, tmp_path)
    assert checkpoint.complete_steps(tmp_path / "elsewhere") == [8, 10]
    assert checkpoint.complete_steps(tmp_path / "extended") == [10, 11, 12]
    long = {line["step"]: line for line in figures(tmp_path / "long") if "loss" in line}
    found = [line for line in figures(tmp_path / "extended") if "loss" in line]
    assert found == [long[step] for step in (9, 10, 11, 12)]


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("train.seed", 5, "train.seed was 1234, now 5"),
        ("train.global_batch_size", 8, "train.global_batch_size was 4, now 8"),
        ("data.sequence_length", 17, "data.sequence_length was 16, now 17"),
        ("train.dtype", "bfloat16", "train.dtype was float32, now bfloat16"),
        ("train.max_steps", 4, "has taken 5 of 4 steps"),
    ],
)
def test_what_a_branch_may_not_change_is_named(key: str, value: Any, named: str, finished: Path, made: Path, tmp_path):
    with pytest.raises(UserError, match=named):
        train(config_of(made, 6, str(finished), **{key: value}), tmp_path / "branch")
    assert not (tmp_path / "branch").exists()


@pytest.fixture(scope="module")
def finished(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    assert train(config_of(made, 5), run_dir) == Outcome(5, 5)
    return run_dir


@pytest.mark.parametrize(
    ("steps", "schedule"), [(9, {}), (5, {"schedule.kind": "cosine", "schedule.decay_steps": None})]
)
def test_a_finished_run_that_is_asked_for_more_says_how(steps: int, schedule: dict, finished: Path, made: Path):
    with pytest.raises(UserError) as refused:
        train(config_of(made, steps, **schedule), finished)
    for part in ("has taken all its steps", f"train.start_from to {finished}@3", "start_state full", "or weights"):
        assert part in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_hyperparameters_are_those_of_the_branch(finished: Path, made: Path, tmp_path: Path):
    config = config_of(made, 6, f"{finished}@3", **{"optimizer.beta1": 0.5, "optimizer.weight_decay": 0.3})
    with process_group() as environment:
        trainer = Trainer(config, tmp_path / "branch", environment)
        assert [(group["betas"], group["weight_decay"]) for group in trainer.optimizer.param_groups] == [
            ((0.5, 0.95), 0.3),
            ((0.5, 0.95), 0.0),
        ]
        assert (trainer.step, len(trainer.optimizer.state) > 0) == (3, True)


def test_a_store_goes_on_in_its_order_where_the_mixture_changes(finished: Path, made: Path, tmp_path: Path):
    """Three steps on one store; then that store and a new one, stopped and resumed; then a third mixture."""
    write_store(tmp_path / "new", random_documents(30, seed=5))
    entries = [MixedStore(name="old", path=str(made / "text"), weight=3)]
    entries += [MixedStore(name="new", path=str(tmp_path / "new"), weight=1)]
    config = config_of(made, 12, f"{finished}@3", **{"data.store": None, "data.stores": entries})
    expected = state_after(config, tmp_path / "whole")
    state_after(config, tmp_path / "stopped", stop=2)
    found = state_after(config, tmp_path / "stopped")
    assert not [name for name in expected if not torch.equal(found[name], expected[name])]
    with process_group() as environment:
        data = Trainer(config, tmp_path / "whole", environment).data
    sizes = [len(rows) for rows in data.train_rows]
    stores, rows = data.mixture.at(np.arange(12, 48))
    assert np.bincount(stores).tolist() == [27, 9]
    assert rows[stores == 0].tolist() == row_at(np.arange(12, 39), sizes[0], 1234).tolist()  # the seed of the run
    assert sorted(rows[stores == 1].tolist()) == sorted(set(rows[stores == 1].tolist()))
    state = checkpoint.read_state(tmp_path / "whole", 10)
    taken = np.bincount(stores[: 10 * 4 - 12], minlength=2)
    assert [order["uses"] for order in state["orders"]] == [12 + taken[0], taken[1]]
    assert state["rows_by_store"] == [12 + taken[0], taken[1]]

    third = config_of(made, 14, f"{tmp_path / 'whole'}@10", **{"data.store": None, "data.stores": entries[::-1]})
    with process_group() as environment:
        mixture = Trainer(third, tmp_path / "third", environment).data.mixture
    stores, rows = mixture.at(np.arange(40, 56))
    begin = 12 + int(taken[0])
    expected_rows = row_at(np.arange(begin, begin + 12), sizes[0], 1234).tolist()
    assert rows[stores == 1].tolist() == expected_rows


def test_a_branch_needs_a_checkpoint(made: Path):
    with pytest.raises(UserError, match=r"start_state is full without train\.start_from"):
        run_config(made / "text", {"train.max_steps": 2, "train.start_state": "full", "model.preset": "tiny"})


def test_the_checkpoint_before_the_decay_and_every_nth_stay(made: Path, tmp_path: Path):
    config = config_of(made, 9, **{"checkpoint.every": 1, "checkpoint.keep_every": 3, "schedule.decay_steps": 5})
    train(config, tmp_path)
    assert checkpoint.complete_steps(tmp_path) == [3, 4, 6, 8, 9]

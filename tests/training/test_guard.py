"""A step that would do harm changes nothing: neither weights nor moments, and every process agrees on it."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from support.ranks import run_ranks
from support.runs import StopAfter, figures, run_config, whole
from support.stores import random_documents, write_store

from tsumugu.config import GuardConfig
from tsumugu.distributed.environment import process_group
from tsumugu.errors import UserError
from tsumugu.training import checkpoint
from tsumugu.training.guard import APPLIED, NON_FINITE, SPIKE, Guard
from tsumugu.training.optimizer import LossScale, take_step
from tsumugu.training.trainer import Outcome, Trainer, train

COMMON = {
    "train.max_steps": 10,
    "train.global_batch_size": 4,
    "optimizer.learning_rate": 1e-2,
    "guard.spike_window": 3,
    "guard.spike_deviations": 20.0,
}


def config_of(made: Path, **changes):
    return run_config(made / "text", {**COMMON, "model.config": str(made / "gpt_neox"), **changes})


class Poisoned(Trainer):
    """The loss of some steps on the last rank is multiplied: a spike, or no number."""

    factors: dict[int, float]

    def _summed_loss(self, batch):
        last = self.environment.rank == self.environment.world_size - 1
        factor = self.factors.get(self.step + 1, 1.0) if last and self.model.training else 1.0
        return super()._summed_loss(batch) * factor


def poisoned(config, run_dir: Path, factors: dict[int, float], request: StopAfter | None = None):
    with process_group() as environment:
        trainer = Poisoned(config, run_dir, environment)
        trainer.factors = factors
        outcome = trainer.train(StopAfter(None) if request is None else request)
        return outcome, {name: whole(parameter) for name, parameter in trainer.model.named_parameters()}


def without_steps(config, run_dir: Path, left_out: set[int]) -> dict[str, torch.Tensor]:
    """The weights of a run in which the optimizer does not see some steps."""
    with process_group() as environment:
        trainer = Trainer(config, run_dir, environment)
        for step in range(1, trainer.max_steps + 1):
            if step not in left_out:
                trainer.train_step(StopAfter(None))
            trainer.step = step
        return {name: whole(parameter) for name, parameter in trainer.model.named_parameters()}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert not [name for name in expected if not torch.equal(found[name], expected[name])]


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_step_that_is_not_finite_is_skipped(factor: float, made: Path, tmp_path: Path):
    config = config_of(made, **{"guard.non_finite": "skip"})
    outcome, found = poisoned(config, tmp_path / "run", {4: factor, 5: factor})
    assert outcome == Outcome(10, 10)
    assert_equal(found, without_steps(config, tmp_path / "reference", {4, 5}))
    lines = {line["step"]: line for line in figures(tmp_path / "run") if "loss" in line}
    assert [step for step in lines if lines[step]["loss"] is None] == [4, 5]


def test_too_many_skipped_steps_end_the_run(made: Path, tmp_path: Path):
    config = config_of(made, **{"guard.non_finite": "skip", "guard.max_skipped": 2})
    with pytest.raises(UserError, match=r"step 6: not finite: .*; 3 such steps in a row"):
        poisoned(config, tmp_path, dict.fromkeys((4, 5, 6), math.nan))


def name_the_rank(made: Path, folder: Path) -> str:
    try:
        poisoned(config_of(made), folder, {3: math.nan})
    except UserError as error:
        return str(error)
    return ""


def test_the_rank_and_the_rows_of_a_loss_that_is_not_finite_are_named_on_every_rank(made: Path, tmp_path: Path):
    messages = run_ranks(name_the_rank, 2, made, tmp_path / "run")
    assert messages[0] == messages[1]
    with process_group() as environment:
        mixture = Trainer(config_of(made), tmp_path / "other", environment).data.mixture
    _, rows = mixture.at(np.arange(8, 12))  # the third step of four rows, of which every second is rank 1's
    assert f"(rank 1, rows store:{rows[1]} store:{rows[3]})" in messages[0]


def skip_a_spike(made: Path, folder: Path) -> dict[str, torch.Tensor]:
    return poisoned(config_of(made, **{"guard.spike": "skip", "train.dtype": "float64"}), folder, {6: 100.0})[1]


def test_a_spike_is_skipped_alike_on_every_mesh(made: Path, tmp_path: Path):
    found = skip_a_spike(made, tmp_path / "run")
    config = config_of(made, **{"train.dtype": "float64"})
    assert_equal(found, without_steps(config, tmp_path / "reference", {6}))
    for weights in run_ranks(skip_a_spike, 2, made, tmp_path / "two"):
        for name in found:
            torch.testing.assert_close(weights[name], found[name], rtol=0, atol=1e-10)


def test_the_recent_losses_survive_a_resume(made: Path, tmp_path: Path):
    config = config_of(made, **{"guard.spike": "skip"})
    _, expected = poisoned(config, tmp_path / "whole", {6: 100.0})
    poisoned(config, tmp_path / "run", {6: 100.0}, StopAfter(5))
    _, found = poisoned(config, tmp_path / "run", {6: 100.0})
    assert_equal(found, expected)


def test_a_run_goes_back_before_a_spike_and_passes_over_its_rows(made: Path, tmp_path: Path):
    config = config_of(made, **{"guard.spike": "rewind", "checkpoint.every": 4})
    outcome, found = poisoned(config, tmp_path / "run", {7: 100.0})
    assert outcome == Outcome(10, 10)
    assert_equal(found, without_steps(config, tmp_path / "reference", {6, 7}))
    lines = [line for line in figures(tmp_path / "run") if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert [line["step"] for line in lines if line["loss"] is None] == [6, 7]
    state = checkpoint.read_state(tmp_path / "run", 10)
    assert (state["passed_over"], state["rows_by_store"]) == ([5, 6], [8 * 4])


def test_a_run_that_went_back_resumes_as_if_it_had_not_stopped(made: Path, tmp_path: Path):
    config = config_of(made, **{"guard.spike": "rewind", "checkpoint.every": 4})
    _, expected = poisoned(config, tmp_path / "whole", {7: 100.0})
    for stop in (3, 5, 9):  # of the steps that are launched, those taken twice included
        poisoned(config, tmp_path / f"{stop}", {7: 100.0}, StopAfter(stop))
        _, found = poisoned(config, tmp_path / f"{stop}", {7: 100.0})
        assert_equal(found, expected)


def test_a_spike_before_the_first_checkpoint_is_skipped(made: Path, tmp_path: Path):
    config = config_of(made, **{"guard.spike": "rewind"})
    _, found = poisoned(config, tmp_path / "run", {6: 100.0})
    assert_equal(found, without_steps(config, tmp_path / "reference", {6}))


def test_what_a_spike_is():
    """By hand: the mean of 1, 2, 3 is 2 and their standard deviation 1."""
    guard = Guard(GuardConfig(spike="skip", spike_window=3, spike_deviations=2.0), torch.device("cpu"), [])

    def judge(loss: float, grad_norm: float = 1.0) -> int:
        return int(guard.judge(torch.tensor(loss, dtype=torch.float64), torch.tensor(grad_norm)))

    assert [judge(loss) for loss in (1.0, 2.0, 3.0)] == [APPLIED] * 3
    assert judge(4.001) == SPIKE
    assert judge(math.nan) == judge(1.0, math.inf) == NON_FINITE
    assert guard.losses() == [1.0, 2.0, 3.0]
    assert judge(3.999) == APPLIED
    assert guard.losses() == [2.0, 3.0, 3.999]


def test_the_loss_scale_follows_torchs_grad_scaler(monkeypatch: pytest.MonkeyPatch):
    """On gradients that overflow now and then; 3 quiet steps double the scale."""
    monkeypatch.setattr(LossScale, "QUIET_STEPS", 3)
    parameter, expected = (torch.nn.Parameter(torch.ones(4)) for _ in range(2))
    optimizer, reference = (torch.optim.AdamW([p], lr=0.1, fused=True) for p in (parameter, expected))
    ours, theirs = LossScale(torch.device("cpu")), torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=3)
    for step in range(12):
        gradient = torch.full((4,), math.inf if step in (2, 3, 9) else 0.1 * (step + 1))
        parameter.grad = gradient * ours.scale
        norm = parameter.grad.norm() / ours.scale
        take_step(optimizer, skip=~torch.isfinite(norm), grad_scale=ours.scale)
        ours.update(norm)
        (theirs.scale(expected.sum()) * 1).backward()
        expected.grad = gradient * theirs.get_scale()
        theirs.step(reference)
        theirs.update()
        assert ours.scale.item() == theirs.get_scale()
        assert torch.equal(parameter, expected)
        ours = LossScale(torch.device("cpu"), ours.state())


def test_float16_trains_and_its_overflows_are_not_applied(made: Path, tmp_path: Path):
    store = write_store(tmp_path / "store", random_documents(30, seed=1), random_documents(9, seed=2))
    changes = {**COMMON, "model.config": str(made / "gpt_neox"), "train.dtype": "float16"}
    outcome, found = poisoned(run_config(store, changes), tmp_path / "run", {4: 1e5})
    assert outcome == Outcome(10, 10)
    lines = {line["step"]: line for line in figures(tmp_path / "run") if "loss" in line}
    assert lines[4]["grad_norm"] is None
    assert checkpoint.read_state(tmp_path / "run", 10)["loss_scale"][0] == 2.0**15
    with process_group():
        train(run_config(store, {**changes, "train.dtype": "float32"}), tmp_path / "float32")
    expected = {line["step"]: line for line in figures(tmp_path / "float32") if "loss" in line}
    for step in (1, 2, 3):
        assert lines[step]["loss"] == pytest.approx(expected[step]["loss"], rel=2e-3)
    assert all(weight.isfinite().all() for weight in found.values())


def test_going_back_again_and_again_ends_the_run(made: Path, tmp_path: Path):
    """Every step after the fifth spikes: a run that has diverged is not passed over to its end."""
    config = config_of(made, **{"guard.spike": "rewind", "checkpoint.every": 4, "guard.max_skipped": 2})
    with pytest.raises(UserError, match="3 such steps in a row"):
        poisoned(config, tmp_path, dict.fromkeys(range(6, 11), 100.0))


def test_going_back_before_the_first_step_forgets_the_moments(made: Path, tmp_path: Path):
    config = config_of(made, **{"guard.spike": "rewind"})
    poisoned(config, tmp_path / "run", {}, StopAfter(0))
    assert checkpoint.complete_steps(tmp_path / "run") == [0]
    _, found = poisoned(config, tmp_path / "run", {6: 100.0})
    assert_equal(found, without_steps(config, tmp_path / "reference", {5, 6}))

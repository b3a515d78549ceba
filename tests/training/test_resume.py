"""A run that is stopped or killed and started again is the run that was not: bit for bit at the same world size."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.ranks import run_ranks
from support.runs import StopAfter, figures, run_config
from support.stores import random_documents, write_store
from torch.distributed.tensor import DTensor

from tsumugu.data.sampler import row_at
from tsumugu.distributed.environment import process_group
from tsumugu.errors import UserError
from tsumugu.training import checkpoint, saving
from tsumugu.training import trainer as trainer_module
from tsumugu.training.trainer import Outcome, Trainer, train

STEPS = 6
COMMON = {
    "train.max_steps": STEPS,
    "train.global_batch_size": 4,
    "train.micro_batch_size": 1,
    "evaluate.every": 2,
    "schedule.warmup_steps": 2,
    "optimizer.learning_rate": 1e-2,
}
RUNS = {"gpt2 with dropout": ("gpt2", "text", "concatenate"), "gpt_neox": ("gpt_neox", "instructions", "pad_left")}


class Killed(BaseException):
    """No clean-up code may depend on seeing it."""


class KillAfter(StopAfter):
    """Kills the process after the given step, before its figures are looked at."""

    def __bool__(self) -> bool:
        if super().__bool__():
            raise Killed
        return False


def config_of(made: Path, run: str, **changes: Any):
    model, store, packing = RUNS[run]
    return run_config(made / store, {**COMMON, "model.config": str(made / model), "data.packing": packing, **changes})


def take(config, run_dir: Path, request: StopAfter) -> tuple[Outcome, dict[str, torch.Tensor]]:
    """Trains, and returns this process's weights and moments as they are at the end."""
    with process_group() as environment:
        trainer = Trainer(config, run_dir, environment)
        outcome = trainer.train(request)
        state = dict(trainer.model.named_parameters())
        for name, parameter in list(state.items()):
            state |= {f"{name} {key}": value for key, value in trainer.optimizer.state[parameter].items()}
        return outcome, {
            name: (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach().clone()
            for name, tensor in state.items()
        }


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different


def check_every_step(made: Path, folder: Path, run: str) -> None:
    """Stops at every step in turn and goes on; the request comes to the last process alone."""
    config = config_of(made, run)
    with process_group() as environment:
        asked = environment.rank == environment.world_size - 1
        done, expected = take(config, folder / "whole", StopAfter(None))
        assert done == Outcome(STEPS, STEPS)
        for stop in range(1, STEPS):
            run_dir = folder / f"stopped at {stop}"
            outcome, _ = take(config, run_dir, StopAfter(stop if asked else None))
            assert outcome == Outcome(stop, STEPS, interrupted=True)
            outcome, found = take(config, run_dir, StopAfter(None))
            assert outcome == done
            assert_same(found, expected)
            assert figures(run_dir) == figures(folder / "whole")


@pytest.mark.parametrize("run", RUNS)
def test_stopping_at_any_step_changes_nothing(run: str, made: Path, tmp_path: Path):
    check_every_step(made, tmp_path, run)
    lines = figures(tmp_path / "whole")
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, STEPS + 1))
    assert [line["step"] for line in lines if "validation_loss" in line] == [0, 2, 4, 6]


def on_two_ranks(made: Path, folder: Path) -> None:
    for run in RUNS:
        check_every_step(made, folder / run, run)
    config = config_of(made, "gpt_neox", **{"parallel.shard_degree": 1})
    take(config, folder / "replicas", StopAfter(3))
    take(config_of(made, "gpt_neox"), folder / "replicas", StopAfter(None))
    take(config_of(made, "gpt_neox"), folder / "from one", StopAfter(None))
    take(config_of(made, "gpt_neox"), folder / "to one", StopAfter(3))


def test_two_processes_resume_exactly_and_any_number_resumes_any_other(made: Path, tmp_path: Path):
    config = config_of(made, "gpt_neox")
    take(config, tmp_path / "one", StopAfter(None))
    take(config_of(made, "gpt_neox", **{"train.micro_batch_size": 2}), tmp_path / "from one", StopAfter(3))
    run_ranks(on_two_ranks, 2, made, tmp_path)
    take(config, tmp_path / "to one", StopAfter(None))
    expected = [line["loss"] for line in figures(tmp_path / "one") if "loss" in line]
    for run in ("gpt_neox/whole", "replicas", "from one", "to one"):
        lines = figures(tmp_path / run)
        assert [line["loss"] for line in lines if "loss" in line] == pytest.approx(expected, rel=0, abs=1e-6), run
        assert [line["step"] for line in lines] == [line["step"] for line in figures(tmp_path / "one")]


def test_a_killed_run_goes_on_from_its_checkpoint_and_drops_later_lines(made: Path, tmp_path: Path):
    config = config_of(made, "gpt2 with dropout", **{"checkpoint.every": 2})
    _, expected = take(config, tmp_path / "whole", StopAfter(None))
    with pytest.raises(Killed):
        take(config, tmp_path / "run", KillAfter(5))
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')
    assert [line["step"] for line in figures(tmp_path / "run")][-1] == 5
    _, found = take(config, tmp_path / "run", StopAfter(None))
    assert_same(found, expected)
    assert figures(tmp_path / "run") == figures(tmp_path / "whole")


def test_a_run_killed_before_its_first_checkpoint_starts_over(made: Path, tmp_path: Path):
    config = config_of(made, "gpt_neox")
    _, expected = take(config, tmp_path / "whole", StopAfter(None))
    with pytest.raises(Killed):
        take(config, tmp_path / "run", KillAfter(1))
    _, found = take(config, tmp_path / "run", StopAfter(None))
    assert_same(found, expected)
    assert figures(tmp_path / "run") == figures(tmp_path / "whole")


def test_a_checkpoint_before_the_first_supervised_token_changes_nothing(made: Path, tmp_path: Path):
    """Saving must not take an optimizer step of its own, as torch's get_optimizer_state_dict does on an empty state."""
    documents = random_documents(24, seed=1)
    masks = [[1] * len(ids) for ids in documents]
    for index in row_at(torch.arange(8).numpy(), 24, 1234):
        masks[index] = [0] * len(documents[index])
    store = write_store(tmp_path / "store", documents, masks=masks)
    changes = {**COMMON, "model.config": str(made / "gpt_neox"), "data.packing": "pad_left"}
    _, expected = take(run_config(store, changes), tmp_path / "whole", StopAfter(None))
    changes["checkpoint.every"] = 1
    take(run_config(store, changes), tmp_path / "run", StopAfter(1))
    _, found = take(run_config(store, changes), tmp_path / "run", StopAfter(None))
    assert_same(found, expected)
    assert [line["loss"] is None for line in figures(tmp_path / "run")] == [True, True] + [False] * 4


@pytest.fixture(scope="module")
def stopped(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stopped") / "run"
    take(config_of(made, "gpt_neox"), folder, StopAfter(2))
    return folder


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("train.seed", 5, "train.seed was 1234, now 5"),
        ("train.global_batch_size", 8, "train.global_batch_size was 4, now 8|the rows of the run"),
        ("train.max_steps", 7, "length of the run .steps. was 6, now 7"),
        ("train.dtype", "bfloat16", "train.dtype was float32, now bfloat16"),
        ("data.sequence_length", 17, "data.sequence_length was 16, now 17"),
        ("optimizer.learning_rate", 0.1, "optimizer.learning_rate was 0.01, now 0.1"),
        ("schedule.warmup_steps", 3, "schedule.warmup_steps was 2, now 3"),
        ("model.config", "smaller", "the model's hidden_size was 32, now 16"),
        ("data.store", "text", r"data\.store was"),
    ],
)
def test_what_the_numbers_depend_on_must_not_change(key: str, value: Any, named: str, stopped: Path, made: Path):
    value = str(made / value) if key in ("model.config", "data.store") else value
    before = (stopped / "config.yaml").read_bytes(), (stopped / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=named):
        train(config_of(made, "gpt_neox", **{key: value}), stopped)
    assert before == ((stopped / "config.yaml").read_bytes(), (stopped / "metrics.jsonl").read_bytes())


def test_another_store_of_the_same_size_is_refused(made: Path, tmp_path: Path):
    config = {**COMMON, "model.config": str(made / "gpt_neox")}
    take(run_config(made / "text", config), tmp_path, StopAfter(1))
    with pytest.raises(UserError, match=r"data\.store was"):
        train(run_config(made / "other text", config), tmp_path)


def test_what_the_numbers_do_not_depend_on_may_change(stopped: Path, made: Path, tmp_path: Path):
    """Micro batch, logging, checkpoints and evaluations, spelling a default out, and where the store lies."""
    (tmp_path / "moved").symlink_to(made / "instructions")
    changes = {
        "train.micro_batch_size": 4,
        "train.log_every": 2,
        "train.dtype": "float32",
        "checkpoint.every": 1,
        "checkpoint.keep": 9,
        "evaluate.every": 1,
        "data.store": str(tmp_path / "moved"),
    }
    assert train(config_of(made, "gpt_neox", **changes), stopped) == Outcome(STEPS, STEPS)
    assert checkpoint.complete_steps(stopped) == [2, 3, 4, 5, 6]


def test_the_run_resumes_when_what_it_started_from_is_gone(made: Path, tmp_path: Path):
    take(config_of(made, "gpt_neox"), tmp_path / "first", StopAfter(1))
    changes = {"model.config": None, "train.start_from": str(tmp_path / "first")}
    take(config_of(made, "gpt_neox", **changes), tmp_path / "second", StopAfter(2))
    (tmp_path / "first").rename(tmp_path / "elsewhere")
    outcome, _ = take(config_of(made, "gpt_neox", **changes), tmp_path / "second", StopAfter(None))
    assert outcome == Outcome(STEPS, STEPS)
    state = json.loads((checkpoint.folder(tmp_path / "second", STEPS) / "state.json").read_text())
    assert state["step"] == STEPS


def test_a_run_whose_hours_are_over_saves_in_time_and_goes_on(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """By a clock on which every step takes ten minutes and a checkpoint one hour, and building two hours."""
    minutes = [0.0]
    train_step, build = Trainer.train_step, trainer_module.build_optimizer

    def passes(amount: float, action):
        def slow(*arguments, **keywords):
            result = action(*arguments, **keywords)
            minutes[0] += amount
            return result

        return slow

    clock = SimpleNamespace(monotonic=lambda: minutes[0] * 60, perf_counter=lambda: minutes[0] * 60)
    for module in (trainer_module, saving):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(trainer_module, "build_optimizer", passes(120, build))
    monkeypatch.setattr(Trainer, "train_step", passes(10, train_step))
    monkeypatch.setattr(saving.dcp, "save", passes(60, saving.dcp.save))
    waits = {"checkpoint.asynchronous": False, "checkpoint.every": 2}
    config = config_of(made, "gpt_neox", **waits)
    train(config, tmp_path / "whole")

    minutes[0] = 0
    hours = config_of(made, "gpt_neox", **waits | {"train.max_hours": 5.0})
    # 120 of 300 minutes to start, 20 for two steps, 60 for their checkpoint: 200; two more steps and 1.5 times a
    # checkpoint are 110 more, which is too long
    assert train(hours, tmp_path / "run") == Outcome(2, STEPS, interrupted=True)
    assert minutes[0] <= 300
    assert checkpoint.complete_steps(tmp_path / "run") == [2]
    unsaved = config_of(made, "gpt_neox", **waits | {"checkpoint.every": None, "train.max_hours": 2.8})
    minutes[0] = 0
    assert train(unsaved, tmp_path / "unsaved") == Outcome(3, STEPS, interrupted=True)
    assert checkpoint.complete_steps(tmp_path / "unsaved") == [3]
    for run in ("run", "unsaved"):
        assert train(config, tmp_path / run) == Outcome(STEPS, STEPS)
        assert figures(tmp_path / run) == figures(tmp_path / "whole")

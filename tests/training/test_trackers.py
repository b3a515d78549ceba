"""Trackers get the figures and the configuration of a run, and go on with it where it goes on."""

import json
import sys
import types
from pathlib import Path

import pytest
from support.runs import run_config

from tsumugu.errors import UserError
from tsumugu.training.metrics import read_metrics
from tsumugu.training.trainer import Outcome, train

COMMON = {"train.max_steps": 4, "train.global_batch_size": 2}
TOKEN = "hf_" + "aB3" * 11


def config_of(made: Path, tracker: str, **changes):
    changes = {**COMMON, "model.config": str(made / "gpt_neox"), "train.log_to": [tracker], **changes}
    return run_config(made / "text", changes)


def interrupted_and_resumed(made: Path, run_dir: Path, tracker: str) -> str:
    """The id of its run at the tracker."""
    changes = {"train.stop_after": 2, "tokenizer.path": None}
    assert train(config_of(made, tracker, **changes), run_dir) == Outcome(2, 4, interrupted=True)
    first = json.loads((run_dir / "trackers.json").read_text())
    assert train(config_of(made, tracker), run_dir) == Outcome(4, 4)
    assert json.loads((run_dir / "trackers.json").read_text()) == first
    return first[tracker]


def losses(run_dir: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_metrics(run_dir) if "loss" in line}


def test_mlflow_goes_on_with_its_run(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    id = interrupted_and_resumed(made, tmp_path / "run", "mlflow")
    client = mlflow.MlflowClient()
    run = client.get_run(id)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "run")
    assert run.data.params["train.global_batch_size"] == "2"
    assert run.data.params["data.store"] == str(made / "text")
    history = {metric.step: metric.value for metric in client.get_metric_history(id, "loss")}
    assert history == losses(tmp_path / "run")
    assert [metric.step for metric in client.get_metric_history(id, "validation_loss")] == [0, 4]
    assert len(client.search_runs([run.info.experiment_id])) == 1


def test_wandb_goes_on_with_its_run(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    id = interrupted_and_resumed(made, tmp_path / "run", "wandb")
    files = sorted((tmp_path / "run").glob("wandb/offline-run-*/*.wandb"))
    assert [file.stem for file in files] == [f"run-{id}"] * 2  # one id, in the parts in which it was taken
    assert all(b"grad_norm" in file.read_bytes() for file in files)


class Recorded:
    """A stand-in for wandb: it keeps what it is called with."""

    def __init__(self):
        self.runs: list[dict] = []
        self.module = types.ModuleType("wandb")
        self.module.__spec__ = types.SimpleNamespace(origin="somewhere")  # type: ignore[assignment]
        self.module.Settings = dict  # type: ignore[attr-defined]
        self.module.init = self.init  # type: ignore[attr-defined]

    def init(self, **arguments):
        logged: list[dict] = []
        self.runs.append({**arguments, "logged": logged, "ended": None})
        this = self.runs[-1]
        return types.SimpleNamespace(
            define_metric=lambda *_, **__: None,
            log=logged.append,
            finish=lambda exit_code: this.update(ended=exit_code),
        )


def test_what_wandb_is_told(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    recorded = Recorded()
    monkeypatch.setitem(sys.modules, "wandb", recorded.module)
    id = interrupted_and_resumed(made, tmp_path / "run", "wandb")
    first, second = recorded.runs
    assert (first["id"], second["id"], second["resume"]) == (id, id, "allow")
    assert (first["ended"], second["ended"]) == (1, 0)
    assert first["config"]["optimizer.beta2"] == 0.95
    logged = {line["step"]: line["loss"] for line in first["logged"] + second["logged"] if "loss" in line}
    assert logged == losses(tmp_path / "run")


def test_a_tracker_that_fails_later_does_not_end_the_run(made: Path, tmp_path: Path, monkeypatch, capsys):
    recorded = Recorded()
    init = recorded.init

    def failing(**arguments):
        run = init(**arguments)
        run.log = lambda _: (_ for _ in ()).throw(ConnectionError(f"no answer from https://me:{TOKEN}@host"))
        return run

    recorded.module.init = failing  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", recorded.module)
    assert train(config_of(made, "wandb"), tmp_path / "run") == Outcome(4, 4)
    shown = capsys.readouterr().err
    assert "wandb: no answer from https://[redacted]@host; the figures are in metrics.jsonl" in shown
    assert TOKEN not in shown


def test_a_tracker_that_cannot_start_is_refused(made: Path, tmp_path: Path, monkeypatch):
    recorded = Recorded()
    recorded.module.init = lambda **_: (_ for _ in ()).throw(RuntimeError("not logged in"))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", recorded.module)
    with pytest.raises(UserError, match=r"train\.log_to: wandb cannot be used: not logged in"):
        train(config_of(made, "wandb"), tmp_path / "run")


@pytest.mark.parametrize("tracker", ["mlflow", "wandb"])
def test_a_tracker_that_is_not_installed_is_refused_at_the_start(
    tracker: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(UserError, match=f"names {tracker}, which is not installed .pip install {tracker}"):
        train(config_of(made, tracker), tmp_path / "run")
    assert not (tmp_path / "run").exists()

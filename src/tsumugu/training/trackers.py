"""Experiment trackers beside metrics.jsonl: TensorBoard, MLflow, Weights & Biases; imported only when asked for.

The run at the tracker goes on when the training run is resumed: its id is in `trackers.json` of the run folder. Where
the tracker lies, and the credentials for it, are the tracker's own affair (its environment variables and files).
"""

import importlib.util
import json
import math
import os
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from tsumugu.errors import UserError, redact

TRACKERS = "trackers.json"

_INSTALLED_BY = {"mlflow": "pip install mlflow-skinny", "wandb": "pip install wandb"}


class Tracker(Protocol):
    """What takes figures."""

    def write(self, step: int, figures: dict[str, float]) -> None: ...

    def close(self, finished: bool) -> None: ...


def check_trackers(names: Sequence[str]) -> None:
    """Raises UserError where a tracker is asked for that is not installed (but for TensorBoard)."""
    for name in names:
        found = name not in _INSTALLED_BY or importlib.util.find_spec(name)
        if not found or (found is not True and found.origin is None):  # a folder of that name is no package
            raise UserError(f"train.log_to names {name}, which is not installed", _INSTALLED_BY[name])


def open_trackers(names: Sequence[str], run_dir: Path, step: int, configuration: dict) -> dict[str, Tracker]:
    """Starts the trackers, or goes on with the runs that they had for this run folder.

    Args:
        names: From train.log_to.
        run_dir: The run folder.
        step: Steps done.
        configuration: Nested, without credentials; becomes the parameters of a new run.

    Raises:
        UserError: A tracker that cannot be reached, or does not know the run any more.
    """
    path = run_dir / TRACKERS
    try:
        ids = json.loads(path.read_text(encoding="utf-8")) if path.exists() and step else {}
    except ValueError:  # cut by a full disk: the trackers begin new runs
        ids = {}
    openers = {"tensorboard": _tensorboard, "mlflow": _mlflow, "wandb": _wandb}
    opened = {}
    for name in names:
        try:
            tracker, ids[name] = openers[name](run_dir, step, configuration, ids.get(name))
        except Exception as error:  # each tracker has its own kinds
            reason = " ".join(str(error).split())
            raise UserError(
                f"train.log_to: {name} cannot be used: {reason}", "mend its settings, or leave it out"
            ) from None
        if tracker is not None:
            opened[name] = tracker
    if any(ids.values()):
        temporary = path.with_name(f".{path.name}")
        temporary.write_text(json.dumps({name: id for name, id in ids.items() if id}), encoding="utf-8")
        temporary.replace(path)
    return opened


def _tensorboard(run_dir: Path, step: int, _configuration: dict, _id: str | None) -> tuple[Tracker | None, None]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # the training dependencies alone do not have it
        return None, None
    return _TensorBoard(SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)), None


class _TensorBoard:
    def __init__(self, writer: Any):
        self._writer = writer

    def write(self, step: int, figures: dict[str, float]) -> None:
        for key, value in figures.items():
            self._writer.add_scalar(key, value, step)

    def close(self, finished: bool) -> None:
        self._writer.close()


def _mlflow(run_dir: Path, _step: int, configuration: dict, id: str | None) -> tuple[Tracker, str]:
    import mlflow  # pyright: ignore[reportMissingImports]

    # by the client, which sends neither the command line nor the environment
    client = mlflow.MlflowClient()
    if id is None:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "tsumugu")
        experiment = client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else client.create_experiment(name)
        id = str(client.create_run(experiment_id, run_name=run_dir.name).info.run_id)
        for key, value in _flat(configuration).items():
            client.log_param(id, key, str(value)[:6000])  # the longest that MLflow takes
    else:
        client.update_run(id, status="RUNNING")
    return _MLflow(client, id, mlflow.entities.Metric), id


class _MLflow:
    def __init__(self, client: Any, id: str, metric: Any):
        self._client, self._id, self._metric = client, id, metric

    def write(self, step: int, figures: dict[str, float]) -> None:
        now = int(time.time() * 1000)
        metrics = [self._metric(_plain(key), float(value), now, step) for key, value in figures.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self, finished: bool) -> None:
        self._client.set_terminated(self._id, status="FINISHED" if finished else "KILLED")


def _wandb(run_dir: Path, _step: int, configuration: dict, id: str | None) -> tuple[Tracker, str]:
    import wandb  # pyright: ignore[reportMissingImports]

    # neither what is printed nor the command line, the machine and the working copy are sent
    settings = wandb.Settings(console="off", disable_code=True, disable_git=True, x_disable_meta=True)
    id = id or uuid.uuid4().hex[:12]
    run = wandb.init(
        id=id, resume="allow", dir=str(run_dir), name=run_dir.name, config=_flat(configuration), settings=settings
    )
    run.define_metric("*", step_metric="step")  # steps taken again after a kill are welcome too
    return _Wandb(run), id


class _Wandb:
    def __init__(self, run: Any):
        self._run = run

    def write(self, step: int, figures: dict[str, float]) -> None:
        self._run.log({"step": step, **figures})

    def close(self, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


def _flat(content: dict, prefix: str = "") -> dict[str, Any]:
    """{"train": {"seed": 1}} as {"train.seed": 1}."""
    flat = {}
    for key, value in content.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _plain(key: str) -> str:
    """A name of a figure in the characters that MLflow takes."""
    return "".join(c if c.isalnum() or c in "_-. /:" else "_" for c in key)


def numbers(line: dict) -> dict[str, float]:
    """The figures of a line of metrics.jsonl that a tracker can take."""
    return {
        key: value
        for key, value in line.items()
        if key != "step" and isinstance(value, (int, float)) and math.isfinite(value)
    }


def failure(name: str, error: Exception) -> str:
    """What a person is told when a tracker fails; training goes on."""
    return redact(f"{name}: {' '.join(str(error).split())}; the figures are in metrics.jsonl")

"""Checkpoints: a folder that holds everything, or does not exist.

    checkpoints/step-00000100/
        .metadata, __*.distcp     weights, moments (torch.distributed.checkpoint, one file a process)
        state.json                step, counters, and what the run must not change
        COMPLETE                  JSON list of every file with size and sha256, written last

A checkpoint is valid when every listed file is there at its size; on loading also by its hash. DCP's `.metadata` is a
pickle: load checkpoints only from those whom you would let run code.
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from transformers import PreTrainedModel

from tsumugu.data.store import sha256
from tsumugu.distributed.environment import on_main
from tsumugu.errors import UserError
from tsumugu.model.build import NewRows, grown, place, rebuild_buffers, tied_names, vocabulary_names

COMPLETE = "COMPLETE"
STATE = "state.json"

_NAME = re.compile(r"step-([0-9]{8,})")


def save(run_dir: Path, step: int, model: PreTrainedModel, optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Writes the checkpoint of a step; every process calls it.

    Args:
        run_dir: The run folder.
        step: Optimizer steps done.
        model: The sharded model.
        optimizer: Its optimizer.
        state: What goes to state.json, equal on every process.
    """
    final = folder(run_dir, step)
    temporary = final.with_name(f".{final.name}")
    try:
        on_main(lambda: _clear(temporary))
        dcp.save(_state(model, optimizer), checkpoint_id=temporary)
        on_main(lambda: _complete(temporary, final, state))
    except (OSError, CheckpointException):
        if dist.get_rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)  # a full disk is not left full
        raise


def _clear(temporary: Path) -> None:
    """Makes the empty folder, and deletes what killed saves and deletions have left."""
    for path in temporary.parent.glob(".step-*"):
        if _NAME.fullmatch(path.name.removeprefix(".")):
            shutil.rmtree(path)
    for _, path in _named(temporary.parent.parent):
        if not (path / COMPLETE).exists():
            shutil.rmtree(path)
    temporary.mkdir(parents=True)


def _complete(temporary: Path, final: Path, state: dict) -> None:
    (temporary / STATE).write_text(json.dumps(state, ensure_ascii=False, indent=1), encoding="utf-8")
    files = {file.name: {"size": file.stat().st_size, "sha256": sha256(file)} for file in temporary.iterdir()}
    for file in [*temporary.iterdir(), temporary]:
        _flush(file)
    if final.exists():  # a damaged one, which was passed over
        _delete(final)
    temporary.rename(final)
    marker = final / f".{COMPLETE}"
    marker.write_text(json.dumps(files, indent=1), encoding="utf-8")
    _flush(marker)
    marker.rename(final / COMPLETE)
    _flush(final)
    _flush(final.parent)


def prune(run_dir: Path, step: int, keep: int) -> None:
    """Deletes all but the newest `keep` complete checkpoints up to `step`, the one just saved (main process).

    Later ones were passed over as damaged when the run resumed, and do not count.
    """
    for old in [saved for saved in complete_steps(run_dir) if saved <= step][:-keep]:
        _delete(folder(run_dir, old))


def _delete(path: Path) -> None:
    (path / COMPLETE).unlink(missing_ok=True)  # first no longer a checkpoint, then no longer there
    shutil.rmtree(path)


def complete_steps(run_dir: Path) -> list[int]:
    """Steps with a checkpoint whose files are all there at their sizes, oldest first."""
    return [step for step, path in _named(run_dir) if _fault(path, hashes=False) is None]


def _named(run_dir: Path) -> list[tuple[int, Path]]:
    """Steps and folders whose names are those of checkpoints, oldest first; other names are somebody else's."""
    matches = [(_NAME.fullmatch(path.name), path) for path in (run_dir / "checkpoints").glob("step-*")]
    return sorted((int(match[1]), path) for match, path in matches if match and path.is_dir())


def newest(run_dir: Path, report: Callable[[str], None]) -> int | None:
    """The newest step whose files also have their hashes; every process calls it, and all get the same answer.

    Args:
        run_dir: The run folder.
        report: Called with a line for every checkpoint that is damaged and passed over.

    Raises:
        UserError: There were checkpoints, and none of them is whole: starting over would write over the run.
    """

    def find() -> int | None:
        damaged = False
        for step, path in reversed(_named(run_dir)):
            fault = _fault(path, hashes=True)
            if fault is None:
                return step
            report(f"{path} is passed over: {fault}")
            damaged = damaged or (path / COMPLETE).exists()
        if damaged:
            raise UserError(
                f"every checkpoint of {run_dir} is damaged",
                f"choose another --run-dir, or delete {run_dir / 'checkpoints'} to start this run over",
            )
        return None

    return on_main(find)


def read_state(run_dir: Path, step: int) -> dict:
    """state.json of a checkpoint."""
    return json.loads((folder(run_dir, step) / STATE).read_text(encoding="utf-8"))


def weights(path: Path, new_rows: NewRows = ()) -> Callable[[PreTrainedModel, list], None]:
    """Fills a model (see `model.build.build_model`) from the weights of a checkpoint, on any mesh.

    Args:
        path: The checkpoint.
        new_rows: Rows of the vocabulary that it lacks, as for `model.build.pretrained`.
    """

    def fill(model: PreTrainedModel, mapping: list) -> None:
        rebuild_buffers(model)
        state = _model_state(model)
        vocabulary = vocabulary_names(model) & state.keys() if new_rows else set()
        stored: dict[str, Any] = dcp.FileSystemReader(path).read_metadata().state_dict_metadata if vocabulary else {}
        whole = {name: torch.empty(stored[f"model.{name}"].size, dtype=state[name].dtype) for name in vocabulary}
        dcp.load({"model": state | whole}, checkpoint_id=path)
        for name, tensor in whole.items():
            place(grown(tensor, len(state[name]), new_rows), state[name])
        model.tie_weights()

    return fill


def load_optimizer(path: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
    """Loads the optimizer's state from a checkpoint, on any mesh."""
    stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    if not any(name.startswith("optimizer.") for name in stored):
        return
    contents: dict[str, Any] = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(contents, checkpoint_id=path)
    set_optimizer_state_dict(model, optimizer, contents["optimizer"])


def folder(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def resolve(reference: str) -> tuple[Path, int]:
    """RUN or RUN@STEP as run folder and step (the newest complete one).

    Raises:
        UserError: No such run or step.
    """
    name, _, wanted = reference.rpartition("@") if "@" in Path(reference).name else (reference, "", "")
    run_dir = Path(name)
    steps = complete_steps(run_dir)
    if not steps:
        raise UserError(f"{name} holds no complete checkpoint", "give the folder of a run that has saved one")
    if not wanted:
        return run_dir, steps[-1]
    if not wanted.isdigit() or int(wanted) not in steps:
        raise UserError(f"{name} has no complete checkpoint of step {wanted}", f"it has: {', '.join(map(str, steps))}")
    return run_dir, int(wanted)


def check(path: Path) -> None:
    """Raises UserError where a checkpoint's files are not what was written (on one process: it reads them whole)."""
    fault = _fault(path, hashes=True)
    if fault:
        raise UserError(f"{path} is damaged: {fault}", "name another step, as RUN@STEP")


def _state(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    state: dict[str, Any] = {"model": _model_state(model)}
    if optimizer.state:  # before its first step it has none, and torch would take a step to make one
        state["optimizer"] = get_optimizer_state_dict(model, optimizer)
    return state


def _model_state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    tied = tied_names(model)
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def _fault(path: Path, hashes: bool) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        files = json.loads((path / COMPLETE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "it has no COMPLETE marker"
    except ValueError:
        files = None
    if not isinstance(files, dict):
        return "its COMPLETE marker is damaged"
    for name, entry in files.items():
        file = path / Path(name).name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != entry["size"]:
            return f"{name} has {file.stat().st_size} bytes, not {entry['size']}"
        try:
            if hashes and sha256(file) != entry["sha256"]:
                return f"{name} has another sha256"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error means that no space was left, on this or, for a CheckpointException, any process."""
    if isinstance(error, CheckpointException):
        return any(is_disk_full(cause) for cause, _ in error.failures.values())
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        if any(words in str(error) for words in ("No space left", "File too large", "unexpected pos")):
            return True  # torch's and safetensors' writers say only this
        error = error.__cause__ or error.__context__
    return False


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

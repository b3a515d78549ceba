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
from tsumugu.errors import UserError
from tsumugu.model.build import rebuild_buffers, tied_names

COMPLETE = "COMPLETE"
STATE = "state.json"


def save(run_dir: Path, step: int, model: PreTrainedModel, optimizer: torch.optim.Optimizer, state: dict) -> Path:
    """Writes the checkpoint of a step; every process calls it.

    Args:
        run_dir: The run folder.
        step: Optimizer steps done.
        model: The sharded model.
        optimizer: Its optimizer.
        state: What goes to state.json, equal on every process.

    Raises:
        UserError: No space left.
    """
    final = folder(run_dir, step)
    temporary = final.with_name(f".{final.name}")
    if dist.get_rank() == 0:
        for leftover in (temporary, final):
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    contents = {"model": _model_state(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    try:
        dcp.save(contents, checkpoint_id=temporary)
    except CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        if any(_is_disk_full(cause) for cause in causes):
            shutil.rmtree(temporary, ignore_errors=True)
            raise UserError(f"no space left to write {final}", "free space, then start again: it resumes") from None
        raise
    if dist.get_rank() == 0:
        (temporary / STATE).write_text(json.dumps(state, ensure_ascii=False, indent=1), encoding="utf-8")
        files = {file.name: {"size": file.stat().st_size, "sha256": sha256(file)} for file in temporary.iterdir()}
        for file in [*temporary.iterdir(), temporary]:
            _flush(file)
        temporary.rename(final)
        marker = final / f".{COMPLETE}"
        marker.write_text(json.dumps(files, indent=1), encoding="utf-8")
        _flush(marker)
        marker.rename(final / COMPLETE)
        _flush(final)
        _flush(final.parent)
    dist.barrier()
    return final


def prune(run_dir: Path, keep: int) -> None:
    """Deletes all but the newest `keep` complete checkpoints (main process)."""
    for step in complete_steps(run_dir)[:-keep]:
        (folder(run_dir, step) / COMPLETE).unlink()  # first no longer a checkpoint, then no longer there
        shutil.rmtree(folder(run_dir, step))


def complete_steps(run_dir: Path) -> list[int]:
    """Steps with a checkpoint whose files are all there at their sizes, oldest first."""
    candidates = sorted((run_dir / "checkpoints").glob("step-*"))
    return [int(path.name.removeprefix("step-")) for path in candidates if _fault(path, hashes=False) is None]


def newest(run_dir: Path, report: Callable[[str], None]) -> int | None:
    """The newest step whose files also have their hashes; every process calls it, and all get the same answer.

    Args:
        run_dir: The run folder.
        report: Called with a line for every checkpoint that is damaged and passed over.
    """
    found: list[int | None] = [None]
    if dist.get_rank() == 0:
        for path in sorted((run_dir / "checkpoints").glob("step-*"), reverse=True):
            fault = _fault(path, hashes=True)
            if fault is None:
                found = [int(path.name.removeprefix("step-"))]
                break
            report(f"{path} is passed over: {fault}")
    dist.broadcast_object_list(found, src=0)
    return found[0]


def read_state(run_dir: Path, step: int) -> dict:
    """state.json of a checkpoint."""
    return json.loads((folder(run_dir, step) / STATE).read_text(encoding="utf-8"))


def weights(path: Path) -> Callable[[PreTrainedModel, list], None]:
    """Fills a model (see `model.build.build_model`) from the weights of a checkpoint, on any mesh."""

    def fill(model: PreTrainedModel, mapping: list) -> None:
        rebuild_buffers(model)
        contents = {"model": _model_state(model)}
        dcp.load(contents, checkpoint_id=path)
        model.tie_weights()

    return fill


def load_optimizer(path: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
    """Loads the optimizer's state from a checkpoint, on any mesh."""
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
    name, _, wanted = reference.partition("@")
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
    """Raises UserError where a checkpoint's files are not what was written."""
    fault = _fault(path, hashes=True)
    if fault:
        raise UserError(f"{path} is damaged: {fault}", "name another step, as RUN@STEP")


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
        return "its COMPLETE marker is cut short"
    for name, entry in files.items():
        file = path / Path(name).name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != entry["size"]:
            return f"{name} has {file.stat().st_size} bytes, not {entry['size']}"
        if hashes and sha256(file) != entry["sha256"]:
            return f"{name} has another sha256"
    return None


def _is_disk_full(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left" in str(error) or "unexpected pos" in str(error):  # torch's writers say only this
            return True
        error = error.__cause__ or error.__context__
    return False


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

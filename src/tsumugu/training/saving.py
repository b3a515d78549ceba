"""Writing checkpoints while training goes on.

The training thread copies the state into host memory; a second thread writes the copy, over a process group of its own,
under a temporary name. When all processes have written their files and taken their hashes, the folder is renamed,
COMPLETE is written, and older checkpoints are deleted. At every moment the old or the new one is whole.
"""

import json
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from tsumugu.config import CheckpointConfig
from tsumugu.data.store import sha256
from tsumugu.model.masters import Master
from tsumugu.training import checkpoint
from tsumugu.training.checkpoint import COMPLETE, METADATA, STATE, Files
from tsumugu.training.storages import Group, find_leaders, flush, together


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is complete: its step, how long training was held up by it on the process that was held up
    longest, and how long it took until it was complete, in seconds."""

    step: int
    stall_seconds: float
    seconds: float


class Saver:
    """Writes the checkpoints of a run, one at a time; every process has one and calls it alike.

    Args:
        run_dir: The run folder, as this process sees it.
        group: A gloo group of all processes, which nothing else uses while a checkpoint is written.
        config: The section of the configuration.
        keeps: Whether the checkpoint of a step stays for ever.
        damaged: Steps whose checkpoints were found damaged, of `checkpoint.newest`; a new one is taken out of it.
    """

    def __init__(
        self, run_dir: Path, group: Group, config: CheckpointConfig, keeps: Callable[[int], bool], damaged: set[int]
    ):
        self._run_dir, self._group, self._config = run_dir, group, config
        self._keeps, self._damaged = keeps, damaged
        self._rank = dist.get_rank(group)
        self._leaders: list[int] = []
        self._buffers: dict[str, torch.Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._completed: list[Saved] = []

    def open(self) -> None:
        """Makes the run folder and finds out which processes share it; before anything else."""
        self._leaders = find_leaders(self._run_dir, self._group)

    @property
    def leads(self) -> bool:
        """Whether this process does what one process a storage must do."""
        return self._leaders[self._rank] == self._rank

    @property
    def running(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def failed(self) -> bool:
        """Whether writing one has failed: `wait` will say why, on every process."""
        return self._error is not None

    def completed(self) -> list[Saved]:
        """Those that have become complete since this was last asked."""
        completed, self._completed = self._completed, []
        return completed

    def save(self, step: int, model: PreTrainedModel, optimizer: torch.optim.Optimizer, state: dict) -> None:
        """Begins to write the checkpoint of a step (or writes it, where checkpoint.asynchronous is false).

        Args:
            step: Optimizer steps done.
            model: The sharded model; it may change as soon as this returns.
            optimizer: Its optimizer, likewise.
            state: What goes to state.json, equal on every process.
        """
        started = time.monotonic()
        self.wait()
        tensors = checkpoint.contents(model, optimizer)
        text = json.dumps(state, ensure_ascii=False, indent=1).encode()  # now: the lists in it change
        if not self._config.asynchronous:
            weights = tensors["model"].items()
            whole = {name: self._staged(item, name) for name, item in weights if isinstance(item, Master)}
            tensors["model"] |= whole
            if torch.cuda.is_available():
                torch.cuda.current_stream().synchronize()
            self._write(step, tensors, text, started, None)
            return
        tensors = self._staged(tensors, "")
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        stall = time.monotonic() - started
        device = torch.cuda.current_device() if torch.cuda.is_available() else None

        def run() -> None:
            try:
                if device is not None:
                    torch.cuda.set_device(device)  # a thread begins on the first one, and would take memory there
                self._write(step, tensors, text, started, stall)
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Returns when no checkpoint is being written; raises what has kept the latest from becoming complete."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _staged(self, value: Any, key: str) -> Any:
        """A copy in host memory, in buffers that are kept for the next one: pinned for a GPU, so that it is fast."""
        if isinstance(value, dict):
            return {name: self._staged(item, f"{key}.{name}") for name, item in value.items()}
        if isinstance(value, list):
            return [self._staged(item, f"{key}.{index}") for index, item in enumerate(value)]
        if isinstance(value, Master):
            value = value.whole()
        if isinstance(value, DTensor):  # not by from_local, which would move it to the device of the mesh
            return DTensor(self._staged(value.to_local(), key), value._spec, requires_grad=False)
        if isinstance(value, torch.Tensor):
            buffer = self._buffers.get(key)
            if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
                buffer = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
                self._buffers[key] = buffer
            return buffer.copy_(value.detach(), non_blocking=True)
        return value

    def _write(self, step: int, tensors: dict, state: bytes, started: float, stall: float | None) -> None:
        final = checkpoint.folder(self._run_dir, step)
        temporary = final.with_name(f".{final.name}")
        group = self._group
        try:
            together(group, lambda: _clear(temporary) if self.leads else None)
            writer = dcp.FileSystemWriter(temporary, per_thread_copy_ahead=0)  # nothing is on a GPU to be copied ahead
            dcp.save(tensors, storage_writer=writer, process_group=group)
            metadata = None
            if len(set(self._leaders)) > 1:  # it was written to that of rank 0
                read = together(group, lambda: (temporary / METADATA).read_bytes() if self._rank == 0 else None)
                metadata = read[0]
            described = together(group, lambda: (self._describe(temporary, state, metadata), stall))
            files = dict(sorted(item for own, _ in described for item in own.items()))
            together(group, lambda: _place(temporary, final) if self.leads else None)
            together(group, lambda: checkpoint.mark(final, files) if self.leads else None)
        except (OSError, CheckpointException):
            if self.leads:
                shutil.rmtree(temporary, ignore_errors=True)  # a full disk is not left full
            raise
        seconds = time.monotonic() - started
        self._prune(step)
        stalls = [stall for _, stall in described if stall is not None]
        self._completed.append(Saved(step, max(stalls, default=seconds), seconds))

    def _describe(self, temporary: Path, state: bytes, metadata: bytes | None) -> Files:
        """Writes what stands once on every storage; sizes and hashes of this process's files (rank 0: those, too)."""
        if self.leads:
            (temporary / STATE).write_bytes(state)
            if metadata is not None and self._rank != 0:
                (temporary / METADATA).write_bytes(metadata)
            flush(temporary / STATE)
            flush(temporary / METADATA)
        files = [*temporary.glob(f"__{self._rank}_*"), *([temporary / STATE, temporary / METADATA] * (self._rank == 0))]
        for file in files:
            flush(file)
        return {file.name: {"size": file.stat().st_size, "sha256": sha256(file)} for file in files}

    def _prune(self, step: int) -> None:
        """Deletes all but the newest complete checkpoints up to `step`, the one just saved, and those kept for ever.

        Later ones, and those that were passed over as damaged when the run resumed, do not count.
        """
        self._damaged.discard(step)
        steps = checkpoint.complete_steps_everywhere(self._run_dir, self._group, self.leads)
        old = [saved for saved in steps if saved <= step and saved not in self._damaged][: -self._config.keep]
        paths = [checkpoint.folder(self._run_dir, saved) for saved in old if not self._keeps(saved)]
        together(self._group, lambda: [_delete(path) for path in paths if self.leads and path.exists()])


def _clear(temporary: Path) -> None:
    """Makes the empty folder, and deletes what killed saves and deletions have left."""
    for path in temporary.parent.glob(".step-*"):
        if checkpoint.is_name(path.name.removeprefix(".")):
            shutil.rmtree(path)
    for _, path in checkpoint.named(temporary.parent.parent):
        if not (path / COMPLETE).exists():
            shutil.rmtree(path)
    temporary.mkdir(parents=True)


def _place(temporary: Path, final: Path) -> None:
    flush(temporary)
    if final.exists():  # a damaged one, which was passed over
        _delete(final)
    temporary.rename(final)
    flush(final.parent)


def _delete(path: Path) -> None:
    (path / COMPLETE).unlink(missing_ok=True)  # first no longer a checkpoint, then no longer there
    shutil.rmtree(path)

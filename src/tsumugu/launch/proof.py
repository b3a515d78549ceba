"""`--prove-resume N`: N steps straight, N steps with a kill in the middle, and the comparison of what both have made.

Both runs are the given command in processes of its own, in a scratch folder beside the run folder; the run itself is
not touched.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from tsumugu.errors import UserError
from tsumugu.training import checkpoint
from tsumugu.training.metrics import read_metrics

_FIGURES = ("loss", "grad_norm")


def prove_resume(command: Sequence[str], run_dir: Path, steps: int) -> int:
    """Runs `tsumugu COMMAND` for so many steps, once straight and once killed and started again, and compares.

    Args:
        command: Such as ["train", "--config=a.yaml"], without --run-dir.
        run_dir: Beside which the scratch folder lies; it stays where something differs.
        steps: At least 4, at most the length of the run.

    Returns:
        0 where losses, gradient norms, weights and moments are equal bit for bit, else 1.

    Raises:
        UserError: Under torchrun, too few steps, or a run that fails.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 or "TORCHELASTIC_RUN_ID" in os.environ:
        raise UserError("--prove-resume starts processes itself", "use `tsumugu launch local --prove-resume`")
    if steps < 4:
        raise UserError(f"--prove-resume {steps}: there is no middle to be killed in", "give 4 steps or more")
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f"{run_dir.name}-prove-resume-", dir=run_dir.parent))
    every = max(1, steps // 3)
    straight = _Run(command, scratch / "straight", steps, every=None)
    killed = _Run(command, scratch / "killed", steps, every=every)
    print(f"{steps} steps straight", flush=True)
    straight.finish()
    print(f"{steps} steps, a checkpoint every {every}, killed after step {steps // 2}", flush=True)
    at, back_to = killed.kill(steps // 2)
    print(f"killed after step {at}; goes on from step {back_to}", flush=True)
    killed.finish()
    lines = [*_compare_figures(straight.run_dir, killed.run_dir), *_compare_tensors(straight, killed, steps)]
    different = [line for same, line in lines if not same]
    for _, line in lines:
        print(line)
    if different:
        print(f"DIFFERENT; both runs are kept in {scratch}")
        return 1
    shutil.rmtree(scratch)
    print("equal, bit for bit")
    return 0


class _Run:
    """One of the two runs: a command that can be started, killed and started again."""

    def __init__(self, command: Sequence[str], run_dir: Path, steps: int, every: int | None):
        self.run_dir, self.steps = run_dir, steps
        own = {
            "train.stop_after": steps,
            "train.log_every": 1,
            "train.log_to": "[]",
            "train.max_hours": "null",
            "train.profile_steps": "null",
            "train.memory_snapshot": "null",
            "checkpoint.every": "null" if every is None else every,
        }
        flags = [f"--{key}={value}" for key, value in own.items()]
        self._command = [sys.executable, "-m", "tsumugu", *command, f"--run-dir={run_dir}", *flags]
        self._log = run_dir.with_suffix(".log")

    def start(self) -> subprocess.Popen:
        with open(self._log, "ab") as log:
            return subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)

    def finish(self) -> None:
        """Until the last step is saved."""
        process = self.start()
        try:
            code = process.wait()
        finally:
            _kill(process)
        if code not in (0, 3) or self.steps not in checkpoint.complete_steps(self.run_dir):
            raise self._failed(code)

    def kill(self, after: int) -> tuple[int, int]:
        """Kills all its processes once a checkpoint is complete and a step beyond `after` in the metrics.

        Returns:
            The last step in the metrics, and that of the newest checkpoint.
        """
        process = self.start()
        try:
            while process.poll() is None:
                if self._step() > after and checkpoint.complete_steps(self.run_dir):
                    break
                time.sleep(0.002)
        finally:
            _kill(process)
        saved = checkpoint.complete_steps(self.run_dir)
        if process.returncode in (0, 3) or saved[-1:] == [self.steps]:
            raise UserError(
                f"the run had taken its {self.steps} steps before it could be killed", "give --prove-resume more steps"
            )
        if self._step() <= after or not saved:
            raise self._failed(process.returncode)
        return self._step(), saved[-1]

    def _step(self) -> int:
        return max((line["step"] for line in read_metrics(self.run_dir)), default=0)

    def _failed(self, code: int) -> UserError:
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        last = next((line for line in reversed(lines) if line.startswith("tsumugu: ")), lines[-1] if lines else "")
        return UserError(f"the run that is to be proven ended with {code}: {last}", f"see {self._log}")


def _kill(process: subprocess.Popen) -> None:
    """SIGKILL, to the process and to all that it has started (torchrun's workers are sessions of their own)."""
    family = [process.pid, *_descendants(process.pid)] if process.poll() is None else []
    for pid in family:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 60  # what waits for its device ends later; one that nobody reaps stays as a zombie
    while family[1:] and time.monotonic() < deadline and _alive(family[1:]):
        time.sleep(0.05)


def _processes() -> list[list[str]]:
    """Process, parent and state of all."""
    if Path("/proc/self/stat").exists():  # small images have no ps
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                state, parent, *_ = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()
                found.append([folder.name, parent, state])
        return found
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,stat="], check=True, capture_output=True, text=True).stdout
    return [line.split() for line in listed.splitlines()]


def _alive(pids: list[int]) -> bool:
    return any(int(pid) in pids and not state.startswith("Z") for pid, _, state in _processes())


def _descendants(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for child, parent, _ in _processes():
        children.setdefault(int(parent), []).append(int(child))
    found, open_ = [], [pid]
    while open_:
        open_ = [child for parent in open_ for child in children.get(parent, [])]
        found += open_
    return found


def _compare_figures(straight: Path, killed: Path) -> list[tuple[bool, str]]:
    first, second = (
        {line["step"]: line for line in read_metrics(run_dir) if "loss" in line} for run_dir in (straight, killed)
    )
    lines = [(first.keys() == second.keys(), f"steps compared: {len(first.keys() & second.keys())}")]
    for key in _FIGURES:
        pairs = [(first[step][key], second[step][key]) for step in sorted(first.keys() & second.keys())]
        different = [(a, b) for a, b in pairs if a != b]
        gaps = [abs(a - b) for a, b in different if a is not None and b is not None]
        text = f"{key}: {len(different)} of {len(pairs)} differ" + (f", by {max(gaps):.3g} at most" if gaps else "")
        lines.append((not different, text))
    return lines


def _compare_tensors(straight: _Run, killed: _Run, steps: int) -> list[tuple[bool, str]]:
    """Tensor by tensor, so that no more than one is in memory twice."""
    paths = [checkpoint.folder(run.run_dir, steps) for run in (straight, killed)]
    stored = [dcp.FileSystemReader(path).read_metadata().state_dict_metadata for path in paths]
    names = sorted(stored[0].keys() | stored[1].keys())
    lines = []
    for kind, chosen in (
        ("weights", [name for name in names if not name.startswith("optimizer.")]),
        ("moments and optimizer state", [name for name in names if name.startswith("optimizer.")]),
    ):
        different = [name for name in chosen if not _equal(name, paths, stored)]
        shown = f": {', '.join(different[:3])}{' …' if len(different) > 3 else ''}" if different else ""
        lines.append((not different, f"{kind}: {len(different)} of {len(chosen)} tensors differ{shown}"))
    states = [checkpoint.read_state(run.run_dir, steps) for run in (straight, killed)]
    different = [key for key in states[0] | states[1] if states[0].get(key) != states[1].get(key)]
    counters = f"counters: {len(different)} of {len(states[0])} differ"
    return [*lines, (not different, counters + (f": {', '.join(different)}" if different else ""))]


def _equal(name: str, paths: list[Path], stored: list[dict[str, Any]]) -> bool:
    if name not in stored[0] or name not in stored[1]:
        return False
    loaded = []
    for path, metadata in zip(paths, stored, strict=True):
        entry = metadata[name]
        tensor = isinstance(entry, TensorStorageMetadata)
        contents: dict[str, Any] = {name: torch.empty(entry.size, dtype=entry.properties.dtype) if tensor else None}
        with warnings.catch_warnings():  # that it loads in one process
            warnings.simplefilter("ignore", UserWarning)
            dcp.load(contents, checkpoint_id=path, no_dist=True)
        loaded.append(contents[name])
    first, second = loaded
    if not isinstance(first, torch.Tensor):
        return first == second
    alike = (first.shape, first.dtype) == (second.shape, second.dtype)
    return alike and torch.equal(first.flatten().view(torch.uint8), second.flatten().view(torch.uint8))

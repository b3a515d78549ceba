"""Profiler traces of chosen steps, and the allocations of one; each process writes its own."""

from pathlib import Path

import torch

from tsumugu.config import TrainConfig
from tsumugu.errors import UserError


class Profile:
    """Starts and ends around the steps of `train.profile_steps` and `train.memory_snapshot`.

    Args:
        config: The section of the configuration.
        run_dir: The run folder: `profile/rank-N.json.gz` (for Perfetto or chrome://tracing), `memory/rank-N.pickle`
            (for pytorch.org/memory_viz).
        rank: Of this process.
        device: Of this process.

    Raises:
        UserError: A memory snapshot without a GPU.
    """

    def __init__(self, config: TrainConfig, run_dir: Path, rank: int, device: torch.device):
        if config.memory_snapshot is not None and device.type != "cuda":
            raise UserError("train.memory_snapshot is set, but there is no GPU", "remove it")
        self._steps = config.profile_steps
        self._snapshot = config.memory_snapshot
        self._run_dir, self._rank, self._device = run_dir, rank, device
        self._profiler: torch.profiler.profile | None = None
        self._recording = False

    def before(self, step: int) -> None:
        """Step `step` begins."""
        if self._steps and self._profiler is None and self._steps[0] <= step <= self._steps[1]:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if self._device.type == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._profiler = profiler = torch.profiler.profile(activities=activities, record_shapes=True)
            profiler.start()
        if step == self._snapshot and not self._recording:
            torch.cuda.memory._record_memory_history()
            self._recording = True

    def after(self, step: int) -> None:
        """Step `step` is launched."""
        if self._steps and step >= self._steps[1]:
            self._end_trace()
        if step == self._snapshot:
            self._end_snapshot()

    def close(self) -> None:
        """Writes what is not written yet: also a run that ends between the steps leaves a trace."""
        self._end_trace()
        self._end_snapshot()

    def _end_trace(self) -> None:
        if self._profiler is not None:
            self._wait()
            profiler, self._profiler = self._profiler, None
            profiler.stop()
            profiler.export_chrome_trace(str(self._file("profile", "json.gz")))

    def _end_snapshot(self) -> None:
        if self._recording:
            self._wait()
            self._recording = False
            torch.cuda.memory._dump_snapshot(str(self._file("memory", "pickle")))
            torch.cuda.memory._record_memory_history(enabled=None)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _file(self, folder: str, suffix: str) -> Path:
        (self._run_dir / folder).mkdir(parents=True, exist_ok=True)
        return self._run_dir / folder / f"rank-{self._rank}.{suffix}"

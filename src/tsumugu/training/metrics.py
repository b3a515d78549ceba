"""Where figures go: metrics.jsonl always, TensorBoard where it is installed, and the terminal."""

import json
import math
import resource
import sys
from pathlib import Path

import torch
from tqdm import tqdm

METRICS = "metrics.jsonl"


class Metrics:
    """Writes lines of figures (main process).

    Args:
        run_dir: The run folder.
        step: Steps done when this process starts; later lines of an interrupted run are dropped.
        max_steps: Length of the run.
        trackers: From train.log_to.
    """

    def __init__(self, run_dir: Path, step: int, max_steps: int, trackers: list[str]):
        path, rewritten = run_dir / METRICS, run_dir / f".{METRICS}"
        kept = [line for line in read_metrics(run_dir) if line["step"] <= step] if step else []
        rewritten.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        rewritten.replace(path)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)
        self._board = _tensorboard(run_dir, step) if "tensorboard" in trackers else None
        self._bar = tqdm(total=max_steps, initial=step, unit="step", desc=run_dir.name, disable=None)

    def write(self, line: dict) -> None:
        """One line: `step` and figures; what is not a finite number is written as null."""
        line = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in line.items()
        }
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if self._board is not None:
            for key, value in line.items():
                if key != "step" and value is not None:
                    self._board.add_scalar(key, value, line["step"])
        self._show(line)

    def advance(self) -> None:
        """One step is done."""
        self._bar.update()

    def say(self, text: str) -> None:
        """A line for the person in front of the terminal."""
        tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        self._bar.close()
        self._file.close()
        if self._board is not None:
            self._board.close()

    def _show(self, line: dict) -> None:
        if "checkpoint_seconds" in line:
            return
        if "validation_loss" in line:
            shown = ("validation_loss", "validation_bits_per_byte")
        else:
            shown = ("loss", "learning_rate", "tokens_per_second")
        text = "  ".join(f"{key} {line[key]:.4g}" for key in shown if line[key] is not None)
        if self._bar.disable or "validation_loss" in line:
            self.say(f"step {line['step']}/{self._bar.total}  {text}")
        else:
            self._bar.set_postfix_str(text)


def read_metrics(run_dir: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl; a last line cut short by a kill is left out."""
    path = run_dir / METRICS
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def memory_peak_gib(device: torch.device) -> float:
    """Peak memory of this process: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS and in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _tensorboard(run_dir: Path, step: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # the training dependencies alone do not have it
        return None
    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)

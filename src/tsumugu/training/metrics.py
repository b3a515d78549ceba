"""Where figures go: metrics.jsonl always, trackers when asked for, and the terminal (a bar there, lines elsewhere).

The lines have a form that log services can read: `step 20/100  loss 2.31  learning_rate 0.0003 …`, two spaces between
figures, the word nan where a figure is not a finite number; `metric_definitions` gives the patterns.
"""

import contextlib
import json
import math
import re
import resource
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from tsumugu.errors import UserError, redact
from tsumugu.training.trackers import Tracker, failure, numbers

METRICS = "metrics.jsonl"

_SHOWN = (
    "loss",
    "learning_rate",
    "grad_norm",
    "tokens_seen",
    "tokens_per_second",
    "tflops_per_device",
    "mfu",
    "memory_peak_gib",
    "step_seconds",
    "data_seconds",
)
_VALIDATION = ("loss", "perplexity", "bits_per_byte")
_NUMBER = r"(-?[0-9.]+(?:e[-+]?[0-9]+)?|nan)"


def metric_definitions(stores: Sequence[str] = ()) -> dict[str, str]:
    """Names of figures → patterns that find their values in the lines of a run, as CloudWatch's metric definitions.

    Each has one group, the value. Only what every dialect of regular expressions has is used.

    Args:
        stores: Names of the stores of a mixture, whose validation figures have lines of their own.
    """
    names = [*_SHOWN, *(f"validation_{key}" for key in _VALIDATION)]
    names += [f"validation/{store}/{key}" for store in stores for key in _VALIDATION]
    return {"step": r"step ([0-9]+)/[0-9]+ "} | {name: f" {re.escape(name)} {_NUMBER}" for name in names}


class Metrics:
    """Writes lines of figures (main process).

    Args:
        run_dir: The run folder.
        step: Steps done when this process starts; later lines of an interrupted run are dropped.
        max_steps: Length of the run.
        trackers: By name; closed with this.
    """

    def __init__(self, run_dir: Path, step: int, max_steps: int, trackers: dict[str, Tracker]):
        path, rewritten = run_dir / METRICS, run_dir / f".{METRICS}"
        kept = [line for line in read_metrics(run_dir) if line["step"] <= step] if step else []
        rewritten.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        rewritten.replace(path)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)
        self._trackers, self._finished = trackers, False
        self._bar = tqdm(total=max_steps, initial=step, unit="step", desc=run_dir.name, disable=None)

    def write(self, line: dict) -> None:
        """One line: `step` and figures; what is not a finite number is written as null."""
        text = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in line.items()
        }
        self._file.write(json.dumps(text) + "\n")
        self._file.flush()
        self._finished = line["step"] == self._bar.total
        for name, tracker in self._trackers.items():
            try:
                tracker.write(line["step"], numbers(line))
            except Exception as error:  # each tracker has its own kinds; none of them ends a run
                self.say(failure(name, error))
        self._show(line)

    def advance(self) -> None:
        """One step is done."""
        self._bar.update()

    def say(self, text: str) -> None:
        """A line for the person in front of the terminal; credentials in it are redacted."""
        tqdm.write(redact(text), file=sys.stderr)

    def close(self) -> None:
        self._bar.close()
        self._file.close()
        for name, tracker in self._trackers.items():
            try:
                tracker.close(self._finished)
            except Exception as error:
                self.say(failure(name, error))

    def _show(self, line: dict) -> None:
        if "checkpoint_seconds" in line:
            return
        validates = "validation_loss" in line
        if self._bar.disable or validates:
            shown = [key for key in line if key.startswith("validation")] if validates else _SHOWN
            self.say(f"step {line['step']}/{self._bar.total}  {_text(line, shown)}")
        else:
            self._bar.set_postfix_str(_text(line, ("loss", "learning_rate", "tokens_per_second")))


def _text(line: dict, keys: Sequence[str]) -> str:
    """Figures to six digits, but for those that are unknown here."""
    figures = ((key, line[key]) for key in keys if line[key] is not None)
    return "  ".join(f"{key} {value if math.isfinite(value) else math.nan:.6g}" for key, value in figures)


def read_metrics(run_dir: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl; those cut short by a kill or a full disk are left out.

    Raises:
        UserError: A whole line that holds no figures of a step.
    """
    return list(metric_lines(run_dir))


def metric_lines(run_dir: Path) -> Iterator[dict]:
    """The same, one after the other."""
    path = run_dir / METRICS
    if not path.exists():
        return
    with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            with contextlib.suppress(ValueError):
                if line.endswith("\n"):
                    content = json.loads(line)
                    figures = content.values() if isinstance(content, dict) else ["nothing"]
                    if not all(isinstance(value, int | float | None) for value in figures) or "step" not in content:
                        raise UserError(f"{path}:{number} holds no figures of a step", "delete that line")
                    yield content


def memory_peak_gib(device: torch.device) -> float:
    """Peak memory of this process: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS and in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30

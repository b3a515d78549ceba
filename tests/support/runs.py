"""Tiny training runs: their configuration, a request to stop that comes at a given step, and what a run has made."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from tsumugu import config
from tsumugu.config import TrainingRun
from tsumugu.training.metrics import read_metrics
from tsumugu.training.signals import StopRequest

TIMINGS = (
    "tokens_per_second",
    "tokens_per_second_per_device",
    "tflops_per_device",
    "mfu",
    "memory_peak_gib",
    "step_seconds",
    "data_seconds",
)


def run_config(store: Path, changes: dict[str, Any]) -> TrainingRun:
    """The configuration of a run on `store`, with changes such as {"train.max_steps": 5}."""
    sections = {section.name: {} for section in dataclasses.fields(TrainingRun)}
    defaults = {"data.store": str(store), "data.sequence_length": 16, "train.log_every": 1, "train.log_to": []}
    defaults["data.audit"] = "off"  # random ids end with no stop token
    for key, value in (defaults | changes).items():
        section, name = key.split(".")
        sections[section][name] = value
    classes = {
        "model": config.ModelConfig,
        "tokenizer": config.TokenizerConfig,
        "data": config.DataConfig,
        "train": config.TrainConfig,
        "optimizer": config.OptimizerConfig,
        "schedule": config.ScheduleConfig,
        "parallel": config.ParallelConfig,
        "checkpoint": config.CheckpointConfig,
        "evaluate": config.EvaluateConfig,
        "guard": config.GuardConfig,
    }
    return TrainingRun(**{name: classes[name](**values) for name, values in sections.items()})


class StopAfter(StopRequest):
    """Asks to stop after the given step, counted from where this process started; None: never."""

    def __init__(self, steps: int | None):
        super().__init__()
        self.steps_left = steps

    def __bool__(self) -> bool:
        if self.steps_left is not None:
            self.steps_left -= 1
        return self.steps_left == -1


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of the tensor that the processes share in slices; every process calls it."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def figures(run_dir: Path) -> list[dict]:
    """metrics.jsonl without what depends on the clock."""
    lines = [line for line in read_metrics(run_dir) if "checkpoint_seconds" not in line]
    return [{key: line[key] for key in line if key not in TIMINGS} for line in lines]

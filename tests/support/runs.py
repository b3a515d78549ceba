"""Tiny training runs: their configuration, a request to stop that comes at a given step, and what a run has made."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from support.models import tiny_config
from tsumugu import config
from tsumugu.config import PrepareConfig, Source, TrainingRun
from tsumugu.tokenizer.contract import read_contract
from tsumugu.training.metrics import read_metrics
from tsumugu.training.signals import StopRequest
from tsumugu.training.trainer import train

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


def text_run(folder: Path, tokenizer: Path) -> Path:
    """A run on real text in a folder, with checkpoints of steps 2 (after which it was stopped) and 4."""
    from tsumugu.data.prepare import prepare  # the others need no more than a training machine has

    texts = [f"朝早く起きて、川沿いの道を{number}キロほど歩いた。" * 5 for number in range(24)]
    lines = (json.dumps({"text": text}) for text in texts)
    (folder / "text.jsonl").write_text("\n".join(lines), encoding="utf-8")
    source = Source(name="text", path=str(folder / "text.jsonl"))
    prepare(
        PrepareConfig(
            sources=[source],
            tokenizer=str(tokenizer),
            output=str(folder / "store"),
            workers=1,
            validation_share=0.2,
        )
    )
    vocab_size = read_contract(tokenizer).vocab_size
    tiny_config("llama", True, max_position_embeddings=256, vocab_size=vocab_size).save_pretrained(folder / "shape")
    changes = {"model.config": str(folder / "shape" / "config.json"), "train.max_steps": 4, "checkpoint.every": 2}
    changes |= {"train.global_batch_size": 2, "train.micro_batch_size": 2, "optimizer.learning_rate": 0.01}
    changes |= {"evaluate.every": 2}
    for stop in (2, None):
        train(run_config(folder / "store", changes | {"train.stop_after": stop}), folder / "run")
    return folder / "run"

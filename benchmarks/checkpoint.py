"""What checkpoints cost: the same steps without any, with training waiting for each, and with training going on.

    python benchmarks/checkpoint.py [--folder DIR] [--layers N] [--intervals N]

Trains a GPT-NeoX on random tokens (on a GPU the width of the 1b preset, on a CPU some 60 million parameters) in a
temporary folder (in DIR: on the disk that is to be measured). Between two checkpoints lie as many steps as make those
that training waits for cost a fifth of the time. Prints a Markdown table; two to four minutes.
"""

import argparse
import dataclasses
import json
import logging
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import GPTNeoXConfig

from tsumugu import config
from tsumugu.data.store import FORMAT_VERSION, MANIFEST, ShardWriter, describe_split, token_dtype
from tsumugu.distributed.environment import process_group
from tsumugu.tokenizer.contract import VERSION
from tsumugu.training import checkpoint
from tsumugu.training.saving import Saved, Saver
from tsumugu.training.signals import StopRequest
from tsumugu.training.trainer import Trainer

VOCABULARY = 32_000
SHAPES = {  # hidden size, layers, heads, sequence length, rows a step
    "cuda": (2048, 8, 16, 2048, 16),
    "cpu": (512, 8, 8, 128, 2),
}


def write_store(path: Path, tokens: int) -> None:
    """One document of random ids, and a contract that fits no tokenizer."""
    writer = ShardWriter(path / "train" / "00000", token_dtype(VOCABULARY), supervised=False)
    writer.add(np.random.default_rng(0).integers(4, VOCABULARY, tokens), None)
    shard = writer.close()
    contract = {
        "version": VERSION,
        "fingerprint": "of no tokenizer",
        "vocab_size": VOCABULARY,
        **{"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": 3},
        **{"adds_bos": False, "adds_eos": False, "newline": "expressible", "golden": []},
        "token_bytes": [0] * 4 + [3] * (VOCABULARY - 4),
    }
    (path / "tokenizer").mkdir(parents=True)
    (path / "tokenizer" / "contract.json").write_text(json.dumps(contract))
    manifest = {
        "version": FORMAT_VERSION,
        "kind": "text",
        "tokenizer": {"fingerprint": "of no tokenizer", "vocab_size": VOCABULARY, "files": {}},
        **{"template": None, "add_bos": False, "add_eos": False},
        "splits": {"train": describe_split([shard] if shard else []), "validation": describe_split([])},
    }
    (path / MANIFEST).write_text(json.dumps(manifest))


def run_config(folder: Path, device: str, layers: int | None) -> config.TrainingRun:
    hidden, default_layers, heads, sequence, rows = SHAPES[device]
    write_store(folder / "store", 200 * sequence)
    GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers or default_layers,
        num_attention_heads=heads,
        max_position_embeddings=sequence,
        **{"bos_token_id": 1, "eos_token_id": 2},
    ).save_pretrained(folder / "model")
    return config.TrainingRun(
        model=config.ModelConfig(config=str(folder / "model")),
        tokenizer=config.TokenizerConfig(),
        data=config.DataConfig(store=str(folder / "store"), sequence_length=sequence, audit="off"),
        train=config.TrainConfig(
            max_steps=100_000, global_batch_size=rows, micro_batch_size=max(1, rows // 4), log_to=[]
        ),
        optimizer=config.OptimizerConfig(),
        schedule=config.ScheduleConfig(),
        parallel=config.ParallelConfig(),
        checkpoint=config.CheckpointConfig(),
        evaluate=config.EvaluateConfig(),
        guard=config.GuardConfig(),
    )


def saver_of(trainer: Trainer, asynchronous: bool) -> Saver:
    section = dataclasses.replace(trainer.config.checkpoint, asynchronous=asynchronous)
    saver = Saver(trainer.run_dir, trainer.group, section, lambda step: False, set())
    saver.open()
    return saver


def take_steps(trainer: Trainer, steps: int, saver: Saver | None = None) -> float:
    """Seconds of a checkpoint, where there is a saver, and of the steps after it; as in training, one step ahead."""
    started, previous = time.perf_counter(), None
    if saver:
        saver.save(trainer.step, trainer.model, trainer.optimizer, {"step": trainer.step})
    for _ in range(steps):
        launched = trainer.train_step(StopRequest())
        trainer.step += 1
        if previous:
            previous.figures()
        previous = launched
    if previous:
        previous.figures()
    return time.perf_counter() - started


def measure(trainer: Trainer, intervals: int) -> str:
    waiting, going_on = saver_of(trainer, asynchronous=False), saver_of(trainer, asynchronous=True)
    take_steps(trainer, 5)
    take_steps(trainer, 0, waiting)
    (trial,) = waiting.completed()
    take_steps(trainer, 0, going_on)
    going_on.wait()
    (first,) = going_on.completed()
    step_seconds = take_steps(trainer, 5) / 5
    every = max(1, round(4 * trial.seconds / step_seconds))
    savers = {"none": None, "synchronous": waiting, "asynchronous": going_on}
    seconds = dict.fromkeys(savers, 0.0)
    for _ in range(intervals):  # in turn, so that what else the machine does strikes all
        for name, saver in savers.items():
            seconds[name] += take_steps(trainer, every, saver)
            going_on.wait()
    rows = [
        row(name, seconds[name], seconds["none"], saver.completed() if saver else []) for name, saver in savers.items()
    ]
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    newest = checkpoint.folder(trainer.run_dir, checkpoint.complete_steps(trainer.run_dir)[-1])
    size = sum(file.stat().st_size for file in newest.iterdir())
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return "\n".join(
        [
            f"{device}, torch {torch.__version__}, {parameters / 1e6:.0f} million parameters, {size / 2**30:.2f} GiB a "
            f"checkpoint, one every {every} steps of {step_seconds:.3f} s, {intervals} of them. The first asynchronous "
            f"one, which allocates the host memory of all, stalls {first.stall_seconds:.2f} s.",
            "",
            "| checkpoints | wall time | more than without | stall of one | stall, share of wall time | to COMPLETE |",
            "| --- | --- | --- | --- | --- | --- |",
            *rows,
        ]
    )


def row(name: str, seconds: float, without: float, saved: list[Saved]) -> str:
    cells = [name, f"{seconds:.1f} s", f"{seconds / without - 1:.1%}"]
    if saved:
        stall = sum(one.stall_seconds for one in saved)
        cells += [f"{stall / len(saved):.2f} s", f"{stall / seconds:.1%}"]
        cells += [f"{sum(one.seconds for one in saved) / len(saved):.1f} s"]
    return "| " + " | ".join(cells + ["–"] * (6 - len(cells))) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", help="where checkpoints are written; default: a temporary folder")
    parser.add_argument("--layers", type=int, help="decoder layers")
    parser.add_argument("--intervals", type=int, default=2, help="checkpoints of each kind that are measured")
    options = parser.parse_args()
    logging.getLogger("torch").setLevel(logging.ERROR)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch, process_group() as environment:
        trainer = Trainer(run_config(Path(scratch), device, options.layers), Path(scratch) / "run", environment)
        print(measure(trainer, options.intervals))


if __name__ == "__main__":
    main()

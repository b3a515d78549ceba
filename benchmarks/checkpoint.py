"""What checkpoints cost: the same steps without any, with training waiting for each, and with training going on.

    python benchmarks/checkpoint.py [--folder DIR] [--layers N] [--intervals N]
    torchrun --standalone --nproc-per-node 8 benchmarks/checkpoint.py --preset 7b --folder DIR      # seconds of each

With --preset, one checkpoint of that shape on all processes: how long it takes to write it while training waits and
while it goes on, and to find it whole (every file is hashed) and load it.

Without, it trains a GPT-NeoX on random tokens (on a GPU the width of the 1b preset, on a CPU some 60 million
parameters) in a temporary folder (in DIR: on the disk that is to be measured). Between two checkpoints lie as many
steps as make those that training waits for cost a fifth of the time. Prints a Markdown table; two to four minutes.
"""

import argparse
import dataclasses
import logging
import os
import shutil
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from throughput import random_store
from transformers import GPTNeoXConfig

from tsumugu import config
from tsumugu.distributed.environment import on_main, process_group
from tsumugu.model.presets import preset_config
from tsumugu.tokenizer.contract import read_contract
from tsumugu.training import checkpoint
from tsumugu.training.saving import Saved, Saver
from tsumugu.training.signals import StopRequest
from tsumugu.training.trainer import Trainer

VOCABULARY = 32_000
SAVE_AND_LOAD = (
    "| shape | GiB | synchronous, s | first asynchronous, stall, s | to COMPLETE, s | next one, stall, s "
    "| to COMPLETE, s | hashed, s | loaded, s |\n| --- |" + " ---: |" * 8 + "\n"
)
SHAPES = {  # hidden size, layers, heads, sequence length, rows a step
    "cuda": (2048, 8, 16, 2048, 16),
    "cpu": (512, 8, 8, 128, 2),
}


def run_config(folder: Path, device: str, layers: int | None) -> config.TrainingRun:
    hidden, default_layers, heads, sequence, rows = SHAPES[device]
    GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers or default_layers,
        num_attention_heads=heads,
        max_position_embeddings=sequence,
        bos_token_id=1,
        eos_token_id=2,
    ).save_pretrained(folder / "model")
    random_store(folder / "store", VOCABULARY, 200 * sequence)
    return configured(folder, sequence, rows, max(1, rows // 4))


def configured(folder: Path, sequence: int, rows: int, micro_batch: int) -> config.TrainingRun:
    """A run of a folder's model configuration and store."""
    return config.TrainingRun(
        model=config.ModelConfig(config=str(folder / "model")),
        tokenizer=config.TokenizerConfig(),
        data=config.DataConfig(store=str(folder / "store"), sequence_length=sequence, audit="off"),
        train=config.TrainConfig(max_steps=100_000, global_batch_size=rows, micro_batch_size=micro_batch, log_to=[]),
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


def save_and_load(preset: str, folder: str | None) -> str:
    """Seconds of a checkpoint of a preset's shape, on all processes."""
    with process_group() as environment:
        scratch = Path(on_main(lambda: tempfile.mkdtemp(dir=folder)))
        try:
            on_main(lambda: prepare(preset, scratch))
            training = configured(scratch, sequence=512, rows=environment.world_size, micro_batch=1)
            trainer = Trainer(training, scratch / "run", environment)
            take_steps(trainer, 2)
            figures = [f"{preset}, {environment.world_size} processes"]
            waiting, going_on = saver_of(trainer, asynchronous=False), saver_of(trainer, asynchronous=True)
            figures += [f"{save_once(trainer, waiting).seconds:.1f}"]
            for _ in range(2):  # the second one finds its host memory there
                saved = save_once(trainer, going_on)
                figures += [f"{saved.stall_seconds:.1f}", f"{saved.seconds:.1f}"]
            started = time.perf_counter()
            newest = checkpoint.newest(trainer.run_dir, trainer.group, print, set())
            assert newest is not None
            found = time.perf_counter()
            checkpoint.weights(newest)(trainer.model, [])
            checkpoint.load_optimizer(newest, trainer.model, trainer.optimizer)
            dist.barrier()
            size = sum(file.stat().st_size for file in newest.path.iterdir()) / 2**30
            figures[1:1] = [f"{size:.1f}"]
            figures += [f"{found - started:.1f}", f"{time.perf_counter() - found:.1f}"]
        finally:
            on_main(lambda: shutil.rmtree(scratch))
    return f"{SAVE_AND_LOAD}| {' | '.join(figures)} |"


def save_once(trainer: Trainer, saver: Saver) -> Saved:
    trainer.step += 1
    take_steps(trainer, 0, saver)
    saver.wait()
    (saved,) = saver.completed()
    return saved


def prepare(preset: str, folder: Path) -> None:
    random_store(folder / "store", VOCABULARY, 100_000)
    preset_config(preset, read_contract(folder / "store" / "tokenizer")).save_pretrained(folder / "model")


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
    parser.add_argument("--preset", help="of this shape, on all processes of torchrun")
    parser.add_argument("--layers", type=int, help="decoder layers")
    parser.add_argument("--intervals", type=int, default=2, help="checkpoints of each kind that are measured")
    options = parser.parse_args()
    logging.getLogger("torch").setLevel(logging.ERROR)
    if options.preset:
        table = save_and_load(options.preset, options.folder)
        if os.environ.get("RANK", "0") == "0":
            print(table)
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch, process_group() as environment:
        trainer = Trainer(run_config(Path(scratch), device, options.layers), Path(scratch) / "run", environment)
        print(measure(trainer, options.intervals))


if __name__ == "__main__":
    main()

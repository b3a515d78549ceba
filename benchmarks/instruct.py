"""Supervised tokens a second of instruction tuning: whole examples packed into rows, against padding on the left.

    python benchmarks/instruct.py                               # synthetic lengths, tiny model, CPU (or 1b on a GPU)
    python benchmarks/instruct.py --store STORE
    python benchmarks/instruct.py --corpus jaquad-instructions.jsonl.gz --tokenizer FOLDER

Both train the same model from the same seed, with the same code, one after the other in one process, repeatedly; padded
batches have 24 examples and are padded to their longest, as in the sample that this project succeeds, and packed ones
have about as many tokens. Prints a Markdown table. Without a store, lengths are drawn from a lognormal distribution
with the mean (382) and the longest (1,327) of JaQuAD's instructions.
"""

import argparse
import gc
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from tsumugu import config
from tsumugu.data import store
from tsumugu.data.packing import BestFit
from tsumugu.data.store import open_store
from tsumugu.distributed.environment import process_group
from tsumugu.tokenizer.contract import VERSION
from tsumugu.training.signals import StopRequest
from tsumugu.training.trainer import Trainer

VOCABULARY, EXAMPLES, PADDED_BATCH = 16_000, 5_000, 24


def synthetic(path: Path) -> Path:
    """An instruction store of random ids: prompts and, behind them, replies of about a tenth."""
    draw = np.random.default_rng(0)
    lengths = np.clip(draw.lognormal(np.log(335), 0.51, EXAMPLES), 40, 1327).astype(int)
    writer = store.ShardWriter(path / "train" / "00000", np.uint16, supervised=True)
    for length in lengths.tolist():
        writer.add(draw.integers(4, VOCABULARY, length), np.arange(length) >= length - max(2, length // 10))
    shard = writer.close()
    assert shard is not None
    contract = {"version": VERSION, "fingerprint": "none", "vocab_size": VOCABULARY, "unk_id": 0, "bos_id": 1}
    contract |= {"eos_id": 2, "pad_id": 3, "adds_bos": False, "adds_eos": False, "newline": "expressible"}
    contract |= {"golden": [], "token_bytes": [0] * 4 + [3] * (VOCABULARY - 4)}
    (path / "tokenizer").mkdir()
    (path / "tokenizer" / "contract.json").write_text(json.dumps(contract), encoding="utf-8")
    manifest = {"version": store.FORMAT_VERSION, "kind": "instructions", "template": "alpaca-ja", "add_bos": False}
    manifest |= {"tokenizer": {"fingerprint": "none", "vocab_size": VOCABULARY, "files": {}}, "add_eos": True}
    manifest |= {"splits": {"train": store.describe_split([shard]), "validation": store.describe_split([])}}
    (path / store.MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    return path


def run_of(
    path: Path, preset: str, packing: str, length: int, batch: int, micro: int, grouped: bool, recompute: bool
) -> config.TrainingRun:
    return config.TrainingRun(
        model=config.ModelConfig(preset=preset),
        tokenizer=config.TokenizerConfig(),
        data=config.DataConfig(
            store=str(path), sequence_length=length, packing=packing, group_by_length=grouped, audit="off"
        ),
        train=config.TrainConfig(max_steps=10**6, global_batch_size=batch, micro_batch_size=micro),
        optimizer=config.OptimizerConfig(),
        schedule=config.ScheduleConfig(),
        parallel=config.ParallelConfig(activation_checkpointing="full" if recompute else "none"),
        checkpoint=config.CheckpointConfig(),
        evaluate=config.EvaluateConfig(),
        guard=config.GuardConfig(),
    )


def measure(trainer: Trainer, seconds: float) -> tuple[float, int, int]:
    """Seconds, tokens and supervised tokens of steps that take about so long."""
    before = trainer.tokens_seen, trainer.supervised_tokens_seen
    started = time.perf_counter()
    while time.perf_counter() - started < seconds:
        for _ in range(2):
            launched = trainer.train_step(StopRequest())
            trainer.step += 1
        assert launched is not None
        launched.figures()  # waits for the device
    taken = time.perf_counter() - started
    return taken, trainer.tokens_seen - before[0], trainer.supervised_tokens_seen - before[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path)
    parser.add_argument("--corpus")
    parser.add_argument("--tokenizer")
    parser.add_argument("--preset", default="1b" if torch.cuda.is_available() else "tiny")
    parser.add_argument("--length", type=int, default=2048, help="data.sequence_length of packed rows")
    parser.add_argument("--seconds", type=float, default=15, help="of every measurement, of which there are three each")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, process_group() as environment:
        path = arguments.store
        if arguments.corpus:
            from tsumugu.data.prepare import prepare  # a training machine need not have what it needs

            source = config.Source(name="instructions", path=arguments.corpus, kind="instructions")
            path = Path(folder) / "prepared"
            prepare(
                config.PrepareConfig(
                    sources=[source], tokenizer=arguments.tokenizer, output=str(path), max_length=arguments.length + 1
                )
            )
        path = path or synthetic(Path(folder) / "synthetic")
        split = open_store(path).train
        mean = split.tokens / split.documents
        print(f"{split.documents:,} examples, mean {mean:.0f}, longest {split.longest_document:,} tokens")
        rows = max(1, round(PADDED_BATCH * mean / arguments.length))
        longest = split.longest_document - 1
        gpu = torch.cuda.is_available()
        preset, length = arguments.preset, arguments.length
        # on a GPU the padded batch fits with recomputation alone, which the sample had on
        runs = {
            "pad_left": run_of(path, preset, "pad_left", longest, PADDED_BATCH, PADDED_BATCH, False, gpu),
            "pad_right, group_by_length": run_of(
                path, preset, "pad_right", longest, PADDED_BATCH, PADDED_BATCH // 4, True, False
            ),
            "best_fit": run_of(
                path, preset, "best_fit", length, rows, max(1, rows // 2) if gpu else rows, False, False
            ),
        }
        sums = {name: np.zeros(3) for name in runs}
        # on a CPU in turns, so that other work on the machine troubles all alike; a GPU holds one of them
        turns = [list(runs)] if not gpu else [[name] for name in runs]
        for together in turns:
            trainers = {name: Trainer(runs[name], Path(folder) / name, environment) for name in together}
            for trainer in trainers.values():
                measure(trainer, 20 if gpu else 2)  # compiles
            for _ in range(3):
                for name, trainer in trainers.items():
                    sums[name] += measure(trainer, arguments.seconds)
            for trainer in trainers.values():
                packed = trainer.data.train_rows[0]
                if isinstance(packed, BestFit):
                    print(f"best_fit fills {packed.filled:.2%} of its rows; {trainer.attention}\n")
            del trainers, trainer
            gc.collect()
            torch.cuda.empty_cache()
        print("| packing | tokens a second | supervised tokens a second | of pad_left |\n| --- | ---: | ---: | ---: |")
        for name, (seconds, tokens, supervised) in sums.items():
            ratio = supervised / seconds / (sums["pad_left"][2] / sums["pad_left"][0])
            print(f"| {name} | {tokens / seconds:,.0f} | {supervised / seconds:,.0f} | {ratio:.2f} × |")


if __name__ == "__main__":
    main()

"""Losses of training in fp8 beside those in bfloat16, on real tokens: the same model, seed and rows.

    python benchmarks/fp8_loss.py --store STORE                 # 1b, 500 steps of 4 rows, one way after the other
    python benchmarks/fp8_loss.py --store STORE --gpus 2        # two ways at a time, each on a GPU of its own

STORE is what `tsumugu prepare` makes of a corpus. Needs the extra `fp8` and a GPU that knows fp8. Prints a Markdown
table: the mean loss of the last 50 steps before each, and that of the validation split at the end.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from throughput import measure_rows

WAYS = ("bfloat16", "tensorwise", "rowwise")


def train(way: str, arguments: argparse.Namespace) -> None:
    from tsumugu import config
    from tsumugu.distributed.environment import process_group
    from tsumugu.training.signals import StopRequest
    from tsumugu.training.trainer import Trainer

    run = config.TrainingRun(
        model=config.ModelConfig(preset=arguments.preset),
        tokenizer=config.TokenizerConfig(),
        data=config.DataConfig(store=str(arguments.store), sequence_length=2048, audit="off"),
        train=config.TrainConfig(max_steps=arguments.steps, global_batch_size=4, micro_batch_size=4, seed=1),
        optimizer=config.OptimizerConfig(learning_rate=3e-4),
        schedule=config.ScheduleConfig(
            kind="cosine", warmup_steps=min(50, arguments.steps // 4), min_learning_rate=3e-5
        ),
        parallel=config.ParallelConfig(fp8=None if way == "bfloat16" else way),  # type: ignore[arg-type]
        checkpoint=config.CheckpointConfig(),
        evaluate=config.EvaluateConfig(),
        guard=config.GuardConfig(),
    )
    with process_group() as environment:
        trainer = Trainer(run, arguments.out / f"run-{way}", environment)
        losses, previous = [], None
        for _ in range(arguments.steps):
            launched = trainer.train_step(StopRequest())
            trainer.step += 1
            if previous is not None:
                losses.append(previous.figures().loss)
            previous = launched
        assert previous is not None
        losses.append(previous.figures().loss)
        validation = trainer.evaluate()["validation_loss"]
    (arguments.out / f"{way}.json").write_text(json.dumps({"losses": losses, "validation": validation}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--preset", default="1b")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--way", action="append", choices=WAYS, help="default: all")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--limit", type=float, default=600, help="seconds of one way")
    parser.add_argument("--total", type=float, default=1800, help="seconds of all")
    parser.add_argument("--out", type=Path, default=Path("/tmp/fp8-loss"))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.one:
        train(arguments.one, arguments)
        return
    ways = arguments.way or list(WAYS)
    measure_rows(__file__, ways, arguments)
    found = {way: json.loads(file.read_text()) for way in ways if (file := arguments.out / f"{way}.json").exists()}
    ends = [end for end in (100, 200, 300, 400, 500) if end <= arguments.steps]
    print(
        "| way | "
        + " | ".join(f"step {end}" for end in ends)
        + " | validation |\n| --- |"
        + " ---: |" * (len(ends) + 1)
    )
    for way, result in found.items():
        cells = [f"{np.mean(result['losses'][end - 50 : end]):.4f}" for end in ends]
        first = next(iter(found.values()))["validation"]
        print(f"| {way} | {' | '.join(cells)} | {result['validation']:.4f} ({result['validation'] / first - 1:+.2%}) |")


if __name__ == "__main__":
    main()

"""Loss curves of packed and padded instruction tuning on the built-in set, and whether greedy answers agree.

    python benchmarks/packing_curves.py [--steps 400]

Trains the tiny model from the same seed on the built-in instructions, once packed by best fit and once padded on the
left, with about as many tokens a step, writes the first 200 steps to docs/images/packing.svg, and, after the last step,
answers some trained instructions with both.
"""

import argparse
import json
import tempfile
from importlib import resources
from pathlib import Path

import numpy as np

from tsumugu import config
from tsumugu.data.prepare import prepare
from tsumugu.data.store import open_store
from tsumugu.distributed.environment import process_group
from tsumugu.export import export
from tsumugu.generate import Generator
from tsumugu.tokenizer.train import train_tokenizer
from tsumugu.training.metrics import read_metrics
from tsumugu.training.signals import StopRequest
from tsumugu.training.trainer import Trainer

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "packing.svg"
LENGTH, PADDED_BATCH, ANSWERS, SMOOTHED, DRAWN = 512, 16, 20, 5, 200
COLOURS = {"pad_left": "#c0504d", "best_fit": "#2f6fb0"}


def run_of(path: Path, packing: str, batch: int, steps: int) -> config.TrainingRun:
    return config.TrainingRun(
        model=config.ModelConfig(preset="tiny"),
        tokenizer=config.TokenizerConfig(),
        data=config.DataConfig(store=str(path), sequence_length=LENGTH, packing=packing),
        train=config.TrainConfig(
            max_steps=steps, global_batch_size=batch, micro_batch_size=batch, log_every=1, log_to=[]
        ),
        optimizer=config.OptimizerConfig(learning_rate=2e-3, weight_decay=0.0),
        schedule=config.ScheduleConfig(kind="wsd", warmup_steps=10),
        parallel=config.ParallelConfig(),
        checkpoint=config.CheckpointConfig(),
        evaluate=config.EvaluateConfig(),
        guard=config.GuardConfig(),
    )


def picture(curves: dict[str, list[float]]) -> str:
    """Means over some steps, as SVG."""
    width, height, left, bottom = 640, 320, 48, 36
    steps, top = max(map(len, curves.values())), max(map(max, curves.values()))
    place = lambda step, loss: (  # noqa: E731
        left + (width - left - 12) * step / steps,
        12 + (height - bottom - 12) * (1 - loss / top),
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    for loss in range(0, int(top) + 1, 2):
        x, y = place(0, loss)
        parts.append(f'<path d="M{x:.0f} {y:.1f}H{width - 12}" stroke="#ddd"/><text x="{x - 22:.0f}" y="{y + 4:.0f}">')
        parts.append(f"{loss}</text>")
    for step in range(0, steps + 1, 50):
        x, _ = place(step, 0)
        parts.append(f'<text x="{x:.0f}" y="{height - 18}" text-anchor="middle">{step}</text>')
    parts.append(f'<text x="{width // 2}" y="{height - 3}" text-anchor="middle">step</text>')
    for index, (name, losses) in enumerate(curves.items()):
        smooth = [np.mean(losses[max(0, i - SMOOTHED + 1) : i + 1]) for i in range(len(losses))]
        points = " ".join("{:.1f},{:.1f}".format(*place(i + 1, loss)) for i, loss in enumerate(smooth))
        parts.append(f'<polyline fill="none" stroke="{COLOURS[name]}" stroke-width="1.6" points="{points}"/>')
        parts.append(f'<text x="{width - 120}" y="{30 + 18 * index}" fill="{COLOURS[name]}">{name}</text>')
    return "".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    steps = parser.parse_args().steps
    sample = resources.files("tsumugu") / "sample" / "instructions.jsonl"
    records = [json.loads(line) for line in sample.read_text(encoding="utf-8").splitlines()]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = [f"{r['instruction']}\n{r.get('input') or ''}\n{r['output']}" for r in records]
        train_tokenizer(lambda: texts, folder / "tokenizer", vocab_size=2000)
        source = config.Source(name="instructions", path=str(sample), kind="instructions")
        path = folder / "store"
        prepare(
            config.PrepareConfig(
                sources=[source], tokenizer=str(folder / "tokenizer"), output=str(path), max_length=LENGTH + 1,
                validation_share=0.0,
            )
        )  # fmt: skip
        split = open_store(path).train
        batches = {"pad_left": PADDED_BATCH}
        batches["best_fit"] = max(1, round(PADDED_BATCH * split.tokens / split.documents / LENGTH))
        curves, tokens, models = {}, {}, {}
        for packing, batch in batches.items():
            with process_group() as environment:
                trainer = Trainer(run_of(path, packing, batch, steps), folder / packing, environment)
                trainer.train(StopRequest())
            curves[packing] = [line["loss"] for line in read_metrics(folder / packing) if "loss" in line]
            tokens[packing] = trainer.supervised_tokens_seen
            export(str(folder / packing), folder / f"model-{packing}", dtype="float32")
            models[packing] = Generator(folder / f"model-{packing}")
        asked = [r for r in records if not r.get("input")][:ANSWERS]
        answers = {p: [m.generate(r["instruction"], max_new_tokens=80)[0] for r in asked] for p, m in models.items()}
    PICTURE.write_text(picture({p: losses[:DRAWN] for p, losses in curves.items()}), encoding="utf-8")
    for packing, losses in curves.items():
        tenths = [float(np.mean(part)) for part in np.array_split(losses, 8)]
        print(f"{packing} ({batches[packing]} rows a step, {tokens[packing]:,} supervised tokens): loss by eighths "
              + " ".join(f"{loss:.2f}" for loss in tenths))  # fmt: skip
    agree = sum(a == b for a, b in zip(*answers.values(), strict=True))
    known = {p: sum(a == r["output"] for a, r in zip(given, asked, strict=True)) for p, given in answers.items()}
    print(f"{agree} of {len(asked)} greedy answers agree; as trained: {known}")


if __name__ == "__main__":
    main()

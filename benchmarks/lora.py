"""Memory of LoRA, predicted by parts and measured: rinna's 3.6B in bfloat16, and an 8B Llama in NF4, at 2,048 tokens.

    python benchmarks/lora.py [--shape 3.6b] [--predict]

Models of these shapes with random weights are written into a temporary folder (24 GB; --folder DIR: in DIR) and trained
for some steps, as on a card of 24 GB: micro batches of one row, weights gathered layer by layer. Some three minutes on
one GPU; without one, or with --predict, it prints what it predicts. Needs the extra `lora`. Prints a Markdown table.
"""

import argparse
import gc
import logging
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import checkpoint as text_of  # benchmarks/checkpoint.py, for its store
import torch
from transformers import AutoConfig, PretrainedConfig

from tsumugu import config
from tsumugu.distributed import paths
from tsumugu.distributed.environment import Environment, process_group
from tsumugu.export import _write_weights
from tsumugu.model import build
from tsumugu.plan import instances, memory
from tsumugu.training.signals import StopRequest
from tsumugu.training.trainer import Trainer

TOKENS, RANK, STEPS, GIB = 2048, 16, 6, 2**30


@dataclass(frozen=True)
class Shape:
    """A model, and how it is trained."""

    model_type: str
    sizes: dict
    quantize: str | None
    recomputed: str

    def config(self) -> PretrainedConfig:
        ids = {"bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}
        return AutoConfig.for_model(self.model_type, **self.sizes, **ids, dtype=torch.bfloat16)


SHAPES = {
    "3.6b": Shape(  # rinna/japanese-gpt-neox-3.6b
        "gpt_neox",
        {
            **{"vocab_size": 32000, "hidden_size": 2816, "num_hidden_layers": 36, "num_attention_heads": 22},
            **{"intermediate_size": 11264, "max_position_embeddings": TOKENS, "use_parallel_residual": False},
        },
        quantize=None,
        recomputed="selective",
    ),
    "8b": Shape(  # Llama 3
        "llama",
        {
            **{"vocab_size": 128256, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32},
            **{"num_key_value_heads": 8, "intermediate_size": 14336, "max_position_embeddings": TOKENS},
        },
        quantize="nf4",
        recomputed="full",
    ),
    "tiny": Shape(  # to try the script
        "llama",
        {
            **{"vocab_size": 32000, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
            **{"num_key_value_heads": 2, "intermediate_size": 128, "max_position_embeddings": TOKENS},
        },
        quantize="nf4",
        recomputed="full",
    ),
}


def predict(shape: Shape) -> dict[str, float]:
    """Bytes by part, for a micro batch of one row of TOKENS on one GPU, as `tsumugu plan` has them."""
    cuda = torch.cuda.is_available()
    device = paths.this_device(torch.device("cuda", 0)) if cuda else instances.gpu("H100").device()
    setup = memory.set_up(run_config(shape, Path("nowhere")), shape.config(), device, processes=1)
    parts = memory.peak(setup, memory.trace_model(setup, 1), 1)
    return {part: size for part, size in parts.items() if size}


def write_model(shape: Shape, folder: Path) -> None:
    model = build.meta_model(shape.config(), torch.bfloat16)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def random(name: str) -> torch.Tensor:
        return (0.02 * torch.randn(model.get_parameter(name).shape, device=device, dtype=torch.bfloat16)).cpu()

    folder.mkdir()
    _write_weights(model, random, folder)
    shape.config().save_pretrained(folder)


def run_config(shape: Shape, folder: Path) -> config.TrainingRun:
    adapters = config.LoraConfig(rank=RANK, quantize=shape.quantize)  # type: ignore[arg-type]
    return config.TrainingRun(
        model=config.ModelConfig(pretrained=str(folder / "model"), lora=adapters),
        tokenizer=config.TokenizerConfig(path=str(folder / "store" / "tokenizer")),
        data=config.DataConfig(store=str(folder / "store"), sequence_length=TOKENS, audit="off"),
        train=config.TrainConfig(max_steps=1000, global_batch_size=2, micro_batch_size=1, log_to=[]),
        optimizer=config.OptimizerConfig(),
        schedule=config.ScheduleConfig(),
        parallel=config.ParallelConfig(
            activation_checkpointing=shape.recomputed,  # type: ignore[arg-type]
            reshard_after_forward="always",
        ),
        checkpoint=config.CheckpointConfig(),
        evaluate=config.EvaluateConfig(),
        guard=config.GuardConfig(),
    )


def measure(shape: Shape, environment: Environment, folder: str | None) -> dict[str, float]:
    """Peaks in bytes, of building and of training, and seconds."""
    cuda = torch.cuda.is_available()
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        text_of.write_store(Path(scratch) / "store", 200 * TOKENS)
        write_model(shape, Path(scratch) / "model")
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        trainer = Trainer(run_config(shape, Path(scratch)), Path(scratch) / "run", environment)
        found = {"build_seconds": time.perf_counter() - started}
        found["build"] = torch.cuda.max_memory_allocated() if cuda else 0
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        for step in range(STEPS):
            if step == 2:
                started = time.perf_counter()
            trainer.train_step(StopRequest()).figures()
            trainer.step += 1
        found["step_seconds"] = (time.perf_counter() - started) / (STEPS - 2)
        found["train"] = torch.cuda.max_memory_allocated() if cuda else 0
        found["reserved"] = torch.cuda.max_memory_reserved() if cuda else 0
    return found


def report(name: str, predicted: dict[str, float], found: dict[str, float] | None) -> str:
    shape = SHAPES[name]
    what = f"{shape.quantize or 'bfloat16'}, activation_checkpointing {shape.recomputed}"
    lines = [f"{name}, {what}, rank {RANK}, one row of {TOKENS:,} tokens", "", "| part | GiB |", "| --- | ---: |"]
    lines += [f"| {part} | {size / GIB:.2f} |" for part, size in predicted.items()]
    lines.append(f"| **predicted peak** | **{sum(predicted.values()) / GIB:.2f}** |")
    if found:
        lines.append(f"| **measured peak** | **{found['train'] / GIB:.2f}** |")
        lines.append(f"| held by the allocator | {found['reserved'] / GIB:.2f} |")
        lines.append(f"| peak while building ({found['build_seconds']:.0f} s) | {found['build'] / GIB:.2f} |")
        lines += ["", f"{2 * TOKENS / found['step_seconds']:,.0f} tokens a second"]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, help="default: 3.6b and 8b")
    parser.add_argument("--predict", action="store_true", help="measure nothing")
    parser.add_argument("--folder", help="where models are written; default: a temporary folder")
    options = parser.parse_args()
    logging.getLogger("torch").setLevel(logging.ERROR)
    measured = not options.predict and (torch.cuda.is_available() or options.shape == "tiny")
    if torch.cuda.is_available():
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    for name in [options.shape] if options.shape else ["3.6b", "8b"]:
        found = None
        if measured:
            with process_group() as environment:
                found = measure(SHAPES[name], environment, options.folder)
            torch.compiler.reset()
        print(report(name, predict(SHAPES[name]), found) + "\n", flush=True)


if __name__ == "__main__":
    main()

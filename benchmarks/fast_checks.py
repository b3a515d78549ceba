"""On a GPU: the fast path of one device computes what the plain one does.

    python benchmarks/fast_checks.py

The kernels in Triton are compared with torch's operations, the head in chunks with float32 cross entropy on whole
logits, and runs of small models (bf16, compiled) with FSDP2 over one process and whole logits: losses, checkpoints of
either read by the other, and a run that was stopped. It also says where the host waits for the device within a step.
Exit code 1 where something is off.
"""

import copy
import importlib.util
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from throughput import random_store
from torch import nn
from transformers import AutoConfig

from tsumugu import config
from tsumugu.distributed import parallelize
from tsumugu.distributed.environment import process_group
from tsumugu.kernels import cross_entropy, has_triton
from tsumugu.kernels import masters as kernels
from tsumugu.model import masters
from tsumugu.training.deterministic import deterministic
from tsumugu.training.signals import StopRequest
from tsumugu.training.trainer import Trainer

VOCABULARY, LENGTH, STEPS = 1000, 256, 30
SHAPE = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512}
SHAPES = {
    "gpt_neox": SHAPE | {"use_parallel_residual": False},
    "llama": SHAPE | {"num_key_value_heads": 2},
    "qwen3": SHAPE | {"num_key_value_heads": 2, "head_dim": 128, "tie_word_embeddings": True},
}
FAILED: list[str] = []


def check(what: str, found: float, allowed: float) -> None:
    good = found <= allowed  # NaN is not
    print(f"{'ok    ' if good else 'FAILED'} {what}: {found:.3g} (allowed {allowed:.3g})", flush=True)
    if not good:
        FAILED.append(what)


def apart(found: torch.Tensor, right: torch.Tensor) -> float:
    return ((found.double() - right.double()).norm() / right.double().norm()).item()


def check_masters() -> None:
    from tsumugu.kernels import triton_kernels

    for size in (1, 5000, 2**20 + 3, 3 * 2**20):
        master = torch.randn(size, device="cuda")
        reference = nn.Parameter(master.clone())
        weight, low = kernels.split(master)
        check(f"split and joined, {size}", (kernels.join(weight, low) - master).abs().max().item(), 0)
        first, second = torch.zeros_like(master), torch.zeros_like(master)
        optimizer = torch.optim.AdamW([reference], lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
        for step in range(1, 21):
            gradient, skip = torch.randn(size, device="cuda"), torch.tensor(float(step == 5), device="cuda")
            clip = torch.tensor(0.3, device="cuda")
            taken = torch.tensor(float(step - (step > 5)), device="cuda")
            scalars = kernels.Scalars(taken, clip, skip, (0.9, 0.95))
            kernels.adamw(weight, low, gradient.clone(), (first, second), scalars, 1e-3, 0.1, 1e-8)
            if step != 5:
                reference.grad = gradient * clip
                optimizer.step()
        check(f"AdamW on masters, {size}", apart(kernels.join(weight, low), reference.detach()), 3e-7)
        check(f"its second moment, {size}", apart(second, optimizer.state[reference]["exp_avg_sq"]), 1e-6)
        total, gradients = torch.full_like(master, torch.nan), torch.randn(2, size, device="cuda").bfloat16()
        for index in (0, 1):
            triton_kernels.accumulate(total, gradients[index], index == 0)
        check(f"accumulated, {size}", (total - (gradients[0].float() + gradients[1].float())).abs().max().item(), 0)


def check_head() -> None:
    for tokens, hidden, vocabulary, bias in (
        (4096, 2816, 32000, False),
        (3001, 2048, 52096, True),
        (77, 64, 131, False),
    ):
        states = torch.randn(tokens, hidden, device="cuda").bfloat16().requires_grad_()
        weight = (torch.randn(vocabulary, hidden, device="cuda") / hidden**0.5).bfloat16().requires_grad_()
        offset = torch.randn(vocabulary, device="cuda").bfloat16().requires_grad_() if bias else None
        inputs = [states, weight, *([offset] if offset is not None else [])]
        labels = torch.randint(vocabulary, (tokens,), device="cuda")
        logits = F.linear(states, weight, offset).float()
        right = F.cross_entropy(logits, labels, reduction="sum") / tokens
        in_float32 = torch.autograd.grad(right, [logits], retain_graph=True)[0]
        exact = [in_float32 @ weight.float(), in_float32.T @ states.float()]
        whole = torch.autograd.grad(right, inputs)
        weight.grad_dtype = None
        for chunk in (2**27, 2**20):
            cross_entropy.LOGITS_AT_A_TIME = chunk
            states.grad = weight.grad = None
            loss = cross_entropy.summed_cross_entropy(states, weight, offset, labels) / tokens
            loss.backward()
            name = f"head {tokens} × {vocabulary}, 2^{chunk.bit_length() - 1} at a time"
            check(f"{name}: loss", abs(loss.item() / right.item() - 1), 1e-5)
            assert states.grad is not None
            assert weight.grad is not None
            print(f"       the weight's gradient is {weight.grad.dtype}")
            for what, found, wanted, theirs in zip(
                ("hidden states", "weight"), (states.grad, weight.grad), exact, whole, strict=False
            ):
                # the weight's is in float32; that of hidden states is rounded to 16 bits twice, as torch's own is
                of_torch = apart(theirs, wanted)
                allowed = 1e-3 if what == "weight" and tokens > 1000 else 1.3 * of_torch
                check(f"{name}: d {what} (torch: {of_torch:.2g})", apart(found, wanted), allowed)
        cross_entropy.LOGITS_AT_A_TIME = 2**27
    weight = torch.zeros(1000, 64, device="cuda")
    cross_entropy.add_product(
        weight, torch.ones(3000, 1000, device="cuda").bfloat16(), torch.ones(3000, 64).cuda().bfloat16()
    )
    cross_entropy.add_product(
        weight, torch.ones(3000, 1000, device="cuda").bfloat16(), torch.ones(3000, 64).cuda().bfloat16()
    )
    check("products are summed in float32", (weight - 6000).abs().max().item(), 0)


def run_of(folder: Path, name: str, **changes: Any) -> config.TrainingRun:
    sections: dict[str, dict[str, Any]] = {
        "train": {"max_steps": STEPS, "global_batch_size": 8, "micro_batch_size": 2, "log_to": [], "log_every": 1},
        "data": {"store": str(folder / "store"), "sequence_length": LENGTH, "audit": "off"},
        "parallel": {},
    }
    for key, value in changes.items():
        section, _, field = key.partition("__")
        sections[section][field] = value
    return config.TrainingRun(
        model=config.ModelConfig(config=str(folder / name)),
        tokenizer=config.TokenizerConfig(),
        data=config.DataConfig(**sections["data"]),
        train=config.TrainConfig(**sections["train"]),
        optimizer=config.OptimizerConfig(learning_rate=1e-3),
        schedule=config.ScheduleConfig(warmup_steps=5),
        parallel=config.ParallelConfig(**sections["parallel"]),
        checkpoint=config.CheckpointConfig(),
        evaluate=config.EvaluateConfig(),
        guard=config.GuardConfig(),
    )


def masters_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in trainer.model.named_parameters():
        master = masters.of(parameter)
        plain: Any = parameter
        found[name] = master.whole() if master else (plain.full_tensor() if hasattr(plain, "full_tensor") else plain)
        found[name] = found[name].detach().clone()
    return found


def take(run: config.TrainingRun, run_dir: Path) -> tuple[np.ndarray, dict[str, torch.Tensor], list[str]]:
    """Trains; losses, masters at the end, and what was printed."""
    from tsumugu.training.metrics import read_metrics

    with deterministic(run.train.deterministic), process_group() as environment:
        trainer = Trainer(run, run_dir, environment)
        trainer.train(StopRequest())
        losses = np.array([line["loss"] for line in read_metrics(run_dir) if "loss" in line])
        return losses, masters_of(trainer), trainer.paths


def check_runs(folder: Path) -> None:
    random_store(folder / "store", VOCABULARY, 200_000)
    sharded = {"parallel__fsdp": True, "parallel__chunked_loss": False}
    for name, shape in SHAPES.items():
        AutoConfig.for_model(name, vocab_size=VOCABULARY + 24, **copy.deepcopy(shape)).save_pretrained(folder / name)
        plain, _, _ = take(run_of(folder, name, **sharded), folder / f"{name} fsdp")
        fast, _, paths = take(run_of(folder, name), folder / f"{name} fast")
        if name == "gpt_neox":
            print("\n".join(paths))
        check(f"{name}: losses of {STEPS} steps", float(np.abs(fast / plain - 1).max()), 2e-3)
        parallelize.SMALLEST_OFFLOADED, smallest = 0, parallelize.SMALLEST_OFFLOADED
        moved, _, _ = take(run_of(folder, name, parallel__offload_activations=True), folder / f"{name} offloaded")
        parallelize.SMALLEST_OFFLOADED = smallest
        check(f"{name}: losses of {STEPS} steps, activations offloaded", float(np.abs(moved / plain - 1).max()), 2e-3)
        if importlib.util.find_spec("torchao"):
            for recipe in ("tensorwise", "rowwise"):
                in_fp8, _, paths = take(run_of(folder, name, parallel__fp8=recipe), folder / f"{name} {recipe}")
                print(paths[1])
                check(
                    f"{name}: losses of {STEPS} steps in fp8, {recipe}", float(np.abs(in_fp8 / plain - 1).max()), 1e-2
                )
        exact, _, _ = take(run_of(folder, name, train__dtype="float32", parallel__compile=False), folder / f"{name} 32")
        distances = [f"{np.abs(losses / exact - 1).max():.2g}" for losses in (plain, fast)]
        print(f"       from float32: fsdp {distances[0]}, fast {distances[1]}")
    name = "gpt_neox"
    half = {"train__stop_after": STEPS // 2}
    _, at_half, _ = take(run_of(folder, name, **half), folder / "half")
    _, read, _ = take(run_of(folder, name, train__stop_after=STEPS // 2, **sharded), folder / "half")
    check("fsdp reads the masters exactly", max((read[key] - at_half[key]).abs().max().item() for key in read), 0)
    resumed, _, _ = take(run_of(folder, name), folder / "half")
    fast, _, _ = take(run_of(folder, name), folder / "whole")
    check("a stopped run goes on as the whole one", float(np.abs(resumed / fast - 1).max()), 1e-3)
    same = {"train__deterministic": True}
    once, _, _ = take(run_of(folder, name, **same), folder / "deterministic")
    take(run_of(folder, name, **same, **half), folder / "deterministic half")
    again, _, _ = take(run_of(folder, name, **same), folder / "deterministic half")
    check("a stopped run goes on bit for bit, with train.deterministic", float(np.abs(again - once).max()), 0)
    _, at_half, _ = take(run_of(folder, name, **half, **sharded), folder / "sharded half")
    _, read, _ = take(run_of(folder, name, **half), folder / "sharded half")
    check("the masters of fsdp are read exactly", max((read[key] - at_half[key]).abs().max().item() for key in read), 0)


def say_waits(folder: Path) -> None:
    """Where the host waits for the device within a step."""
    with process_group() as environment:
        trainer = Trainer(run_of(folder, "gpt_neox"), folder / "waits", environment)
        for _ in range(3):
            trainer.train_step(StopRequest())
            trainer.step += 1
        torch.cuda.synchronize()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            launched = trainer.train_step(StopRequest())
            torch.cuda.set_sync_debug_mode("default")
        assert launched is not None
        places = sorted(
            {f"{warning.filename}:{warning.lineno}" for warning in caught if "synchroniz" in str(warning.message)}
        )
        print(f"the host waits in {len(places)} places of a step: {', '.join(places) or 'none'}")


def main() -> None:
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Triton {'there' if has_triton() else 'missing'}")
    check_masters()
    check_head()
    with tempfile.TemporaryDirectory() as folder:
        check_runs(Path(folder))
        say_waits(Path(folder))
    print(f"\nfailed: {', '.join(FAILED)}" if FAILED else "\nall is well")
    sys.exit(bool(FAILED))


if __name__ == "__main__":
    main()

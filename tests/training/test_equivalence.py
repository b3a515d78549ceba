"""However a step is split, recomputed, compiled and kept in memory, it is the same step: that of a plain PyTorch loop.

The reference is stock transformers on whole weights, one unpadded row at a time, the sum of all token losses over their
number, and torch's AdamW in its plainest form.

A run of the suite takes cases in which every two choices meet. `make equivalence` takes all of them (compiled layers:
of four models, without padding); with TSUMUGU_EQUIVALENCE=all:3/64 the fourth of 64 parts, so that several processes or
machines can share the work. With TORCHINDUCTOR_CACHE_DIR set, parts share what the compiler has made.
"""

import itertools
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.models import VOCABULARY, exact_models, stock_model, tiny_config
from support.ranks import run_ranks
from support.runs import run_config, whole
from support.stores import random_documents, write_store
from transformers import AutoModelForCausalLM

from tsumugu.data.sampler import row_at
from tsumugu.distributed.environment import process_group
from tsumugu.training.signals import StopRequest
from tsumugu.training.trainer import Trainer

MODELS = {
    "gpt_neox parallel": ("gpt_neox", False, {"use_parallel_residual": True}),
    "gpt_neox sequential": ("gpt_neox", False, {"use_parallel_residual": False}),
    "gpt2 tied": ("gpt2", True, {}),
    "llama": ("llama", False, {}),
    "qwen3 tied": ("qwen3", True, {}),
    "bloom tied": ("bloom", True, {}),
}
# Their vocabulary is even, so that it can be split by tensor parallelism. In one the row that never learns is in use.
SPLIT = {
    f"{name}, split": (architecture, tied, {**changes, "vocab_size": VOCABULARY + 1})
    for name, (architecture, tied, changes) in (MODELS | {"qwen3": ("qwen3", False, {"pad_token_id": 9})}).items()
    if architecture in ("gpt_neox", "llama", "qwen3")
}
PACKINGS = ("pad_left", "concatenate")
# (shard, replicate) or (shard, replicate, tensor)
MESHES = {
    "1": (1, 1),
    "shard 2": (2, 1),
    "replicate 2": (1, 2),
    "shard 4": (4, 1),
    "2 × 2": (2, 2),
    "replicate 4": (1, 4),
}
SPLIT_MESHES = {"tensor 2": (1, 1, 2), "shard 2 × tensor 2": (2, 1, 2), "replicate 2 × tensor 2": (1, 2, 2)}
KEEPING = {
    "by default": {},
    "gathered and exchanged once": {
        "parallel.reshard_after_forward": "never", "parallel.sync_each_micro_batch": False,
    },
    "gathered ahead": {"parallel.prefetch": 2, "parallel.reshard_after_forward": "always"},
    "on the host": {"parallel.offload_optimizer": True},
    "exchanged once, on the host": {
        "parallel.sync_each_micro_batch": False, "parallel.reshard_after_forward": "always",
        "parallel.offload_optimizer": True,
    },
    "sharded over one": {"parallel.fsdp": True},
    "whole logits": {"parallel.chunked_loss": False},
    "every second recomputed": {"parallel.checkpoint_every_nth_layer": 2},
}  # fmt: skip


class Case(NamedTuple):
    """One way to take the steps."""

    model: str
    packing: str
    mesh: str
    accumulation: int
    recomputed: str
    keeping: str
    compiled: bool = False

    @property
    def processes(self) -> int:
        return math.prod((MESHES | SPLIT_MESHES)[self.mesh])


CHOICES = (tuple(MODELS), PACKINGS, tuple(MESHES), (1, 2, 4), ("none", "selective", "full"))
SPLIT_CHOICES = (tuple(SPLIT), PACKINGS, tuple(SPLIT_MESHES), *CHOICES[3:])
SPLIT_CASES = [
    Case("gpt_neox parallel, split", "pad_left", "shard 2 × tensor 2", 2, "none", "by default"),
    Case(
        "gpt_neox sequential, split", "concatenate", "shard 2 × tensor 2", 1, "selective", "gathered and exchanged once"
    ),
    Case("llama, split", "pad_left", "shard 2 × tensor 2", 1, "full", "gathered ahead"),
    Case("llama, split", "concatenate", "tensor 2", 2, "none", "by default"),
    Case("qwen3 tied, split", "concatenate", "replicate 2 × tensor 2", 2, "selective", "every second recomputed"),
    Case("qwen3, split", "pad_left", "tensor 2", 1, "full", "on the host"),
    Case("qwen3, split", "concatenate", "shard 2 × tensor 2", 1, "none", "on the host"),
    Case("gpt_neox parallel, split", "concatenate", "shard 2 × tensor 2", 4, "none", "gathered and exchanged once"),
]
COMPILED = [Case("gpt_neox parallel", "pad_left", "1", 2, "selective", "by default", True)]


def pairwise(choices: list[Case]) -> list[Case]:
    """Cases in which any two values of different fields stand together, as far as they do in any; taken greedily."""
    pairs = {case: set(itertools.combinations(enumerate(case), 2)) for case in choices}
    missing, taken = set().union(*pairs.values()), []
    while missing:
        taken.append(max(choices, key=lambda case: len(pairs[case] & missing)))
        missing -= pairs[taken[-1]]
    return taken


def cases() -> list[Case]:
    few = pairwise([Case(*values) for values in itertools.product(*CHOICES, KEEPING)]) + SPLIT_CASES + COMPILED
    wanted, _, part = os.environ.get("TSUMUGU_EQUIVALENCE", "").partition(":")
    if wanted != "all":
        return few
    every = [
        Case(*values, "by default") for choices in (CHOICES, SPLIT_CHOICES) for values in itertools.product(*choices)
    ]
    every += [
        case._replace(compiled=True)
        for case in every
        if case.packing == "concatenate"
        and case.model in ("gpt_neox parallel", "gpt_neox sequential", "llama", "qwen3 tied")
    ]
    found = sorted(dict.fromkeys(every + few), key=lambda case: (case.compiled, case.model, case.packing, case))
    number, _, parts = part.partition("/")
    return (
        found[len(found) * int(number) // int(parts) : len(found) * (int(number) + 1) // int(parts)] if part else found
    )


CASES = cases()


def with_dtypes(cases: list[Case]) -> list[tuple[Case, str]]:
    """Every case in what it is computed in: both, but where few are taken and compiling or splitting takes longest."""
    few = "all" not in os.environ.get("TSUMUGU_EQUIVALENCE", "")
    return [
        (case, d)
        for case in cases
        for d in ("float64", "float32")
        if not (few and (case.compiled or case.model in SPLIT) and d == "float32")
        # torch 2.11's compiler cannot make a kernel for a CPU of it
        if not (torch.__version__.startswith("2.11.") and case.compiled and d == "float64" and "neox" in case.model)
    ]


STEPS, BATCH, WIDTH, ROWS, SEED = 5, 16, 16, 70, 7
LEARNING_RATE, FLOOR, WARMUP, DECAY, CLIP = 1e-2, 1e-3, 2, 0.1, 0.8
SKIPPED_STEP = 2


@dataclass
class Result:
    """Losses and gradient norms of every step, and the weights after the last."""

    losses: np.ndarray
    norms: np.ndarray
    weights: dict[str, torch.Tensor]


def order() -> np.ndarray:
    return row_at(np.arange(ROWS), ROWS, SEED)


def documents() -> tuple[list[list[int]], list[list[int]]]:
    """Documents and masks: none supervised in half of step 0, nor anywhere in step 2; unevenly elsewhere."""
    ids = random_documents(ROWS, seed=1)
    masks = [[int(position >= 1 + index % 5) for position in range(len(ids[index]))] for index in range(ROWS)]
    for index in order()[[*range(8), *range(2 * BATCH, 3 * BATCH)]]:
        masks[index] = [0] * len(ids[index])
    return ids, masks


def stream() -> list[int]:
    """The tokens of all rows, the last of them short."""
    return [id for document in random_documents(200, seed=2) for id in document][: WIDTH * (ROWS - 1) + 6]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder of every architecture, and a store of every packing."""
    folder = tmp_path_factory.mktemp("equivalence")
    for name, (architecture, tied, changes) in (MODELS | SPLIT).items():
        stock_model(tiny_config(architecture, tied, **changes)).save_pretrained(folder / name)
    ids, masks = documents()
    write_store(folder / "pad_left", ids, masks=masks)
    write_store(folder / "concatenate", [stream()])
    return folder


Results = dict[tuple[Case, str], Result]


def train_all(folder: Path, run_dir: Path, cases: list[Case]) -> Results:
    """Five steps of every case in either dtype, on the processes at hand."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(run_dir / "inductor"))
    results = {}
    with process_group() as environment, exact_models():
        for case, dtype in with_dtypes(cases):
            shard, replicate, *tensor = (MESHES | SPLIT_MESHES)[case.mesh]
            reading = shard * replicate  # processes, or groups of them, that read different rows
            changes = {
                "model.pretrained": str(folder / case.model),
                "tokenizer.path": str(folder / case.packing / "tokenizer"),
                "data.packing": case.packing,
                "data.sequence_length": WIDTH,
                "train.max_epochs": 1.0,
                "train.global_batch_size": BATCH,
                "train.micro_batch_size": BATCH // reading // case.accumulation,
                "train.seed": SEED,
                "train.dtype": dtype,
                "optimizer.learning_rate": LEARNING_RATE,
                "optimizer.weight_decay": DECAY,
                "optimizer.max_grad_norm": CLIP,
                "schedule.warmup_steps": WARMUP,
                "schedule.min_learning_rate": FLOOR,
                "parallel.shard_degree": shard,
                "parallel.replicate_degree": replicate,
                "parallel.tensor_degree": math.prod(tensor),
                "parallel.activation_checkpointing": case.recomputed,
                "parallel.compile": case.compiled,
                **KEEPING[case.keeping],
            }
            trainer = Trainer(run_config(folder / case.packing, changes), run_dir, environment)
            assert trainer.max_steps == STEPS
            steps = []
            for _ in range(STEPS):
                steps.append(trainer.train_step(StopRequest()).figures())
                trainer.step += 1
            results[case, dtype] = Result(
                np.array([step.loss for step in steps]),
                np.array([step.grad_norm for step in steps]),
                {name: whole(weight) for name, weight in trainer.model.named_parameters()},
            )
            if case.compiled:
                torch.compiler.reset()
    return results


@pytest.fixture(scope="module")
def results(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    run_dir = tmp_path_factory.mktemp("runs")
    by_processes = {count: [case for case in CASES if case.processes == count] for count in (1, 2, 4)}
    found = train_all(folder, run_dir, by_processes[1])
    for count in [count for count in (2, 4) if by_processes[count]]:
        found |= run_ranks(train_all, count, folder, run_dir, by_processes[count])[0]
    return found


def reference_rows(packing: str) -> list[list[tuple[list[int], list[int]]]]:
    """(inputs, labels) of the rows of every step, without any padding."""
    if packing == "pad_left":
        ids, masks = documents()
        rows = [
            (i[:-1], [label if kept else -100 for label, kept in zip(i[1:], m[1:], strict=True)])
            for i, m in zip(ids, masks, strict=True)
        ]
    else:
        tokens = stream()
        rows = [
            (tokens[start : start + WIDTH][: len(tokens) - 1 - start], tokens[start + 1 : start + 1 + WIDTH])
            for start in range(0, len(tokens) - 1, WIDTH)
        ]
    assert len(rows) == ROWS
    shuffled = [rows[index] for index in order()]
    return [shuffled[start : start + BATCH] for start in range(0, ROWS, BATCH)]


def reference(folder: Path, model_name: str, packing: str) -> Result:
    """A plain loop in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder / model_name, dtype=torch.float64)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.95), eps=1e-8, foreach=False, fused=False,
    )  # fmt: skip
    losses, norms = [], []
    for step, rows in enumerate(reference_rows(packing), start=1):
        total, count = torch.zeros((), dtype=torch.float64), 0
        for inputs, labels in rows:
            logits = model(torch.tensor([inputs])).logits[0]
            total = total + F.cross_entropy(logits, torch.tensor(labels), ignore_index=-100, reduction="sum")
            count += sum(label != -100 for label in labels)
        if count == 0:
            losses.append(math.nan)
            norms.append(0.0)
            continue
        loss = total / count
        optimizer.zero_grad()
        loss.backward()
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))
        for parameter in model.parameters():
            parameter.grad *= min(1.0, CLIP / (norm + 1e-6))
        cosine = (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP))) / 2
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * step / WARMUP if step <= WARMUP else FLOOR + (LEARNING_RATE - FLOOR) * cosine
        optimizer.step()
        losses.append(loss.item())
        norms.append(norm)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return Result(np.array(losses), np.array(norms), weights)


def largest_difference(result: Result, expected: Result) -> float:
    assert result.weights.keys() == expected.weights.keys()
    differences = [float((result.weights[name] - expected.weights[name]).abs().max()) for name in expected.weights]
    return max(
        np.nanmax(np.abs(result.losses - expected.losses)), np.abs(result.norms - expected.norms).max(), *differences
    )


@pytest.mark.parametrize(("model", "packing"), sorted({(case.model, case.packing) for case in CASES}))
def test_every_case_trains_as_a_plain_loop_does(model: str, packing: str, folder: Path, results: Results):
    with exact_models():
        expected = reference(folder, model, packing)
    skipped = [step == SKIPPED_STEP and packing == "pad_left" for step in range(STEPS)]
    assert np.isnan(expected.losses).tolist() == skipped
    assert (expected.norms > CLIP).any()
    alike = [case for case in CASES if (case.model, case.packing) == (model, packing)]
    for case, dtype in with_dtypes(alike):
        result = results[case, dtype]
        assert np.isnan(result.losses).tolist() == skipped, case
        assert all(weight.isfinite().all() for weight in result.weights.values())
        if dtype == "float64":
            assert largest_difference(result, expected) < 1e-10, case
        else:
            np.testing.assert_allclose(result.losses, expected.losses, rtol=0, atol=1e-5, err_msg=str(case))
            np.testing.assert_allclose(result.norms, expected.norms, rtol=1e-5, err_msg=str(case))

"""Validation figures are those of the whole split, whatever the batches and the processes."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support.models import VOCABULARY, stock_model, tiny_config
from support.ranks import run_ranks
from support.runs import run_config
from support.stores import random_documents, write_store
from transformers import AutoModelForCausalLM

from tsumugu.distributed.environment import process_group
from tsumugu.training.trainer import Trainer

WIDTH = 16
PACKINGS = ("concatenate", "pad_left")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 (learned positions) with dropout, which evaluation must switch off, and a store of each packing."""
    folder = tmp_path_factory.mktemp("evaluation")
    stock_model(tiny_config("gpt2", tied=True, resid_pdrop=0.5, embd_pdrop=0.5)).save_pretrained(folder / "model")
    documents = random_documents(11, seed=5)
    write_store(folder / "concatenate", documents, documents)
    write_store(folder / "pad_left", documents, documents, masks=[[1] * len(ids) for ids in documents])
    return folder


def evaluate(folder: Path, packing: str, batch: int, micro_batch: int, dtype: str = "float64", **changes) -> dict:
    changes = {
        "model.pretrained": str(folder / "model"),
        "tokenizer.path": str(folder / packing / "tokenizer"),
        "data.packing": packing,
        "data.sequence_length": WIDTH,
        "train.max_steps": 1,
        "train.global_batch_size": batch,
        "train.micro_batch_size": micro_batch,
        "train.dtype": dtype,
        **changes,
    }
    with process_group() as environment:
        return Trainer(run_config(folder / packing, changes), folder / "run", environment).evaluate()


def evaluate_both(folder: Path, batch: int, micro_batch: int) -> list[dict]:
    return [evaluate(folder, packing, batch, micro_batch) for packing in PACKINGS]


def by_hand(folder: Path, packing: str) -> dict:
    """Row by row, without padding, with the token lengths of the contract (1 to 4 bytes)."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float64).eval()
    documents = random_documents(11, seed=5)
    if packing == "concatenate":
        stream = [id for document in documents for id in document]
        rows = [(stream[start : start + WIDTH + 1], 1) for start in range(0, len(stream) - 1, WIDTH)]
    else:
        rows = [(ids, 2) for ids in documents]  # supervised from the third token on
    nats, tokens, text_bytes = 0.0, 0, 0
    for ids, first in rows:
        with torch.no_grad():
            logits = model(torch.tensor([ids[:-1]])).logits[0, first - 1 :]
        labels = torch.tensor(ids[first:])
        nats += F.cross_entropy(logits, labels, reduction="sum").item()
        tokens += len(labels)
        text_bytes += int((1 + labels % 4).sum())
    return {
        "validation_loss": nats / tokens,
        "validation_perplexity": math.exp(nats / tokens),
        "validation_bits_per_byte": nats / math.log(2) / text_bytes,
    }


def test_figures_are_those_computed_row_by_row_on_any_batches_and_processes(folder: Path):
    expected = [by_hand(folder, packing) for packing in PACKINGS]
    for batch, micro_batch in ((1, 1), (4, 4), (6, 2), (32, 8)):
        found = evaluate_both(folder, batch, micro_batch)
        assert found == [pytest.approx(figures, rel=1e-12) for figures in expected], (batch, micro_batch)
    for found in run_ranks(evaluate_both, 2, folder, 4, 2):
        assert found == [pytest.approx(figures, rel=1e-12) for figures in expected]


def test_figures_of_float32_and_bfloat16_are_near(folder: Path):
    exact = by_hand(folder, "pad_left")["validation_loss"]
    assert evaluate(folder, "pad_left", 4, 4, "float32")["validation_loss"] == pytest.approx(exact, rel=1e-6)
    assert evaluate(folder, "pad_left", 4, 4, "bfloat16")["validation_loss"] == pytest.approx(exact, rel=1e-2)


def test_a_limit_counts_global_batches(folder: Path):
    whole = evaluate(folder, "pad_left", 4, 2)
    assert evaluate(folder, "pad_left", 4, 2, **{"evaluate.batches": 3}) == whole
    part = evaluate(folder, "pad_left", 4, 2, **{"evaluate.batches": 1})
    assert part != whole
    assert part == pytest.approx(evaluate(folder, "pad_left", 2, 1, **{"evaluate.batches": 2}), rel=1e-12)


def test_without_validation_rows_there_are_no_figures(folder: Path, tmp_path: Path):
    store = write_store(tmp_path / "store", [list(range(4, VOCABULARY))])
    changes = {"model.config": str(folder / "model"), "train.max_steps": 1, "train.global_batch_size": 1}
    with process_group() as environment:
        trainer = Trainer(run_config(store, changes), tmp_path / "run", environment)
        assert trainer.evaluate() == {}

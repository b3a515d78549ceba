"""Packed, padded on either side, one by one: the same losses, the same gradients.

The reference is stock transformers on whole weights, one document at a time without padding or mask.
"""

import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support.models import VOCABULARY, stock_model, tiny_config
from support.ranks import run_ranks
from support.runs import run_config, whole
from support.stores import random_documents, write_store
from transformers import AutoModelForCausalLM

from tsumugu.config import DataConfig
from tsumugu.data.packing import Batch, BestFit, rows_of
from tsumugu.data.store import open_store
from tsumugu.distributed.environment import process_group
from tsumugu.errors import UserError
from tsumugu.training.isolation import crossing
from tsumugu.training.signals import StopRequest
from tsumugu.training.trainer import Trainer

MODELS = {"gpt_neox": False, "llama": False, "qwen3": True}  # tied
WIDTH, DOCUMENTS, BATCH, SEED = 24, 17, 20, 3
PACKINGS = {
    "best_fit": {"data.packing": "best_fit"},
    "pad_left": {"data.packing": "pad_left"},
    "pad_right": {"data.packing": "pad_right"},
    "by length": {"data.packing": "pad_right", "data.group_by_length": True},
}
SEVERAL_STEPS = {"train.global_batch_size": 4, "train.max_epochs": None, "train.max_steps": 5}
# (packing, dtype, rows of a micro batch)
RUNS = [
    *((packing, "float64", 5) for packing in PACKINGS),
    ("best_fit", "float64", 1),
    ("best_fit", "float32", 10),
    ("pad_left", "float32", 10),
    ("document_mask", "float64", 5),
]


def examples() -> tuple[list[list[int]], list[list[int]]]:
    """Documents and masks; the pad id, 3, stands among the tokens."""
    ids = random_documents(DOCUMENTS, seed=1, longest=WIDTH + 1)
    for document in ids[::3]:
        document[-1] = 3
    return ids, [[int(position >= 1 + index % 4) for position in range(len(d))] for index, d in enumerate(ids)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packing")
    for name, tied in MODELS.items():
        stock_model(tiny_config(name, tied)).save_pretrained(folder / name)
    ids, masks = examples()
    write_store(folder / "instructions", ids, ids[:7], masks=masks)
    write_store(folder / "text", ids, ids[:7])
    return folder


def trainer_of(folder: Path, run_dir: Path, environment, model: str, changes: dict) -> Trainer:
    store = folder / ("text" if "data.document_mask" in changes else "instructions")
    defaults = {
        "model.pretrained": str(folder / model),
        "tokenizer.path": str(store / "tokenizer"),
        "data.sequence_length": WIDTH,
        "train.max_epochs": 1.0,
        "train.global_batch_size": BATCH,
        "train.micro_batch_size": 5,
        "train.dtype": "float64",
        "train.seed": SEED,
        "optimizer.max_grad_norm": 1e9,
    }
    return Trainer(run_config(store, defaults | changes), run_dir, environment)


def one_step_of_all(folder: Path, run_dir: Path, models: list[str]) -> dict:
    """Loss and gradients of one step over the whole store, by (model, run)."""
    results = {}
    with process_group() as environment:
        for model, run in itertools.product(models, RUNS):
            packing, dtype, micro = run
            changes = PACKINGS.get(packing, {"data.document_mask": True})
            changes = changes | {"train.dtype": dtype, "train.micro_batch_size": micro}
            trainer = trainer_of(folder, run_dir, environment, model, changes)
            assert trainer.max_steps == 1
            trainer.optimizer.zero_grad = lambda: None
            loss = trainer.train_step(StopRequest()).figures().loss
            results[model, run] = loss, {name: whole(p.grad) for name, p in trainer.model.named_parameters()}
    return results


def on_two_ranks(folder: Path, run_dir: Path) -> tuple[dict, dict]:
    steps = {
        (packing, shards): train(
            folder,
            run_dir,
            SEVERAL_STEPS | PACKINGS[packing] | {"train.micro_batch_size": 1, "parallel.shard_degree": shards},
            5,
        )
        for packing in ("best_fit", "by length")
        for shards in (1, 2)
    }
    return one_step_of_all(folder, run_dir, ["llama"]), steps


@pytest.fixture(scope="module")
def two_ranks(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict]:
    return run_ranks(on_two_ranks, 2, folder, tmp_path_factory.mktemp("ranks"))[0]


@pytest.fixture(scope="module")
def results(folder: Path, two_ranks: tuple[dict, dict], tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return [one_step_of_all(folder, tmp_path_factory.mktemp("runs"), list(MODELS)), two_ranks[0]]


def pieces(packing: str) -> list[tuple[list[int], list[int]]]:
    """(inputs, labels) of what must not see one another: documents, or what is left of them in blocks of the stream."""
    ids, masks = examples()
    if packing != "document_mask":
        labels = [
            [i if m else -100 for i, m in zip(d[1:], mask[1:], strict=True)] for d, mask in zip(ids, masks, strict=True)
        ]
        return [(document[:-1], of_document) for document, of_document in zip(ids, labels, strict=True)]
    found = []
    of_token = [(token, index) for index, document in enumerate(ids) for token in document]
    for position, (token, document) in enumerate(of_token[:-1]):
        if position % WIDTH == 0 or of_token[position - 1][1] != document:
            found.append(([], []))
        following, its_document = of_token[position + 1]
        found[-1][0].append(token)
        found[-1][1].append(following if its_document == document else -100)
    return found


def one_by_one(folder: Path, model_name: str, packing: str) -> tuple[float, dict[str, torch.Tensor]]:
    model = AutoModelForCausalLM.from_pretrained(folder / model_name, dtype=torch.float64)
    total, count = torch.zeros((), dtype=torch.float64), 0
    for inputs, labels in pieces(packing):
        logits = model(torch.tensor([inputs])).logits[0]
        total = total + F.cross_entropy(logits, torch.tensor(labels), ignore_index=-100, reduction="sum")
        count += sum(label != -100 for label in labels)
    (total / count).backward()
    return total.item() / count, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("model", MODELS)
def test_every_packing_gives_the_losses_and_gradients_of_the_documents_one_by_one(model, folder, results):
    references = {packing: one_by_one(folder, model, packing) for packing in ("examples", "document_mask")}
    for run in RUNS:
        packing, dtype, _ = run
        expected_loss, expected = references.get(packing, references["examples"])
        largest = max(gradient.abs().max().item() for gradient in expected.values())
        tolerance = 1e-10 if dtype == "float64" else 1e-5
        for of_ranks in results:
            if (model, run) not in of_ranks:
                continue
            loss, gradients = of_ranks[model, run]
            assert loss == pytest.approx(expected_loss, rel=tolerance), run
            assert gradients.keys() == expected.keys()
            for name, gradient in gradients.items():
                assert (gradient - expected[name]).abs().max() < tolerance * max(1, largest), (run, name)


def train(folder: Path, run_dir: Path, changes: dict, steps: int) -> dict[str, torch.Tensor]:
    with process_group() as environment:
        trainer = trainer_of(folder, run_dir, environment, "qwen3", changes)
        for _ in range(steps):
            trainer.train_step(StopRequest())
            trainer.step += 1
        return {name: whole(weight) for name, weight in trainer.model.named_parameters()} | {
            "validation": torch.tensor(trainer.evaluate()["validation_loss"])
        }


@pytest.mark.parametrize("packing", ["best_fit", "by length"])
def test_packed_and_grouped_steps_are_the_same_on_any_mesh(packing, folder, two_ranks, tmp_path):
    one = SEVERAL_STEPS | PACKINGS[packing] | {"train.micro_batch_size": 4}
    expected = train(folder, tmp_path, one, 5)
    for shards in (1, 2):
        for name, weight in expected.items():
            torch.testing.assert_close(two_ranks[1][packing, shards][name], weight, rtol=0, atol=1e-10)


def test_several_steps_of_the_whole_store_end_in_the_same_weights_however_rows_are_made(folder, tmp_path):
    bins = rows_of(
        DataConfig(store="", sequence_length=WIDTH, packing="best_fit"), open_store(folder / "instructions").train,
        3, supervised=True, seed=SEED,
    )  # fmt: skip
    found = []
    for packing, changes in PACKINGS.items():
        rows = len(bins) if packing == "best_fit" else DOCUMENTS
        batch = {"train.global_batch_size": rows, "train.micro_batch_size": rows, "train.max_epochs": 4.0}
        found.append(train(folder, tmp_path, changes | batch, 4))
    start = train(folder, tmp_path, {"data.packing": "pad_left"}, 0)
    for name, weight in found[1].items():
        assert not torch.equal(weight, start[name])
        for other in found:
            torch.testing.assert_close(other[name], weight, rtol=0, atol=1e-9)


def test_validation_is_the_same_however_rows_are_made(folder, tmp_path):
    losses = [train(folder, tmp_path, changes, 0)["validation"].item() for changes in PACKINGS.values()]
    assert max(losses) - min(losses) < 1e-12


def test_the_tokens_of_a_packed_run_are_those_of_the_documents(folder, tmp_path):
    with process_group() as environment:
        trainer = trainer_of(folder, tmp_path, environment, "llama", PACKINGS["best_fit"])
        launched = trainer.train_step(StopRequest())
    ids, masks = examples()
    assert launched is not None
    assert launched.tokens == sum(len(document) - 1 for document in ids)
    assert launched.squared_lengths == sum((len(document) - 1) ** 2 for document in ids)
    assert trainer.supervised_tokens_seen == sum(sum(mask[1:]) for mask in masks)


def test_a_model_that_does_not_keep_documents_apart_is_refused(folder, tmp_path):
    stock_model(tiny_config("bloom", tied=True)).save_pretrained(folder / "bloom")
    with process_group() as environment:
        with pytest.raises(UserError, match=r"bloom does not keep .* apart.*best_fit.*data\.packing to pad_left"):
            trainer_of(folder, tmp_path, environment, "bloom", PACKINGS["best_fit"])
        with pytest.raises(UserError, match=r"data\.document_mask needs"):
            trainer_of(folder, tmp_path, environment, "bloom", {"data.document_mask": True})
        trainer_of(folder, tmp_path, environment, "bloom", PACKINGS["pad_left"])


def logits_with(model, **changes):
    def logits(batch: Batch) -> torch.Tensor:
        inputs = {"position_ids": torch.from_numpy(batch.position_ids), "use_cache": False} | changes
        inputs = {key: value(batch) if callable(value) else value for key, value in inputs.items()}
        return model(torch.from_numpy(batch.input_ids), **inputs).logits

    return logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["gpt_neox", "llama", "gpt2"])
def test_the_check_tells_what_keeps_documents_apart_even_in_fresh_weights(architecture, dtype, folder):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(architecture, tied=False)).to(dtype).eval()
    rows = rows_of(DataConfig(store="", sequence_length=32, packing="best_fit"), open_store(folder / "text").train, 3,
                   supervised=False, seed=0)  # fmt: skip

    def found(**changes) -> float:
        return crossing(logits_with(model, **changes), rows, (2, 32), VOCABULARY, dtype)

    assert found() == 0
    assert found(attention_mask=lambda batch: torch.ones_like(torch.from_numpy(batch.input_ids))) > 0
    assert found(use_cache=True) > 0
    assert found(position_ids=None) > 0


def test_best_fit_says_how_full_its_rows_are(folder):
    rows = rows_of(DataConfig(store="", sequence_length=WIDTH, packing="best_fit"), open_store(folder / "text").train,
                   3, supervised=False, seed=0)  # fmt: skip
    assert isinstance(rows, BestFit)
    assert rows.filled == sum(len(document) - 1 for document in examples()[0]) / (WIDTH * len(rows))

"""Figures of models are those of a plain loop over tokens, those of the trainer, and those of the harness's own tasks."""

import csv
import importlib.util
import json
import math
import shutil
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.models import stock_model, tiny_config
from support.ranks import run_ranks
from support.runs import run_config
from support.stores import random_documents, write_store
from transformers import AutoModelForCausalLM, AutoTokenizer

from tsumugu.cli import main
from tsumugu.distributed.environment import process_group
from tsumugu.errors import UserError
from tsumugu.evaluate import harness
from tsumugu.evaluate.evaluation import Evaluation, evaluate
from tsumugu.evaluate.likelihood import Windows, pieces_of
from tsumugu.export import export
from tsumugu.generate import Generator
from tsumugu.tokenizer.contract import read_contract
from tsumugu.tokenizer.load import BulkEncoder
from tsumugu.training.metrics import read_metrics
from tsumugu.training.signals import StopRequest
from tsumugu.training.trainer import Trainer

WIDTH = 16
TEXTS = ["朝早く起きて、川沿いの道を三キロほど歩いた。", "雨", "図書館は月曜日がお休みです。\nAlways. ＡＢＣ"]

needs_harness = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("lm_eval", "accelerate"))), reason="lm-evaluation-harness is not installed"
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """Two models in folders, stores of text and of instructions, texts, and runs on the stores, in float64."""
    root = tmp_path_factory.mktemp("evaluate")
    vocab_size = read_contract(tokenizer_folder).vocab_size
    for name, seed in (("base", 1), ("tuned", 2)):
        shutil.copytree(tokenizer_folder, root / name)
        config = tiny_config("gpt2", True, vocab_size=vocab_size, n_positions=1024)
        stock_model(config, seed).save_pretrained(root / name)
    documents = random_documents(11, seed=5, shortest=2, longest=30)
    examples = [document[:17] for document in documents]
    made(root / "text", tokenizer_folder, documents, documents)
    made(root / "instructions", tokenizer_folder, examples, examples, [[1] * len(ids) for ids in examples])
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in TEXTS]
    (root / "texts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    tiny_config("llama", False, vocab_size=vocab_size).save_pretrained(root / "config")
    for name, (store, data) in RUNS.items():
        changes = {f"data.{key}": value for key, value in data.items()}
        changes |= {"train.max_steps": 3, "train.global_batch_size": 2, "checkpoint.every": 2, "train.dtype": "float64"}
        changes |= {"model.config": str(root / "config"), "optimizer.learning_rate": 0.01, "evaluate.every": 2}
        with process_group() as environment:
            Trainer(run_config(root / store, changes), root / name, environment).train(StopRequest())
    return root


RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "concatenate": ("text", {"packing": "concatenate"}),
    "document_mask": ("text", {"packing": "concatenate", "document_mask": True}),
    "best_fit": ("text", {"packing": "best_fit"}),
    "pad_left": ("instructions", {"packing": "pad_left"}),
}


def made(path: Path, tokenizer: Path, train: Sequence, validation: Sequence, masks: Sequence | None = None) -> Path:
    write_store(path, train, validation, masks, read_contract(tokenizer).fingerprint)
    return shutil.copytree(tokenizer, path / "tokenizer", dirs_exist_ok=True).parent


def figures(asked: Evaluation) -> list[dict]:
    """Loss, perplexity and bits per byte on the first store, by model."""
    return [entry["stores"][0] for entry in evaluate(asked)["models"]]


# --- loss ------------------------------------------------------------------------------------------------------------


def plain_loop(folder: Path, rows: list[tuple[list[int], list[int]]]) -> tuple[float, int]:
    """Sum of the nats of labels at the given places of each row, one row at a time; and their number."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    nats, number = 0.0, 0
    for ids, places in rows:
        with torch.no_grad():
            log_probabilities = F.log_softmax(model(torch.tensor([ids])).logits[0], -1)
        nats -= sum(log_probabilities[place - 1, ids[place]].item() for place in places)
        number += len(places)
    return nats, number


def rows_of(packing: str, stride: int) -> list[tuple[list[int], list[int]]]:
    """Rows with the places that are predicted: each token from the last WIDTH ones, or from those that a rule allows."""
    documents = random_documents(11, seed=5, shortest=2, longest=30)
    streams = [[id for document in documents for id in document]] if packing == "concatenate" else documents
    rows, offset = [], 0
    for stream in streams:
        predicted = 1
        start = 0
        while predicted < len(stream):
            stop = min(start + WIDTH, len(stream) - 1)
            if packing == "document_mask":  # blocks of WIDTH inputs of all documents laid end to end
                stop = min(start + WIDTH - (offset + start) % WIDTH, len(stream) - 1)
            rows.append((stream[start : stop + 1], list(range(predicted - start, stop + 1 - start))))
            predicted, start = stop + 1, stop if packing == "document_mask" else start + stride
        offset += len(stream)
    return rows


CUTS = [("documents", WIDTH), ("documents", 5), ("concatenate", WIDTH), ("concatenate", 7), ("document_mask", WIDTH)]


def of_every_cut(root: Path, batch_size: int) -> list[dict]:
    return [
        figures(
            Evaluation(
                models=[str(root / "base")],
                stores=[root / "text"],
                packing=packing,
                sequence_length=WIDTH,
                stride=stride,
                batch_size=batch_size,
                dtype="float64",
            )
        )[0]
        for packing, stride in CUTS
    ]


def test_figures_of_a_store_are_those_of_a_plain_loop_on_any_batches_and_processes(root: Path):
    token_bytes = read_contract(root / "base").token_bytes
    expected = []
    for packing, stride in CUTS:
        rows = rows_of(packing, stride)
        nats, number = plain_loop(root / "base", rows)
        size = sum(token_bytes[ids[place]] for ids, places in rows for place in places)
        expected.append(
            {
                "loss": nats / number,
                "perplexity": math.exp(nats / number),
                "bits_per_byte": nats / math.log(2) / size,
                "tokens": number,
                "bytes": size,
            }
        )
    for batch_size in (1, 3, 64):
        assert of_every_cut(root, batch_size) == [pytest.approx(cut, rel=1e-12) for cut in expected], batch_size
    for found in run_ranks(of_every_cut, 2, root, 3):
        assert found == [pytest.approx(cut, rel=1e-12) for cut in expected]


@pytest.mark.parametrize("length", [1, 4, 7])
def test_every_token_but_the_first_of_a_document_is_the_label_of_one_piece(length: int):
    bounds = np.array([0, 1, 3, 3, 20, 27])
    for stride in range(1, length + 1):
        pieces = pieces_of(bounds, Windows("documents", length, stride)).tolist()
        assert sorted(label for _, stop, first in pieces for label in range(first, stop)) == [
            2,
            *range(4, 20),
            *range(21, 27),
        ]
        assert all(stop - start - 1 <= length for start, stop, _ in pieces)
    pieces = pieces_of(bounds, Windows("concatenate", length, length)).tolist()
    assert [label for _, stop, first in pieces for label in range(first, stop)] == list(range(1, 27))


@pytest.mark.parametrize("run", RUNS)
def test_figures_of_a_run_are_its_own_validation_figures(run: str, root: Path):
    lines = [line for line in read_metrics(root / run) if "validation_loss" in line and line["step"]]
    asked = Evaluation(models=[str(root / run)], each_checkpoint=True, stores=[root / RUNS[run][0]], dtype="float64")
    report = evaluate(asked)
    assert [entry["model"] for entry in report["models"]] == [f"{root / run}@{step}" for step in (2, 3)]
    for entry, line in zip(report["models"], lines, strict=True):
        for key in ("loss", "perplexity", "bits_per_byte"):
            assert entry["stores"][0][key] == pytest.approx(line[f"validation_{key}"], rel=1e-12)


def test_a_run_and_its_export_have_the_same_figures(root: Path, tmp_path: Path):
    export(str(root / "pad_left"), tmp_path / "model", dtype="float64")
    asked = Evaluation(models=[str(root / "pad_left@3"), str(tmp_path / "model")], stores=[root / "instructions"])
    run, folder = figures(asked)
    assert run == folder


def test_float32_is_near_and_the_dtype_is_named(root: Path):
    for dtype, tolerance in ((None, 1e-6), ("bfloat16", 2e-2)):
        asked = Evaluation(models=[str(root / "base")], stores=[root / "text"], dtype=dtype)
        exact = Evaluation(models=[str(root / "base")], stores=[root / "text"], dtype="float64")
        assert figures(asked)[0]["loss"] == pytest.approx(figures(exact)[0]["loss"], rel=tolerance)
        assert evaluate(asked)["dtype"] == (dtype or "float32")


def test_texts_are_predicted_whole_and_counted_in_their_own_bytes(root: Path):
    asked = Evaluation(
        models=[str(root / "base"), str(root / "tuned")],
        texts=[str(root / "texts.jsonl")],
        sequence_length=WIDTH,
        dtype="float64",
    )
    found = [entry["text"] for entry in evaluate(asked)["models"]]
    encoded = [ids.tolist() for ids in BulkEncoder(root / "base")(TEXTS)]
    rows = []
    for ids in encoded:
        before = [2, *ids]  # eos comes before a document
        rows += [
            (before[at : at + WIDTH + 1], list(range(1, len(before[at : at + WIDTH + 1]))))
            for at in range(0, len(ids), WIDTH)
        ]
    size = sum(len(text.encode()) for text in TEXTS)
    for folder, text in zip(("base", "tuned"), found, strict=True):
        nats, number = plain_loop(root / folder, rows)
        assert number == sum(map(len, encoded)) == text["tokens"]
        assert text["loss"] == pytest.approx(nats / number, rel=1e-12)
        assert text["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-12)
        assert (text["bytes"], text["first_token_after"]) == (size, 2)


def test_a_model_that_was_trained_with_bos_reads_texts_after_it(root: Path, tmp_path: Path):
    folder = shutil.copytree(root / "base", tmp_path / "model")
    (folder / "tsumugu.json").write_text(json.dumps({"add_bos": True}))
    asked = Evaluation(models=[str(folder)], texts=[str(root / "texts.jsonl")])
    assert evaluate(asked)["models"][0]["text"]["first_token_after"] == 1


def test_a_folder_without_a_contract_is_known_by_its_tokenizer(root: Path, tmp_path: Path):
    folder = shutil.copytree(root / "base", tmp_path / "model")
    (folder / "contract.json").unlink()
    asked = {"stores": [root / "text"], "dtype": "float64"}
    assert figures(Evaluation(models=[str(folder)], **asked)) == figures(
        Evaluation(models=[str(root / "base")], **asked)
    )
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"no tokenizer.json .*--tokenizer"):
        evaluate(Evaluation(models=[str(folder)], **asked))
    borrowed = Evaluation(models=[str(folder)], tokenizer=root / "tuned", **asked)
    assert figures(borrowed) == figures(Evaluation(models=[str(root / "base")], **asked))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "nothing to evaluate on"),
        ({"models": ["nowhere"], "stores": ["text"]}, "nowhere holds no model"),
        ({"each_checkpoint": True, "stores": ["text"]}, "no MODEL is a run"),
        ({"stores": ["foreign"]}, "was made with another tokenizer"),
        ({"stores": ["text"], "sequence_length": 2000}, "a model has 1024 positions"),
        ({"stores": ["text"], "sequence_length": 8, "stride": 9}, "--stride 9 is longer than"),
        ({"stores": ["text"], "sequence_length": 8, "stride": 4, "packing": "document_mask"}, "does not go with"),
        ({"stores": ["instructions"], "packing": "concatenate"}, "example by example"),
        ({"stores": ["empty"]}, "holds no document"),
        ({"texts": ["texts.jsonl"], "packing": "concatenate"}, "document by document"),
        ({"tasks": ["jsquad"]}, "no --task-data"),
        ({"models": ["pad_left"], "prompts": "texts.jsonl"}, "not prompt, input and system"),
        ({"models": ["pad_left"], "prompts": "prompts.txt"}, "is a run"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(asked: dict, message: str, root: Path, tmp_path: Path):
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    write_store(tmp_path / "foreign", random_documents(3, seed=1), random_documents(3, seed=1))
    made(tmp_path / "empty", root / "base", random_documents(3, seed=1), [])
    (tmp_path / "prompts.txt").write_text("朝\n")
    paths = {"models": ["base"]} | asked
    for key in ("models", "texts"):
        paths[key] = [str(tmp_path / name) for name in paths.get(key, [])]
    paths["stores"] = [tmp_path / name for name in paths.get("stores", [])]
    if "prompts" in paths:
        paths["prompts"] = tmp_path / paths["prompts"]
    with pytest.raises(UserError, match=message):
        evaluate(Evaluation(**paths))


# --- the command -----------------------------------------------------------------------------------------------------


def test_models_stand_side_by_side_in_a_table_and_in_json(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "prompts.txt").write_text('朝早く\n{"prompt": "雨が"}\n', encoding="utf-8")
    command = ["evaluate", str(root / "base"), str(root / "tuned"), "--store", str(root / "text")]
    command += ["--prompts", str(tmp_path / "prompts.txt"), "--max-new-tokens", "4", "--output", str(tmp_path / "out")]
    assert main(command) == 0
    shown = capsys.readouterr().out
    report = json.loads((tmp_path / "out").read_text(encoding="utf-8"))
    assert report["prompts"] == ["朝早く", "雨が"]
    for entry in report["models"]:
        folder = Path(entry["model"])
        expected = [Generator(folder).generate(prompt, max_new_tokens=4) for prompt in report["prompts"]]
        assert [(reply["reply"], reply["ended"]) for reply in entry["replies"]] == expected
        assert f"{entry['stores'][0]['loss']:.6g}" in shown
        assert entry["tokenizer"] == report["stores"][0]["tokenizer"]
        assert len(entry["weights"]) == 64
    assert report["models"][0]["weights"] != report["models"][1]["weights"]
    assert torch.__version__.startswith(report["versions"]["torch"].split("+")[0])
    assert "documents one after another, windows of 1,024 tokens" in shown
    assert main([*command[:3], "--store", str(root / "text"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["models"][0]["stores"] == report["models"][0]["stores"]


def test_what_is_wrong_is_one_line(root: Path, capsys: pytest.CaptureFixture):
    assert main(["evaluate", str(root / "base")]) == 2
    assert capsys.readouterr().err == ("tsumugu: nothing to evaluate on (give --store, --text, --tasks or --prompts)\n")

"""Figures are those of a plain loop over tokens and of the trainer; tasks ask what the harness's own tasks ask."""

import csv
import dataclasses
import importlib.util
import json
import math
import random
import shutil
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from support.models import stock_model, tiny_config
from support.ranks import run_ranks
from support.runs import run_config
from support.stores import random_documents, write_store
from transformers import AutoModelForCausalLM, AutoTokenizer

from tsumugu import generate
from tsumugu.cli import main
from tsumugu.config import LoraConfig
from tsumugu.distributed.environment import process_group
from tsumugu.errors import UserError
from tsumugu.evaluate import harness, models
from tsumugu.evaluate.evaluation import Evaluation, evaluate
from tsumugu.evaluate.likelihood import Windows, pieces_of
from tsumugu.export import export
from tsumugu.generate import Generator
from tsumugu.tokenizer.contract import read_contract
from tsumugu.tokenizer.load import BulkEncoder
from tsumugu.training.metrics import read_metrics
from tsumugu.training.signals import StopRequest
from tsumugu.training.storages import new_group
from tsumugu.training.trainer import Trainer

WIDTH = 16
TEXTS = ["朝早く起きて、川沿いの道を三キロほど歩いた。", "雨", "図書館は月曜日がお休みです。\nAlways. ＡＢＣ"]

HAS_HARNESS = all(map(importlib.util.find_spec, ("lm_eval", "accelerate")))
HAS_PEFT = importlib.util.find_spec("peft") is not None
needs_harness = pytest.mark.skipif(not HAS_HARNESS, reason="lm-evaluation-harness is not installed")


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
    (root / "prompts.txt").write_text("朝早く\n雨が\n図書館は\n", encoding="utf-8")
    tiny_config("llama", False, vocab_size=vocab_size).save_pretrained(root / "config")
    for name, (store, data) in RUNS.items():
        if name == "lora" and not HAS_PEFT:
            continue
        changes = {f"data.{key}": value for key, value in data.items()}
        changes |= {"train.max_steps": 3, "train.global_batch_size": 2, "checkpoint.every": 2, "train.dtype": "float64"}
        changes |= {"optimizer.learning_rate": 0.01, "evaluate.every": 2}
        if name == "lora":
            changes |= {"model.pretrained": str(root / "base"), "model.lora": LoraConfig(rank=2)}
        else:
            changes["model.config"] = str(root / "config")
        with process_group() as environment:
            Trainer(run_config(root / store, changes), root / name, environment).train(StopRequest())
    return root


RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "concatenate": ("text", {"packing": "concatenate"}),
    "document_mask": ("text", {"packing": "concatenate", "document_mask": True}),
    "best_fit": ("text", {"packing": "best_fit"}),
    "pad_left": ("instructions", {"packing": "pad_left"}),
    "lora": ("instructions", {"packing": "best_fit"}),
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
    """Rows with the places that are predicted, each from at most WIDTH tokens before it."""
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


def replies(root: Path) -> list[dict]:
    asked = Evaluation(models=[str(root / "base")], prompts=root / "prompts.txt", max_new_tokens=3)
    return evaluate(asked)["models"][0]["replies"]


def on_a_rank(root: Path) -> tuple[list[dict], list, list[dict]]:
    group, calls = new_group(), []
    shared = [harness._shared(list(range(number)), lambda own: calls.append(own) or own, group) for number in (1, 7)]
    return of_every_cut(root, 3), [shared, calls], replies(root)


def test_figures_and_replies_are_those_of_a_plain_loop_on_any_batches_and_processes(root: Path):
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
    of_two_processes = run_ranks(on_a_rank, 2, root)
    alone = replies(root)
    assert len(alone) == 3
    for found, (shared, _), shared_replies in of_two_processes:
        assert shared_replies == alone
        assert found == [pytest.approx(cut, rel=1e-12) for cut in expected]
        assert shared == [[0], list(range(7))]  # requests of tasks: all replies, in order
    assert [calls for _, (_, calls), _ in of_two_processes] == [[[0, 1, 2]], [[0], [3, 4, 5, 6]]]


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
    if run == "lora" and not HAS_PEFT:
        pytest.skip("peft is not installed")
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
        ({"models": ["pad_left"], "prompts": "texts.jsonl"}, "texts.jsonl:1: no prompt"),
        ({"prompts": "cp932.txt"}, "cp932.txt is not UTF-8 at byte 0"),
        ({"prompts": "nowhere.txt"}, "nowhere.txt"),
        ({"prompts": "prompts.txt", "template": "nobody's"}, "no template nobody's"),
        ({"models": ["base", "pad_left"], "prompts": "long.txt"}, "prompt 2: the prompt has .* the model has 1024"),
        ({"stores": ["text"], "prompts": "prompts.txt", "template": "chatml"}, "lacks .* of the template"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_a_model_is_loaded(
    asked: dict, message: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def never(*_):
        pytest.fail("a model was loaded")

    monkeypatch.setattr(models, "load", never)
    monkeypatch.setattr(generate, "load_model", never)
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    write_store(tmp_path / "foreign", random_documents(3, seed=1), random_documents(3, seed=1))
    made(tmp_path / "empty", root / "base", random_documents(3, seed=1), [])
    (tmp_path / "prompts.txt").write_text("朝\n")
    (tmp_path / "cp932.txt").write_bytes("朝\n".encode("cp932"))
    (tmp_path / "long.txt").write_text("朝\n" + "雨" * 2000)
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
    records = [{"prompt": "朝早く"}, {"messages": [{"role": "user", "content": "雨が"}]}]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    command = ["evaluate", str(root / "base"), str(root / "tuned"), "--store", str(root / "text")]
    command += [
        "--prompts",
        str(tmp_path / "prompts.jsonl"),
        "--max-new-tokens",
        "4",
        "--output",
        str(tmp_path / "out"),
    ]
    assert main(command) == 0
    shown = capsys.readouterr().out
    report = json.loads((tmp_path / "out").read_text(encoding="utf-8"))
    assert report["prompts"] == records
    for entry in report["models"]:
        folder = Path(entry["model"])
        expected = [Generator(folder).generate(prompt, max_new_tokens=4) for prompt in ("朝早く", "雨が")]
        assert [(reply["reply"], reply["stopped"]) for reply in entry["replies"]] == expected
        assert f"{entry['stores'][0]['loss']:.6g}" in shown
        assert entry["tokenizer"] == report["stores"][0]["tokenizer"]
        assert len(entry["weights"]) == 64
    assert report["models"][0]["weights"] != report["models"][1]["weights"]
    assert torch.__version__.startswith(report["versions"]["torch"].split("+")[0])
    assert "documents one after another, windows of 1,024 tokens" in shown
    assert main([*command[:3], "--store", str(root / "text"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["models"][0]["stores"] == report["models"][0]["stores"]


def test_runs_reply_too_and_in_the_dtype_that_is_asked_for(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "prompts.txt").write_text("朝早く\n雨が\n", encoding="utf-8")
    loaded, load = [], generate.load_model
    monkeypatch.setattr(generate, "load_model", lambda *asked: loaded.append(load(*asked)) or loaded[-1])
    names = [f"{root / 'pad_left'}@{step}" for step in (2, 3)]
    asked = {"prompts": tmp_path / "prompts.txt", "max_new_tokens": 4, "dtype": "bfloat16"}
    found = evaluate(Evaluation(models=[str(root / "pad_left")], each_checkpoint=True, **asked))
    assert [model.dtype for model in loaded] == [torch.bfloat16, torch.bfloat16]
    assert [entry["model"] for entry in found["models"]] == names
    for name, entry in zip(names, found["models"], strict=True):
        generator = Generator(name, dtype="bfloat16")
        expected = [generator.generate(prompt, max_new_tokens=4) for prompt in ("朝早く", "雨が")]
        assert [(reply["reply"], reply["stopped"]) for reply in entry["replies"]] == expected


def test_a_folder_of_adapters_has_the_figures_of_its_run(root: Path, tmp_path: Path):
    pytest.importorskip("peft")
    export(str(root / "lora"), tmp_path / "adapter", dtype="float64", adapter=True)
    (tmp_path / "base").symlink_to(root / "base")
    asked = {"stores": [root / "instructions"], "dtype": "float64"}
    run = Evaluation(models=[str(root / "lora@3")], **asked)
    (folder,) = figures(Evaluation(models=[str(tmp_path / "adapter")], **asked))
    assert folder == pytest.approx(figures(run)[0], rel=1e-6)  # peft merges in float32


def test_what_is_wrong_is_one_line(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert main(["evaluate", str(root / "base")]) == 2
    assert capsys.readouterr().err == ("tsumugu: nothing to evaluate on (give --store, --text, --tasks or --prompts)\n")
    for output in (tmp_path, tmp_path / "nowhere" / "report.json"):
        assert main(["evaluate", "nothing", "--store", "nothing", "--output", str(output)]) == 2
        assert f"--output {output} cannot be written" in capsys.readouterr().err


# --- tasks -----------------------------------------------------------------------------------------------------------

DESCRIPTION = "以下は、タスクを説明する指示と、文脈のある入力の組み合わせです。要求を適切に満たす応答を書きなさい。\n\n"
NOUNS = ["山", "川", "霧", "味噌汁", "豆腐", "図書館", "手袋", "地球", "時計", "雷", "資料", "印刷"]


def common_sense(number: int, seed: int) -> list[dict]:
    generator = random.Random(seed)
    documents = []
    for id in range(number):
        choices = {f"choice{place}": noun for place, noun in enumerate(generator.sample(NOUNS, 5))}
        label = generator.randrange(5)
        documents.append(
            {"q_id": id, "question": f"{generator.choice(NOUNS)}に近いものは？", **choices, "label": label}
        )
    return documents


def squad(number: int, seed: int) -> list[dict]:
    generator = random.Random(seed)
    return [
        {
            "title": noun,
            "paragraphs": [
                {
                    "context": f"{noun} [SEP] {noun}は{generator.choice(NOUNS)}の上にある。",
                    "qas": [
                        {
                            "id": f"{noun}{place}",
                            "question": f"{noun}はどこにある？",
                            "answers": [{"text": answer, "answer_start": 0} for answer in (f"{noun}の上", "上")],
                            "is_impossible": False,
                        }
                    ],
                }
            ],
        }
        for place, noun in enumerate(generator.sample(NOUNS, number))
    ]


@pytest.fixture(scope="module")
def task_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made-up documents in the published forms, where they lie in the published folders."""
    data = tmp_path_factory.mktemp("task-data")
    for folder in ("jcommonsenseqa-v1.3", "jsquad-v1.3", "JMMLU"):
        (data / folder).mkdir()
    for split, number, seed in (("train", 7, 1), ("valid", 6, 2)):
        lines = [json.dumps(document, ensure_ascii=False) for document in common_sense(number, seed)]
        (data / "jcommonsenseqa-v1.3" / f"{split}-v1.3.json").write_text("\n".join(lines) + "\n", encoding="utf-8")
        content = json.dumps({"version": "1.3", "data": squad(number - 3, seed)}, ensure_ascii=False)
        (data / "jsquad-v1.3" / f"{split}-v1.3.json").write_text(content, encoding="utf-8")
    for subject, header in (("anatomy", False), ("world_history", True)):
        with open(data / "JMMLU" / f"{subject}.csv", "w", encoding="utf-8-sig", newline="") as stream:
            rows = csv.writer(stream)
            if header:
                rows.writerow(["question", "A", "B", "C", "D", "answer"])
            for document in common_sense(4, len(subject)):
                choices = [f" {document[f'choice{place}']}" for place in range(4)]
                rows.writerow([document["question"], *choices, "ABCD"[document["label"] % 4]])
    return data


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch):
    def refuse(*arguments: Any, **_: Any):
        raise AssertionError(f"reaches for the network: {arguments}")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def tasks_of(root: Path, task_data: Path, **asked: Any) -> dict[str, dict[str, dict]]:
    names = ["jcommonsenseqa", "jmmlu"]
    asked = {"models": [str(root / "base"), str(root / "tuned")], "batch_size": 2, "dtype": "float64"} | asked
    report = evaluate(Evaluation(**{"tasks": names, "task_data": task_data, **asked}))
    return {Path(entry["model"]).name: entry["tasks"] for entry in report["models"]}


def loglikelihood(folder: Path, prompt: str, continuation: str) -> float:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    before, ids = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, prompt + continuation))
    assert ids[: len(before)] == before
    return -plain_loop(folder, [(ids, list(range(len(before), len(ids))))])[0]


def common_sense_prompts() -> list[str]:
    def question(document: dict) -> str:
        choices = "".join(f"- {document[f'choice{place}']}\n" for place in range(5))
        return (
            f"### 指示：\n出力は以下から選択してください：\n{choices}\n### 入力：\n{document['question']}\n\n### 応答："
        )

    def answer(document: dict) -> str:
        return document[f"choice{document['label']}"]

    shots = random.Random(1234)
    prompts = []
    for document in common_sense(6, 2):
        chosen = shots.sample(common_sense(7, 1), 3)
        answered = [f"{question(shot)}\n{answer(shot)}\n\n" for shot in chosen]
        prompts.append(DESCRIPTION + "".join(answered) + question(document))
    return prompts


@needs_harness
def test_scores_are_those_computed_by_hand_without_the_network(root: Path, task_data: Path, no_network: None):
    found = tasks_of(root, task_data)
    for name in ("base", "tuned"):
        folder, hits = root / name, []
        for document, prompt in zip(common_sense(6, 2), common_sense_prompts(), strict=True):
            each = [loglikelihood(folder, prompt, f"\n{document[f'choice{place}']}") for place in range(5)]
            hits.append(each.index(max(each)) == document["label"])
        assert found[name]["jcommonsenseqa"]["scores"] == {"acc": pytest.approx(sum(hits) / 6)}
        by_subject = {}
        for subject in ("anatomy", "world_history"):
            hits = []
            for document in common_sense(4, len(subject)):
                choices = "".join(f"{'ABCD'[place]}. {document[f'choice{place}']}\n" for place in range(4))
                prompt = (
                    f"{DESCRIPTION}### 指示：\n質問の答えとして最も適切なものを選び、その記号だけを出力してください。"
                    f"\n\n### 入力：\n{document['question']}\n{choices}\n### 応答："
                )
                each = [loglikelihood(folder, prompt, f"\n{letter}") for letter in "ABCD"]
                hits.append(each.index(max(each)) == document["label"] % 4)
            by_subject[subject] = sum(hits) / 4
        jmmlu = found[name]["jmmlu"]
        assert jmmlu["by_subject"] == by_subject
        assert jmmlu["scores"] == {"acc": pytest.approx(sum(by_subject.values()) / 2)}


@needs_harness
def test_replies_are_scored_by_exact_match_and_by_characters(
    root: Path, task_data: Path, tmp_path: Path, no_network: None
):
    """The first answer is made the model's own reply, the second one a part of it."""
    tokenizer = AutoTokenizer.from_pretrained(root / "base")

    def question(article: dict) -> str:
        paragraph = article["paragraphs"][0]
        context = paragraph["context"].split("[SEP]")[-1].strip()
        asked = f"### 入力：\n文脈：{context}\n質問：{paragraph['qas'][0]['question']}\n\n### 応答："
        return f"### 指示：\n与えられた文脈から、質問に対する答えを抜き出してください。\n\n{asked}"

    model = AutoModelForCausalLM.from_pretrained(root / "base", dtype=torch.float64).eval()
    shots, replies = random.Random(1234), []
    articles = squad(3, 2)
    for article in articles:
        chosen = shots.sample(squad(4, 1), 2)
        answered = [f"{question(shot)}\n{shot['paragraphs'][0]['qas'][0]['answers'][0]['text']}\n\n" for shot in chosen]
        prompt = tokenizer(DESCRIPTION + "".join(answered) + question(article), add_special_tokens=False)["input_ids"]
        ids = list(prompt)
        while len(ids) < len(prompt) + 12 and ids[-1] != 2:
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        replies.append(tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True).split("\n\n")[0].strip())
    data = shutil.copytree(task_data, tmp_path / "data")
    answers = [[replies[0]], [replies[1][:3], replies[1][:5]], ["？？"]]
    for article, texts in zip(articles, answers, strict=True):
        article["paragraphs"][0]["qas"][0]["answers"] = [{"text": text, "answer_start": 0} for text in texts]
    (data / "jsquad-v1.3" / "valid-v1.3.json").write_text(json.dumps({"data": articles}), encoding="utf-8")
    own = yaml.safe_load((harness.TASKS / "jsquad.yaml").read_text(encoding="utf-8"))
    own["generation_kwargs"]["max_gen_toks"] = 12  # in place of 256, for speed
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own), encoding="utf-8")
    asked = {"tasks": [str(tmp_path / "own.yaml")], "models": [str(root / "base")]}
    found = tasks_of(root, data, **asked)["base"]["jsquad"]
    assert found["scores"]["exact_match"] == pytest.approx(1 / 3)
    said = len("".join(replies[1].split()))
    overlap = len("".join(replies[1][:5].split()))
    assert found["scores"]["char_f1"] == pytest.approx((1 + 2 * overlap / (said + overlap) + 0) / 3)


def test_character_f1_is_of_the_best_answer():
    assert harness.character_f1("東京都", ["京都", "大阪"]) == pytest.approx(2 * (2 / 3) * 1 / (2 / 3 + 1))
    assert harness.character_f1(" 東 京\n", ["東京"]) == 1
    assert harness.character_f1("ああ", ["あ"]) == pytest.approx(2 / 3)
    assert [harness.character_f1(reply, ["東京"]) for reply in ("", "大阪")] == [0, 0]


@needs_harness
@pytest.mark.parametrize("name", ["jcommonsenseqa", "jsquad"])
def test_requests_and_metrics_are_those_of_the_harnesss_own_task(name: str, task_data: Path):
    import datasets
    import lm_eval.tasks
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    task = harness.read_task(name, task_data)
    folder = Path(lm_eval.tasks.__file__).parent / "japanese_leaderboard"
    config = load_yaml(folder / f"{task.upstream}.yaml")
    splits = {split: datasets.Dataset.from_list(documents) for split, documents in task.documents.items()}
    for key in ("dataset_path", "dataset_name"):
        config.pop(key)
    upstream = ConfigurableTask(config={**config, "custom_dataset": lambda **_: splits})
    upstream.set_fewshot_seed(1234)
    ours = harness._made(task)
    for made in (ours, upstream):
        made.build_all_requests()
    assert [request.args for request in ours.instances] == [request.args for request in upstream.instances]
    assert [ours.doc_to_target(document) for document in ours.eval_docs] == [
        upstream.doc_to_target(document) for document in upstream.eval_docs
    ]
    for key in ("metric_list", "filter_list", "generation_kwargs", "num_fewshot", "output_type", "metadata"):
        assert ours.config[key] == upstream.config[key], key


@needs_harness
def test_scores_say_what_they_compare_with(root: Path, task_data: Path, monkeypatch: pytest.MonkeyPatch):
    few = {name: found["not_comparable"] for name, found in tasks_of(root, task_data, limit=1)["base"].items()}
    assert few["jcommonsenseqa"] == [
        "train has 7 documents, 8939 were published",
        "validation has 6 documents, 1119 were published",
        "only the first 1 documents",
    ]
    assert few["jmmlu"][0] == "lm-evaluation-harness has no task with this prompt"
    read = harness.read_task

    def as_published(name: str, data: Path) -> harness.Task:
        task = read(name, data)
        return dataclasses.replace(task, published={split: len(each) for split, each in task.documents.items()})

    monkeypatch.setattr(harness, "read_task", as_published)
    found = tasks_of(root, task_data, tasks=["jcommonsenseqa"])["base"]["jcommonsenseqa"]
    assert found["not_comparable"] == []
    assert (found["upstream"], found["shots"], found["version"]) == ("ja_leaderboard_jcommonsenseqa", 3, 1.0)
    assert found["prompts_cut"] == 0
    monkeypatch.setattr(harness, "CHECKED", "0.4.0")
    found = tasks_of(root, task_data, tasks=["jcommonsenseqa"])["base"]["jcommonsenseqa"]
    assert "is installed" in found["not_comparable"][0]


@needs_harness
def test_a_run_has_the_scores_of_its_export(root: Path, task_data: Path, tmp_path: Path):
    export(str(root / "pad_left"), tmp_path / "model", dtype="float64")
    asked: dict[str, Any] = {"tasks": ["jsquad", "jcommonsenseqa"], "limit": 1, "chat_template": True}
    models = [str(root / "pad_left"), str(tmp_path / "model")]
    run, folder = tasks_of(root, task_data, models=models, **asked).values()
    assert run == folder
    assert run["jsquad"]["not_comparable"][-3:] == [
        "the prompts went through a chat template",
        "which has no system message, so that the task's description was left out",
        "which has a single turn, so that the shots stand in the one message",
    ]


@needs_harness
def test_what_tasks_cannot_be_asked_is_refused_before_a_model_is_loaded(
    root: Path, task_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def never(*_):
        pytest.fail("a model was loaded")

    monkeypatch.setattr(models, "load", never)
    with pytest.raises(UserError, match="has no chat template"):
        tasks_of(root, task_data, tasks=["jmmlu"], chat_template=True)
    with pytest.raises(UserError, match=r"has no chat template"):
        tasks_of(root, task_data, tasks=["jmmlu"], chat_template=True, models=[str(root / "document_mask")])
    data = shutil.copytree(task_data, tmp_path / "data")
    config = tiny_config("gpt2", True, vocab_size=read_contract(root / "base").vocab_size, n_positions=200)
    stock_model(config).save_pretrained(shutil.copytree(root / "base", tmp_path / "short"))
    with pytest.raises(UserError, match=r"wants replies of 256 tokens, .* has 200 positions"):
        tasks_of(root, task_data, tasks=["jsquad"], models=[str(tmp_path / "short")])
    squad_file, choices = data / "jsquad-v1.3" / "valid-v1.3.json", data / "JMMLU" / "anatomy.csv"
    common = data / "jcommonsenseqa-v1.3" / "valid-v1.3.json"
    document, article = common_sense(1, 2)[0], squad(1, 2)
    without_answer = json.loads(json.dumps(article))
    without_answer[0]["paragraphs"][0]["qas"][0]["answers"] = []
    for task, file, content, message in (
        ("jsquad", squad_file, "[1, 2]", "line 1: no JSON object"),
        ("jsquad", squad_file, '{"data": 3}', "not of SQuAD's form"),
        ("jsquad", squad_file, '{"data": [{"title": "a"}]}', "not of SQuAD's form: KeyError 'paragraphs'"),
        ("jsquad", squad_file, json.dumps({"data": without_answer}), "cannot be asked of its documents"),
        ("jcommonsenseqa", common, "3\n", "line 1: no JSON object"),
        ("jcommonsenseqa", common, "\n", "holds no document"),
        ("jcommonsenseqa", common, json.dumps({"question": "a"}), "cannot be asked of its documents"),
        ("jcommonsenseqa", common, json.dumps(document | {"label": -1}), "the answer -1 is none of the 5 choices"),
        ("jcommonsenseqa", common, json.dumps(document | {"label": "x"}), "the answer 'x' is none of the 5 choices"),
        ("jmmlu", choices, "問,1,2,3,4,A".encode("cp932"), "not UTF-8"),
        ("jmmlu", choices, '"' + "a" * 200_000 + '",1,2,3,4,A', "no CSV: field larger than field limit"),
        ("jmmlu", choices, "a,1,2,3,4,E", "not a question, four choices and a letter"),
    ):
        before = file.read_bytes()
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(UserError, match=message):
            tasks_of(root, data, tasks=[task])
        file.write_bytes(before)


def test_task_files_of_ones_own_read_local_files_and_nothing_else(task_data: Path, tmp_path: Path):
    own = yaml.safe_load((harness.TASKS / "jmmlu.yaml").read_text(encoding="utf-8"))
    own["tsumugu"]["files"] = {"test": "JMMLU/ana*.csv"}
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump(own), encoding="utf-8")
    assert len(harness.read_task(str(file), task_data).documents["test"]) == 4
    for change, message in (
        ({"dataset_path": "Rakuten/JGLUE"}, "dataset_path, which names a data set of the hub"),
        ({"tsumugu": {"form": "lines"}}, "does not say which files it reads"),
        ({"tsumugu": {"form": "lines", "files": {"test": "nothing*"}}}, r"holds no nothing\*"),
        ({"tsumugu": {"form": ["lines"], "files": {}}}, "does not say which files it reads"),
        ({"tsumugu": {"form": "lines", "files": ["a"]}}, "does not say which files it reads"),
        ({"test_split": "other"}, "evaluates a split that no file is named for"),
        ({"output_type": None}, "has no output_type"),
        ({"metric_list": []}, "has no metric_list"),
    ):
        file.write_text(yaml.safe_dump(own | change), encoding="utf-8")
        with pytest.raises(UserError, match=message):
            harness.read_task(str(file), task_data)
    file.write_text("task: own\nprocess_docs: !function utils.run\n", encoding="utf-8")
    with pytest.raises(UserError, match="no task file that is read here"):
        harness.read_task(str(file), task_data)
    with pytest.raises(UserError, match=r"no task jnli \(known: jcommonsenseqa, jmmlu, jsquad"):
        harness.read_task("jnli", task_data)


def test_two_versions_of_one_data_set_are_refused(task_data: Path, tmp_path: Path):
    data = shutil.copytree(task_data, tmp_path / "data")
    shutil.copytree(data / "jsquad-v1.3", data / "jsquad-v1.1")
    with pytest.raises(UserError, match=r"several files for the task jsquad.*leave one of them"):
        harness.read_task("jsquad", data)

"""From files to a token store: what is in it, and what happens when a run is stopped or its input is bad."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from transformers import AutoTokenizer

from tsumugu.config import PrepareConfig, Source
from tsumugu.data import prepare as module
from tsumugu.data import store
from tsumugu.data.instructions import TEMPLATES, Message
from tsumugu.data.prepare import describe, prepare
from tsumugu.errors import UserError

DOCUMENTS = [f"{number}日目の朝、川沿いの道を{number * 37 % 101}歩だけ歩いた。\n霧が晴れた。" for number in range(300)]
EXAMPLES = [
    {
        "instruction": f"{number}を二倍にしてください。",
        "input": "暗算で" if number % 4 == 0 else "",
        "output": f"{2 * number}です。",
    }
    for number in range(80)
]


def _write_lines(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture
def make(tmp_path: Path, tokenizer_folder: Path) -> Callable[..., dict]:
    """Prepares one source in this process: `make(path, kind="text", source={...}, output="store", **settings)`."""

    def make(
        path: Path, kind: str = "text", source: dict | None = None, output: str = "store", **settings: Any
    ) -> dict:
        only = Source(name="only", path=str(path), kind=kind, **(source or {}))  # pyright: ignore[reportArgumentType]
        values = {"tokenizer": str(tokenizer_folder), "validation_share": 0.2, "workers": 1} | settings
        return prepare(PrepareConfig(sources=[only], output=str(tmp_path / output), **values))

    return make


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return _write_lines(tmp_path / "text.jsonl", [{"text": document} for document in DOCUMENTS])


@pytest.fixture
def examples(tmp_path: Path) -> Path:
    return _write_lines(tmp_path / "examples.jsonl", EXAMPLES)


@pytest.fixture
def _small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some ten tasks from the documents, so that there is something to stop and to deal out."""
    monkeypatch.setattr(module, "TASK_BYTES", (3000, 3000))


def _files(folder: Path) -> dict[str, bytes]:
    """Everything in a store."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _documents(split: store.Split) -> list[tuple[list[int], list[bool]]]:
    return [tuple(part.tolist() for part in split.document(index)) for index in range(split.documents)]


def _encode(folder: Path, texts: list[str]) -> list[list[int]]:
    return AutoTokenizer.from_pretrained(folder)(texts, add_special_tokens=False)["input_ids"]


# --- what is in the store --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("add_bos", "add_eos"), [(None, None), (False, True), (True, False), (True, True)])
def test_text_is_stored_as_stock_transformers_encodes_it(
    tmp_path: Path, make: Callable, text: Path, tokenizer_folder: Path, add_bos: bool | None, add_eos: bool | None
):
    manifest = make(text, add_bos=add_bos, add_eos=add_eos)
    opened = store.open_store(tmp_path / "store")
    before, after = [1] if add_bos else [], [2] if add_eos else []  # the tokenizer itself adds neither
    expected = [before + ids + after for ids in _encode(tokenizer_folder, DOCUMENTS)]
    found = [ids for split in (opened.train, opened.validation) for ids, _ in _documents(split)]
    assert sorted(found) == sorted(expected)
    assert manifest["sources"] == {"only": {"documents": 300, "characters": sum(map(len, DOCUMENTS))}}
    assert sum(manifest["splits"][split]["tokens"] for split in store.SPLITS) == sum(map(len, expected))
    assert (manifest["add_bos"], manifest["add_eos"]) == (bool(add_bos), bool(add_eos))
    assert ("nothing marks where documents end" in describe(manifest)) == (not (add_bos or add_eos))
    assert AutoTokenizer.from_pretrained(tmp_path / "store" / "tokenizer").get_vocab()
    assert not (tmp_path / "store" / ".work").exists()
    store.verify(tmp_path / "store")


def test_the_prompt_is_not_supervised_and_the_response_with_its_end_is(
    tmp_path: Path, make: Callable, examples: Path, tokenizer_folder: Path
):
    make(examples, kind="instructions")
    opened = store.open_store(tmp_path / "store")
    assert opened.supervised
    expected = []
    for example in EXAMPLES:
        question = [Message("user", example["instruction"], input=example["input"])]
        prompt = "".join(segment.text for segment in TEMPLATES["alpaca-ja"].segments(question))
        prompt_ids, response_ids = _encode(tokenizer_folder, [prompt, example["output"]])
        expected.append((prompt_ids + response_ids + [2], [False] * len(prompt_ids) + [True] * (len(response_ids) + 1)))
    assert sorted(_documents(opened.train) + _documents(opened.validation)) == sorted(expected)
    supervised = sum(opened.manifest["splits"][split]["supervised_tokens"] for split in store.SPLITS)
    assert supervised == sum(sum(mask) for _, mask in expected)


def test_input_may_be_absent_null_or_empty_and_is_the_same_then(tmp_path: Path, make: Callable):
    question = {"instruction": "空の色は？", "output": "青です。"}
    path = _write_lines(tmp_path / "a.jsonl", [question, question | {"input": None}, question | {"input": ""}])
    make(path, kind="instructions", validation_share=0.0)
    first, *others = _documents(store.open_store(tmp_path / "store").train)
    assert others == [first, first]


def test_fields_name_the_columns(tmp_path: Path, make: Callable):
    renamed = [{"q": e["instruction"], "context": e["input"] or None, "a": e["output"], "n": 1} for e in EXAMPLES]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(renamed), tmp_path / "a.parquet")
    fields = {"instruction": "q", "input": "context", "output": "a"}
    make(tmp_path / "a.parquet", kind="instructions", source={"fields": fields}, output="renamed")
    make(_write_lines(tmp_path / "a.jsonl", EXAMPLES), kind="instructions", output="plain")
    for name in ("00000.bin", "00000.idx", "00000.mask"):
        assert (tmp_path / "renamed/train" / name).read_bytes() == (tmp_path / "plain/train" / name).read_bytes()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"question": "q"}, r"prepare\.sources\[0\]\.fields has question.*instruction, input, output"),
        ({"output": "answer"}, "line 1: no column answer.*it has: instruction, input, output"),
        ({"input": "context"}, "line 1: no column context"),  # a column that the user named must be there
    ],
)
def test_wrong_fields_are_refused(make: Callable, examples: Path, fields: dict[str, str], message: str):
    with pytest.raises(UserError, match=message):
        make(examples, kind="instructions", source={"fields": fields})


def test_what_is_dropped_is_counted_by_reason(tmp_path: Path, make: Callable):
    question = {"instruction": "空の色は？", "output": "青です。"}
    records = [question, question | {"output": ""}, question | {"output": None}, question | {"instruction": ""}]
    path = _write_lines(tmp_path / "a.jsonl", [*records, question | {"output": "青" * 900}])
    short = make(path, kind="instructions", validation_share=0.0, max_length=400)
    dropped = {"empty reply": 2, "empty question": 1, "longer than prepare.max_length": 1}
    expected = {f"dropped: {reason}": count for reason, count in dropped.items()}
    assert {key: value for key, value in short["sources"]["only"].items() if key != "characters"} == {
        "documents": 1,
        **expected,
    }
    assert all(f"only: {count} dropped: {reason}" in describe(short) for reason, count in dropped.items())
    texts = _write_lines(tmp_path / "b.jsonl", [{"text": value} for value in ("本文", "", None, " ")])
    assert make(texts, output="texts", validation_share=0.0)["sources"]["only"]["dropped: empty"] == 2


def test_max_length_is_the_longest_that_stays(tmp_path: Path, make: Callable, examples: Path):
    longest = max(
        make(examples, kind="instructions", output="all")["splits"][split]["longest_document"] for split in store.SPLITS
    )
    assert "dropped" not in describe(make(examples, kind="instructions", output="same", max_length=longest))
    assert "dropped" in describe(make(examples, kind="instructions", output="fewer", max_length=longest - 1))


def test_examples_that_are_too_long_are_shortened_as_asked_and_counted(tmp_path: Path, make: Callable):
    record = {"instruction": "長い" * 300, "output": "青です。"}
    path = _write_lines(tmp_path / "a.jsonl", [record, {"instruction": "空の色は？", "output": "青です。"}])

    def made(too_long: str) -> tuple[dict, list]:
        settings = {"kind": "instructions", "validation_share": 0.0, "max_length": 300}
        manifest = make(path, output=too_long, too_long=too_long, **settings)
        split = store.open_store(tmp_path / too_long).train
        return manifest, [split.document(index) for index in range(split.documents)]

    assert made("drop")[0]["sources"]["only"]["dropped: longer than prepare.max_length"] == 1
    for too_long, counted in (("truncate_prompt", "prompt cut from the left"), ("split", "split")):
        manifest, documents = made(too_long)
        assert f"1 shortened: {counted}" in describe(manifest)
        assert manifest["sources"]["only"]["documents"] == len(documents) == manifest["splits"]["train"]["documents"]
        longest = max(len(ids) for ids, _ in documents)
        assert longest == 300 if too_long == "truncate_prompt" else longest <= 300  # stretches without a reply go
        assert documents[-1][1].any()  # the short one
        replied = sum(int(mask.sum()) for _, mask in documents[:-1])
        assert replied == documents[-1][1].sum()  # the whole reply, and the stop token


@pytest.mark.usefixtures("_small_tasks")
@pytest.mark.parametrize("too_long", ["truncate_prompt", "split"])
def test_rows_that_shortening_makes_equal_are_not_both_trained_on_and_held_out(
    tmp_path: Path, make: Callable, too_long: str
):
    """Texts that differ at their beginning alone, or replies of which a stretch repeats."""
    records = [{"prompt": f"{n}{'川' * 150}", "response": "山" * 90 + str(n) * (n % 2)} for n in range(60)]
    settings = {"kind": "instructions", "template": "plain", "validation_share": 0.3, "max_length": 150}
    manifest = make(_write_lines(tmp_path / "a.jsonl", records), too_long=too_long, **settings)
    opened = store.open_store(tmp_path / "store")
    train, held_out = ([tuple(ids) for ids, _ in _documents(split)] for split in (opened.train, opened.validation))
    assert held_out
    assert train
    assert not set(train) & set(held_out)
    dropped = manifest["sources"]["only"]["dropped: rows that equal validation rows once shortened"]
    assert dropped > 0
    assert manifest["sources"]["only"]["documents"] == len(train) + len(held_out)


def test_replies_that_a_template_does_not_let_one_learn_are_counted(tmp_path: Path, make: Callable):
    turns = [{"role": role, "content": f"{n}{role}"} for n in range(3) for role in ("user", "assistant")]
    path = _write_lines(tmp_path / "a.jsonl", [{"messages": turns}, {"messages": turns[:2]}])
    (tmp_path / "own.yaml").write_text("without_input: '{instruction}>'\nearlier_replies: without_stop\n")
    settings = {"kind": "instructions", "template": str(tmp_path / "own.yaml"), "validation_share": 0.0}
    assert "2 not learned: earlier replies" in describe(make(path, **settings))
    assert "not learned" not in describe(make(path, output="last", train_on="last_response", **settings))
    assert "not learned" not in describe(make(path, output="all", **settings | {"template": "alpaca-ja"}))


def test_a_template_that_writes_bos_gets_no_second_one(tmp_path: Path, make: Callable, examples: Path):
    (tmp_path / "own.yaml").write_text(
        "without_input: '<s>{instruction}'\nspecial_tokens: ['<s>']\nseveral_turns: no\n"
    )
    settings = {"kind": "instructions", "template": str(tmp_path / "own.yaml")}
    make(examples, **settings)
    rows = _documents(store.open_store(tmp_path / "store").train)
    assert all(ids[0] == 1 != ids[1] for ids, _ in rows)
    with pytest.raises(UserError, match=r"add_bos is set, but template .* writes bos by itself"):
        make(examples, output="twice", add_bos=True, **settings)


def test_cutting_prompts_that_are_learned_is_refused(make: Callable, examples: Path):
    with pytest.raises(UserError, match="truncate_prompt with train_on everything"):
        make(examples, kind="instructions", max_length=50, too_long="truncate_prompt", train_on="everything")


@pytest.mark.usefixtures("_small_tasks")
def test_equal_documents_lie_on_one_side(tmp_path: Path, make: Callable):
    path = _write_lines(tmp_path / "a.jsonl", [{"text": document} for document in DOCUMENTS * 3])
    make(path, add_eos=True)
    opened = store.open_store(tmp_path / "store")
    train, validation = ({tuple(ids) for ids, _ in _documents(split)} for split in (opened.train, opened.validation))
    assert not train & validation
    assert len(train | validation) == len(DOCUMENTS)
    assert 0.1 < len(validation) / len(DOCUMENTS) < 0.3
    assert opened.train.documents + opened.validation.documents == 3 * len(DOCUMENTS)


def test_questions_with_several_answers_lie_on_one_side(tmp_path: Path, make: Callable):
    answers = [example | {"output": answer} for answer in ("はい。", "いいえ。") for example in EXAMPLES]
    make(_write_lines(tmp_path / "a.jsonl", answers), kind="instructions")
    opened = store.open_store(tmp_path / "store")
    train, validation = (
        {tuple(np.array(ids)[~np.array(mask)]) for ids, mask in _documents(split)}
        for split in (opened.train, opened.validation)
    )
    assert validation
    assert not train & validation


def test_small_files_share_a_task(tmp_path: Path, make: Callable, tokenizer_folder: Path):
    (tmp_path / "texts").mkdir()
    for number, document in enumerate(DOCUMENTS):
        (tmp_path / "texts" / f"{number:03d}.txt").write_text(document, encoding="utf-8")
    make(tmp_path / "texts", validation_share=0.0)
    opened = store.open_store(tmp_path / "store")
    assert len(opened.manifest["splits"]["train"]["shards"]) == 1
    assert [ids for ids, _ in _documents(opened.train)] == _encode(tokenizer_folder, DOCUMENTS)


# --- stopped, run again, run differently -----------------------------------------------------------------------------


@pytest.mark.usefixtures("_small_tasks")
def test_any_number_of_workers_writes_the_same_bytes(tmp_path: Path, make: Callable, text: Path):
    make(text, output="one", workers=1)
    make(text, output="two", workers=2)
    assert len(list((tmp_path / "one" / "train").glob("*.bin"))) > 5
    assert _files(tmp_path / "one") == _files(tmp_path / "two")


def test_a_finished_store_is_left_as_it_is(tmp_path: Path, make: Callable, text: Path):
    made = make(text)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*")}
    again = make(text, workers=2)
    assert again == made | {"already_done": True}
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*")} == before


def test_a_finished_store_with_other_settings_is_refused_by_name(tmp_path: Path, make: Callable, text: Path):
    make(text)
    with pytest.raises(UserError, match=r"other settings: prepare\.add_eos, prepare\.validation_share"):
        make(text, validation_share=0.3, add_eos=True)
    with open(text, "a") as file:
        file.write('{"text": "もう一つ。"}\n')
    with pytest.raises(UserError, match="other settings: input files were modified"):
        make(text)


def test_a_finished_store_of_a_file_that_was_edited_at_the_same_size_is_refused(
    tmp_path: Path, make: Callable, text: Path
):
    make(text)
    text.write_bytes(text.read_bytes().replace("川沿い".encode(), "山沿い".encode()))
    os.utime(text, (time.time() + 5, time.time() + 5))
    with pytest.raises(UserError, match="other settings: input files were modified"):
        make(text)
    make(text, output="of the edited file")


def test_equal_texts_make_equal_bytes_whatever_their_times(tmp_path: Path, make: Callable, text: Path):
    make(text, output="one")
    os.utime(text, (5, 5))
    make(text, output="two")
    one, two = _files(tmp_path / "one"), _files(tmp_path / "two")
    assert one.pop("manifest.json") != two.pop("manifest.json")
    assert one == two


def test_only_the_tokenizer_is_copied_from_its_folder(
    tmp_path: Path, make: Callable, text: Path, tokenizer_folder: Path
):
    export = tmp_path / "export"
    shutil.copytree(tokenizer_folder, export)
    for name in ("model.safetensors", "config.json", "README.md"):
        (export / name).write_text("of a model")
    make(text, tokenizer=str(export))
    copied = {path.name: path.read_bytes() for path in (tmp_path / "store" / "tokenizer").iterdir()}
    assert copied == {path.name: path.read_bytes() for path in tokenizer_folder.iterdir()}


def test_a_folder_with_other_things_in_it_is_refused(tmp_path: Path, make: Callable, text: Path):
    (tmp_path / "store" / "train").mkdir(parents=True)
    (tmp_path / "store" / "train" / "00007.idx").write_bytes(b"of somebody else")
    with pytest.raises(UserError, match="holds something else"):
        make(text)
    assert (tmp_path / "store" / "train" / "00007.idx").exists()
    with pytest.raises(UserError, match="is not a folder"):
        make(text, output="text.jsonl")


write_manifest = module._write_manifest


class _KilledError(BaseException):
    pass


@pytest.mark.usefixtures("_small_tasks")
@pytest.mark.parametrize(
    ("place", "stride"),
    [("steps.write_json", 1), ("copy_tokenizer", 1), ("shutil.rmtree", 1), ("store._HashedFile.publish", 5)],
)
def test_stopped_before_any_write_and_run_again_it_makes_the_same(
    tmp_path: Path, make: Callable, examples: Path, monkeypatch: pytest.MonkeyPatch, place: str, stride: int
):
    make(examples, kind="instructions", output="whole")
    owner: Any = module if place != "steps.write_json" else sys.modules["tsumugu.data"]
    *path, name = place.split(".")
    for part in path:
        owner = getattr(owner, part)
    original = getattr(owner, name)
    for number in range(0, 1000, stride):
        calls = iter(range(number))

        def stop_at_last(*arguments: Any, calls: Any = calls) -> Any:
            if next(calls, None) is None:
                raise _KilledError
            return original(*arguments)

        monkeypatch.setattr(owner, name, stop_at_last)
        try:
            make(examples, kind="instructions", output=f"stopped-{number}")
            break
        except _KilledError:
            monkeypatch.setattr(owner, name, original)
        make(examples, kind="instructions", output=f"stopped-{number}")
        assert _files(tmp_path / f"stopped-{number}") == _files(tmp_path / "whole")
    assert number > 0


@pytest.mark.usefixtures("_small_tasks")
def test_a_task_without_its_marker_is_done_again_and_no_other(
    tmp_path: Path, make: Callable, text: Path, monkeypatch: pytest.MonkeyPatch
):
    make(text, output="whole")
    monkeypatch.setattr(module, "_write_manifest", _kill)
    with pytest.raises(_KilledError):
        make(text)
    monkeypatch.setattr(module, "_write_manifest", write_manifest)
    shards = tmp_path / "store" / "train"
    (tmp_path / "store" / ".work" / "encode" / "completions" / "00002").unlink()
    shutil.rmtree(tmp_path / "store" / ".work" / "finish")
    (shards / "00002.bin").write_bytes(b"half")
    (shards / ".00002.idx").write_bytes(b"half")
    before = {path: path.stat().st_mtime_ns for path in shards.glob("0*") if path.stem != "00002"}
    make(text)
    assert {path: path.stat().st_mtime_ns for path in shards.glob("0*") if path.stem != "00002"} == before
    assert _files(tmp_path / "store") == _files(tmp_path / "whole")


def _kill(*_: Any) -> None:
    raise _KilledError


@pytest.mark.usefixtures("_small_tasks")
def test_after_a_bad_line_is_mended_the_work_starts_anew(
    tmp_path: Path, make: Callable, text: Path, capsys: pytest.CaptureFixture
):
    good = text.read_text(encoding="utf-8")
    text.write_text(good + "bad\n", encoding="utf-8")
    with pytest.raises(UserError, match="not JSON"):
        make(text)
    with pytest.raises(UserError, match="not JSON"):  # nothing changed: goes on where it stopped
        make(text)
    assert capsys.readouterr().err == ""
    text.write_text("".join(good.splitlines(keepends=True)[:50]), encoding="utf-8")  # fewer tasks than before
    make(text)
    assert "unfinished work is thrown away" in capsys.readouterr().err
    make(text, output="whole")
    assert _files(tmp_path / "store") == _files(tmp_path / "whole")


@pytest.mark.usefixtures("_small_tasks")
def test_a_mended_file_of_the_same_size_is_read_again(tmp_path: Path, make: Callable, text: Path):
    good = text.read_bytes()
    bad_end, bad_start = good[:-3] + b"xx\n", good.replace("川沿い".encode(), "山沿い".encode(), 1)
    text.write_bytes(bad_end)
    with pytest.raises(UserError, match="not JSON"):
        make(text)
    assert len(bad_start) == len(bad_end)
    text.write_bytes(bad_start)
    os.utime(text, (time.time() + 5, time.time() + 5))
    make(text)
    make(text, output="whole")
    assert _files(tmp_path / "store") == _files(tmp_path / "whole")


@pytest.mark.usefixtures("_small_tasks")
def test_unfinished_work_with_other_settings_is_thrown_away(
    tmp_path: Path, make: Callable, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr(module, "_write_manifest", _kill)
    with pytest.raises(_KilledError):
        make(text)
    monkeypatch.setattr(module, "_write_manifest", write_manifest)
    make(text, add_eos=True)
    assert capsys.readouterr().err.count("\n") == 1
    make(text, output="whole", add_eos=True)
    assert _files(tmp_path / "store") == _files(tmp_path / "whole")


# --- errors in workers -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_small_tasks")
@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_line_is_the_same_error_from_any_worker(tmp_path: Path, make: Callable, workers: int):
    lines = [json.dumps({"text": document}) for document in DOCUMENTS]
    lines[200] = '{"body": "本文"}'
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        make(path, workers=workers)
    assert "no column text" in caught.value.message
    assert caught.value.hint == "it has: body"
    assert multiprocessing.active_children() == []


_SLOW_SCRIPT = """
import sys, time
from tsumugu.config import PrepareConfig, Source
from tsumugu.data import corpus, prepare
prepare.TASK_BYTES = (3000, 3000)
column_of = corpus.column_of
corpus.column_of = lambda *arguments: time.sleep(0.01) or column_of(*arguments)  # in the workers too: they read this
if __name__ == "__main__":
    path, tokenizer, output = sys.argv[1:]
    source = Source(name="only", path=path)
    prepare.prepare(
        PrepareConfig(sources=[source], tokenizer=tokenizer, output=output, validation_share=0.2, workers=2)
    )
"""


@pytest.mark.usefixtures("_small_tasks")
def test_killed_in_the_middle_its_workers_end_and_run_again_it_makes_the_same(
    tmp_path: Path, make: Callable, text: Path, tokenizer_folder: Path
):
    script = tmp_path / "script.py"
    script.write_text(_SLOW_SCRIPT)
    process = subprocess.Popen([sys.executable, script, text, tokenizer_folder, tmp_path / "store"])
    completions = tmp_path / "store" / ".work" / "encode" / "completions"
    while process.poll() is None and not (completions.exists() and any(completions.iterdir())):
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    time.sleep(0.2)
    progress = (tmp_path / "store" / ".work" / "encode" / "progress.bin").read_bytes()
    time.sleep(0.6)
    assert (tmp_path / "store" / ".work" / "encode" / "progress.bin").read_bytes() == progress
    make(text)
    make(text, output="whole")
    assert _files(tmp_path / "store") == _files(tmp_path / "whole")


# --- nothing to make a store of --------------------------------------------------------------------------------------


def test_a_corpus_without_text_is_refused(tmp_path: Path, make: Callable):
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(UserError, match=r"no document is left for training \(the sources are empty\)"):
        make(tmp_path / "a.jsonl")
    _write_lines(tmp_path / "b.jsonl", [{"text": ""}, {"text": None}])
    with pytest.raises(UserError, match=r"no document is left for training \(2 dropped: empty\)"):
        make(tmp_path / "b.jsonl", output="b")


def test_a_corpus_too_small_for_validation_is_refused(tmp_path: Path, make: Callable):
    path = _write_lines(tmp_path / "a.jsonl", [{"text": "一つだけの文書。"}])
    with pytest.raises(UserError, match="none was chosen for validation"):
        make(path, validation_share=0.0001)
    assert make(path, validation_share=0.0, output="all")["splits"]["validation"]["documents"] == 0


def test_an_unknown_template_is_refused_before_anything_is_written(tmp_path: Path, make: Callable, examples: Path):
    with pytest.raises(UserError, match="no template alpaca-fr"):
        make(examples, kind="instructions", template="alpaca-fr")
    assert not (tmp_path / "store").exists()

"""What preparation does to documents between reading and the store: cleaned, compared, dropped with a reason, split."""

import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import AutoTokenizer

from tsumugu import config
from tsumugu.config import PrepareConfig
from tsumugu.data import prepare as module
from tsumugu.data import store
from tsumugu.data.prepare import prepare, training_texts, warnings
from tsumugu.data.preview import preview, show
from tsumugu.errors import UserError

TEXTS = [f"{n}番目の朝、川沿いの道を{n * 37 % 101}歩だけ歩いた。霧が晴れて、山が青く見えた。" for n in range(120)]


def _write(path: Path, records: list[dict]) -> str:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return str(path)


def _corpus(path: Path, texts: list[str]) -> str:
    return _write(path, [{"text": text} for text in texts])


@pytest.fixture
def run(tmp_path: Path, tokenizer_folder: Path) -> Callable[..., dict]:
    """`run([{name, path, ...}, ...], output="store", key=value)`: prepares as a configuration file would."""

    def run(sources: list[dict], output: str = "store", preview_of: int = 0, **keys: Any) -> Any:
        content = {"sources": sources, "tokenizer": str(tokenizer_folder), "output": str(tmp_path / output)}
        file = tmp_path / f"{output}.yaml"
        file.write_text(json.dumps({"prepare": {"validation_share": 0.0, "workers": 1, **content, **keys}}))
        settings: PrepareConfig = config.load(config.Preparation, [str(file)]).prepare
        return preview(settings, preview_of) if preview_of else prepare(settings)

    return run


@pytest.fixture
def texts_of(tmp_path: Path, tokenizer_folder: Path) -> Callable[..., list[str]]:
    """The decoded documents of a split."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)

    def texts_of(split: str, output: str = "store") -> list[str]:
        opened = getattr(store.open_store(tmp_path / output), split)
        return [tokenizer.decode(opened.document(index)[0].tolist()) for index in range(opened.documents)]

    return texts_of


def _lines(folder: Path) -> list[dict]:
    return [json.loads(line) for file in sorted(folder.iterdir()) for line in file.read_text().splitlines()]


# --- cleaning --------------------------------------------------------------------------------------------------------


def test_text_is_normalised_unless_told_otherwise(tmp_path: Path, run: Callable, texts_of: Callable):
    path = _corpus(tmp_path / "a.jsonl", ["ｶﾞラス１０²個。"])
    run([{"name": "a", "path": path}])
    run([{"name": "a", "path": path}], output="as-it-is", clean={"rules": "none"})
    run([{"name": "a", "path": path, "language": "code"}], output="code")
    assert texts_of("train") == ["ガラス10²個。"]
    assert texts_of("train", "as-it-is") == texts_of("train", "code") == ["ｶﾞラス１０²個。"]


def test_a_source_may_have_rules_of_its_own(tmp_path: Path, run: Callable):
    long, short = TEXTS[0] * 20, "短い文。"
    paths = [_corpus(tmp_path / f"{name}.jsonl", [long + name, short]) for name in "ab"]
    sources = [{"name": "a", "path": paths[0]}, {"name": "b", "path": paths[1], "clean": {"min_letters": 0}}]
    manifest = run(
        sources,
        clean={"rules": "swallow", "min_japanese_letters": 0, "max_top_ngrams": [1, 1, 1], "min_mean_sentence": 0}
        | {f"max_duplicate_{what}": 1 for what in ("sentences", "sentence_characters")}
        | {"max_duplicate_ngrams": [1] * 6},
    )
    assert manifest["sources"]["a"]["dropped: min_letters"] == 1
    assert manifest["sources"]["a"]["documents"] == 1
    assert manifest["sources"]["b"]["documents"] == 2


def test_conversations_are_left_as_they_are_unless_told_otherwise(tmp_path: Path, run: Callable, texts_of: Callable):
    path = _write(tmp_path / "a.jsonl", [{"instruction": "半角で書いて：１２", "input": "ＡＢ", "output": "12とｱ"}])
    source = {"name": "a", "path": path, "kind": "instructions"}
    run([source])
    run([source], output="cleaned", clean={"rules": "normalize"})
    (plain,), (cleaned,) = texts_of("train"), texts_of("train", "cleaned")
    assert all(part in plain for part in ("：１２", "ＡＢ", "12とｱ"))
    assert all(part in cleaned for part in ("12", "AB", "12とア"))


def test_a_filter_of_hojichar_that_fails_is_an_error_with_the_place(tmp_path: Path, run: Callable):
    path = _write(tmp_path / "a.jsonl", [{"prompt": text, "response": text} for text in TEXTS[:2]])
    rules = {"rules": "normalize", "hojichar": [{"name": "DocumentLengthFilter", "max_doc_len": "one"}]}
    with pytest.raises(UserError, match=r"a\.jsonl, line 1: HojiChar's DocumentLengthFilter fails \(TypeError"):
        run([{"name": "a", "path": path, "kind": "instructions"}], clean=rules)


def test_what_is_dropped_is_kept_with_its_reason_where_asked_for(tmp_path: Path, run: Callable):
    texts = [*TEXTS[:3], "", TEXTS[1]]
    path = _corpus(tmp_path / "a.jsonl", texts)
    run([{"name": "a", "path": path}], deduplicate="exact", keep_dropped=True)
    run([{"name": "a", "path": path}], output="not-kept", deduplicate="exact")
    assert not (tmp_path / "not-kept" / "dropped").exists()
    duplicate, empty = _lines(tmp_path / "store" / "dropped")
    assert empty == {"place": f"{path}, line 4", "reason": "empty", "text": ""}
    assert duplicate == {
        "place": f"{path}, line 5",
        "reason": "duplicate",
        "equals": f"{path}, line 2",
        "text": TEXTS[1],
    }


def test_a_source_that_loses_more_than_half_is_warned_of(tmp_path: Path, run: Callable):
    good = _corpus(tmp_path / "good.jsonl", TEXTS)
    poor = _corpus(tmp_path / "poor.jsonl", [*TEXTS[:2], "", "", ""])
    manifest = run([{"name": "good", "path": good}, {"name": "poor", "path": poor}])
    assert warnings(manifest) == ["poor: 3 of 5 documents were dropped (empty 3)"]


# --- records that cannot be read -------------------------------------------------------------------------------------


@pytest.mark.parametrize("deduplicate", ["none", "exact"])
def test_bad_records_stop_the_run_or_are_set_aside_and_counted(tmp_path: Path, run: Callable, deduplicate: str):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "{TEXTS[0]}"}}\nbad\n{{"body": "x"}}\n{{"text": "{TEXTS[1]}"}}\n')
    source = {"name": "a", "path": str(path)}
    with pytest.raises(UserError, match=r"a\.jsonl, line 2: not JSON"):
        run([source], output="stopped", deduplicate=deduplicate)
    manifest = run([source], bad_records="set_aside", deduplicate=deduplicate)
    assert {key: manifest["sources"]["a"][key] for key in ("documents", "set aside")} == {
        "documents": 2,
        "set aside": 2,
    }
    first, second = _lines(tmp_path / "store" / "set_aside")
    assert (first["place"], first["record"]) == (f"{path}, line 2", "bad")
    assert "not JSON" in first["reason"]
    assert "no column text" in second["reason"]


def test_a_conversation_that_the_template_has_no_place_for_is_a_bad_record(tmp_path: Path, run: Callable):
    turns = [("system", "丁寧に。"), ("user", "空の色は？"), ("assistant", "青です。")]
    messages = [{"role": role, "content": content} for role, content in turns]
    path = _write(tmp_path / "a.jsonl", [{"messages": messages[1:]}, {"messages": messages}])
    with pytest.raises(UserError, match="line 2: the template has no place for a system message"):
        run([{"name": "a", "path": path, "kind": "instructions"}])


def test_a_conversation_of_which_nothing_may_be_learned_is_dropped(tmp_path: Path, run: Callable):
    turns = [{"role": "user", "content": "空の色は？"}, {"role": "assistant", "content": "青です。"}]
    unlearned = [turns[0], turns[1] | {"train": False}]
    path = _write(tmp_path / "a.jsonl", [{"messages": turns}, {"messages": unlearned}, {"messages": turns[:1]}])
    counts = run([{"name": "a", "path": path, "kind": "instructions"}])["sources"]["a"]
    assert {key: value for key, value in counts.items() if key != "characters"} == {
        "documents": 1,
        "dropped: no supervised token": 1,
        "dropped: the last turn is not the assistant's": 1,
    }


def test_a_reply_that_cleaning_leaves_nothing_of_is_dropped(tmp_path: Path, run: Callable):
    records = [{"prompt": "空の色は？", "response": reply} for reply in ("青です。", "\u200b", " ")]
    source = {"name": "a", "path": _write(tmp_path / "a.jsonl", records), "kind": "instructions"}
    counts = run([source], clean={"rules": "normalize"})["sources"]["a"]
    assert (counts["documents"], counts["dropped: empty reply"]) == (1, 2)


def test_a_conversation_lies_where_those_that_go_on_from_it_do(tmp_path: Path, run: Callable):
    def chat(number: int, turns: int) -> dict:
        contents = (f"{number}の質問", "答え", "次の質問", "次の答え")
        pairs = zip(("user", "assistant") * 2, contents, strict=True)
        return {"messages": [{"role": role, "content": content} for role, content in pairs][:turns]}

    path = _write(tmp_path / "a.jsonl", [chat(number, turns) for number in range(40) for turns in (2, 4)])
    run([{"name": "a", "path": path, "kind": "instructions"}], validation_share=0.3)
    opened = store.open_store(tmp_path / "store")
    assert opened.train.documents % 2 == opened.validation.documents % 2 == 0
    train, validation = (
        [part.document(i)[0].tolist() for i in range(part.documents)] for part in (opened.train, opened.validation)
    )
    assert not any(longer[: len(ids)] == ids for ids in validation for longer in train)


# --- the text column -------------------------------------------------------------------------------------------------


def test_the_text_column_is_found(tmp_path: Path, run: Callable, texts_of: Callable):
    path = _write(tmp_path / "a.jsonl", [{"id": 1, "content": TEXTS[0], "url": "x"}])
    run([{"name": "a", "path": path}])
    assert texts_of("train") == [TEXTS[0]]
    path = _write(tmp_path / "b.jsonl", [{"one": TEXTS[0], "two": TEXTS[1]}])
    with pytest.raises(UserError, match=r"which column holds the text.*one, two"):
        run([{"name": "a", "path": path}], output="b")


def test_a_file_that_two_sources_read_in_the_same_way_is_warned_of(
    tmp_path: Path, run: Callable, capsys: pytest.CaptureFixture
):
    path = _write(tmp_path / "a.jsonl", [{"one": text, "two": text + "続き"} for text in TEXTS])
    (tmp_path / "link.jsonl").symlink_to(path)
    others = {"two": {"path": path, "text": "two"}, "linked": {"path": str(tmp_path / "link.jsonl"), "text": "one"}}
    sources = [{"name": "one", "path": path, "text": "one"}, *({"name": key} | value for key, value in others.items())]
    run(sources[:2], output="legitimate")
    assert capsys.readouterr().err == ""
    run(sources)
    assert capsys.readouterr().err == (
        f"sources one and linked both read {tmp_path / 'link.jsonl'} with the same column: "
        "what is in there counts twice\n"
    )


# --- deduplication and validation ------------------------------------------------------------------------------------


def test_of_equal_documents_the_first_stays(tmp_path: Path, run: Callable, texts_of: Callable):
    one = _corpus(tmp_path / "one.jsonl", [*TEXTS[:10], TEXTS[3]])
    two = _corpus(tmp_path / "two.jsonl", TEXTS[5:15])
    kept = _corpus(tmp_path / "kept.jsonl", TEXTS[:2])
    sources = [{"name": "one", "path": one}, {"name": "two", "path": two}]
    manifest = run([*sources, {"name": "kept", "path": kept, "deduplicate": "none"}], deduplicate="exact")
    assert texts_of("train") == [*TEXTS[:15], *TEXTS[:2]]
    assert manifest["sources"]["one"]["dropped: duplicate"] == 1
    assert manifest["sources"]["two"]["dropped: duplicate"] == 5


def test_equality_is_that_of_cleaned_texts(tmp_path: Path, run: Callable, texts_of: Callable):
    run([{"name": "a", "path": _corpus(tmp_path / "a.jsonl", ["１２個。", "12個。"])}], deduplicate="exact")
    assert texts_of("train") == ["12個。"]


@pytest.mark.parametrize("workers", [1, 2])
def test_nothing_is_printed_but_by_the_command_line(
    tmp_path: Path, run: Callable, capfd: pytest.CaptureFixture, workers: int
):
    draw = random.Random(2)
    path = _corpus(tmp_path / "a.jsonl", ["".join(draw.choices("あいうえおかきくけこ朝昼夜", k=99)) for _ in range(50)])
    run([{"name": "a", "path": path, "deduplicate": "near", "validation_share": 0.1}], workers=workers)
    assert capfd.readouterr() == ("", "")


def test_near_duplicates_are_removed_by_similarity(tmp_path: Path, run: Callable, texts_of: Callable):
    draw = random.Random(3)
    base = ["".join(draw.choices("あいうえおかきくけこさしすせそ朝昼夜山川海", k=400)) for _ in range(20)]
    edited = [text[:200] + "違" + text[201:] for text in base[:5]]
    path = _corpus(tmp_path / "a.jsonl", [*base, *edited])
    manifest = run([{"name": "a", "path": path}], deduplicate="near")
    assert texts_of("train") == base
    assert manifest["sources"]["a"]["dropped: near duplicate"] == 5
    run([{"name": "a", "path": path}], output="strict", deduplicate="near", min_similarity=1.0)
    assert len(texts_of("train", "strict")) == 25


def test_a_validation_source_and_what_equals_it_never_train(tmp_path: Path, run: Callable, texts_of: Callable):
    train = _corpus(tmp_path / "train.jsonl", TEXTS)
    held_out = _corpus(tmp_path / "held-out.jsonl", TEXTS[10:20])
    sources = [{"name": "t", "path": train}, {"name": "v", "path": held_out, "validation_share": 1}]
    run(sources, validation_share=0.1)
    in_training, in_validation = texts_of("train"), texts_of("validation")
    assert not set(in_training) & set(in_validation)
    assert set(TEXTS[10:20]) < set(in_validation)
    assert set(in_training) | set(in_validation) == set(TEXTS)
    counts = store.open_store(tmp_path / "store").manifest["sources"]["t"]
    assert counts["documents"] + counts["dropped: in validation"] == len(TEXTS)


def test_questions_of_a_validation_source_never_train_whatever_their_answer(tmp_path: Path, run: Callable):
    questions = [f"{n}の次の数は？" for n in range(20)]
    train = _write(tmp_path / "t.jsonl", [{"instruction": q, "output": "はい。"} for q in questions])
    held_out = _write(tmp_path / "v.jsonl", [{"instruction": q, "output": "いいえ。"} for q in questions[:5]])
    sources = [
        {"name": "t", "path": train, "kind": "instructions"},
        {"name": "v", "path": held_out, "kind": "instructions", "validation_share": 1},
    ]
    splits = run(sources)["splits"]
    assert (splits["train"]["documents"], splits["validation"]["documents"]) == (15, 5)


@pytest.mark.parametrize("deduplicate", ["exact", "near"])
def test_nothing_is_removed_for_the_sake_of_what_is_not_stored(
    tmp_path: Path, run: Callable, texts_of: Callable, deduplicate: str
):
    reply = "".join(random.Random(4).choices("あいうえおかきくけこさしすせそ朝昼夜山川海", k=300))
    turns = [{"role": "user", "content": "続けて。"}, {"role": "assistant", "content": reply}]
    too_long = [turns[0], turns[1] | {"content": reply + "。" * 600}]  # as similar as can be
    unlearned = [turns[0], turns[1] | {"train": False}]
    path = _write(tmp_path / "a.jsonl", [{"messages": messages} for messages in (too_long, unlearned, turns)])
    held_out = _write(
        tmp_path / "v.jsonl", [{"messages": too_long}, {"messages": [{**turns[0], "content": "他"}, turns[1]]}]
    )
    sources = [
        {"name": "a", "path": path, "kind": "instructions"},
        {"name": "v", "path": held_out, "kind": "instructions", "validation_share": 1, "deduplicate": "none"},
    ]
    counts = run(sources, deduplicate=deduplicate, max_length=600, keep_dropped=True)["sources"]
    reasons = {"dropped: longer than prepare.max_length": 1, "dropped: no supervised token": 1}
    assert {key: value for key, value in counts["a"].items() if key != "characters"} == {"documents": 1, **reasons}
    assert reply in texts_of("train")[0]
    assert sorted(line["reason"] for line in _lines(tmp_path / "store" / "dropped")) == sorted(
        [*(reason.removeprefix("dropped: ") for reason in reasons), "longer than prepare.max_length"]
    )


def test_documents_that_hold_a_benchmark_are_dropped(tmp_path: Path, run: Callable, texts_of: Callable):
    question = "明治時代に京都から東京へ移された政府の機関のうち、最初に庁舎が建てられたのはどこか答えなさい。"
    benchmark = _write(tmp_path / "benchmark.jsonl", [{"question": question, "answer": "大蔵省"}])
    path = _corpus(tmp_path / "a.jsonl", [TEXTS[0], f"{TEXTS[1]}{question}{TEXTS[2]}"])
    manifest = run([{"name": "a", "path": path}], contamination=[benchmark])
    assert texts_of("train") == [TEXTS[0]]
    assert manifest["sources"]["a"][f"dropped: contaminated by {benchmark}"] == 1


def test_a_tokenizer_may_see_what_is_trained_on_and_nothing_else(tmp_path: Path, tokenizer_folder: Path):
    path = _corpus(tmp_path / "a.jsonl", [*TEXTS, "１２個。", ""])
    settings = PrepareConfig(
        sources=[config.Source(name="a", path=path)],
        tokenizer=str(tokenizer_folder),
        output=str(tmp_path / "store"),
        validation_share=0.2,
        workers=1,
    )
    prepare(settings)
    tokenizer, train = AutoTokenizer.from_pretrained(tokenizer_folder), store.open_store(tmp_path / "store").train
    stored = [tokenizer.decode(train.document(index)[0].tolist()) for index in range(train.documents)]
    assert list(training_texts(settings)) == stored


# --- preview ---------------------------------------------------------------------------------------------------------


def test_a_preview_says_what_would_be_dropped_and_changed_and_writes_nothing(tmp_path: Path, run: Callable):
    path = _corpus(tmp_path / "a.jsonl", [*TEXTS, "", "１２個。", ""])
    (found,) = run([{"name": "a", "path": path}], preview_of=1000)
    assert (found.documents, found.kept, found.changed) == (123, 121, 1)
    assert found.dropped == {"empty": 2}
    assert found.examples["empty"] == [(f"{path}, line {n}", "", None) for n in (121, 123)]
    assert found.changes == [("１２個。", "12個。")]
    (part,) = run([{"name": "a", "path": path}], preview_of=50)
    assert part.documents == 50
    assert not (tmp_path / "store").exists()


def test_a_preview_tries_as_many_as_asked_for_however_short_the_files_are(tmp_path: Path, run: Callable):
    (tmp_path / "many").mkdir()
    sizes = [0, 1, 90, 0, *[1] * 26]  # 117 documents in 30 files, most of them in one
    for number, size in enumerate(sizes):
        _corpus(tmp_path / "many" / f"{number:02d}.jsonl", [f"{number} {n}" for n in range(size)])
    source = {"name": "a", "path": str(tmp_path / "many")}
    for wanted, expected in ((1, 1), (5, 5), (16, 16), (40, 40), (100, 100), (117, 117), (500, 117)):
        (found,) = run([source], preview_of=wanted)
        assert (found.documents, found.kept) == (expected, expected)


def test_a_preview_shows_why_a_record_cannot_be_read(tmp_path: Path, run: Callable):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "{TEXTS[0]}"}}\n壊れた\n{{"body": "x"}}\n', encoding="utf-8")
    previews = run([{"name": "a", "path": str(path)}], preview_of=9, bad_records="set_aside")
    printed = StringIO()
    show(previews, Console(file=printed, width=200))
    assert "  cannot be read: 2 dropped (66.7%), such as\n" in printed.getvalue()
    assert "    a.jsonl, line 2: not JSON (Expecting value" in printed.getvalue()
    assert ": 壊れた\n" in printed.getvalue()
    assert '    a.jsonl, line 3: no column text (it has: body): {"body": "x"}\n' in printed.getvalue()


# --- killed ----------------------------------------------------------------------------------------------------------

_SCRIPT = """
import sys, time
from tsumugu import config
from tsumugu.data import executor, prepare
prepare.TASK_BYTES = (3000, 3000)
run_task = executor._Local.run_task
executor._Local.run_task = lambda *arguments: time.sleep(0.03) or run_task(*arguments)  # in the workers too
if __name__ == "__main__":
    prepare.prepare(config.load(config.Preparation, [sys.argv[1]], ["--prepare.workers=2"]).prepare)
"""


@pytest.mark.parametrize("stage", ["read", "near-signatures", "near-candidates", "near-comparison", "encode"])
def test_killed_in_any_stage_and_run_again_it_makes_the_same(
    tmp_path: Path, run: Callable, monkeypatch: pytest.MonkeyPatch, stage: str
):
    monkeypatch.setattr(module, "TASK_BYTES", (3000, 3000))
    draw = random.Random(5)
    texts = ["".join(draw.choices("あいうえおかきくけこさしすせそ朝昼夜山川海", k=150)) for _ in range(60)]
    texts += [*texts[:10], *(text[:70] + "違" + text[71:] for text in texts[10:20])]
    sources = [{"name": "a", "path": _corpus(tmp_path / "a.jsonl", texts)}]
    keys = {"deduplicate": "near", "keep_dropped": True, "validation_share": 0.2}
    run(sources, output="whole", **keys)
    (tmp_path / "script.py").write_text(_SCRIPT)
    content = json.loads((tmp_path / "whole.yaml").read_text())
    content["prepare"]["output"] = str(tmp_path / "store")
    (tmp_path / "killed.yaml").write_text(json.dumps(content))
    process = subprocess.Popen([sys.executable, tmp_path / "script.py", tmp_path / "killed.yaml"])
    work = tmp_path / "store" / ".work"
    while process.poll() is None and not list(work.glob(f"{stage}/completions/*")):
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    run(sources, **keys)
    made, whole = ({p.relative_to(f): p.read_bytes() for p in f.rglob("*") if p.is_file()} for f in _two(tmp_path))
    assert made == whole
    assert not work.exists()


def _two(folder: Path) -> list[Path]:
    return [folder / "store", folder / "whole"]


def test_two_preparations_of_one_folder_do_not_meet(tmp_path: Path, run: Callable, monkeypatch: pytest.MonkeyPatch):
    sources = [{"name": "a", "path": _corpus(tmp_path / "a.jsonl", TEXTS)}]

    def meet(*_: Any) -> None:
        monkeypatch.undo()
        with pytest.raises(UserError, match="another process prepares"):
            run(sources)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "run_local", meet)
    with pytest.raises(KeyboardInterrupt):
        run(sources)
    run(sources)
    assert os.listdir(tmp_path / "store").count(".lock") == 0


def test_of_two_preparations_the_later_one_finds_what_the_other_made_meanwhile(
    tmp_path: Path, run: Callable, monkeypatch: pytest.MonkeyPatch
):
    sources = [{"name": "a", "path": _corpus(tmp_path / "a.jsonl", TEXTS)}]
    check_contract = module.check_contract
    made = []

    def overtaken(*arguments: Any) -> None:  # after it looked for a store, and before it locks
        monkeypatch.setattr(module, "check_contract", check_contract)
        made.append(run(sources))

    monkeypatch.setattr(module, "check_contract", overtaken)
    assert run(sources) == made[0] | {"already_done": True}


def test_a_lock_that_is_removed_while_another_waits_for_it_keeps_a_third_out(
    tmp_path: Path, run: Callable, monkeypatch: pytest.MonkeyPatch
):
    sources = [{"name": "a", "path": _corpus(tmp_path / "a.jsonl", TEXTS)}]
    (tmp_path / "store").mkdir()
    flock = fcntl.flock

    def overtaken(file: Any, how: int) -> None:  # the holder ends between our opening of the lock and our locking
        monkeypatch.setattr(fcntl, "flock", flock)
        (tmp_path / "store" / ".lock").unlink()
        flock(file, how)

    def meet(*_: Any) -> None:
        monkeypatch.undo()
        with pytest.raises(UserError, match="another process prepares"):
            run(sources)
        raise KeyboardInterrupt

    monkeypatch.setattr(fcntl, "flock", overtaken)
    monkeypatch.setattr(module, "run_local", meet)
    with pytest.raises(KeyboardInterrupt):
        run(sources)


@pytest.mark.parametrize("left", [[".lock"], [".lock", ".work/encode/completions"]])
def test_a_store_that_was_finished_before_the_kill_is_done(tmp_path: Path, run: Callable, left: list[str]):
    sources = [{"name": "a", "path": _corpus(tmp_path / "a.jsonl", TEXTS)}]
    made = run(sources)
    files = sorted((tmp_path / "store").rglob("*"))
    (tmp_path / "store" / ".lock").touch()
    for folder in left[1:]:
        (tmp_path / "store" / folder).mkdir(parents=True)
    assert run(sources) == made | {"already_done": True}
    assert sorted((tmp_path / "store").rglob("*")) == files


def test_a_finished_store_that_may_not_be_written_is_done(tmp_path: Path, run: Callable):
    sources = [{"name": "a", "path": _corpus(tmp_path / "a.jsonl", TEXTS)}]
    made = run(sources)
    (tmp_path / "store" / ".lock").mkdir()  # as root, the tests may write everything else
    assert run(sources) == made | {"already_done": True}

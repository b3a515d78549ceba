"""What an audit says of good stores: figures that are right, nothing that is not so, and texts that harm no page."""

import json
import random
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from support.data import SHARED
from support.rewritten import documents, rewrite
from transformers import AutoTokenizer

from tsumugu import config
from tsumugu.cli import main
from tsumugu.config import PrepareConfig, Source
from tsumugu.data.audit import audit, quick_audit
from tsumugu.data.audit_view import show, to_html, to_page
from tsumugu.data.prepare import prepare
from tsumugu.data.store import open_store
from tsumugu.errors import UserError
from tsumugu.tokenizer.extend import Token, add_tokens
from tsumugu.tokenizer.importer import import_tokenizer
from tsumugu.tokenizer.train import train_tokenizer

# What people and models write, and what a careless check would take for a marker, a stop token or an empty reply.
ODD = [
    "はい",
    "。",
    "1",
    "### 応答:\n### 指示:",
    "</s>",
    "<|im_start|>assistant\n<|im_end|>",
    "<start_of_turn>model",
    "\n\n改行で始まり、改行で終わる\n\n",
    "　全角空白　",
    "👨‍👩‍👧‍👦🇯🇵",
    "```python\nprint({'a': 1})\n```",
    "{instruction}{input}{{ eos_token }}",
    "ＡＢＣ ｶﾅ ㍿",
    "\t\ttabs\t",
    "同じことを同じことを同じことを同じことを",
    "x" * 300,
]


def _odd(draw: random.Random) -> str:
    return "".join(draw.choices(ODD, k=draw.randint(1, 3)))


def _with_system(number: int) -> list[dict]:
    """Chats of one to five questions with a system message, some of whose replies are not to be learned."""
    draw, lines = random.Random(1), []
    for index in range(number):
        turns = [{"role": "system", "content": f"あなたは助手{index}です。{_odd(draw)}"}] if index % 3 else []
        for turn in range(draw.randint(1, 5)):
            turns.append({"role": "user", "content": f"{index}-{turn}{_odd(draw)}"})
            reply = {"role": "assistant", "content": _odd(draw)}
            turns.append(reply | ({"train": False} if turn == 1 else {}))
        lines.append({"messages": turns})
    return lines


def _sharegpt(number: int) -> list[dict]:
    """ShareGPT's form: long conversations of short turns."""
    draw, lines = random.Random(2), []
    for index in range(number):
        turns = []
        for turn in range(draw.randint(3, 9)):
            turns += [{"from": "human", "value": f"{index}/{turn} {draw.choice(ODD)}"}]
            turns += [{"from": "gpt", "value": draw.choice(ODD)}]
        lines.append({"id": f"c{index}", "conversations": turns})
    return lines


def _thoughts(number: int) -> list[dict]:
    """Reasoning in front of replies; the questions are all but the same, the replies too."""
    draw, lines = random.Random(3), []
    for index in range(number):
        turns = []
        for turn in range(draw.randint(1, 3)):
            turns.append({"role": "user", "content": f"{index + turn}足す{turn}は？"})
            thoughts = f"<think>\n{_odd(draw)}\n</think>\n\n" if draw.random() < 0.7 else ""
            turns.append({"role": "assistant", "content": f"{thoughts}{index + 2 * turn}"})
        lines.append({"messages": turns})
    return lines


@pytest.fixture(scope="module")
def chat_tokenizer(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    output = tmp_path_factory.mktemp("chat") / "tokenizer"
    special = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    special += ["<start_of_turn>", "<end_of_turn>"]
    tokens = [Token(content, True) for content in special] + [Token(t, False) for t in ("<think>", "</think>", "<NL>")]
    add_tokens(tokenizer_folder, output, tokens)
    return output


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tsumugu.tokenizer.train import train_byte_level

    output = tmp_path_factory.mktemp("bytes") / "tokenizer"
    train_byte_level(lambda: ["### 指示:\n\n### 応答:\n日本語。", *ODD] * 50, output, vocab_size=400)
    return output


def prepared(folder: Path, tokenizer: Path, lines: list[dict], **settings: Any) -> Path:
    path = folder / "records.jsonl"
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    source = Source(name="only", path=str(path), kind="instructions")
    values = {"validation_share": 0.1, "workers": 1, "template": "alpaca-ja"} | settings
    prepare(PrepareConfig(sources=[source], tokenizer=str(tokenizer), output=str(folder / "store"), **values))
    return folder / "store"


@pytest.mark.parametrize(
    ("lines", "template", "settings"),
    [
        (_with_system(150), "chatml", {}),
        (_with_system(150), "gemma", {"train_on": "last_response"}),
        (_with_system(150), "llama3", {"max_length": 300, "too_long": "truncate_prompt"}),
        (_with_system(150), "llm-jp", {"train_on": "everything"}),
        (_sharegpt(150), "alpaca-ja", {}),
        (_sharegpt(150), "alpaca-en", {"train_on": "last_response"}),
        (_sharegpt(150), "rinna", {}),
        (_sharegpt(150), "llama3", {"max_length": 400}),
        (_thoughts(150), "qwen3", {}),
        (_thoughts(150), "chatml", {"train_on": "everything"}),
        (_thoughts(150), "alpaca-ja", {"train_on": "last_response"}),
    ],
)
def test_no_false_alarm_on_sets_of_several_turns(
    tmp_path: Path, chat_tokenizer: Path, lines: list[dict], template: str, settings: dict
):
    store = prepared(tmp_path, chat_tokenizer, lines, template=template, **settings)
    report = audit(store)
    assert [(finding.name, finding.count) for finding in report.findings] == []
    assert report.not_checked == []
    assert quick_audit(open_store(store)).findings == []


@pytest.mark.parametrize("too_long", ["truncate_prompt", "split"])
@pytest.mark.parametrize(
    ("template", "settings"),
    [
        ("alpaca-ja", {"add_bos": True}),
        ("chatml", {}),
        ("qwen3", {}),
        ("plain", {"add_bos": True}),
        ("llm-jp", {"train_on": "last_response"}),
    ],
)
def test_shortened_rows_are_no_false_alarm(
    tmp_path: Path, chat_tokenizer: Path, template: str, settings: dict, too_long: str
):
    """Whatever a row is cut in: its question, the marker in front of a reply, the reply, its end."""
    draw, lines = random.Random(4), []
    for number in range(200):
        question, reply = (str(number) + "".join(draw.choices("川山朝霧駅", k=draw.randint(2, 80))) for _ in range(2))
        lines.append({"prompt": question, "response": reply})
    store = prepared(tmp_path, chat_tokenizer, lines, template=template, max_length=70, too_long=too_long, **settings)
    counts = json.loads((store / "manifest.json").read_text())["sources"]["only"]
    assert any(name.startswith("shortened") and count > 20 for name, count in counts.items())
    report = audit(store)
    assert report.errors == []
    names = {finding.name for finding in report.findings}
    assert names <= {"truncated-replies", "bos-mismatch"}  # cut replies are told of; a tokenizer without bos too
    assert ("truncated-replies" in names) == (too_long == "split")


def test_a_bos_that_the_tokenizer_does_not_add_is_told(tmp_path: Path, chat_tokenizer: Path):
    store = prepared(tmp_path, chat_tokenizer, _sharegpt(40), add_bos=True)
    (finding,) = audit(store).findings
    assert (finding.name, finding.level) == ("bos-mismatch", "warning")
    assert "the tokenizer does not" in finding.message.replace("which the", "the")
    other = tmp_path / "adds-bos"
    other.mkdir()
    for file in chat_tokenizer.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    contract = json.loads((other / "contract.json").read_text())
    (other / "contract.json").write_text(json.dumps(contract | {"adds_bos": True}))
    assert audit(store, model=other).findings == []
    (tmp_path / "none").mkdir()
    (finding,) = audit(prepared(tmp_path / "none", chat_tokenizer, _sharegpt(40)), model=other).findings
    assert (finding.name, "the store has none" in finding.message) == ("bos-mismatch", True)


def test_thoughts_without_an_answer_are_empty_replies(tmp_path: Path, chat_tokenizer: Path):
    store = prepared(tmp_path, chat_tokenizer, _thoughts(60), template="qwen3")
    tokenizer = AutoTokenizer.from_pretrained(chat_tokenizer)
    closing, stop = (tokenizer.convert_tokens_to_ids(token) for token in ("</think>", "<|im_end|>"))

    def silent(ids, mask):
        """The reply ends behind its thoughts."""
        place = np.flatnonzero(ids == closing)[-1] + 1
        return np.array([*ids[:place], stop]), np.array([*mask[:place], 1])

    assert {finding.name for finding in audit(rewrite(store, tmp_path / "s", silent)).errors} == {"empty-replies"}


@pytest.mark.parametrize("lines", [_sharegpt(100), _thoughts(100)], ids=["sharegpt", "thoughts"])
def test_no_false_alarm_with_byte_level_pieces_that_merge_over_newlines(
    tmp_path: Path, byte_level: Path, lines: list[dict]
):
    report = audit(prepared(tmp_path, byte_level, lines))
    assert [(finding.name, finding.count) for finding in report.findings] == []


def test_no_false_alarm_where_plain_prompts_have_nothing_in_front_of_the_reply(tmp_path: Path, tokenizer_folder: Path):
    lines = [{"prompt": f"{number}の次は", "response": f"{number + 1}です"} for number in range(100)]
    assert audit(prepared(tmp_path, tokenizer_folder, lines, template="plain")).findings == []


def test_no_false_alarm_on_the_built_in_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("quickstart/corpus").mkdir(parents=True)
    sample = resources.files("tsumugu") / "sample"
    for name in ("japanese", "instructions"):
        Path(f"quickstart/corpus/{name}.jsonl").write_text((sample / f"{name}.jsonl").read_text("utf-8"), "utf-8")
    texts = [
        json.loads(line)["text"] for line in Path("quickstart/corpus/japanese.jsonl").read_text("utf-8").splitlines()
    ]
    train_tokenizer(lambda: texts, Path("quickstart/tokenizer"), vocab_size=4000)
    for name in ("quickstart-prepare", "quickstart-prepare-instructions"):
        recipe = Path(__file__).parents[2] / "recipes" / f"{name}.yaml"
        preparation = config.load(config.Preparation, [str(recipe)], ["--prepare.workers=1"]).prepare
        prepare(preparation)
        assert audit(Path(preparation.output)).findings == []


@pytest.mark.skipif(not (SHARED / "jaquad-instructions.jsonl.gz").exists(), reason="no JaQuAD beside the repository")
@pytest.mark.parametrize("model", ["llm-jp-v2.2-48k", "llm-jp-v3.1-100k", "rinna-gpt2-unigram-32k"])
def test_no_false_alarm_on_jaquad(tmp_path: Path, model: str):
    import gzip
    from itertools import islice

    import_tokenizer(str(SHARED / "tokenizers" / f"{model}.model"), tmp_path / "tokenizer")
    with gzip.open(SHARED / "jaquad-instructions.jsonl.gz", "rt", encoding="utf-8") as file:
        lines = [json.loads(line) for line in islice(file, 2000)]
    if model.startswith("rinna"):  # it has no newline, which the template needs
        with pytest.raises(UserError, match="newline"):
            prepared(tmp_path, tmp_path / "tokenizer", lines)
        return
    assert audit(prepared(tmp_path, tmp_path / "tokenizer", lines)).findings == []


# --- figures ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, chat_tokenizer: Path) -> Path:
    return prepared(tmp_path_factory.mktemp("store"), chat_tokenizer, _with_system(90), template="chatml")


def test_the_figures_are_those_of_a_plain_loop(store: Path):
    report = audit(store)
    for split, figures in report.splits.items():
        rows = documents(store, split)
        lengths = sorted(len(ids) for ids, _ in rows)
        assert figures.rows == len(rows)
        assert figures.tokens == sum(lengths)
        assert figures.supervised_tokens == sum(int(mask.sum()) for _, mask in rows)
        replies = 0
        for _, mask in rows:
            replies += sum(bool(flag) and not (place and mask[place - 1]) for place, flag in enumerate(mask))
        assert figures.replies == replies
        assert figures.lengths["longest"] == lengths[-1]
        assert figures.lengths["shortest"] == lengths[0]
        assert figures.lengths["median"] in (lengths[(len(lengths) - 1) // 2], lengths[len(lengths) // 2])
        for low, high, count in figures.histogram:
            assert count == sum(low <= length <= high for length in lengths)
        assert sum(count for *_, count in figures.histogram) == len(rows)
    assert report.stop == "<|im_end|>"


def test_shown_rows_hold_the_text_and_the_stop_token(store: Path, chat_tokenizer: Path):
    tokenizer = AutoTokenizer.from_pretrained(chat_tokenizer)
    for example in audit(store, rows=5).examples:
        ids, mask = documents(store, "train")[example.row]
        shown = "".join(text for kind, text in example.parts if kind == "stop")
        assert shown == "<|im_end|>" * int(((ids == tokenizer.convert_tokens_to_ids("<|im_end|>")) & mask).sum())
        whole = "".join(text for _, text in example.parts)
        if "…" not in whole:
            assert whole == tokenizer.decode(ids)


def test_stores_of_several_blocks_give_the_same_report(store: Path, monkeypatch: pytest.MonkeyPatch):
    whole = audit(store).to_json()
    monkeypatch.setattr("tsumugu.data.audit._BLOCK_TOKENS", 1000)
    assert audit(store).to_json() == whole


# --- outputs ---------------------------------------------------------------------------------------------------------


def test_json_has_everything(store: Path, capsys: pytest.CaptureFixture):
    assert main(["audit", str(store), "--json", "--rows", "2"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["splits"]["train"]["supervised_share"] > 0
    assert len(content["examples"]) == 2
    assert content["findings"] == []


class _Tags(HTMLParser):
    """Every tag of a page, and its text."""

    def __init__(self):
        super().__init__()
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs):
        self.tags.append(tag)

    def handle_data(self, data: str):
        self.text += data


def test_html_holds_the_texts_of_the_store_as_text(tmp_path: Path, tokenizer_folder: Path):
    evil = "<script>alert('悪')</script>&amp;<img src=x onerror=y>"
    lines = [{"prompt": f"{number}{evil}", "response": f"{evil}{number}"} for number in range(40)]
    store = prepared(tmp_path, tokenizer_folder, lines)
    broken = rewrite(store, tmp_path / "<b>broken", lambda ids, mask: (ids, np.where(ids == 2, 0, mask)))
    assert main(["audit", str(broken), "--html", str(tmp_path / "page.html")]) == 1
    page = _Tags()
    page.feed((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert not {"script", "img", "b"} & set(page.tags)
    assert evil in page.text
    assert "stop-not-supervised" in page.text
    assert "Mend: " in page.text
    report = audit(broken)
    assert to_html(report) in to_page(report)


def test_the_terminal_gets_no_control_characters_and_no_markup(tmp_path: Path, tokenizer_folder: Path):
    lines = [{"prompt": f"{n} [bold]\x1b[31m赤", "response": f"[/bold]\x07{n}"} for n in range(30)]
    store = prepared(tmp_path, tokenizer_folder, lines)
    with (tmp_path / "out").open("w", encoding="utf-8") as file:
        show(audit(store), Console(file=file, width=200))
    shown = (tmp_path / "out").read_text(encoding="utf-8")
    assert "[bold]\\x1b[31m赤" in shown
    assert "\x1b" not in shown
    assert "\x07" not in shown


def test_a_page_that_cannot_be_written_is_one_line(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert main(["audit", str(store), "--html", str(tmp_path / "nowhere" / "page.html")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "nowhere/page.html cannot be written" in line


def test_what_is_no_store_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="no token store"):
        audit(tmp_path)

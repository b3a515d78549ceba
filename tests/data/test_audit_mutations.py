"""Every way in which supervision goes wrong is planted in a clean store, and the audit calls it by its name."""

import json
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from support.data import SHARED
from support.rewritten import documents, rewrite
from transformers import AutoTokenizer

from tsumugu.cli import main
from tsumugu.config import PrepareConfig, Source
from tsumugu.data.audit import audit, quick_audit
from tsumugu.data.prepare import prepare
from tsumugu.data.store import open_store
from tsumugu.tokenizer.contract import GOLDEN, read_contract
from tsumugu.tokenizer.extend import Token, add_tokens
from tsumugu.tokenizer.importer import import_tokenizer
from tsumugu.tokenizer.load import load_tokenizer
from tsumugu.tokenizer.train import train_tokenizer

WORDS = (
    *("川", "山", "朝", "夜", "霧", "駅", "図書館", "時計", "豆腐", "昆布"),
    *("手袋", "洗濯物", "会議", "資料", "雷", "太陽", "季節", "祖父", "窓", "橋"),
)


def records(number: int, seed: int = 0) -> list[dict]:
    """Conversations of one to three questions, no two alike."""
    generator = random.Random(seed)
    made = []
    for index in range(number):
        turns = []
        for turn in range(1 + index % 3):
            first, second = generator.sample(WORDS, 2)
            turns.append({"role": "user", "content": f"{index}の{turn}：{first}と{second}の話をしてください。"})
            middle = "。".join(generator.choices(WORDS, k=generator.randint(1, 12)))
            turns.append({"role": "assistant", "content": f"{second}は{middle}。以上です。"})
        made.append({"messages": turns})
    return made


def prepared(folder: Path, tokenizer: Path, lines: list[dict], copies: int = 1, **settings: Any) -> Path:
    path = folder / "records.jsonl"
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    sources = [Source(name=f"source-{n}", path=str(path), kind="instructions") for n in range(copies)]
    values = {"validation_share": 0.2, "workers": 1, "template": "alpaca-ja"} | settings
    prepare(PrepareConfig(sources=sources, tokenizer=str(tokenizer), output=str(folder / "store"), **values))
    return folder / "store"


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    return prepared(tmp_path_factory.mktemp("clean"), tokenizer_folder, records(120))


@pytest.fixture(scope="module")
def lossy_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As rinna's: no newline, no bytes for characters that it does not know."""
    folder = tmp_path_factory.mktemp("lossy")
    sentences = [f"{word}と{other}の話をしてください。" for word in WORDS for other in WORDS]
    sentences += [
        "以下は、タスクを説明する指示です。",
        "要求を適切に満たす応答を書きなさい。",
        "### 指示:",
        "### 応答:0123456789 鬼",
    ]
    sentencepiece.SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
        sentence_iterator=iter(sentences),
        model_prefix=str(folder / "m"),
        vocab_size=150,
        hard_vocab_limit=False,
        required_chars="</sunk>",  # which its special tokens hold
        character_coverage=1.0,
        minloglevel=2,
    )
    import_tokenizer(str(folder / "m.model"), folder / "tokenizer")
    assert read_contract(folder / "tokenizer").newline == "lost"
    return folder / "tokenizer"


def errors(store: Path) -> set[str]:
    return {finding.name for finding in audit(store, rows=0).errors}


def quick_errors(store: Path) -> set[str]:
    return {finding.name for finding in quick_audit(open_store(store)).errors}


def test_the_clean_store_has_no_finding(clean: Path):
    report = audit(clean)
    assert report.findings == []
    assert report.not_checked == []


def test_masks_are_looked_at_where_templates_cannot_be_read(clean: Path, tmp_path: Path, monkeypatch):
    """A training machine need not have what `prepare` needs."""
    for name in [name for name in sys.modules if name.startswith("tsumugu.data.instructions")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tsumugu.data.instructions", None)
    report = quick_audit(open_store(clean))
    assert report.findings == []
    assert any("where replies begin" in line for line in report.not_checked)
    assert "stop-not-supervised" in quick_errors(rewrite(clean, tmp_path / "store", _pad_is_eos))


# --- masks and stop tokens -------------------------------------------------------------------------------------------

EOS = 2


def _pad_is_eos(ids, mask):
    """Labels are ignored where they equal the pad token, which is eos."""
    return ids, np.where(ids == EOS, 0, mask)


def _prompt_too(ids, mask):
    return ids, np.ones_like(mask)


def _prompts_after_the_first(ids, mask):
    """All from the first reply on, as tools do that look for the first marker alone."""
    return ids, np.maximum.accumulate(mask)


def _no_stop(ids, mask):
    keep = ids != EOS
    return ids[keep], mask[keep]


def _labels_shifted_twice(ids, mask):
    return ids, np.append(mask[1:], 0)


def _labels_not_shifted(ids, mask):
    return ids, np.insert(mask[:-1], 0, 0)


def _all_ignored(ids, mask):
    return ids, np.zeros_like(mask)


def _empty_replies(ids, mask):
    keep = (mask == 0) | (ids == EOS)
    return ids[keep], mask[keep]


def _stop_for_a_character(ids, mask):
    """Every other token of a reply that is also the reply's third token became eos, as with a broken conversion."""
    place = np.flatnonzero(mask)[2]
    ids[place] = EOS
    return ids, mask


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (_pad_is_eos, "stop-not-supervised"),
        (_prompt_too, "prompt-supervised"),
        (_no_stop, "stop-missing"),
        (_labels_shifted_twice, "off-by-one"),
        (_labels_not_shifted, "off-by-one"),
        (_all_ignored, "no-supervision"),
        (_empty_replies, "empty-replies"),
        (_stop_for_a_character, "stop-inside"),
    ],
)
def test_a_store_written_wrong_is_called_by_its_defect(clean: Path, tmp_path: Path, change: Callable, name: str):
    store = rewrite(clean, tmp_path / "store", change)
    assert errors(store) == {name}
    assert quick_errors(store) == {name}


def test_later_prompts_that_are_supervised_are_found(clean: Path, tmp_path: Path):
    report = audit(rewrite(clean, tmp_path / "store", _prompts_after_the_first))
    (finding,) = report.errors
    assert finding.name == "prompt-supervised"
    several = sum(len(record["messages"]) > 2 for record in records(120))
    assert finding.count == several


def test_cut_replies_are_found(tmp_path: Path, tokenizer_folder: Path):
    single = prepared(tmp_path, tokenizer_folder, [line for line in records(150) if len(line["messages"]) == 2])
    lengths = [len(ids) for split in ("train", "validation") for ids, _ in documents(single, split)]
    limit = int(np.quantile(lengths, 0.8))
    store = rewrite(single, tmp_path / "cut", lambda ids, mask: (ids[:limit], mask[:limit]))
    (finding,) = audit(store).errors
    assert (finding.name, finding.count) == ("truncated-replies", sum(length > limit for length in lengths))
    assert quick_errors(store) == {"truncated-replies"}


def test_a_few_bad_rows_warn_and_do_not_block(tmp_path: Path, tokenizer_folder: Path):
    store = prepared(tmp_path, tokenizer_folder, records(300))
    ids, mask = documents(store, "train")[5]
    [finding] = audit(rewrite(store, tmp_path / "other", more=[_pad_is_eos(ids[3:], mask[3:])])).findings
    assert (finding.name, finding.level, finding.count) == ("stop-not-supervised", "warning", 1)
    assert finding.examples[0].row == len(documents(store, "train"))


def test_everything_may_be_supervised_where_that_is_asked_for(tmp_path: Path, tokenizer_folder: Path):
    store = prepared(tmp_path, tokenizer_folder, records(60), train_on="everything")
    assert audit(store).findings == []
    assert errors(rewrite(store, tmp_path / "no stop", _no_stop)) == {"stop-missing"}


# --- templates and tokenizers ----------------------------------------------------------------------------------------


def test_a_chat_template_without_generation_markers_that_gave_no_mask_is_found(
    clean: Path, tmp_path: Path, tokenizer_folder: Path
):
    jinja = (
        "{% for m in messages %}{{ '### ' + m['role'] + ':\\n' + m['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### assistant:\\n' }}{% endif %}"
    )
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    rows = []
    for record in records(40):
        made = tokenizer.apply_chat_template(
            record["messages"], chat_template=jinja, return_assistant_tokens_mask=True, return_dict=True
        )
        rows.append((np.array(made["input_ids"]), np.array(made["assistant_masks"], np.uint8)))
    rest = iter(rows)
    store = rewrite(clean, tmp_path / "store", lambda ids, mask: next(rest, rows[0]))
    (store / "tokenizer" / "chat_template.jinja").write_text(jinja, encoding="utf-8")
    assert "no-generation-markers" in errors(store)
    assert "no-supervision" not in errors(store)


@pytest.mark.parametrize("marked", [True, False])
def test_a_role_header_that_is_learned_is_found(clean: Path, tmp_path: Path, tokenizer_folder: Path, marked: bool):
    """A store of a chat template whose generation prompt is missing, or whose markers enclose the header."""
    header = "{{ '### assistant:\\n' }}"
    reply = (
        "{% generation %}%s{{ m['content'] + eos_token }}{% endgeneration %}"
        if marked
        else "%s{{ m['content'] + eos_token }}"
    )
    jinja = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ '### user:\\n' + m['content'] + '\\n' }}"
        "{% else %}"
        + reply.replace("%s", header)
        + "{% endif %}{% endfor %}"
        + ("{% if add_generation_prompt %}" + header + "{% endif %}" if marked else "")
    )
    tokenizer = load_tokenizer(tokenizer_folder)
    rows = []
    for record in records(40):
        ids, mask = [], []
        for turn in record["messages"]:
            learned = turn["role"] == "assistant"
            end = [EOS] if learned else tokenizer.encode("\n", add_special_tokens=False).ids
            text = f"### {turn['role']}:\n{turn['content']}"
            own = [*tokenizer.encode(text, add_special_tokens=False).ids, *end]
            ids, mask = [*ids, *own], [*mask, *[int(learned)] * len(own)]
        rows.append((np.array(ids), np.array(mask, np.uint8)))
    rest = iter(rows)
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    template = {"jinja": jinja, "names": names, "special_tokens": ["<s>", "</s>"], "stop": "</s>"}
    store = rewrite(clean, tmp_path / "store", lambda ids, mask: next(rest, rows[0]), manifest={"template": template})
    assert "prompt-supervised" in errors(store)
    assert "prompt-supervised" in quick_errors(store)


def test_a_template_that_spells_newlines_loses_none(tmp_path: Path, lossy_tokenizer: Path):
    add_tokens(lossy_tokenizer, tmp_path / "t", [Token("<NL>", False)])
    assert read_contract(tmp_path / "t").newline == "lost"
    lines = [{"prompt": f"{w}と{o}の話", "response": f"{o}\n{w}です"} for w in WORDS for o in WORDS[:4]]
    assert "newline-lost" not in {
        f.name for f in audit(prepared(tmp_path, tmp_path / "t", lines, template="rinna")).findings
    }


def test_padding_in_rows_is_told(clean: Path, tmp_path: Path):
    pad = read_contract(clean / "tokenizer").pad_id
    assert pad is not None
    change = lambda ids, mask: (np.append(ids, [pad] * 3), np.append(mask, [0] * 3))  # noqa: E731
    (finding,) = audit(rewrite(clean, tmp_path / "store", change)).findings
    assert (finding.name, finding.level) == ("pad-tail", "warning")


def test_rows_that_do_not_begin_as_the_manifest_says_are_found(clean: Path, tmp_path: Path):
    assert "bos-mismatch" in errors(rewrite(clean, tmp_path / "none", manifest={"add_bos": True}))
    twice = lambda ids, mask: (np.insert(ids, 0, [1, 1]), np.insert(mask, 0, [0, 0]))  # noqa: E731
    assert "bos-mismatch" in errors(rewrite(clean, tmp_path / "twice", twice, manifest={"add_bos": True}))


def test_other_replies_than_train_on_says_are_found(clean: Path, tmp_path: Path, tokenizer_folder: Path):
    settings = {"settings": {"train_on": "last_response"}}
    store = rewrite(clean, tmp_path / "all", manifest=settings)
    assert errors(store) == quick_errors(store) == {"train-on-mismatch"}

    def first_alone(ids, mask):
        return ids, np.where(np.arange(len(ids)) <= np.flatnonzero((ids == EOS) & (mask == 1))[0], mask, 0)

    assert errors(rewrite(clean, tmp_path / "first", first_alone, manifest=settings)) == {"train-on-mismatch"}
    last = prepared(tmp_path, tokenizer_folder, records(60), train_on="last_response")
    assert audit(last).findings == []
    for train_on in ("responses", "everything"):
        less = rewrite(last, tmp_path / train_on, manifest={"settings": {"train_on": train_on}})
        assert [(f.name, f.level) for f in audit(less).findings] == [("train-on-mismatch", "warning")]


def test_newlines_that_the_tokenizer_loses_are_found(tmp_path: Path, lossy_tokenizer: Path, monkeypatch):
    monkeypatch.setattr("tsumugu.data.instructions.check_template", lambda *_: None)
    store = prepared(tmp_path, lossy_tokenizer, records(40))
    assert "newline-lost" in errors(store)
    assert "newline-lost" in quick_errors(store)


def test_a_flood_of_unknown_characters_is_found_with_the_worst(tmp_path: Path, lossy_tokenizer: Path):
    lines = [
        {"prompt": f"{n}：{word}と{other}の話", "response": f"{word}鬱薔薇{'鬱' * (n % 3)}です"}
        for n, (word, other) in enumerate(zip(WORDS * 3, (WORDS * 3)[7:], strict=False))
    ]
    store = prepared(tmp_path, lossy_tokenizer, lines, template="plain", deduplicate="exact")
    report = audit(store)
    assert {finding.name for finding in report.errors} == {"unknown-flood"}
    assert report.unknown_characters[0][0] == "鬱"
    assert {"薔", "薇"} <= {character for character, _ in report.unknown_characters}
    assert "unknown-flood" in quick_errors(store)


def test_a_marker_in_other_pieces_is_found(clean: Path, tmp_path: Path, tokenizer_folder: Path):
    """Prompt and reply encoded in one go, or by another version of the tokenizer: the text is the same."""
    tokenizer = load_tokenizer(tokenizer_folder)
    lead = tokenizer.encode("\n\n### 応答:", add_special_tokens=False).ids
    of_hash = tokenizer.encode("#", add_special_tokens=False).ids
    other = [tokenizer.token_to_id("<0x23>") if [id] == of_hash else id for id in lead]
    assert tokenizer.decode(other) == tokenizer.decode(lead)
    assert other != lead

    def change(ids, mask):
        new_ids, new_mask, place = [], [], 0
        while place < len(ids):
            if ids[place : place + len(lead)].tolist() == lead:
                new_ids, new_mask, place = new_ids + other, new_mask + [0] * len(other), place + len(lead)
            else:
                new_ids.append(ids[place])
                new_mask.append(mask[place])
                place += 1
        return np.array(new_ids), np.array(new_mask, np.uint8)

    store = rewrite(clean, tmp_path / "store", change)
    assert errors(store) == {"marker-split"}
    assert quick_errors(store) == {"marker-split"}


def test_markers_that_are_no_single_tokens_are_found(tmp_path: Path, tokenizer_folder: Path):
    """A store of ChatML whose tokenizer never got the markers."""
    lines = records(60)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    store = prepared(tmp_path, tokenizer_folder, lines)
    rows = []
    for record in lines:
        ids, mask = [], []
        for turn in record["messages"]:
            for text, flag in ((f"<|im_start|>{turn['role']}\n", 0), (turn["content"], 1), ("<|im_end|>\n", 0)):
                own = tokenizer(text, add_special_tokens=False)["input_ids"]
                ids += own
                mask += [flag if turn["role"] == "assistant" else 0] * len(own)
        rows.append((np.array(ids), np.array(mask, np.uint8)))
    rest = iter(rows)
    broken = rewrite(store, tmp_path / "broken", lambda *_: next(rest), manifest={"template": "chatml"})
    assert "marker-split" in errors(broken)


def test_another_template_than_the_manifest_names_is_found(clean: Path, tmp_path: Path):
    store = rewrite(clean, tmp_path / "store", manifest={"template": "alpaca-en"})
    assert errors(store) == {"template-mismatch"}


@pytest.fixture(scope="module")
def other_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("other") / "tokenizer"
    draw = random.Random(0)
    texts = ["".join(chr(draw.randrange(0x4E00, 0x4F80)) for _ in range(40)) for _ in range(100)]
    train_tokenizer(lambda: texts, folder, vocab_size=745, reserved=4)
    return folder


def test_a_store_with_the_tokenizer_of_another_is_found(clean: Path, tmp_path: Path, other_tokenizer: Path):
    store = rewrite(clean, tmp_path / "store")
    shutil.rmtree(store / "tokenizer")
    shutil.copytree(other_tokenizer, store / "tokenizer")
    assert "wrong-tokenizer" in errors(store)
    assert "wrong-tokenizer" in quick_errors(store)


def test_even_where_its_manifest_was_made_to_look_right(clean: Path, tmp_path: Path, other_tokenizer: Path):
    contract = read_contract(other_tokenizer)
    changed = {"tokenizer": {"fingerprint": contract.fingerprint, "vocab_size": contract.vocab_size, "files": {}}}
    store = rewrite(clean, tmp_path / "store", manifest=changed)
    shutil.rmtree(store / "tokenizer")
    shutil.copytree(other_tokenizer, store / "tokenizer")
    assert errors(store) == {"template-mismatch"}
    assert quick_errors(store) == {"template-mismatch"}


@pytest.mark.skipif(not SHARED.exists(), reason="no tokenizers beside the repository")
def test_ids_of_a_text_that_another_tokenizer_made_are_found(tmp_path: Path):
    """Nothing but the ids themselves tells."""
    tokenizers = {"rinna": "rinna-gpt2-unigram-32k", "llm-jp": "llm-jp-v2.2-48k"}
    for name, model in tokenizers.items():
        import_tokenizer(str(SHARED / "tokenizers" / f"{model}.model"), tmp_path / name)
    lines = [{"prompt": f"{n}: {text}", "response": text[::-1]} for n, text in enumerate(GOLDEN * 5) if text.strip()]
    store = prepared(tmp_path, tmp_path / "rinna", lines, template="plain")
    contract = read_contract(tmp_path / "llm-jp")
    changed = {"tokenizer": {"fingerprint": contract.fingerprint, "vocab_size": contract.vocab_size, "files": {}}}
    broken = rewrite(store, tmp_path / "broken", manifest=changed)
    shutil.rmtree(broken / "tokenizer")
    shutil.copytree(tmp_path / "llm-jp", broken / "tokenizer")
    assert "wrong-tokenizer" not in errors(store)
    assert "wrong-tokenizer" in errors(broken)


def test_a_model_with_another_tokenizer_is_found(clean: Path, other_tokenizer: Path, tokenizer_folder: Path):
    assert audit(clean, model=tokenizer_folder).findings == []
    assert {finding.name for finding in audit(clean, model=other_tokenizer).errors} == {"wrong-tokenizer"}


def test_a_model_whose_tokenizer_was_extended_is_right(tmp_path: Path, tokenizer_folder: Path):
    add_tokens(tokenizer_folder, tmp_path / "tokenizer", [Token("<|im_start|>", True), Token("<|im_end|>", True)])
    store = prepared(tmp_path, tmp_path / "tokenizer", records(40), template="chatml")
    assert audit(store, model=tokenizer_folder).findings == []


def test_ids_that_the_tokenizer_does_not_have_are_found(clean: Path, tmp_path: Path):
    store = rewrite(clean, tmp_path / "store", lambda ids, mask: (np.where(ids == ids[4], 600, ids), mask))
    assert "ids-out-of-range" in errors(store)


# --- copies ----------------------------------------------------------------------------------------------------------


def test_a_set_that_is_read_twice_is_found(tmp_path: Path, tokenizer_folder: Path):
    store = prepared(tmp_path, tokenizer_folder, records(60), copies=2)
    (finding,) = audit(store).errors
    assert finding.name == "duplicates"
    assert finding.share == 0.5


def test_validation_rows_among_the_training_rows_are_found(clean: Path, tmp_path: Path):
    held_out = documents(clean, "validation")
    (finding,) = audit(rewrite(clean, tmp_path / "store", more=held_out)).errors
    assert (finding.name, finding.count, finding.of) == ("validation-overlap", len(held_out), len(held_out))


def test_validation_prompts_among_the_training_rows_are_told(clean: Path, tmp_path: Path):
    held_out = []
    for ids, mask in documents(clean, "validation"):
        first = np.flatnonzero(mask)[0]
        held_out.append((np.array([*ids[:first], *range(300, 309), EOS]), np.array([*mask[:first], *[1] * 10])))
    (finding,) = audit(rewrite(clean, tmp_path / "store", more=held_out)).findings
    assert (finding.name, finding.level, finding.count) == ("validation-prompts", "warning", len(held_out))


# --- text ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def text_store(tmp_path: Path, tokenizer_folder: Path) -> Path:
    path = tmp_path / "text.jsonl"
    lines = [{"text": f"{number}日目。" + "と".join(random.Random(number).sample(WORDS, 9))} for number in range(80)]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    source = Source(name="only", path=str(path))
    config = PrepareConfig(
        sources=[source], tokenizer=str(tokenizer_folder), output=str(tmp_path / "text"), workers=1, add_eos=True
    )
    prepare(config)
    return tmp_path / "text"


def test_clean_text_has_no_finding(text_store: Path):
    report = audit(text_store)
    assert report.findings == []
    assert report.splits["train"].supervised_tokens == report.splits["train"].tokens


def test_empty_documents_of_a_text_are_found(text_store: Path, tmp_path: Path):
    store = rewrite(text_store, tmp_path / "store", lambda ids, mask: (ids[-1:], mask[-1:]))
    assert "empty-documents" in errors(store)
    assert "empty-documents" in quick_errors(store)


def test_the_command_exits_with_1(clean: Path, tmp_path: Path, capsys):
    assert main(["audit", str(clean)]) == 0
    assert "no finding" in capsys.readouterr().out
    assert main(["audit", str(rewrite(clean, tmp_path / "store", _pad_is_eos))]) == 1
    out = capsys.readouterr().out
    assert "error: stop-not-supervised" in out
    assert "mend: " in out

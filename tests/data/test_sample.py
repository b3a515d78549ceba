"""The built-in corpus: as much, as many kinds and as little repetition as it promises."""

import json
import re
from collections import Counter
from importlib import resources
from itertools import combinations

import pytest

_SAMPLE = resources.files("tsumugu") / "sample"


def _read(name: str) -> list[dict]:
    return [json.loads(line) for line in (_SAMPLE / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


JAPANESE, ENGLISH, INSTRUCTIONS = _read("japanese"), _read("english"), _read("instructions")


def _share(pattern: str, text: str) -> float:
    return len(re.findall(pattern, text)) / len(text)


def _sentences(texts: list[str]) -> list[str]:
    return [sentence for text in texts for sentence in re.findall(r"[^。！？\n]+[。！？]*", text)]


def _shingles(text: str) -> set[str]:
    return {text[start : start + 5] for start in range(len(text) - 4)}


def test_japanese_is_large_enough():
    assert sum(len(record["text"]) for record in JAPANESE) >= 60_000
    assert len(JAPANESE) >= 150


def test_japanese_is_of_many_kinds():
    kinds = Counter(record["kind"] for record in JAPANESE)
    assert len(kinds) >= 10
    assert {"encyclopaedia", "narrative", "dialogue", "howto", "science", "letter", "list"} <= set(kinds)
    assert max(kinds.values()) <= len(JAPANESE) / 5


@pytest.mark.parametrize(
    ("what", "documents"),
    [
        (r"[0-9]", 30),
        (r"[A-Za-z]{2,}", 10),
        (r"[\U0001f300-\U0001faff]", 3),
        (r"[\uff66-\uff9f]{2,}", 3),  # half-width kana
        (r"\S\n\n\S", 30),  # several paragraphs
        (r"「.+」", 20),
    ],
)
def test_japanese_has_what_real_text_has(what: str, documents: int):
    assert sum(bool(re.search(what, record["text"])) for record in JAPANESE) >= documents


def test_japanese_is_japanese_and_english_english():
    for record in JAPANESE:
        assert _share(r"[\u3041-\u30ff\uff66-\uff9f]", record["text"]) > 0.15, record["id"]
    for record in ENGLISH:
        assert _share(r"[A-Za-z ]", record["text"]) > 0.75, record["id"]


def test_no_sentence_stands_twice():
    long = [sentence.strip() for sentence in _sentences([record["text"] for record in JAPANESE])]
    counts = Counter(sentence for sentence in long if len(sentence) >= 12)
    assert [sentence for sentence, count in counts.items() if count > 1] == []


@pytest.mark.parametrize("records", [JAPANESE, ENGLISH], ids=["japanese", "english"])
def test_no_document_resembles_another(records: list[dict]):
    assert len({record["id"] for record in records}) == len(records)
    shingles = {record["id"]: _shingles(record["text"]) for record in records}
    for (one, ones), (other, others) in combinations(shingles.items(), 2):
        assert len(ones & others) < 0.3 * min(len(ones), len(others)), (one, other)


def test_english_is_large_enough():
    assert sum(len(record["text"]) for record in ENGLISH) >= 20_000


def test_instructions_are_many_and_a_quarter_has_an_input():
    assert len(INSTRUCTIONS) >= 240
    assert sum(bool(record["input"]) for record in INSTRUCTIONS) >= len(INSTRUCTIONS) / 4
    for record in INSTRUCTIONS:
        assert set(record) == {"instruction", "input", "output"}
        assert record["instruction"].strip()
        assert record["output"].strip()
        assert all(value == value.strip() for value in record.values())


def test_no_question_and_no_answer_stands_twice():
    assert len({(record["instruction"], record["input"]) for record in INSTRUCTIONS}) == len(INSTRUCTIONS)
    assert len({record["output"] for record in INSTRUCTIONS}) == len(INSTRUCTIONS)


def test_instructions_are_no_template_with_words_filled_in():
    digits = re.compile(r"「[^」]*」|[0-9０-９]+")
    forms = Counter(digits.sub("_", record["instruction"]) for record in INSTRUCTIONS if not record["input"])
    assert max(forms.values()) <= 5, forms.most_common(3)

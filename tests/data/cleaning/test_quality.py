"""Measures of quality equal, to the last bit, a slow count in plain Python after the published definitions."""

import gzip
import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support.data import AOZORA

import tsumugu
from tsumugu.data.cleaning import code_points
from tsumugu.data.cleaning.quality import character_measures, measures

SAMPLE = Path(tsumugu.__file__).parent / "sample"
END_MARKS = "。．！？!?"


def reference(text: str) -> dict[str, float]:
    """The measures of a document, counted one character at a time."""
    kinds = Counter(kind(character) for character in text)
    japanese = kinds["hiragana"] + kinds["katakana"] + kinds["kanji"] + kinds["mark"]
    scripts = kinds["hiragana"] + kinds["katakana"] + kinds["kanji"] + kinds["latin"] + kinds["letter"]
    lines = [list(sentences_of(line)) for line in text.split("\n")]
    sentences = [sentence for line in lines for sentence in line if sentence.strip()]
    paragraphs = ["".join(line) for line in lines if "".join(line).strip()]
    found = {
        "letters": len(text),
        "japanese_letters": japanese,
        "hiragana": share(kinds["hiragana"], japanese),
        "katakana": share(kinds["katakana"], japanese),
        "japanese": share(japanese, len(text)),
        "latin": share(kinds["latin"], scripts),
        "mean_sentence": share(sum(map(len, sentences)), len(sentences)),
        "longest_sentence": max(map(len, sentences), default=0),
        "ellipsis": share(sum(sentence.strip()[-1] in "…・" for sentence in sentences), len(sentences)),
    }
    for name, items in (("paragraph", paragraphs), ("sentence", sentences)):
        repetitions = [(item, count - 1) for item, count in Counter(items).items()]
        found[f"duplicate_{name}s"] = share(sum(count for _, count in repetitions), len(items))
        repeated_characters = sum(len(item) * count for item, count in repetitions)
        found[f"duplicate_{name}_characters"] = share(repeated_characters, sum(map(len, items)))
    for size in range(2, 11):
        ngrams = Counter(text[start : start + size] for start in range(len(text) - size + 1))
        if size <= 4:
            found[f"top_{size}gram"] = share(max(ngrams.values(), default=0), ngrams.total())
        else:
            found[f"duplicate_{size}gram"] = share(sum(count > 1 for count in ngrams.values()), len(ngrams))
    return found


def kind(character: str) -> str:
    if "ぁ" <= character <= "ゖ":
        return "hiragana"
    if "ァ" <= character <= "ヺ":
        return "katakana"
    if character in "々〇〻" or "\u3400" <= character <= "\u9fff" or "\uf900" <= character <= "\ufaff":
        return "kanji"
    if character in "、，。．！？":
        return "mark"
    if not character.isalpha():
        return "other"
    if character == "µ":  # a Greek letter among the Latin ones
        return "letter"
    latin = character < "\u0250" or "\u1e00" <= character < "\u1f00" or "Ａ" <= character <= "ｚ"
    return "latin" if latin else "letter"


def sentences_of(line: str) -> Iterator[str]:
    """What stands between end marks, each with the first of its end marks."""
    sentence = ""
    for character in line:
        if character not in END_MARKS:
            sentence += character
        elif sentence:
            yield sentence + character
            sentence = ""
    if sentence:
        yield sentence


def share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def assert_as_reference(texts: list[str]) -> None:
    found = measures(texts)
    expected = [reference(text) for text in texts]
    assert set(found) == set(expected[0])
    for name, values in found.items():
        np.testing.assert_array_equal(values, [document[name] for document in expected], err_msg=name)


@pytest.mark.parametrize("characters", ["ab", "あア漢、。\n", "aあ。！\n 　…・é𠮷😀\0Ωｱ", "あいうえおかきくけこ\n。"])
def test_random_texts(characters: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(code_points, "_BLOCK", 500)  # some blocks of many documents, some documents beyond one block
    choice = random.Random(characters)
    lengths = [*range(13), *(choice.randrange(900) for _ in range(60))]
    texts = ["".join(choice.choices(characters, k=length)) for length in lengths]
    choice.shuffle(texts)
    assert_as_reference(texts)


def test_texts_with_long_repetitions():
    choice = random.Random(0)
    pieces = ["".join(choice.choices("あいうえお漢字。\n", k=length)) for length in (3, 7, 9, 10, 11, 40)]
    assert_as_reference(["".join(choice.choices(pieces, k=30)) for _ in range(40)])


def test_every_character_has_its_class():
    codes = [code for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    for first in range(0, len(codes), 4096):
        text = "".join(map(chr, codes[first : first + 4096]))
        kinds = Counter(map(kind, text))
        found = {name: values[0] for name, values in character_measures([text]).items()}
        assert found["japanese_letters"] == kinds["hiragana"] + kinds["katakana"] + kinds["kanji"] + kinds["mark"]
        scripts = kinds["hiragana"] + kinds["katakana"] + kinds["kanji"] + kinds["latin"] + kinds["letter"]
        assert found["latin"] == share(kinds["latin"], scripts)
        assert found["hiragana"] == share(kinds["hiragana"], found["japanese_letters"])
        assert found["katakana"] == share(kinds["katakana"], found["japanese_letters"])


def test_the_built_in_corpora():
    for name in ("japanese", "english"):
        lines = (SAMPLE / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        assert_as_reference([json.loads(line)["text"] for line in lines])


def test_real_prose():
    if not AOZORA.exists():
        pytest.skip("the Aozora corpus is not here")
    with gzip.open(AOZORA, "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line, _ in zip(file, range(60), strict=False)]
    assert_as_reference([text for text in texts if len(text) < 30_000])


def test_hand_counted_document():
    text = "今日は晴れ！！明日も晴れ…\n\n今日は晴れ！"
    found = {name: values[0] for name, values in measures([text]).items()}
    assert found["letters"] == 21
    assert found["japanese_letters"] == 18  # all but … and two newlines
    assert found["mean_sentence"] == pytest.approx((6 + 6 + 6) / 3)  # the second ！ belongs to no sentence
    assert found["ellipsis"] == pytest.approx(1 / 3)
    assert found["duplicate_sentences"] == pytest.approx(1 / 3)
    assert found["duplicate_paragraphs"] == 0  # 今日は晴れ！明日も晴れ… and 今日は晴れ！; the blank line is none
    assert found["top_2gram"] == pytest.approx(3 / 20)  # 晴れ
    assert found["duplicate_5gram"] == pytest.approx(2 / 15)  # 今日は晴れ and 日は晴れ！, in 17 places

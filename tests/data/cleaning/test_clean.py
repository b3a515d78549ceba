"""A cleaner mends, drops with the rule's name as the reason, masks, and does only what the language allows."""

import gzip
import json
import math
import random
import sys
from pathlib import Path
from typing import Any

import pytest
from support.data import AOZORA

import tsumugu
from tsumugu.config import CleanConfig, PrepareConfig, Source, SourceCleanConfig
from tsumugu.data.cleaning.clean import Cleaned, Cleaner
from tsumugu.data.cleaning.quality import measures
from tsumugu.errors import UserError

SAMPLE = Path(tsumugu.__file__).parent / "sample"

# Swallow Corpus v1: what a document must fulfil (Okazaki et al. 2024 and the published code).
SWALLOW = {
    "min_letters": 400,
    "min_japanese_letters": 400,
    "min_hiragana": 0.2,
    "max_katakana": 0.5,
    "min_japanese": 0.5,
    "min_mean_sentence": 20,
    "max_mean_sentence": 90,
    "max_longest_sentence": 200,
    "max_ellipsis": 0.2,
    "max_duplicate_paragraphs": 0.30,
    "max_duplicate_paragraph_characters": 0.20,
    "max_duplicate_sentences": 0.30,
    "max_duplicate_sentence_characters": 0.20,
    "max_top_2gram": 0.20,
    "max_top_3gram": 0.18,
    "max_top_4gram": 0.16,
    "max_duplicate_5gram": 0.15,
    "max_duplicate_6gram": 0.14,
    "max_duplicate_7gram": 0.13,
    "max_duplicate_8gram": 0.12,
    "max_duplicate_9gram": 0.11,
    "max_duplicate_10gram": 0.10,
}


def clean(text: str, language: Any = "ja", **rules: Any) -> Cleaned:
    return Cleaner(CleanConfig(**{"rules": "swallow"} | rules), language)([text])[0]


def prose() -> str:
    """Text that no rule objects to: sentences of random hiragana and kanji."""
    choice = random.Random(0)
    pool = "あいうえおかきくけこさしすせそたちつてとなにぬねのはひふへほまみむめも" + "漢字文章語句意味言葉" * 2
    return "\n".join("".join(choice.choices(pool, k=39)) + "。" for _ in range(20))


OFF: dict[str, Any] = {key: 0 if key.startswith("min_") else math.inf for key in SWALLOW if not key.endswith("gram")}
OFF |= {"max_top_ngrams": [1] * 3, "max_duplicate_ngrams": [1] * 6}
MANY = "".join(chr(0x4E00 + number) for number in range(100))  # a hundred characters, none twice


# A document that fails and one that just does not.
EDGES = {
    "min_letters": ("a" * 399, "a" * 400),
    "min_japanese_letters": ("あ" * 399 + "a…ー", "あア漢。" * 100),
    "min_hiragana": ("あ" * 19 + "漢ア、。" * 20 + "漢", "あ" * 20 + "漢ア、。" * 20),
    "max_katakana": ("ア" * 51 + "あ" * 49, "ア" * 50 + "あ" * 50),
    "min_japanese": ("あ" * 49 + "a" * 51, "あ" * 50 + "\n" * 50),
    "min_mean_sentence": ("あ" * 18 + "。", "あ" * 19 + "。"),
    "max_mean_sentence": ("あ" * 91, "あ" * 90),
    "max_longest_sentence": ("い。" + "あ" * 201, "い。" + "あ" * 200),
    "max_ellipsis": ("あ…\nい・\n" + "う。" * 7, "あ…\nい・\n" + "う。" * 8),
    "max_duplicate_paragraphs": ("い\n" * 5 + "\n".join(MANY[:8]), "い\n" * 4 + "\n".join(MANY[:6])),
    "max_duplicate_paragraph_characters": (("い" * 21 + "\n") * 2 + "あ" * 58, "い\nい\nあああ"),
    "max_duplicate_sentences": (
        "あ。" * 5 + "い。う。え。お。か。き。く。け。",
        "あ。" * 4 + "い。う。え。お。か。き。",
    ),
    "max_duplicate_sentence_characters": (("い" * 20 + "。") * 2 + "あ" * 58, ("い" * 19 + "。") * 2 + "あ" * 60),
}
for size, percent in ((2, 20), (3, 18), (4, 16)):  # of 100 N-grams
    EDGES[f"max_top_{size}gram"] = tuple(
        "あ" * (count + size - 1) + MANY[: 100 - count] for count in (percent + 1, percent)
    )
for size, percent in zip(range(5, 11), range(15, 9, -1), strict=True):  # of 100 different N-grams
    EDGES[f"max_duplicate_{size}gram"] = tuple(MANY + MANY[: count + size - 1] for count in (percent + 1, percent))


@pytest.mark.parametrize("reason", SWALLOW)
def test_each_rule_drops_at_its_threshold_and_can_be_switched_off(reason: str):
    fails, passes = EDGES[reason]
    rules = dict(OFF)
    if reason.endswith("gram"):
        size = int("".join(filter(str.isdigit, reason)))
        key, first = ("max_top_ngrams", 2) if size < 5 else ("max_duplicate_ngrams", 5)
        rules[key] = [SWALLOW[reason] if place == size else 1 for place in range(first, first + len(OFF[key]))]
    else:
        rules[reason] = SWALLOW[reason]
    assert clean(fails, **rules) == (fails, reason)
    assert clean(passes, **rules) == (passes, None)
    assert clean(fails, **OFF) == (fails, None)
    assert clean(fails, rules="normalize") == (fails, None)
    assert clean(prose()) == (prose(), None)


def test_thresholds_are_swallows():
    texts = [json.loads(line)["text"] for line in (SAMPLE / "japanese.jsonl").read_text(encoding="utf-8").splitlines()]
    if AOZORA.exists():
        with gzip.open(AOZORA, "rt", encoding="utf-8") as file:
            texts += [json.loads(line)["text"][:3000] for line, _ in zip(file, range(1000), strict=False)]
    cleaned = Cleaner(CleanConfig(rules="swallow"), "ja")(texts)
    found = measures([document.text for document in cleaned])
    kept = 0
    for index, document in enumerate(cleaned):
        values = {reason: found[reason[4:]][index] for reason in SWALLOW}
        failed = {
            reason
            for reason, limit in SWALLOW.items()
            if (values[reason] < limit if reason.startswith("min_") else values[reason] > limit)
        }
        assert document.dropped in failed if failed else document.dropped is None
        kept += not failed
    assert kept or not AOZORA.exists()


def test_rules_none_touches_nothing():
    texts = ["Ａ\r\n\x00ｶﾞ", "縺ゅ≠縺ゅ≠縺ｦ縺ｦ縺ｦ", ""]
    cleaner = Cleaner(CleanConfig(rules="none", mask=["email"], hojichar=[{"name": "Nothing"}]), "ja")
    assert cleaner(texts) == [Cleaned(text, None) for text in texts]
    assert cleaner([]) == Cleaner(CleanConfig(rules="swallow"), "ja")([]) == []


def test_normalize_drops_only_what_cannot_be_read():
    assert clean("Ａ", rules="normalize") == ("A", None)
    lost = "あいうえお".encode("cp932").decode("utf-8", "replace")
    assert clean(lost, rules="normalize").dropped == "mojibake"
    assert clean(lost, rules="normalize", mojibake="keep") == (lost, None)
    misread = "あいうえおかきくけこ".encode().decode("latin-1")
    assert clean(misread, rules="normalize") == ("あいうえおかきくけこ", None)
    assert clean(misread, rules="normalize", mojibake="drop").dropped == "mojibake"


def test_languages_that_are_not_the_sources():
    english = "The quick brown fox jumps over the lazy dog. " * 20
    chinese = "我们今天在这里讨论语言模型的训练数据。" * 30
    code = "def f(x):\n    return x\n"
    assert clean(english).dropped == "min_japanese_letters"
    assert clean(english, min_japanese_letters=0, min_hiragana=0).dropped == "min_japanese"
    assert clean(chinese).dropped == "min_hiragana"
    assert clean(english, "en") == (english, None)
    assert clean(prose(), "en").dropped == "min_latin"
    assert clean("Привет, как дела?", "en").dropped == "min_latin"
    assert clean(prose(), "en", min_latin=0).dropped is None
    assert clean("１２３ 456", "en", min_latin=0.5).dropped == "min_latin"
    assert clean(code, "code") == (code, None)
    assert clean(prose(), "code").dropped is None


def test_batches_are_as_single_documents():
    texts = [*(text for pair in EDGES.values() for text in pair), prose(), "donâ€™t", "Ａ\r", ""]
    cleaner = Cleaner(CleanConfig(rules="swallow", mask=["phone"]), "ja")
    assert cleaner(texts) == [cleaner([text])[0] for text in texts]


def test_masking_comes_after_the_rules():
    text = prose() + "\n電話０３-1234-5678とa@example.com"
    assert clean(text, mask=["phone", "email"]).text == prose() + "\n電話<phone>と<email>"
    assert clean(text, mask=["email"]).text == prose() + "\n電話03-1234-5678と<email>"
    assert clean("a@example.com", mask=["email"]) == ("<email>", "min_letters")
    assert clean("a@example.com", "code", rules="normalize", mask=["email"]).text == "<email>"


def reason_above(limit: float, part: int, whole: int) -> str | None:
    return "max_ng_words" if part / whole > limit and limit != 1 else None  # 1 switches a share off


def ng_characters(text: str, words: list[str]) -> int:
    """Characters of the longest matches from left to right."""
    covered = place = 0
    while place < len(text):
        length = max((len(word) for word in words if text.startswith(word, place)), default=0)
        covered += length
        place += length or 1
    return covered


def test_ng_words_are_counted_as_longest_matches(tmp_path: Path):
    choice = random.Random(3)
    words = ["".join(choice.choices("あいうえ", k=choice.randrange(1, 6))) for _ in range(12)] + ["Ｎ\tＧ", "𠮷野"]
    (tmp_path / "ng.txt").write_text("\n".join(["", *words, ""]), encoding="utf-8")
    texts = ["".join(choice.choices("あいうえおNG\t𠮷野", k=choice.randrange(1, 80))) for _ in range(300)]
    normal = [word.translate(str.maketrans("ＮＧ", "NG")) for word in words]
    for limit in (0, 0.3, 0.5, 0.7, 1):
        rules = CleanConfig(rules="normalize", ng_words=str(tmp_path / "ng.txt"), max_ng_words=limit)
        ja = [document.dropped for document in Cleaner(rules, "ja")(texts)]
        letters = [max(int(count), 1) for count in measures(texts)["japanese_letters"]]
        covered = [ng_characters(text, normal) for text in texts]
        assert any(
            part > whole for part, whole in zip(covered, letters, strict=True)
        )  # N and G are no Japanese letters
        assert ja == [reason_above(limit, *pair) for pair in zip(covered, letters, strict=True)]
        en = [document.dropped for document in Cleaner(rules, "en")(texts)]  # which leaves full-width words as they are
        assert en == [reason_above(limit, ng_characters(text, words), len(text)) for text in texts]


def test_a_file_of_ng_words_that_cannot_be_used(tmp_path: Path):
    with pytest.raises(UserError, match=r"clean\.ng_words: cannot read .*nowhere\.txt: No such file"):
        Cleaner(CleanConfig(rules="normalize", ng_words=str(tmp_path / "nowhere.txt")), "ja")
    (tmp_path / "binary.txt").write_bytes("死ね".encode("cp932"))
    with pytest.raises(UserError, match="it is not UTF-8"):
        Cleaner(CleanConfig(rules="normalize", ng_words=str(tmp_path / "binary.txt")), "ja")
    (tmp_path / "empty.txt").write_text("\n\n", encoding="utf-8")
    with pytest.raises(UserError, match="holds no word"):
        Cleaner(CleanConfig(rules="normalize", ng_words=str(tmp_path / "empty.txt")), "ja")


def test_hojichar_filters():
    filters = [{"name": "DocumentLengthFilter", "max_doc_len": 100}, {"name": "DiscardAds", "max_allowed_num": 1}]
    cleaner = Cleaner(CleanConfig(rules="normalize", hojichar=[*filters, {"name": "MaskPersonalInformation"}]), "ja")
    assert cleaner(["あ" * 101, "営業時間 よくある質問 営業時間", "電話は06-1234-5678。"]) == [
        ("あ" * 101, "hojichar:DocumentLengthFilter"),
        ("営業時間 よくある質問 営業時間", "hojichar:DiscardAds"),
        ("電話は06-1234-XXXX。", None),
    ]


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"name": "DiscardAd"}, r"clean.hojichar\[0\]: no filter of HojiChar is named DiscardAd \(known: .*DiscardAds"),
        ({"name": "re"}, "no filter of HojiChar is named re"),
        ({"name": "hojichar.filters.document_filters.DiscardAds"}, "no filter of HojiChar is named hojichar"),
        ({"name": "DiscardAds", "limit": 1}, r"DiscardAds has no argument limit \(its arguments: dict_path, max_allow"),
        ({"name": "DiscardAds", "p": 0.5}, "DiscardAds has no argument p"),
        ({"name": "DiscardAds", "dict_path": "/nowhere"}, "DiscardAds: .*No such file"),
    ],
)
def test_hojichar_filters_that_do_not_exist(item: dict, message: str):
    with pytest.raises(UserError, match=message):
        Cleaner(CleanConfig(rules="normalize", hojichar=[item]), "ja")


@pytest.mark.parametrize(
    ("item", "error"),
    [({"name": "DocumentLengthFilter", "max_doc_len": "9"}, "TypeError: '<' not supported between instances of 'str'")],
)
def test_hojichar_filters_that_fail_name_the_document(item: dict, error: str):
    cleaner = Cleaner(CleanConfig(rules="normalize", hojichar=[item]), "ja")
    with pytest.raises(UserError) as caught:
        cleaner(["あ", "い"], ["a.jsonl, line 7", "a.jsonl, line 9"])
    assert caught.value.message.startswith(f"a.jsonl, line 7: HojiChar's DocumentLengthFilter fails ({error}")
    assert "\n" not in str(caught.value)


def test_hojichar_is_not_installed(monkeypatch: pytest.MonkeyPatch):
    for name in ("hojichar", "hojichar.core.filter_interface", "hojichar.filters"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match="pip install hojichar"):
        Cleaner(CleanConfig(rules="normalize", hojichar=[{"name": "DiscardAds"}]), "ja")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_hiragana": -0.1}, "clean.min_hiragana is -0.1"),
        ({"max_longest_sentence": math.nan}, "clean.max_longest_sentence is nan"),
        ({"max_top_ngrams": [0.2]}, "clean.max_top_ngrams is .*use 3 shares"),
        ({"max_duplicate_ngrams": [0.1] * 5 + [-1]}, "clean.max_duplicate_ngrams is .*use 6 shares"),
        ({"hojichar": [{"max_doc_len": 3}]}, r"clean.hojichar\[0\] has no name"),
    ],
)
def test_settings_that_mean_nothing(settings: dict, message: str):
    with pytest.raises(UserError, match=message):
        CleanConfig(**settings)


def test_a_source_changes_single_rules():
    changes = SourceCleanConfig(min_letters=0, punctuation=False)
    source = Source(name="web", path="web.jsonl", clean=changes)
    config = PrepareConfig(
        sources=[source], tokenizer="t", output="o", clean=CleanConfig(rules="swallow", min_hiragana=0.1)
    )
    rules = config.clean_of(source)
    assert (rules.rules, rules.min_letters, rules.punctuation, rules.min_hiragana) == ("swallow", 0, False, 0.1)

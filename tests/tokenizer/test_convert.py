"""Conversion of SentencePiece models of every kind, against SentencePiece itself."""

import random

import pytest
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from tsumugu.tokenizer.contract import GOLDEN
from tsumugu.tokenizer.convert import compare, processor, to_fast
from tsumugu.tokenizer.load import without_specials

OWN = ["<nl>", "\n", "==>", "である"]
# kind, rule, dummy prefix, extra spaces removed, byte fallback, user-defined pieces
KINDS = [
    ("unigram", "identity", True, True, True, []),
    ("unigram", "identity", True, False, False, OWN),
    ("unigram", "identity", False, True, False, []),
    ("unigram", "identity", False, False, True, OWN),
    ("unigram", "nmt_nfkc", True, True, False, []),
    ("unigram", "nmt_nfkc", True, True, True, ["\n"]),
    ("unigram", "nmt_nfkc", True, False, True, []),
    ("unigram", "nfkc", False, True, True, []),
    ("unigram", "nfkc", False, False, False, OWN),
    ("bpe", "identity", True, True, False, []),
    ("bpe", "identity", True, False, True, OWN),
    ("bpe", "identity", False, False, True, ["\n"]),
    ("bpe", "nmt_nfkc", True, True, False, OWN),
    ("bpe", "nfkc", False, False, True, []),
]


@pytest.fixture(scope="module")
def models(train_plainly) -> dict[tuple, ModelProto]:
    names = ("model_type", "normalization_rule_name", "add_dummy_prefix", "remove_extra_whitespaces", "byte_fallback")
    return {
        str(kind): train_plainly(**dict(zip(names, kind[:5], strict=True)), user_defined_symbols=kind[5])
        for kind in KINDS
    }


def spelt(texts: list[str]) -> list[str]:
    """More texts, around what converters get wrong: control pieces, user-defined pieces, runs, combining characters."""
    draw = random.Random(3)
    parts = ["<nl>", "==>", "である", "\n", "</s>", "<unk>", "<s>", "<0x41>", " ", "▁", "  ", "ー", "ーー", "wx", "Ａ", "か",
             "\u3099", "ﾞ", "e", "\u0301", "\u0323", "\u0338", "\u200d", "ﷺ", "㌔", "\u1100", "\u1161", "\u11a8", "İ", "ß", "\r"]  # fmt: skip
    mixed = ["".join(draw.choices(parts, k=draw.randrange(1, 12))) for _ in range(1000)]
    runs = [char * count for char in "ー. =あa▁" for count in range(1, 20)]
    return [*GOLDEN, *texts[:500], *mixed, *runs]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind)).replace("\n", "n"))
def test_ids_and_text_are_sentencepieces_own(kind: tuple, models: dict, texts: list[str]):
    model = models[str(kind)]
    tokenizer, engine, strings = to_fast(model), processor(model), spelt(texts)
    made = compare(model, without_specials(tokenizer), strings)
    assert made.strings == len(strings)
    assert made.ties <= (len(strings) / 20 if kind[0] == "unigram" else 0)
    if kind[3] and not kind[4]:  # see convert._decoder
        strings = [text for text in strings if not text.strip().startswith("▁")]
    ids = engine.encode(strings)
    decoded = [tokenizer.decode(of_text, skip_special_tokens=False) for of_text in ids]
    assert decoded == engine.decode(ids)

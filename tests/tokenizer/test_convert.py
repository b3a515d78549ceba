"""Conversion of SentencePiece models of every kind, against SentencePiece itself."""

import itertools
import random
import sys
import unicodedata
from pathlib import Path

import pytest
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from tsumugu.errors import UserError
from tsumugu.tokenizer.contract import GOLDEN
from tsumugu.tokenizer.convert import NORMAL, compare, processor, to_fast
from tsumugu.tokenizer.load import without_specials
from tsumugu.tokenizer.normalize import read_charsmap

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
    ("unigram", "nmt_nfkc_cf", True, True, False, []),
    ("bpe", "nfkc_cf", False, False, True, OWN),
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
    parts = [
        *("<nl>", "==>", "である", "\n", "</s>", "<unk>", "<s>", "<0x41>", " ", "▁", "  ", "ー", "ーー", "wx", "Ａ")
    ]
    parts += [*"かe\u3099ﾞ\u0301\u0323\u0338\u200dﷺ㌔\u1100\u1161\u11a8İß\r\0"]
    mixed = ["".join(draw.choices(parts, k=draw.randrange(1, 12))) for _ in range(700)]
    runs = [char * count for char in "ー. =あa▁" for count in range(1, 20)]
    return [*GOLDEN, *texts[:400], *mixed, *runs]


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


def test_a_bpe_model_may_be_as_large_as_llamas(models: dict, texts: list[str]):
    """Its scores are minus the ranks of its pieces."""
    model = ModelProto()
    model.CopyFrom(models[str(("bpe", "identity", True, True, False, []))])
    for piece in model.pieces:
        piece.score -= 31_000 if piece.type == NORMAL else 0
    compare(model, without_specials(to_fast(model)), texts[:100])


def differing(model: ModelProto, texts: list[str]) -> list[str]:
    engine, normalize = processor(model), to_fast(model).normalizer.normalize_str
    return [text for text in texts if engine.normalize(text) != normalize(text)]


@pytest.mark.parametrize("kind", [str(KINDS[place]) for place in (4, 8, 15)])
def test_normalised_text_is_sentencepieces_for_every_character_and_entry_and_for_mixtures(kind: str, models: dict):
    model = models[kind]
    entries = read_charsmap(model.normalizer_spec.precompiled_charsmap)
    draw = random.Random(11)
    characters = [chr(code) for code in (*range(0xD800), *range(0xE000, sys.maxunicode + 1))]
    # a hundred to a text, apart, so that each is met alone
    apart = ["x".join(characters[start : start + 100]) for start in range(0, len(characters), 100)]
    several = sorted(entry for entry in entries if len(entry) > 1)
    pools = [
        [entry[0] for entry in several],
        sorted({char for entry in several for char in entry[1:]}),
        [char for char in characters if unicodedata.category(char)[0] == "M"],
        [entry for entry in entries if len(entry) == 1],
        [char for entry in several for char in entry if 0x10500 < ord(char) < 0x1CC00],  # the youngest scripts
        [*" \r\n\t\u200d\ufe0f\u3099ﾞﾟかカｶe日本\0"],
        characters,
    ]
    mixtures = ["".join(draw.choice(draw.choice(pools)) for _ in range(draw.randrange(1, 14))) for _ in range(8000)]
    assert differing(model, [*apart, *(f"x{entry}y" for entry in draw.sample(several, 8000)), *mixtures]) == []


def test_folding_case_is_sentencepieces_for_every_combining_character_behind_every_base(models: dict):
    model = models[str(KINDS[14])]
    several = [entry for entry in read_charsmap(model.normalizer_spec.precompiled_charsmap) if len(entry) > 1]
    marks = sorted({char for entry in several for char in entry[1:] if unicodedata.category(char)[0] == "M"})
    pairs = ["x".join(base + mark for mark in marks) for base in sorted({entry[0] for entry in several})]
    # the iota subscript is folded alone, and composed behind these; I with a dot is not folded
    greek = sorted({char for entry in several if "\u0345" in entry for char in entry[1:]})
    tails = ["".join(tail) for count in range(4) for tail in itertools.product(greek, repeat=count)]
    bases = [*sorted({entry[0] for entry in several if "\u0345" in entry}), "ᾳ", "Ι", "ͺ", "か", " ", "\n", "\0"]
    dots = ["".join(text) for count in range(5) for text in itertools.product("IiⅠ\u0130\u0307\u0345", repeat=count)]
    runs = ["x".join(base + tail for tail in tails) for base in bases]
    assert differing(model, [*pairs, *runs, *(base + tail for base in ("", "Α") for tail in tails), *dots]) == []


def test_the_charsmap_is_read_as_sentencepiece_reads_it(models: dict):
    model = models[str(KINDS[8])]
    entries, engine = read_charsmap(model.normalizer_spec.precompiled_charsmap), processor(model)
    for key in random.Random(2).sample(sorted(entries), 5000):
        assert engine.normalize(key) == entries[key].replace(" ", "▁")


def test_literal_space_symbol_and_nul(models: dict):
    identity, nmt = models[str(KINDS[1])], models[str(KINDS[4])]
    for model in (identity, nmt):
        tokenizer, engine = to_fast(model), processor(model)
        for text in ("▁", "a▁b", "▁▁a", "a▁ ▁", "a\0b"):
            assert tokenizer.encode(text).ids == engine.encode(text)
    assert to_fast(identity).decode(to_fast(identity).encode("a▁b").ids) == "a b"  # a space, as in SentencePiece


def test_special_pieces_are_found_by_servers_and_not_in_documents(models: dict):
    model = models[str(KINDS[0])]
    tokenizer = to_fast(model)
    assert [tokenizer.token_to_id(token) for token in ("<unk>", "<s>", "</s>")] == [0, 1, 2]
    assert tokenizer.encode("</s>").ids == [2]
    assert without_specials(tokenizer)(["</s>"]) == [processor(model).encode("</s>")]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model_type": "word", "byte_fallback": False, "hard_vocab_limit": False}, "WORD"),
        ({"treat_whitespace_as_suffix": True}, "treat_whitespace_as_suffix"),
        ({"control_symbols": ["猫\u1234"], "character_coverage": 1.0}, None),
        ({"user_defined_symbols": ["<0xab>"]}, "decoded as a byte"),
        ({"user_defined_symbols": ["Ａ Ｂ"], "normalization_rule_name": "nfkc"}, "which its normalisation"),
        ({"user_defined_symbols": ["a b"], "remove_extra_whitespaces": True}, "holds a space"),
    ],
)
def test_what_would_not_be_exact_is_refused_by_name(train_plainly, options: dict, reason: str | None):
    model = train_plainly(**options)
    if reason is None:
        assert compare(model, without_specials(to_fast(model)), ["猫\u1234", "この猫\u1234は"]).ties == 0
    else:
        with pytest.raises(UserError, match=reason):
            to_fast(model)


def test_a_rule_of_ones_own_is_exact_or_refused(train_plainly, models: dict, tmp_path: Path):
    charsmap = read_charsmap(models[str(KINDS[8])].normalizer_spec.precompiled_charsmap)
    single = {key: value for key, value in charsmap.items() if len(key) == 1}

    def trained(rules: dict[str, str]) -> ModelProto:
        lines = ("\t".join(" ".join(f"{ord(char):X}" for char in side) for side in rule) for rule in rules.items())
        (tmp_path / "rules.tsv").write_text("\n".join(lines), encoding="utf-8")
        return train_plainly(normalization_rule_tsv=str(tmp_path / "rules.tsv"))

    # a mark that alone becomes nothing, a letter that composes with it, one that does not as composing would
    exact = trained(single | {"\u0323": "", "e\u0323": "ẹ", "q\u0301": "Q"})
    parts = ["e", "q", "\u0323", "\u0301", "x", "か"]
    texts = ["".join(text) for count in range(1, 6) for text in itertools.product(parts, repeat=count)]
    assert differing(exact, texts) == []
    with pytest.raises(UserError, match="entries that overlap at 'e\u0301\u0323'"):
        to_fast(trained(single | {"e\u0301": "E", "e\u0301\u0323": "ẹ\u0301"}))

"""Bulk encoding: the same ids from every engine, whatever else a document holds."""

import json
from pathlib import Path

import pytest
import tiktoken
from sentencepiece import SentencePieceProcessor
from support.encoding import BulkEncoder
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from tsumugu.tokenizer import load
from tsumugu.tokenizer.contract import GOLDEN
from tsumugu.tokenizer.convert import compare, read_model
from tsumugu.tokenizer.importer import import_tokenizer
from tsumugu.tokenizer.load import load_tokenizer


def imported(train_plainly, output: Path, newline: str = "keep", **options) -> Path:
    (output.parent / "a.model").write_bytes(train_plainly(**options).SerializeToString())
    import_tokenizer(str(output.parent / "a.model"), output, newline=newline)
    return output


KINDS = [
    ({"add_dummy_prefix": True, "remove_extra_whitespaces": True, "byte_fallback": False}, "keep"),
    ({"add_dummy_prefix": True, "remove_extra_whitespaces": False}, "keep"),
    ({"add_dummy_prefix": True, "user_defined_symbols": ["\n", "<nl>"]}, "keep"),
    ({"add_dummy_prefix": True, "user_defined_symbols": ["<nl>"]}, "<nl>"),
    ({"model_type": "bpe", "add_dummy_prefix": True}, "keep"),
    ({"model_type": "bpe", "user_defined_symbols": ["<nl>"]}, "<nl>"),
]


@pytest.mark.parametrize(("options", "newline"), KINDS)
def test_an_imported_tokenizer_is_encoded_by_sentencepiece_with_the_ids_of_the_whole_text(
    options: dict, newline: str, train_plainly, texts: list[str], corpus: list[str], tmp_path: Path
):
    folder = imported(train_plainly, tmp_path / "imported", newline, **options)
    encode, fast = BulkEncoder(folder), load_tokenizer(folder)
    assert encode.engine == "sentencepiece"
    model = read_model(folder / "tokenizer.model")
    mapped = [text.replace("\r\n", newline).replace("\n", newline) if newline != "keep" else text for text in texts]
    given = dict(zip(mapped, texts, strict=True))
    made = compare(model, lambda parts: encode([given[part] for part in parts]), mapped)
    assert made.ties <= len(texts) / 20
    whole = fast.encode_batch(texts, add_special_tokens=False)
    differing = sum(list(ours) != theirs.ids for ours, theirs in zip(encode(texts), whole, strict=True))
    assert differing <= len(texts) / 20
    if options.get("model_type") == "bpe":
        assert made.ties == differing == 0


def test_ids_do_not_depend_on_the_length_of_the_document(train_plainly, corpus: list[str], tmp_path: Path):
    """A newline is a space here, so that a document is its lines, each with the space that stands before a text."""
    folder = imported(
        train_plainly,
        tmp_path / "imported",
        normalization_rule_name="nmt_nfkc",
        add_dummy_prefix=True,
        remove_extra_whitespaces=True,
    )
    encode = BulkEncoder(folder)
    lines = [line for text in corpus for line in text.split("\n") if line] * 20
    one_by_one = [id for ids in encode(lines) for id in ids]
    [document] = encode(["\n".join(lines)])
    assert list(document) == one_by_one


def test_parts_too_long_for_float32_go_to_tokenizers(train_plainly, corpus: list[str], tmp_path: Path):
    folder = imported(train_plainly, tmp_path / "imported", add_dummy_prefix=True)
    line = "".join(corpus * 10).replace("\n", "").replace(" ", "")
    assert len(line) > load._LONGEST_PART
    assert list(BulkEncoder(folder)([line])[0]) == load_tokenizer(folder).encode(line, add_special_tokens=False).ids


def test_real_models_differ_in_ties_only(real_models: list[Path], sample: list[str], tmp_path: Path):
    for path in real_models:
        folder = tmp_path / path.stem
        report = import_tokenizer(str(path), folder, sample)
        assert (report.strings, report.newline) == (len(set(sample)), "lost" if "rinna" in path.name else "expressible")
        assert report.ties <= len(sample) / 1000
        encode, original = BulkEncoder(folder), SentencePieceProcessor(model_file=str(path))
        assert encode.engine == "sentencepiece"
        differing = sum(list(a) != b for a, b in zip(encode(sample), original.encode(sample), strict=True))
        assert differing <= len(sample) / 1000


def words(folder: Path, pre_tokenizer, tmp_path: Path, normalizer=None) -> Path:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.pre_tokenizer, tokenizer.normalizer = pre_tokenizer, normalizer
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


ISOLATED = [
    pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    for pattern in load._KNOWN_WORDS
]


@pytest.mark.parametrize("pre_tokenizer", [pre_tokenizers.ByteLevel(add_prefix_space=False), *ISOLATED])
@pytest.mark.parametrize("normalizer", [None, normalizers.NFC()])
def test_byte_level_bpe_is_encoded_by_tiktoken(
    byte_level: Path, texts: list[str], corpus: list[str], tmp_path: Path, pre_tokenizer, normalizer
):
    folder = words(byte_level, pre_tokenizer, tmp_path, normalizer)
    encode, fast = BulkEncoder(folder), load_tokenizer(folder)
    assert encode.engine == "tiktoken"
    strings = [*GOLDEN, *texts, *corpus, "it's We'RE I'LL 'ſ  don't", " " * 5000 + "x", "a" * 3000, "1234567 12"]
    assert [list(ids) for ids in encode(strings)] == [ids.ids for ids in fast.encode_batch(strings)]


def test_other_byte_level_tokenizers_are_left_to_tokenizers(byte_level: Path, corpus: list[str], tmp_path: Path):
    unknown_words = pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(use_regex=False)])
    for pre_tokenizer in (pre_tokenizers.ByteLevel(add_prefix_space=True), unknown_words):
        folder = words(byte_level, pre_tokenizer, tmp_path)
        encode = BulkEncoder(folder)
        assert encode.engine == "tokenizers"
        assert encode(corpus) == [ids.ids for ids in load_tokenizer(folder).encode_batch(corpus)]


def test_merges_that_tiktoken_would_do_otherwise_are_left_to_tokenizers(byte_level: Path, tmp_path: Path):
    # "abc" is made of "a" and "bc" only, and "ab" comes before "bc": tiktoken would join "ab" and "c".
    alphabet = {char: id for id, char in enumerate(sorted(load.byte_characters()))}
    vocabulary = alphabet | {"ab": 256, "bc": 257, "abc": 258}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("a", "b"), ("b", "c"), ("a", "bc")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    encode = BulkEncoder(tmp_path)
    assert encode.engine == "tokenizers"
    assert encode(["abc"]) == [[256, alphabet["c"]]]


def test_the_classes_of_characters_are_the_same_in_both_engines():
    characters = [chr(code) for code in (*range(0xD800), *range(0xE000, 0x110000))]
    text = "".join(characters)
    ranks = {bytes([byte]): byte for byte in range(256)}
    for pattern in (r"\p{L}", r"\p{N}", r"\s"):
        encoding = tiktoken.Encoding("class", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        found = encoding.decode(encoding.encode_to_numpy(text, disallowed_special=()).tolist())
        assert normalizers.Replace(Regex(f"(?!{pattern})(?m:.)"), "").normalize_str(text) == found


def test_added_tokens_are_found_as_in_tokenizers(folder: Path, byte_level: Path, corpus: list[str], tmp_path: Path):
    for source in (folder, byte_level):
        copied = tmp_path / source.name
        copied.mkdir()
        tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
        tokenizer.add_tokens([AddedToken("猫で", normalized=False), AddedToken("猫", normalized=False)])
        tokenizer.add_special_tokens([AddedToken("<|x|>", special=True, normalized=False)])
        tokenizer.save(str(copied / "tokenizer.json"))
        for name in ("tokenizer.model", "tokenizer_config.json"):
            if (source / name).exists():
                (copied / name).write_bytes((source / name).read_bytes())
        encode, fast = BulkEncoder(copied), load_tokenizer(copied)
        assert encode.engine == ("sentencepiece" if source is folder else "tiktoken")
        strings = [*corpus, "猫である猫、<|x|>猫で", "猫", "", "猫で猫"]
        assert [list(ids) for ids in encode(strings)] == [ids.ids for ids in fast.encode_batch(strings)]
        assert fast.token_to_id("<|x|>") not in encode(["<|x|>"])[0]
        assert json.loads((copied / "tokenizer.json").read_text())["added_tokens"][-1]["content"] == "<|x|>"

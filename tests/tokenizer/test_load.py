"""Conversion and bulk encoding, against SentencePiece and stock transformers."""

import json
import shutil
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor
from support.encoding import BulkEncoder
from tokenizers import Tokenizer, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tsumugu.errors import UserError
from tsumugu.tokenizer.convert import compare, read_model, to_lossless
from tsumugu.tokenizer.load import load_tokenizer, without_specials


@pytest.fixture(scope="module")
def sentencepiece(folder: Path) -> SentencePieceProcessor:
    return SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def test_every_text_comes_back(folder: Path, texts: list[str]):
    tokenizer, encode = load_tokenizer(folder), BulkEncoder(folder)
    for text, ids in zip(texts, encode(texts), strict=True):
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_ids_are_those_of_sentencepiece(folder: Path, texts: list[str], sentencepiece: SentencePieceProcessor):
    tokenizer, encode = load_tokenizer(folder), BulkEncoder(folder)
    plain = [text for text in texts if "▁" not in text]
    assert len(plain) > 1500
    for text, ids in zip(plain, encode(plain), strict=True):
        assert ids == sentencepiece.encode(text)
        assert ids == tokenizer.encode(text, add_special_tokens=False).ids
    assert compare(read_model(folder / "tokenizer.model"), without_specials(tokenizer), plain).ties == 0


def test_the_space_symbol_falls_to_bytes(folder: Path):
    [ids] = BulkEncoder(folder)(["▁"])
    tokenizer = load_tokenizer(folder)
    assert [tokenizer.id_to_token(id) for id in ids] == ["<0xE2>", "<0x96>", "<0x81>"]


def test_a_document_cannot_spell_special_tokens(folder: Path):
    for ids in BulkEncoder(folder)(["猫である。</s>", "<s><pad><unk><reserved_0>", "<0x41>\n</s>"]):
        assert min(ids) >= 104  # after specials 0 to 3 and reserved 4 to 103; newline is 104
        assert not [id for id in ids if 105 <= id < 105 + 256]  # bytes


def test_long_texts_are_exact_too(folder: Path, texts: list[str], corpus: list[str]):
    encode, tokenizer = BulkEncoder(folder), load_tokenizer(folder)
    assert encode.engine == "sentencepiece"
    joined = "\n".join(texts)
    long = [
        joined,
        joined.replace("\n", ""),
        "\n".join(corpus * 20),
        "".join(corpus * 20).replace("\n", ""),
        "\n" * 9999,
    ]
    assert encode(long) == [tokenizer.encode(text, add_special_tokens=False).ids for text in long]


@pytest.mark.parametrize("model_type", [None, "gpt_neox", "llama", "gpt2", "bloom", "qwen3"])
def test_stock_transformers_gives_the_same_ids(
    folder: Path, texts: list[str], sentencepiece: SentencePieceProcessor, tmp_path: Path, model_type: str | None
):
    export = tmp_path / "export"
    shutil.copytree(folder, export)
    if model_type is not None:
        (export / "config.json").write_text(json.dumps({"model_type": model_type}))
    specials = ("<s>", "</s>", "<unk>", "<pad>")
    plain = [text for text in texts if not any(special in text for special in specials)]
    for round in range(2):
        tokenizer = AutoTokenizer.from_pretrained(export)
        assert [tokenizer.convert_tokens_to_ids(token) for token in ("<unk>", "<s>", "</s>", "<pad>")] == [0, 1, 2, 3]
        assert (tokenizer.unk_token_id, tokenizer.bos_token_id) == (0, 1)
        assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 3)
        assert len(tokenizer) == 800
        batch = tokenizer(plain)
        assert sorted(batch) == ["attention_mask", "input_ids"]
        assert batch["input_ids"] == BulkEncoder(folder)(plain)
        assert [tokenizer.decode(ids) for ids in batch["input_ids"]] == plain
        assert tokenizer("一行目</s>").input_ids == [*sentencepiece.encode("一行目"), 2]
        if round == 0:
            tokenizer.save_pretrained(export)  # also after transformers has written it anew


def test_the_class_is_one_that_transformers_4_knows(folder: Path):
    assert json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert isinstance(AutoTokenizer.from_pretrained(folder), PreTrainedTokenizerFast)


def test_a_reserved_id_becomes_a_marker_when_added(folder: Path, tmp_path: Path):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    reserved = tokenizer.convert_tokens_to_ids("<reserved_0>")
    assert reserved not in tokenizer("前<reserved_0>後").input_ids
    tokenizer.add_special_tokens({"additional_special_tokens": ["<reserved_0>"]})
    assert len(tokenizer) == 800
    ids = tokenizer("前<reserved_0>後").input_ids
    assert ids == [*tokenizer("前").input_ids, reserved, *tokenizer("後").input_ids]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "前後"
    # and documents still cannot spell it
    shutil.copytree(folder, tmp_path / "extended")
    tokenizer.save_pretrained(tmp_path / "extended")
    assert BulkEncoder(tmp_path / "extended")(["前<reserved_0>後"]) == BulkEncoder(folder)(["前<reserved_0>後"])


def test_bulk_encoding_follows_tokenizer_json_where_the_model_beside_it_is_another(
    folder: Path, corpus: list[str], tmp_path: Path
):
    shutil.copytree(folder, tmp_path / "copy")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.save(str(tmp_path / "copy" / "tokenizer.json"))
    encode = BulkEncoder(tmp_path / "copy")
    assert encode.engine == "tokenizers"
    assert encode(corpus) == [tokenizer.encode(text).ids for text in corpus]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model_type": "bpe"}, "BPE"),
        ({"normalization_rule_name": "nmt_nfkc"}, "nmt_nfkc"),
        ({"add_dummy_prefix": True}, "add_dummy_prefix"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces"),
        ({"treat_whitespace_as_suffix": True}, "treat_whitespace_as_suffix"),
        ({"byte_fallback": False}, "byte_fallback"),
        ({"control_symbols": ["<猫→>"]}, "which is not a piece"),
        ({"user_defined_symbols": ["である"]}, "user-defined"),
    ],
)
def test_what_would_not_be_exact_is_refused_by_name(train_plainly, options: dict, reason: str):
    with pytest.raises(UserError, match=reason):
        to_lossless(train_plainly(**options))


def test_a_difference_is_found(folder: Path):
    model = read_model(folder / "tokenizer.model")
    tokenizer = to_lossless(model)
    next(piece for piece in model.pieces if piece.piece == "猫").piece = "犬"
    with pytest.raises(UserError, match="猫"):
        compare(model, without_specials(tokenizer), ["犬と猫"])


def test_a_file_that_is_no_model_is_refused(tmp_path: Path):
    for content in (b"", b"not a model at all", b"\xff" * 100):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(UserError, match="not a SentencePiece model"):
            read_model(tmp_path / "tokenizer.model")
    with pytest.raises(UserError, match="no such file"):
        read_model(tmp_path / "absent.model")


def test_bulk_encoding_works_on_any_folder_of_transformers(byte_level: Path, texts: list[str]):
    tokenizer = AutoTokenizer.from_pretrained(byte_level)
    plain = [text for text in texts if "<|endoftext|>" not in text]
    assert BulkEncoder(byte_level)(plain) == tokenizer(plain, add_special_tokens=False)["input_ids"]
    eos = tokenizer.eos_token_id
    assert tokenizer("<|endoftext|>").input_ids == [eos]
    assert eos not in BulkEncoder(byte_level)(["<|endoftext|>"])[0]


def test_truncation_and_padding_of_a_file_are_not_for_documents(folder: Path, tmp_path: Path, corpus: list[str]):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert BulkEncoder(tmp_path)(corpus) == BulkEncoder(folder)(corpus)


def test_bulk_encoding_names_what_is_wrong(folder: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        BulkEncoder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be read"):
        BulkEncoder(tmp_path)
    with pytest.raises(UserError, match=r"text 1 .* U\+DC00 at character 1"):
        BulkEncoder(folder)(["良い", "悪\udc00"])

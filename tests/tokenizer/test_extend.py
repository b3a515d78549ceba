"""Extension: old ids stay, new ones follow, and the folder keeps what they stand for."""

from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor
from support.encoding import BulkEncoder
from transformers import AutoTokenizer

from tsumugu.errors import UserError
from tsumugu.tokenizer.contract import check_contract, copy_tokenizer, new_rows, read_contract
from tsumugu.tokenizer.extend import Token, add_pieces, add_tokens, read_tokens
from tsumugu.tokenizer.importer import import_tokenizer
from tsumugu.tokenizer.load import load_tokenizer

MARKERS = [Token("<|im_start|>", True), Token("<|im_end|>", True), Token("<nl>", False), Token("吾輩は猫", False)]


@pytest.fixture(scope="module")
def imported(train_plainly, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("imported")
    model = train_plainly(normalization_rule_name="nmt_nfkc", add_dummy_prefix=True, remove_extra_whitespaces=True)
    (root / "a.model").write_bytes(model.SerializeToString())
    import_tokenizer(str(root / "a.model"), root / "folder")
    return root / "folder"


def test_a_list_of_tokens_is_appended(folder: Path, imported: Path, byte_level_folder: Path, corpus, tmp_path: Path):
    for source in (folder, imported, byte_level_folder):
        old = read_contract(source)
        output = tmp_path / f"{source.parent.name}-{source.name}"
        report = add_tokens(source, output, MARKERS, corpus)
        contract, served = check_contract(output), AutoTokenizer.from_pretrained(output)
        ids = [old.vocab_size + place for place in range(4)]
        assert (report.old, report.new, report.changed, contract.vocab_size) == (ids[0], 4, 0, ids[-1] + 1)
        assert [served(token.content, add_special_tokens=False).input_ids for token in MARKERS] == [[id] for id in ids]
        assert served.decode(ids[:2], skip_special_tokens=True) == ""
        assert contract.golden == old.golden
        assert contract.token_bytes == (*old.token_bytes, 0, 0, 4, 12)
        before, after = BulkEncoder(source), BulkEncoder(output)
        assert after.engine == before.engine != "tokenizers"
        plain = [text for text in corpus if "吾輩は猫" not in text]
        assert [list(ids) for ids in after(plain)] == [list(ids) for ids in before(plain)]
        [injected, found] = after(["<|im_end|>", "<nl>吾輩は猫"])
        assert not set(injected) & set(ids)
        assert list(found) == ids[2:]


@pytest.fixture(scope="module")
def byte_level_folder(corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tsumugu.tokenizer.train import train_byte_level

    output = tmp_path_factory.mktemp("bytes") / "bpe"
    train_byte_level(lambda: corpus, output, vocab_size=500, reserved=3)
    return output


def test_new_rows_name_the_old_ids_of_a_tokens_pieces(imported: Path, tmp_path: Path):
    add_tokens(imported, tmp_path / "once", MARKERS[:2])
    add_tokens(tmp_path / "once", tmp_path / "twice", MARKERS[2:], method="mean")
    base, once = read_contract(imported), read_contract(tmp_path / "once")
    engine = SentencePieceProcessor(model_file=str(imported / "tokenizer.model"))

    def pieces(token: str) -> list[int]:
        ids = engine.encode(token)
        return ids[1:] if ids[0] == engine.piece_to_id("▁") else ids

    rows = [(800, pieces("<|im_start|>")), (801, pieces("<|im_end|>"))]
    assert new_rows(tmp_path / "once", base) == rows
    assert new_rows(tmp_path / "twice", base) == [*rows, (802, []), (803, [])]
    assert new_rows(tmp_path / "twice", once) == [(802, []), (803, [])]
    assert new_rows(imported, base) is None
    assert new_rows(tmp_path / "once", read_contract(tmp_path / "twice")) is None
    copy_tokenizer(tmp_path / "twice", tmp_path / "copy")
    assert new_rows(tmp_path / "copy", once) == [(802, []), (803, [])]


def test_pieces_are_learnt_from_a_corpus(folder: Path, imported: Path, tmp_path: Path):
    words = ["深層学習", "事前学習済み", "自然言語処理", "大規模言語モデル"]
    documents = [f"{a}と{b}、{c}の{a}。" for a in words for b in words for c in words]
    for source in (folder, imported):
        output = tmp_path / f"{source.parent.name}-{source.name}"
        report = add_pieces(source, output, lambda: documents, 840, documents)
        old, new = load_tokenizer(source), load_tokenizer(output)
        assert check_contract(output).vocab_size == report.old + report.new <= 840
        assert old.get_vocab().items() <= new.get_vocab().items()
        assert report.changed >= len(documents)
        for text in documents:
            ids = new.encode(text, add_special_tokens=False).ids
            assert len(ids) < len(old.encode(text, add_special_tokens=False).ids)
            assert new.decode(ids) == text
        engine = SentencePieceProcessor(model_file=str(output / "tokenizer.model"))
        assert BulkEncoder(output).engine == "sentencepiece"
        assert [list(ids) for ids in BulkEncoder(output)(documents)] == engine.encode(documents)
        original = SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
        for id, pieces in new_rows(output, read_contract(source)) or []:
            assert id >= report.old
            assert max(pieces) < report.old
            assert original.decode(pieces).strip() == engine.id_to_piece(id).replace("▁", " ").strip()


def test_a_file_says_which_tokens_are_special(tmp_path: Path):
    path = tmp_path / "tokens.txt"
    path.write_text('<|im_start|>\n\n<nl>\ttext\n"\\n"\ttext\n<x>\tspecial\n', encoding="utf-8")
    assert read_tokens(path) == [
        Token("<|im_start|>", True),
        Token("<nl>", False),
        Token("\n", False),
        Token("<x>", True),
    ]
    for content, reason in (
        ("", "no token"),
        ("a\tb", "line 1: 'b'"),
        ('x\n"y', "line 2: not a JSON"),
        ('""', "empty"),
    ):
        path.write_text(content, encoding="utf-8")
        with pytest.raises(UserError, match=reason):
            read_tokens(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_tokens(tmp_path / "absent")


def test_what_cannot_be_extended_is_refused(folder: Path, byte_level_folder: Path, corpus: list[str], tmp_path: Path):
    for tokens, reason in (([Token("</s>", True)], "already: id 2"), ([MARKERS[0]] * 2, "listed twice")):
        with pytest.raises(UserError, match=reason):
            add_tokens(folder, tmp_path / "out", tokens)
    with pytest.raises(UserError, match="no SentencePiece tokenizer"):
        add_pieces(byte_level_folder, tmp_path / "out", lambda: corpus, 900)
    with pytest.raises(UserError, match="800 ids already"):
        add_pieces(folder, tmp_path / "out", lambda: corpus, 800)
    with pytest.raises(UserError, match=r"no contract\.json"):
        add_tokens(tmp_path, tmp_path / "out", MARKERS)
    assert list(tmp_path.iterdir()) == []
    add_tokens(folder, tmp_path / "out", MARKERS)
    with pytest.raises(UserError, match="tokens after its pieces"):
        add_pieces(tmp_path / "out", tmp_path / "more", lambda: corpus, 900)
    with pytest.raises(UserError, match="not empty"):
        add_tokens(folder, tmp_path / "out", MARKERS)

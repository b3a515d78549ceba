"""Training: the model has what was asked for, the same anywhere, and bad input is refused with what works."""

import random
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor
from support.encoding import BulkEncoder
from transformers import AutoTokenizer

from tsumugu.errors import UserError
from tsumugu.tokenizer.contract import check_contract
from tsumugu.tokenizer.load import load_tokenizer
from tsumugu.tokenizer.train import LONGEST_SENTENCE, sentences, train_byte_level, train_tokenizer


def test_the_vocabulary_is_as_asked(folder: Path):
    model = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert len(model) == 800
    assert [model.id_to_piece(id) for id in range(4)] == ["<unk>", "<s>", "</s>", "<pad>"]
    assert (model.unk_id(), model.bos_id(), model.eos_id(), model.pad_id()) == (0, 1, 2, 3)
    assert all(model.is_control(model.piece_to_id(f"<reserved_{number}>")) for number in range(100))
    assert all(model.piece_to_id(chr(code)) != 0 for code in range(0x21, 0x7F))
    assert model.encode("\n\n") == [model.piece_to_id("\n")] * 2
    assert sum(model.is_byte(id) for id in range(800)) == 256


def test_the_report_counts_the_corpus(corpus: list[str], tmp_path: Path):
    report = train_tokenizer(lambda: corpus, tmp_path / "new", vocab_size=800, reserved=8)
    size = sum(len(document.encode()) for document in corpus)
    assert (report.documents, report.bytes, report.sampled_bytes) == (len(corpus), size, size)
    assert (report.skipped_bytes, report.vocab_size) == (0, 800)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new"]


def test_the_same_corpus_gives_the_same_files(corpus: list[str], folder: Path, tmp_path: Path):
    train_tokenizer(lambda: corpus, tmp_path / "again", vocab_size=800)
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_no_line_is_too_long_for_sentencepiece():
    document = "あ" * 5000 + "𠮷" * 3000 + "。" + "い。" * 3000 + "\n" + "a" * 9000
    lines = list(sentences(document))
    assert max(len(line.encode()) for line in lines) <= LONGEST_SENTENCE
    assert "".join(lines) == document.replace("\n", "")


def test_text_that_is_one_long_line_is_learnt(tmp_path: Path):
    line = "".join(f"吾輩は猫である{kana}名前はまだ無い" for kana in "あいうえおかきくけこ" * 20)
    assert len(line.encode()) > LONGEST_SENTENCE
    report = train_tokenizer(lambda: [line], tmp_path / "long", vocab_size=480)
    assert report.skipped_bytes == 0
    model = SentencePieceProcessor(model_file=str(tmp_path / "long" / "tokenizer.model"))
    assert 0 not in [model.piece_to_id(character) for character in set(line)]


def test_characters_that_sentencepiece_keeps_for_itself_are_counted_and_cost_no_other_text(
    corpus: list[str], tmp_path: Path
):
    marked = ["\0▁▅".join(document) for document in ["珍妙奇天烈"] * 50]
    report = train_tokenizer(lambda: [*corpus, *marked], tmp_path / "marked", vocab_size=800)
    assert report.skipped_bytes == 50 * 4 * 7
    model = SentencePieceProcessor(model_file=str(tmp_path / "marked" / "tokenizer.model"))
    assert 0 not in [model.piece_to_id(character) for character in "珍妙奇天烈"]


def test_english_text_keeps_every_ascii_character(tmp_path: Path):
    # SentencePiece alone forgets required characters where the others reach the coverage.
    draw = random.Random(1)
    words = [
        "".join(draw.choices(["ka", "ti", "so", "re", "mu", "no", "pa"], k=draw.randrange(1, 5))) for _ in range(3000)
    ]
    train_tokenizer(lambda: [" ".join(words)], tmp_path / "english", vocab_size=480)
    model = SentencePieceProcessor(model_file=str(tmp_path / "english" / "tokenizer.model"))
    assert all(model.piece_to_id(chr(code)) != 0 for code in range(0x21, 0x7F))
    assert len(model) == 480


def test_a_large_corpus_is_sampled_by_the_seed(corpus: list[str], tmp_path: Path):
    many = corpus * 20
    size = sum(len(document.encode()) for document in many)

    def train(name: str, seed: int) -> tuple[int, bytes]:
        report = train_tokenizer(lambda: many, tmp_path / name, vocab_size=800, sample_bytes=size // 4, seed=seed)
        assert report.bytes == size
        return report.sampled_bytes, (tmp_path / name / "tokenizer.model").read_bytes()

    first, again, other = train("first", 1), train("again", 1), train("other", 2)
    assert first == again != other
    assert abs(first[0] / (size / 4) - 1) < 0.2


@pytest.mark.parametrize("vocab_size", [0, 3, 300, 100_000])
def test_a_vocabulary_that_the_corpus_does_not_allow_is_refused_with_one_that_it_does(
    corpus: list[str], tmp_path: Path, vocab_size: int
):
    with pytest.raises(UserError, match=f"{vocab_size} is (larger|smaller) than") as error:
        train_tokenizer(lambda: corpus, tmp_path / "refused", vocab_size=vocab_size)
    assert "--vocab-size" in error.value.hint
    assert list(tmp_path.iterdir()) == []
    allowed = int(error.value.hint.split()[3])
    assert train_tokenizer(lambda: corpus, tmp_path / "allowed", vocab_size=allowed).vocab_size == allowed


@pytest.mark.parametrize("empty", [[], [""], ["\n\n", "\0"]])
def test_an_empty_corpus_is_refused(empty: list[str], tmp_path: Path):
    with pytest.raises(UserError, match="empty"):
        train_tokenizer(lambda: empty, tmp_path / "empty", vocab_size=500)


def test_a_tiny_corpus_is_refused(tmp_path: Path):
    with pytest.raises(UserError):
        train_tokenizer(lambda: ["a"], tmp_path / "tiny", vocab_size=362)


def test_a_lone_surrogate_is_refused_by_its_document(corpus: list[str], tmp_path: Path):
    with pytest.raises(UserError, match=r"document 200 .* U\+D83D at character 2"):
        train_tokenizer(lambda: [*corpus, "壊れ\ud83d"], tmp_path / "broken", vocab_size=800)


def test_an_error_while_reading_comes_through_as_it_is(corpus: list[str], tmp_path: Path):
    passes = iter([corpus, None])

    def documents():
        if (batch := next(passes)) is None:
            raise OSError(5, "the disk went away")
        yield from batch

    with pytest.raises(OSError, match="the disk went away"):
        train_tokenizer(documents, tmp_path / "gone", vocab_size=800)


def test_what_is_there_is_not_overwritten_and_what_a_killed_run_left_is(corpus: list[str], tmp_path: Path):
    (tmp_path / ".new.partial").mkdir()
    (tmp_path / ".new.partial" / "rubbish").touch()
    train_tokenizer(lambda: corpus, tmp_path / "new", vocab_size=800)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert "rubbish" not in [path.name for path in (tmp_path / "new").iterdir()]
    with pytest.raises(UserError, match="not empty"):
        train_tokenizer(lambda: corpus, tmp_path / "new", vocab_size=800)


def test_a_byte_level_tokenizer_loses_nothing_and_is_encoded_by_tiktoken(
    corpus: list[str], texts: list[str], tmp_path: Path
):
    report = train_byte_level(lambda: corpus, tmp_path / "bpe", vocab_size=600, reserved=5)
    contract = check_contract(tmp_path / "bpe")
    assert (report.documents, report.vocab_size, contract.vocab_size) == (len(corpus), 600, 600)
    assert (contract.bos_id, contract.eos_id, contract.pad_id, contract.unk_id) == (0, 0, 1, None)
    assert contract.newline == "expressible"
    assert contract.token_bytes[:7] == (0,) * 7
    encode, served = BulkEncoder(tmp_path / "bpe"), AutoTokenizer.from_pretrained(tmp_path / "bpe")
    assert encode.engine == "tiktoken"
    for text, ids in zip(texts, encode(texts), strict=True):
        assert sum(contract.token_bytes[id] for id in ids) == len(text.encode())
        assert served.decode(ids) == text
    assert not set(encode(["<|endoftext|><reserved_1>"])[0]) & set(range(7))
    plain = [text for text in texts if "<" not in text]
    assert served(plain).input_ids == [list(ids) for ids in encode(plain)]
    train_byte_level(lambda: corpus, tmp_path / "again", vocab_size=600, reserved=5)
    assert load_tokenizer(tmp_path / "again").to_str() == load_tokenizer(tmp_path / "bpe").to_str()


@pytest.mark.parametrize(("vocab_size", "reason"), [(300, "smaller .* which is 358"), (100_000, "larger .* which is")])
def test_a_byte_level_vocabulary_that_is_not_possible_is_refused(
    corpus: list[str], tmp_path: Path, vocab_size: int, reason: str
):
    with pytest.raises(UserError, match=reason):
        train_byte_level(lambda: corpus, tmp_path / "refused", vocab_size=vocab_size)
    assert list(tmp_path.iterdir()) == []

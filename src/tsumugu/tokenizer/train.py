"""Training a tokenizer that loses nothing: SentencePiece unigram for Japanese, byte-level BPE for English.

Text in, a folder with the tokenizer (tokenizer.model beside it for SentencePiece) and the contract out. Which documents
are fit for training is the caller's affair.
"""

import hashlib
import io
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from sentencepiece import SentencePieceTrainer
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # pyright: ignore[reportAttributeAccessIssue]
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tsumugu.errors import UserError
from tsumugu.tokenizer.contract import GOLDEN, write_contract
from tsumugu.tokenizer.convert import NORMAL, SCORE_GRID, SPACE, compare, special_tokens, to_lossless
from tsumugu.tokenizer.load import (
    BulkEncoder,
    byte_characters,
    check_new,
    check_unicode,
    new_folder,
    save_tokenizer,
    without_specials,
)

# The longest line, in UTF-8 bytes, that SentencePiece does not skip (its default, passed for the record).
LONGEST_SENTENCE = 4192
# What SentencePiece keeps for itself: it drops NUL, reads U+2581 as a space, and skips a line with U+2585.
_RESERVED = "\0\u2581\u2585"
_SENTENCE = re.compile(f"[^。\n{_RESERVED}]+。?|。")
# Every printable ASCII character is a piece, so that what control pieces look like can be spelt.
_REQUIRED = SPACE + "".join(map(chr, range(0x21, 0x7F)))


class VocabularyTooLargeError(UserError):
    """The corpus does not have so many pieces: a smaller vocabulary may do."""


@dataclass(frozen=True)
class TrainingReport:
    """What a tokenizer was trained on.

    Attributes:
        documents: Documents in the corpus.
        bytes: Their UTF-8 bytes.
        sampled_bytes: Bytes of the documents used; all of them unless the corpus exceeds the sample size.
        skipped_bytes: Bytes of those which training could not see: the characters that SentencePiece keeps for itself.
        vocab_size: Ids in all: specials, reserved, bytes and pieces.
    """

    documents: int
    bytes: int
    sampled_bytes: int
    skipped_bytes: int
    vocab_size: int


def train_tokenizer(
    documents: Callable[[], Iterable[str]],
    output: Path,
    *,
    vocab_size: int,
    sample_bytes: int = 2_000_000_000,
    reserved: int = 100,
    seed: int = 1234,
) -> TrainingReport:
    """Train a tokenizer and write its folder, whole or not at all.

    The result depends on the arguments alone, not on the machine.

    Args:
        documents: Gives the corpus anew each time it is called (three times).
        output: The folder to make; must be absent or empty.
        vocab_size: Ids in all.
        sample_bytes: Of a corpus larger than this, a random sample of documents of about this size is used.
        reserved: Spare ids, `<reserved_0>` and on, for markers that a later stage may want.
        seed: Of the sample.

    Raises:
        VocabularyTooLargeError: The corpus does not allow so large a vocabulary.
        UserError: The output exists, the corpus is empty or not valid Unicode, or the vocabulary is too small for it.
    """
    count, total = _measure(documents, output)
    chosen = _Sample(documents, keep=sample_bytes / total, seed=seed)
    model = _train(chosen, vocab_size, reserved)
    tokenizer = to_lossless(model)
    sample = [*GOLDEN, *(document[:2000] for document in islice(documents(), 1000))]
    compare(model, without_specials(tokenizer), [text for text in sample if SPACE not in text])

    with new_folder(output) as partial:
        (partial / "tokenizer.model").write_bytes(model.SerializeToString())
        save_tokenizer(tokenizer, partial, special_tokens(model))
        write_contract(partial)
    return TrainingReport(count, total, chosen.bytes, chosen.skipped, len(model.pieces))


def train_byte_level(
    documents: Callable[[], Iterable[str]],
    output: Path,
    *,
    vocab_size: int,
    sample_bytes: int = 2_000_000_000,
    reserved: int = 100,
    seed: int = 1234,
) -> TrainingReport:
    """Train a byte-level BPE tokenizer, cut into words as GPT-2 does, and write its folder, whole or not at all.

    The first ids are `<|endoftext|>`, which is bos and eos, `<|padding|>`, and the reserved ones. Every text comes back
    from its ids, and none of it is unknown. Arguments, result and errors are those of `train_tokenizer`.
    """
    count, total = _measure(documents, output)
    special = ["<|endoftext|>", "<|padding|>", *(f"<reserved_{number}>" for number in range(reserved))]
    if (smallest := len(special) + 256) > vocab_size:
        raise UserError(
            f"a vocabulary of {vocab_size} is smaller than the bytes and special tokens need, which is {smallest}",
            f"set --vocab-size to {smallest} or more",
        )
    sampled = 0

    def sample() -> Iterator[str]:
        nonlocal sampled
        for index, document in enumerate(documents()):
            if _uniform(seed, index) < sample_bytes / total:
                sampled += len(document.encode())
                yield document

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(byte_characters()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample(), trainer)
    if (made := tokenizer.get_vocab_size()) < vocab_size:
        raise VocabularyTooLargeError(
            f"a vocabulary of {vocab_size} is larger than the corpus allows, which is {made}",
            f"set --vocab-size to {made} or less, or give more text",
        )
    names = {"bos_token": special[0], "eos_token": special[0], "pad_token": special[1]}
    with new_folder(output) as partial:
        save_tokenizer(tokenizer, partial, names)
        write_contract(partial)
        assert BulkEncoder(partial).engine == "tiktoken"
    return TrainingReport(count, total, sampled, 0, vocab_size)


def _measure(documents: Callable[[], Iterable[str]], output: Path) -> tuple[int, int]:
    """Documents and bytes of the corpus; raises UserError where it or the output cannot be used."""
    check_new(output)
    count = total = 0
    for document in documents():
        check_unicode(document, f"document {count} of the corpus")
        count += 1
        total += len(document.encode())
    if total == 0:
        raise UserError("the corpus is empty: there is no text to train a tokenizer on", "check --input")

    return count, total


class _Sample:
    """Sentences of the sampled documents, once through; counts what it gave, and keeps an error from reading them,
    which SentencePiece would turn into a message of its own."""

    def __init__(self, documents: Callable[[], Iterable[str]], keep: float, seed: int):
        self.documents, self.keep, self.seed = documents, keep, seed
        self.bytes = self.skipped = 0
        self.error: Exception | None = None

    def __iter__(self) -> Iterator[str]:
        try:
            for index, document in enumerate(self.documents()):
                if _uniform(self.seed, index) < self.keep:
                    self.bytes += len(document.encode())
                    self.skipped += sum(document.count(c) * len(c.encode()) for c in _RESERVED)
                    yield from sentences(document)
        except Exception as error:
            self.error = error
            raise


def _uniform(seed: int, index: int) -> float:
    """A number in [0, 1) from the seed and the document's place, the same on every machine."""
    digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def sentences(document: str) -> Iterator[str]:
    """Cut a document into lines that SentencePiece does not skip: at 。 (which stays) and newlines, and by length."""
    for sentence in _SENTENCE.findall(document):
        if len(sentence) * 4 <= LONGEST_SENTENCE or len(sentence.encode()) <= LONGEST_SENTENCE:
            yield sentence
        else:
            step = LONGEST_SENTENCE // 4  # no character has more than 4 bytes
            yield from (sentence[start : start + step] for start in range(0, len(sentence), step))


def _train(sample: _Sample, vocab_size: int, reserved: int) -> ModelProto:
    writer = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(sample),
            model_writer=writer,
            model_type="unigram",
            vocab_size=max(vocab_size, 4),  # below 4 SentencePiece does not say how many it needs
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            user_defined_symbols=["\n"],
            control_symbols=[f"<reserved_{number}>" for number in range(reserved)],
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            character_coverage=0.9995,
            required_chars=_REQUIRED,
            max_sentence_length=LONGEST_SENTENCE,
            num_threads=16,  # the order of sums, and so the result, depends on it
            minloglevel=2,
        )
    except RuntimeError as error:
        if sample.error is not None:
            raise sample.error from None
        if found := re.search(r"Vocabulary size too high .* <= (\d+)", str(error)):
            raise VocabularyTooLargeError(
                f"a vocabulary of {vocab_size} is larger than the corpus allows, which is {found[1]}",
                f"set --vocab-size to {found[1]} or less, or give more text",
            ) from None
        if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error)):
            raise UserError(
                f"a vocabulary of {vocab_size} is smaller than the characters of the corpus need, which is {found[1]}",
                f"set --vocab-size to {found[1]} or more",
            ) from None
        if "!sentences_.empty()" in str(error):
            raise UserError(
                f"the corpus is empty: the {sample.bytes} bytes sampled of it hold no text to train a tokenizer on",
                "check --input; a corpus of few huge documents needs a larger --sample-bytes",
            ) from None
        raise
    model = ModelProto.FromString(writer.getvalue())
    _finish(model)
    return model


def _finish(model: ModelProto) -> None:
    """Make the model one that converts exactly.

    SentencePiece forgets required characters where those it has seen reach the coverage by themselves (English text,
    code): they take the places of the worst pieces. Scores go to the grid that both engines add without rounding (the
    change, at most 1/512, is far below their noise). The newline, which stands in no other piece, becomes an ordinary
    piece, since a user-defined one gets a bonus that is not on the grid.
    """
    normal = [piece for piece in model.pieces if piece.type == NORMAL]
    missing = sorted(set(_REQUIRED) - {piece.piece for piece in normal})
    lowest = min(piece.score for piece in normal)
    worst = sorted((piece for piece in normal if len(piece.piece) > 1), key=lambda piece: piece.score)[: len(missing)]
    if shortfall := len(missing) - len(worst):
        raise UserError(
            f"a vocabulary of {len(model.pieces)} has no room for {shortfall} of the ASCII characters",
            f"set --vocab-size to {len(model.pieces) + shortfall} or more, and give more text where that is too many",
        )
    for piece, character in zip(worst, missing, strict=True):
        piece.piece, piece.score = character, lowest
    for piece in normal:
        piece.score = round(piece.score * SCORE_GRID) / SCORE_GRID
    newline = next(piece for piece in model.pieces if piece.piece == "\n")
    newline.type, newline.score = NORMAL, 0.0

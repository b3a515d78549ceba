"""Extending a tokenizer: ids are appended, and what the old ids mean stays as it is.

Two ways: a list of tokens, such as chat markers, with which every other text is encoded as before; or pieces trained on
a corpus and added to a SentencePiece unigram model, with which text is cut otherwise, into old ids and new ones. The
folder keeps, in extension.json, which old ids each new one stands for, so that a model can start its new rows of the
embedding from theirs (model/build.py).
"""

import io
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sentencepiece import SentencePieceTrainer
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # pyright: ignore[reportAttributeAccessIssue]
from tokenizers import AddedToken, Tokenizer

from tsumugu.errors import UserError
from tsumugu.tokenizer import convert, load
from tsumugu.tokenizer.contract import (
    EXTENSION_FILE,
    GOLDEN,
    Contract,
    copy_tokenizer,
    read_contract,
    read_extension,
    write_contract,
)
from tsumugu.tokenizer.convert import NORMAL, SCORE_GRID, SPACE

Method = Literal["mean_of_pieces", "mean"]


@dataclass(frozen=True)
class Token:
    """A token to add: a special one, which documents cannot spell, or one that is found in every text."""

    content: str
    special: bool


@dataclass(frozen=True)
class ExtensionReport:
    """What an extension made.

    Attributes:
        old, new: Ids before it, and ids added by it.
        strings: Strings compared: of a list, all are encoded as before; of trained pieces, all come back as before.
        changed: Those of them that are cut otherwise than before; 0 for a list.
    """

    old: int
    new: int
    strings: int
    changed: int


def read_tokens(path: Path) -> list[Token]:
    """Tokens from a file, one a line.

    A line is a special token. One with a tab and the word `text` after it is found in every text. A token in double
    quotes is read as a JSON string, so that it can hold a newline. Empty lines are left out.

    Raises:
        UserError: No such file, an empty one, or a line that cannot be read; names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}", "give a text file with one token a line") from None
    tokens = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        content, tab, kind = line.partition("\t")
        if tab and kind not in ("special", "text"):
            raise UserError(
                f"{path}, line {number}: {kind!r} is no kind of token", "write special or text after the tab"
            )
        if content.startswith('"'):
            try:
                content = json.loads(content)
            except ValueError as error:
                raise UserError(f"{path}, line {number}: not a JSON string ({error})", "close its quotes") from None
        if not content:
            raise UserError(f"{path}, line {number}: the token is empty", "remove that line")
        load.check_unicode(content, f"{path}, line {number}")
        tokens.append(Token(content, kind != "text"))
    if not tokens:
        raise UserError(f"{path} holds no token", "write one token a line")
    return tokens


def add_tokens(
    source: Path, output: Path, tokens: list[Token], sample: Iterable[str] = (), method: Method = "mean_of_pieces"
) -> ExtensionReport:
    """Writes the folder of a tokenizer with further tokens, whole or not at all.

    Args:
        source: A tokenizer's folder with a contract.
        output: The folder to make; must be absent or empty.
        tokens: What to add, in this order.
        sample: Texts to prove on, besides the golden strings, that what holds none of the tokens is encoded as before.
        method: How a model's new rows start: the mean of the rows of the ids that spelt the token so far, or of all.

    Raises:
        UserError: A token that is there already, or the output.
    """
    contract = read_contract(source)
    fast = load.load_tokenizer(source)
    contents = [token.content for token in tokens]
    for place, content in enumerate(contents):
        if (id := fast.token_to_id(content)) is not None:
            raise UserError(f"{source} has the token {content!r} already: id {id}", "leave it out of the list")
        if content in contents[:place]:
            raise UserError(f"the token {content!r} is listed twice", "list it once")
    rows = [(contract.vocab_size + at, _spelt(fast, content)) for at, content in enumerate(contents)]

    extended = Tokenizer.from_file(str(source / "tokenizer.json"))
    for token in tokens:
        added = AddedToken(token.content, special=token.special, normalized=False)
        (extended.add_special_tokens if token.special else extended.add_tokens)([added])
    found = [extended.token_to_id(content) for content in contents]
    assert found == [id for id, _ in rows], "tokenizers appends after the highest id"

    def prove(partial: Path) -> tuple[int, int]:
        strings = [text for text in (*GOLDEN, *sample) if not any(content in text for content in contents)]
        before, after = fast, load.load_tokenizer(partial)
        for start in range(0, len(strings), 1000):
            batch = strings[start : start + 1000]
            pairs = zip(batch, before.encode_batch(batch), after.encode_batch(batch), strict=True)
            for text, old, new in pairs:
                assert old.ids == new.ids, f"{text[:200]!r} is encoded otherwise than before"
        after.encode_special_tokens = False
        for content, id in zip(contents, found, strict=True):
            assert after.encode(content, add_special_tokens=False).ids == [id], f"{content!r} is not one id"
        return len(strings), 0

    def write(partial: Path) -> None:
        copy_tokenizer(source, partial)
        # not extended.to_str(): reading and writing moves scores by a unit in their last place
        layout = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
        layout["added_tokens"] = json.loads(extended.to_str())["added_tokens"]
        (partial / "tokenizer.json").write_text(json.dumps(layout, ensure_ascii=False, indent=2), encoding="utf-8")
        _seal_again(source, partial)

    strings, changed = _write(source, output, contract, rows, method, write, prove)
    return ExtensionReport(contract.vocab_size, len(rows), strings, changed)


def add_pieces(
    source: Path,
    output: Path,
    documents: Callable[[], Iterable[str]],
    vocab_size: int,
    sample: Iterable[str] = (),
    method: Method = "mean_of_pieces",
) -> ExtensionReport:
    """Writes the folder of a SentencePiece unigram tokenizer with pieces learnt from a corpus, whole or not at all.

    Text is cut otherwise than before, by design. What old ids stand for, and what comes back, is as before.

    Args:
        source: A tokenizer's folder with a contract, imported or trained, without added tokens after its pieces.
        output: The folder to make; must be absent or empty.
        documents: Gives the corpus.
        vocab_size: Ids in all, after the extension.
        sample: Texts to prove on, besides the golden strings, that they come back as before.
        method: As for `add_tokens`.

    Raises:
        UserError: Not such a tokenizer, no new piece to be found, or the output.
    """
    contract = read_contract(source)
    if not (source / "tokenizer.model").is_file():
        raise UserError(f"{source} is no SentencePiece tokenizer: it cannot learn pieces", "add tokens with --tokens")
    model = convert.read_model(source / "tokenizer.model")
    if model.trainer_spec.model_type != model.trainer_spec.UNIGRAM:
        raise UserError(f"{source} is not a unigram model: it cannot learn pieces", "add tokens with --tokens")
    if contract.vocab_size != len(model.pieces):
        raise UserError(f"{source} has tokens after its pieces", "extend by --train first, then by --tokens")
    room = vocab_size - len(model.pieces)
    if room <= 0:
        raise UserError(
            f"{source} has {len(model.pieces)} ids already", f"set --vocab-size above that, not {vocab_size}"
        )
    old_fast = load.load_tokenizer(source)
    lossless = convert.lossless_refusal(model) is None and not convert.differing_part(
        old_fast, convert.to_lossless(model)
    )
    ahead = convert.ahead_of(old_fast)

    pieces = _learn(model, documents, room)
    if not pieces:
        raise UserError("the corpus holds no piece that the tokenizer lacks", "give more text, or another")
    grown = ModelProto()
    grown.CopyFrom(model)
    lowest = min(piece.score for piece in model.pieces if piece.type == NORMAL)
    for text, score in pieces:
        score = max(round(score * SCORE_GRID) / SCORE_GRID, lowest)
        grown.pieces.add(piece=text, score=score, type=NORMAL)
    grown.trainer_spec.vocab_size = len(grown.pieces)
    engine = convert.plain(model)
    rows = [(len(model.pieces) + at, engine.encode(text)) for at, (text, _) in enumerate(pieces)]
    converted = convert.to_lossless(grown) if lossless else convert.to_fast(grown, str(source), ahead)
    extended = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    extended |= {part: json.loads(converted.to_str())[part] for part in ("model", "normalizer", "pre_tokenizer")}

    def write(partial: Path) -> None:
        copy_tokenizer(source, partial)
        (partial / "tokenizer.model").write_bytes(grown.SerializeToString())
        (partial / "tokenizer.json").write_text(json.dumps(extended, ensure_ascii=False, indent=2), encoding="utf-8")
        if not lossless:
            _seal_again(source, partial)

    def prove(partial: Path) -> tuple[int, int]:
        after = load.load_tokenizer(partial)
        vocabulary = old_fast.get_vocab()
        assert vocabulary.items() <= after.get_vocab().items(), "old ids keep their tokens"
        changed = count = 0
        for text in (*GOLDEN, *sample):
            old, new = (tokenizer.encode(text, add_special_tokens=False).ids for tokenizer in (old_fast, after))
            assert contract.unk_id in old or old_fast.decode(old) == after.decode(new), (
                f"{text[:200]!r} does not come back"
            )
            changed, count = changed + (old != new), count + 1
        strings = [ahead(text) for text in (*GOLDEN, *sample) if not (lossless and SPACE in text)]
        convert.compare(grown, load.without_specials(after), strings, str(output))
        return count, changed

    strings, changed = _write(source, output, contract, rows, method, write, prove)
    return ExtensionReport(contract.vocab_size, len(rows), strings, changed)


def _learn(model: ModelProto, documents: Callable[[], Iterable[str]], room: int) -> list[tuple[str, float]]:
    """The best pieces of a unigram model of the corpus that the given one lacks, and which its characters can spell."""
    from tsumugu.tokenizer.train import sentences

    engine, known = convert.processor(model), {piece.piece for piece in model.pieces}
    normalised = (engine.normalize(part).replace(SPACE, " ") for text in documents() for part in sentences(text))
    writer = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=(text for text in normalised if text.strip()),
            model_writer=writer,
            model_type="unigram",
            vocab_size=4 * room + 1000,
            hard_vocab_limit=False,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            character_coverage=1.0,
            num_threads=16,  # the order of sums, and so the result, depends on it
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(f"no pieces can be learnt from this corpus: {error}", "give more text") from None
    characters = {text for text in known if len(text) == 1}
    learnt = [piece for piece in ModelProto.FromString(writer.getvalue()).pieces if piece.type == NORMAL]
    chosen: dict[str, float] = {}
    for piece in sorted(learnt, key=lambda piece: -piece.score):
        text = piece.piece
        if len(chosen) == room:
            break
        if text not in known and (len(text) == 1 or set(text) <= characters) and len(text) <= 16:
            chosen[text] = piece.score
            characters |= {text} if len(text) == 1 else set()
    return list(chosen.items())


def _spelt(fast: Tokenizer, content: str) -> list[int]:
    """The ids that a token has been spelt with, without the space that the tokenizer puts in front of a text."""
    ids = fast.encode(content, add_special_tokens=False).ids
    alone = fast.token_to_id(SPACE)
    return ids[1:] if len(ids) > 1 and ids[0] == alone and not content.startswith((" ", SPACE)) else ids


def _seal_again(source: Path, partial: Path) -> None:
    """A conversion that was exact is exact with further tokens too."""
    config = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    if config.get(load.SEAL) and config[load.SEAL] == load.seal(source):
        config[load.SEAL] = load.seal(partial)
        text = json.dumps(config, ensure_ascii=False, indent=2)
        (partial / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def _write(
    source: Path,
    output: Path,
    contract: Contract,
    rows: list[tuple[int, list[int]]],
    method: Method,
    write: Callable[[Path], None],
    prove: Callable[[Path], tuple[int, int]],
) -> tuple[int, int]:
    with load.new_folder(output) as partial:
        write(partial)
        earlier = _read(source)
        own = [{"id": id, "pieces": pieces if method == "mean_of_pieces" else []} for id, pieces in rows]
        base = {"fingerprint": contract.fingerprint, "vocab_size": contract.vocab_size}
        extension = {"bases": [*earlier["bases"], base], "rows": [*earlier["rows"], *own]}
        (partial / EXTENSION_FILE).write_text(json.dumps(extension, indent=1) + "\n", encoding="utf-8")
        write_contract(partial)
        return prove(partial)


def _read(folder: Path) -> dict:
    path = folder / EXTENSION_FILE
    return read_extension(path) if path.is_file() else {"bases": [], "rows": []}

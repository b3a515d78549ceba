"""From a SentencePiece model to a fast tokenizer with the same ids, and from a folder to an encoder for bulk.

The conversion is exact or refused. It differs from transformers' own in three ways, each needed for that:

- `tokenizers` lets Viterbi pick *every* piece of the vocabulary; SentencePiece never picks control, unknown and byte
  pieces. Here they get the score `NEVER`, so that the text `</s>` or `<0x0A>` is spelt with ordinary pieces.
- SentencePiece writes a space as U+2581 and so reads a literal U+2581 back as a space. The fast tokenizer holds real
  spaces and needs no normaliser: U+2581 falls to bytes, and decode(encode(x)) == x for every text.
- Nothing is put in front of the text, neither a space nor bos.

This module does not train (train.py) and does not describe tokenizers to later stages (contract.py).
"""

import json
import re
from collections.abc import Iterable, Mapping
from itertools import chain, islice
from pathlib import Path

from google.protobuf.message import DecodeError
from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # pyright: ignore[reportAttributeAccessIssue]
from tokenizers import AddedToken, Tokenizer, decoders, models

from tsumugu.errors import UserError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # ModelProto.SentencePiece.Type
SPACE = "\u2581"

# Below every spelling of a control or byte piece by single characters (checked), and a whole number, so that sums stay
# exact in float64.
NEVER = -10_000.0

# Scores of models that we train are multiples of 1/SCORE_GRID. Their sums are exact in float32 up to 2**24 / SCORE_GRID
# and in float64 always, so SentencePiece (float32) and `tokenizers` (float64) see the same ties and, both taking the
# first of equals, break them alike. Unrounded, one line in 2,000 of Aozora Bunko's prose came out differently.
SCORE_GRID = 256
_UNKNOWN_PENALTY = 10.0  # kUnkPenalty of SentencePiece, K_UNK_PENALTY of tokenizers: unknown scores min - 10

# What the ByteFallback decoder takes for a byte: six bytes, and Rust's from_str_radix also accepts a sign.
BYTE_PIECE = re.compile(r"<0x(?:[0-9A-Fa-f]{2}|\+[0-9A-Fa-f])>")


def read_model(path: Path) -> ModelProto:
    """The SentencePiece model in a `.model` file. Raises UserError where there is none."""
    if not path.is_file():
        raise UserError(f"{path}: no such file", "name a SentencePiece .model file")
    try:
        model = ModelProto.FromString(path.read_bytes())
    except DecodeError:
        model = ModelProto()
    if not model.pieces:
        raise UserError(f"{path} is not a SentencePiece model", "name a SentencePiece .model file")
    return model


def special_tokens(model: ModelProto) -> dict[str, str]:
    """The names that transformers gives to the model's special pieces: {"bos_token": "<s>", ...}."""
    spec = model.trainer_spec
    ids = {"unk_token": spec.unk_id, "bos_token": spec.bos_id, "eos_token": spec.eos_id, "pad_token": spec.pad_id}
    return {name: model.pieces[id].piece for name, id in ids.items() if id >= 0}


def _refusal(model: ModelProto) -> str | None:
    """Why `to_fast` would not be exact for this model; None where it is."""
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    reachable = [piece.piece for piece in model.pieces if piece.type in (NORMAL, USER_DEFINED)]
    characters = {piece for piece in reachable if len(piece) == 1}
    lowest = min((piece.score for piece in model.pieces if piece.type == NORMAL), default=0.0)
    if trainer.model_type != trainer.UNIGRAM:
        return f"it is a {trainer.ModelType.Name(trainer.model_type)} model, not a UNIGRAM one"
    if normalizer.precompiled_charsmap or model.denormalizer_spec.precompiled_charsmap:
        return f"it normalises text (rule {normalizer.name!r})"
    if normalizer.add_dummy_prefix:
        return "it puts a space in front of the text (add_dummy_prefix)"
    if normalizer.remove_extra_whitespaces:
        return "it removes spaces (remove_extra_whitespaces)"
    if not normalizer.escape_whitespaces:
        return "it keeps spaces as they are (escape_whitespaces is off)"
    if trainer.treat_whitespace_as_suffix:
        return "it takes a space as the end of a word (treat_whitespace_as_suffix)"
    if sum(piece.type == BYTE for piece in model.pieces) != 256:
        return "it has no byte pieces for unknown characters (byte_fallback)"
    for piece in model.pieces:
        text = piece.piece.replace(SPACE, " ") if piece.type in (NORMAL, USER_DEFINED) else piece.piece
        if piece.type == UNUSED:
            return f"the piece {piece.piece!r} is marked unused"
        if piece.type in (NORMAL, USER_DEFINED) and BYTE_PIECE.fullmatch(text):
            return f"the ordinary piece {text!r} would be decoded as a byte"
        # SentencePiece prefers these by rules of its own, which do not matter where no other piece covers that text.
        if piece.type == USER_DEFINED and (len(text) > 1 or sum(text in other for other in reachable) > 1):
            return f"the user-defined piece {text!r} has rivals in the vocabulary"
        # With a character outside the vocabulary in it, the piece would compete with the unknown piece, whose score is
        # not the same in both engines.
        if piece.type != BYTE and (alien := set(text.replace(" ", SPACE)) - characters):
            return f"the piece {piece.piece!r} holds {min(alien)!r}, which is not a piece itself"
        if len(text) * (lowest - 1) < NEVER:
            return f"the piece {text!r} is too long, or scores are too low"
    return None


def to_fast(model: ModelProto, name: str = "the model") -> Tokenizer:
    """The fast tokenizer with the ids of a SentencePiece unigram model, for every text without a literal U+2581.

    Unknown, bos, eos and pad become special tokens. Other control pieces (`<reserved_0>`) keep their ids and are not
    found in text; `tokenizer.add_special_tokens(["<reserved_0>"])` turns one into a marker with that id.

    Args:
        model: Parsed SentencePiece model (`read_model`).
        name: What to call the model in an error.

    Raises:
        UserError: The conversion would not be exact, and why.
    """
    if reason := _refusal(model):
        raise UserError(f"{name} cannot be converted exactly: {reason}")
    vocabulary = [
        (piece.piece.replace(SPACE, " "), piece.score) if piece.type in (NORMAL, USER_DEFINED) else (piece.piece, NEVER)
        for piece in model.pieces
    ]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=model.trainer_spec.unk_id, byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in special_tokens(model).values()]
    )
    return tokenizer


def check_conversion(model: ModelProto, tokenizer: Tokenizer, texts: Iterable[str]) -> int:
    """Compare SentencePiece with the converted tokenizer on texts (those with a literal U+2581 are left out).

    Returns:
        The number of texts cut differently where both ways score the same within SentencePiece's float32 rounding;
        0 for models whose scores lie on the grid.

    Raises:
        UserError: Any other difference; names the text.
    """
    reference = SentencePieceProcessor(model_proto=model.SerializeToString())
    scores = [score for _, score in json.loads(tokenizer.to_str())["model"]["vocab"]]
    plain = Tokenizer.from_str(tokenizer.to_str())
    plain.encode_special_tokens = True
    ties = 0
    for text in texts:
        if SPACE in text:
            continue
        theirs, ours = reference.encode(text), plain.encode(text, add_special_tokens=False).ids
        if theirs == ours:
            continue
        ties += 1
        total = sum(scores[id] for id in ours)
        same_text = plain.decode(theirs, skip_special_tokens=False) == text
        if not same_text or abs(sum(scores[id] for id in theirs) - total) > 2**-20 * abs(total):
            raise UserError(f"the fast tokenizer gives {ours}, not SentencePiece's {theirs}, for {text!r}")
    return ties


def save_tokenizer(tokenizer: Tokenizer, output: Path, special_tokens: Mapping[str, str]) -> None:
    """Write tokenizer.json and tokenizer_config.json into an existing folder, for any transformers from 4 on.

    Args:
        tokenizer: What to write.
        output: The folder.
        special_tokens: transformers' names and the tokens: {"bos_token": "<s>", ...}.
    """
    # Written by hand: transformers 5 would name the class TokenizersBackend, which 4.x does not know.
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special_tokens,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": int(1e30),  # transformers' own value for "no limit"
    }
    # Not tokenizer.save, whose error on a full disk is no OSError.
    (output / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    text = json.dumps(config, ensure_ascii=False, indent=2)
    (output / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def load_tokenizer(folder: Path) -> Tokenizer:
    """The folder's tokenizer.json as documents are encoded: special tokens spelt in a text are text, nothing is cut off
    or padded. Raises UserError where there is none."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{folder} holds no tokenizer.json", "make one with `tsumugu tokenizer train` or `import`")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise UserError(f"{path} cannot be read: {error}") from None
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _exact_length(model: ModelProto) -> int:
    """The number of characters up to which SentencePiece's float32 sums are exact on this model; 0 where they never
    are, or where a line cannot be encoded without its neighbours."""
    scores = [piece.score for piece in model.pieces if piece.type == NORMAL]
    on_grid = all((score * SCORE_GRID).is_integer() for score in scores)
    with_newline = [piece.piece for piece in model.pieces if "\n" in piece.piece]
    if not on_grid or with_newline != ["\n"] or any(piece.type == USER_DEFINED for piece in model.pieces):
        return 0
    return int(2**24 / SCORE_GRID / (max(map(abs, scores)) + _UNKNOWN_PENALTY))


class BulkEncoder:
    """Documents to ids, in bulk: what tokenizer.json gives for the text alone, from the fastest engine that is exact.

    That is SentencePiece, on runs of lines, for a folder with a tokenizer.model that `tsumugu tokenizer train` made
    (three to four times the speed of `tokenizers`), and `tokenizers` for everything else. No bos or eos is added, and
    special tokens spelt in a document are text, so that a document cannot inject an eos.

    Args:
        folder: A folder with a tokenizer.json, ours or any other.

    Raises:
        UserError: No readable tokenizer.json; when called, a text with a lone surrogate.
    """

    def __init__(self, folder: Path):
        self._fast = load_tokenizer(folder)
        self._sentencepiece: SentencePieceProcessor | None = None
        if (path := folder / "tokenizer.model").is_file():
            model = read_model(path)
            self._longest = _exact_length(model)
            if self._longest and _refusal(model) is None and _same_engine(self._fast, to_fast(model)):
                self._sentencepiece = SentencePieceProcessor(model_proto=model.SerializeToString())
                # As many whole lines as are exact together, else one line, however long.
                self._parts = re.compile(rf"(?s:.{{0,{self._longest - 1}}})\n|[^\n]+\n?")

    def __call__(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text."""
        for number, text in enumerate(texts):
            check_unicode(text, f"text {number} of this batch")
        if self._sentencepiece is None:
            return self._encode_fast(texts)
        parts = [self._parts.findall(text) for text in texts]
        flat = list(chain.from_iterable(parts))
        exact = [len(part) <= self._longest and SPACE not in part for part in flat]
        quick = [part for part, is_exact in zip(flat, exact, strict=True) if is_exact]
        slow = [part for part, is_exact in zip(flat, exact, strict=True) if not is_exact]
        by_sentencepiece = iter(self._sentencepiece.encode(quick, num_threads=1))  # callers run a process per core
        by_tokenizers = iter(self._encode_fast(slow))
        ids = (next(by_sentencepiece if is_exact else by_tokenizers) for is_exact in exact)
        return [list(chain.from_iterable(islice(ids, len(own)))) for own in parts]

    def _encode_fast(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._fast.encode_batch_fast(texts, add_special_tokens=False)]


def check_unicode(text: str, what: str) -> None:
    """Raises UserError, naming `what`, where a text holds a lone surrogate (`\\ud83d` without its other half)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{what} is not valid Unicode: lone surrogate U+{ord(text[error.start]):04X} at character {error.start}",
            "repair or drop it",
        ) from None


def _same_engine(tokenizer: Tokenizer, converted: Tokenizer) -> bool:
    """Whether two tokenizers cut documents alike: special tokens, which are no part of documents, may differ."""
    ours, theirs = json.loads(tokenizer.to_str()), json.loads(converted.to_str())
    return all(ours[part] == theirs[part] for part in ("model", "normalizer", "pre_tokenizer")) and all(
        token["special"] for token in ours["added_tokens"]
    )

"""From a SentencePiece model to a fast tokenizer with the same ids: exact or refused.

`to_fast` gives what SentencePiece gives, for every text. `to_lossless`, for models of `tsumugu tokenizer train`, gives
more: a literal U+2581, which SentencePiece reads as a space, falls to bytes, so that decode(encode(x)) == x for every
text. Both differ from transformers' own conversion, in ways that are each needed for that:

- The normaliser is SentencePiece's (normalize.py).
- `tokenizers` lets Viterbi pick *every* piece of the vocabulary; SentencePiece never picks control, unknown, unused and
  byte pieces. Here they get the score `NEVER`, so that the text `</s>` or `<0x0A>` is spelt with ordinary pieces; where
  a character of theirs is unknown, and would cost even more, the text is cut at that character, where every
  segmentation is cut anyway.
- The order of BPE merges puts, of two ways to make the same piece from overlapping symbols, the left one first.
- Nothing is put in front of the text but the space that the model's own settings ask for.

Scores are float32 in SentencePiece and float64 in `tokenizers`, so that two segmentations whose sums are equal within
float32's rounding may be chosen differently: these are counted as ties by `compare`. BPE has none.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from google.protobuf.message import DecodeError
from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # pyright: ignore[reportAttributeAccessIssue]
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from tsumugu.errors import UserError
from tsumugu.tokenizer import normalize

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # ModelProto.SentencePiece.Type
SPACE = normalize.SPACE
_HIDDEN = (UNKNOWN, CONTROL, UNUSED, BYTE)  # what SentencePiece never picks for a text

# Below every spelling of a control or byte piece by single characters (checked), and a whole number, so that sums stay
# exact in float64.
NEVER = -10_000.0

# Scores of models that we train are multiples of 1/SCORE_GRID. Their sums are exact in float32 up to 2**24 / SCORE_GRID
# and in float64 always, so SentencePiece (float32) and `tokenizers` (float64) see the same ties and, both taking the
# first of equals, break them alike. Unrounded, one line in 2,000 of Aozora Bunko's prose came out differently.
SCORE_GRID = 256
UNKNOWN_PENALTY = 10.0  # kUnkPenalty of SentencePiece, K_UNK_PENALTY of tokenizers: unknown scores min - 10

# What the ByteFallback decoder takes for a byte: six bytes, and Rust's from_str_radix also accepts a sign.
BYTE_PIECE = re.compile(r"<0x(?:[0-9A-Fa-f]{2}|\+[0-9A-Fa-f])>")

# A newline that is mapped to a token: CR LF is one newline.
NEWLINE = r"\r\n|\n"

_PAD = re.compile(r"[<\[]pad\b.*[>\]]", re.IGNORECASE)


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


def processor(model: ModelProto) -> SentencePieceProcessor:
    """SentencePiece's own engine for a model."""
    return SentencePieceProcessor(model_proto=model.SerializeToString())


def special_tokens(model: ModelProto) -> dict[str, str]:
    """The names that transformers gives to the model's special pieces: {"bos_token": "<s>", ...}.

    Where the model names no padding, a control piece that looks like one (`[PAD]`, `<pad>`) is taken.
    """
    spec = model.trainer_spec
    ids = {"unk_token": spec.unk_id, "bos_token": spec.bos_id, "eos_token": spec.eos_id, "pad_token": spec.pad_id}
    if spec.pad_id < 0:
        padding = [id for id, piece in enumerate(model.pieces) if piece.type == CONTROL and _PAD.fullmatch(piece.piece)]
        ids["pad_token"] = padding[0] if padding else -1
    return {
        name: model.pieces[id].piece
        for name, id in ids.items()
        if 0 <= id < len(model.pieces) and model.pieces[id].type in (CONTROL, UNKNOWN)
    }


def _reachable(model: ModelProto) -> list:
    return [piece for piece in model.pieces if piece.type in (NORMAL, USER_DEFINED)]


def _characters(pieces: list) -> tuple[set[str], set[str]]:
    """The characters that are pieces, and the pairs of characters that stand side by side in a piece."""
    texts = [piece.piece for piece in pieces]
    return {text for text in texts if len(text) == 1}, {
        text[at : at + 2] for text in texts for at in range(len(text) - 1)
    }


def _refusal(model: ModelProto) -> str | None:
    """Why the vocabulary cannot be converted exactly; None where it can."""
    trainer = model.trainer_spec
    reachable = _reachable(model)
    characters, neighbours = _characters(reachable)
    lowest = min((piece.score for piece in reachable if piece.type == NORMAL), default=0.0)
    if trainer.model_type not in (trainer.UNIGRAM, trainer.BPE):
        return f"it is a {trainer.ModelType.Name(trainer.model_type)} model, not a UNIGRAM or BPE one"
    if sum(piece.type == UNKNOWN for piece in model.pieces) != 1:
        return "it has no unknown piece"
    if trainer.byte_fallback and sum(piece.type == BYTE for piece in model.pieces) != 256:
        return "it falls back to bytes, yet lacks byte pieces"
    for piece in reachable:
        if BYTE_PIECE.fullmatch(piece.piece) and trainer.byte_fallback:
            return f"the ordinary piece {piece.piece!r} would be decoded as a byte"
        alien = set(piece.piece) - characters
        if alien and trainer.model_type == trainer.BPE and piece.type == NORMAL:
            return f"the piece {piece.piece!r} holds {min(alien)!r}, which is not a piece itself"
    if trainer.model_type == trainer.BPE:
        return _bpe_refusal(model, characters)
    for piece in model.pieces:
        if len(piece.piece) * (lowest - 1) < NEVER:
            return f"the piece {piece.piece!r} is too long, or scores are too low"
        if piece.type in _HIDDEN and _cut(piece.piece, characters, neighbours) is None:
            return (
                f"the piece {piece.piece!r} holds {min(set(piece.piece) - characters)!r}, which is not a piece itself"
            )
    return _rivals_of_unknown(model, characters, lowest)


def _bpe_refusal(model: ModelProto, characters: set[str]) -> str | None:
    scores = [piece.score for piece in model.pieces if piece.type == NORMAL and len(piece.piece) > 1]
    if len(set(scores)) != len(scores):
        return "two of its merges have the same rank"
    if unused := next((piece.piece for piece in model.pieces if piece.type == UNUSED), None):
        return f"the piece {unused!r} is marked unused"
    if any(piece.type == USER_DEFINED and len(piece.piece) > 1 for piece in model.pieces):
        engine = plain(model)
        normal = [(id, piece.piece) for id, piece in enumerate(model.pieces) if piece.type == NORMAL]
        for (id, piece), ids in zip(normal, engine.encode([piece for _, piece in normal]), strict=True):
            if ids != [id]:
                return f"the piece {piece!r} between two user-defined pieces is not one piece in SentencePiece"
    return None


def _rivals_of_unknown(model: ModelProto, characters: set[str], lowest: float) -> str | None:
    """Why a piece with a character that is no piece itself might lose against the unknown piece; None if none does.

    The unknown piece scores less here than in SentencePiece (10 below `NEVER` instead of 10 below the lowest piece).
    That changes nothing where SentencePiece always takes the piece: where putting it in place of whatever else covers
    its text gains more than is lost by cutting the neighbours that reach into it.
    """
    aliens = [piece for piece in _reachable(model) if set(piece.piece) - characters]
    if not aliens:
        return None
    engine, scores = plain(model), {piece.piece: _score(piece) for piece in _reachable(model)}
    starts = {piece.piece[:at] for piece in aliens for at in range(1, len(piece.piece))}
    ends = {piece.piece[at:] for piece in aliens for at in range(1, len(piece.piece))}
    # What is left of a neighbour when the piece takes a part of it.
    left = [(text, text[at:], text[:at]) for text in scores for at in range(1, len(text)) if text[at:] in starts]
    right = [(text, text[:at], text[at:]) for text in scores for at in range(1, len(text)) if text[:at] in ends]
    unknown = _unknown_id(model)
    losses: list[dict[str, float]] = [{}, {}]
    for side, neighbours in enumerate((left, right)):
        spelt = engine.encode([rest for *_, rest in neighbours])
        for (text, taken, _), ids in zip(neighbours, spelt, strict=True):
            known = all(id != unknown and model.pieces[id].type != BYTE for id in ids)
            if known:  # else as many characters are unknown either way, which both engines weigh alike
                loss = scores[text] - sum(_score(model.pieces[id]) for id in ids)
                losses[side][taken] = max(losses[side].get(taken, 0.0), loss)
    for piece in aliens:
        cuts = range(1, len(piece.piece))
        before = max((losses[0].get(piece.piece[:at], 0.0) for at in cuts), default=0.0)
        after = max((losses[1].get(piece.piece[at:], 0.0) for at in cuts), default=0.0)
        if _score(piece) - (lowest - UNKNOWN_PENALTY) <= before + after:
            return (
                f"the piece {piece.piece!r} holds {min(set(piece.piece) - characters)!r}, which is not a piece itself, "
                "and may be taken for unknown"
            )
    return None


def _score(piece) -> float:
    """What Viterbi counts for a piece."""
    if piece.type == USER_DEFINED:
        return 0.0  # what SentencePiece counts for them, so that they are nearly always preferred
    return piece.score if piece.type == NORMAL else NEVER


def _cut(piece: str, characters: set[str], neighbours: set[str]) -> str | None:
    """The start of a piece that Viterbi must not find, up to a place where a known and an unknown character meet that
    no other piece holds; "" where no character is unknown, None where there is no such place."""
    known = [char in characters for char in piece]
    if all(known):
        return ""
    places = [at for at in range(1, len(piece)) if known[at - 1] != known[at]]
    return next((piece[:at] for at in places if piece[at - 1 : at + 1] not in neighbours), None)


def plain(model: ModelProto) -> SentencePieceProcessor:
    """The engine alone: text goes in normalised, with U+2581 for spaces."""
    bare = ModelProto()
    bare.CopyFrom(model)
    bare.normalizer_spec.Clear()
    bare.normalizer_spec.name = "identity"
    bare.normalizer_spec.add_dummy_prefix = False
    bare.normalizer_spec.remove_extra_whitespaces = False
    return processor(bare)


@dataclass(frozen=True)
class Ahead:
    """What is done to a text before SentencePiece's own normalisation, in this order.

    Attributes:
        lower_case: Each character is made lower-case, as slow tokenizers with `do_lower_case` do.
        newline: A token that stands for newlines, in both directions; None for what the model does with them.
    """

    lower_case: bool = False
    newline: str | None = None

    def normalizers(self) -> list[normalizers.Normalizer]:
        steps: list[normalizers.Normalizer] = [normalizers.Lowercase()] if self.lower_case else []
        return steps if self.newline is None else [*steps, normalizers.Replace(Regex(NEWLINE), self.newline)]

    def __call__(self, text: str) -> str:
        if self.lower_case:
            text = normalizers.Lowercase().normalize_str(text)
        if self.newline is not None:
            text = text.replace("\r\n", self.newline).replace("\n", self.newline)
        return text


def ahead_of(tokenizer: Tokenizer) -> Ahead:
    """What a tokenizer made by `to_fast` does ahead; nothing for others."""
    steps = (json.loads(tokenizer.to_str())["normalizer"] or {}).get("normalizers") or []
    lower_case = [step["type"] for step in steps[:1]] == ["Lowercase"]
    mapped = [step for step in steps[lower_case : lower_case + 1] if step.get("pattern") == {"Regex": NEWLINE}]
    return Ahead(lower_case, mapped[0]["content"] if mapped else None)


def to_fast(model: ModelProto, name: str = "the model", ahead: Ahead = Ahead()) -> Tokenizer:
    """The fast tokenizer that gives SentencePiece's ids and decodes to SentencePiece's text.

    Control pieces and the unknown piece become special tokens: a text that spells one is given that id, as always in
    transformers, unless `encode_special_tokens` is set.

    Args:
        model: Parsed SentencePiece model (`read_model`).
        name: What to call the model in an error.
        ahead: What to do to a text first.

    Raises:
        UserError: The conversion would not be exact, and why.
    """
    if reason := normalize.refusal(model) or _refusal(model):
        raise UserError(f"{name} cannot be converted exactly: {reason}", "use it with the library that made it")
    unigram = model.trainer_spec.model_type == model.trainer_spec.UNIGRAM

    tokenizer = Tokenizer(_unigram(model) if unigram else _bpe(model))
    tokenizer.normalizer = normalize.chain(model, ahead.normalizers())  # type: ignore[assignment]
    if cuts := _pre_tokenizers(model):
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cuts)  # type: ignore[assignment]
    tokenizer.decoder = _decoder(model, ahead.newline)  # type: ignore[assignment]
    special = [piece.piece for piece in model.pieces if piece.type in (UNKNOWN, CONTROL)]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def _unigram(model: ModelProto) -> models.Unigram:
    return models.Unigram(
        [(piece.piece, _score(piece)) for piece in model.pieces],
        unk_id=_unknown_id(model),
        byte_fallback=model.trainer_spec.byte_fallback,
    )


def _unknown_id(model: ModelProto) -> int:
    return next(id for id, piece in enumerate(model.pieces) if piece.type == UNKNOWN)


def _bpe(model: ModelProto) -> models.BPE:
    frozen = {piece.piece for piece in model.pieces if piece.type == USER_DEFINED}
    normal = {piece.piece: piece.score for piece in model.pieces if piece.type == NORMAL}
    merges = []
    for merged in sorted((piece for piece in normal if len(piece) > 1), key=normal.__getitem__, reverse=True):
        halves = [(merged[:at], merged[at:]) for at in range(1, len(merged))]
        halves = [(left, right) for left, right in halves if left in normal and right in normal]
        # Where a half stands at both ends of the piece, it may be shared: then the merge that it ends goes first.
        merges += sorted(halves, key=lambda pair: not merged.startswith(pair[1]))
    return models.BPE(
        vocab={piece.piece: id for id, piece in enumerate(model.pieces)},
        merges=merges,
        unk_token=model.pieces[_unknown_id(model)].piece,
        fuse_unk=True,
        byte_fallback=model.trainer_spec.byte_fallback,
        ignore_merges=any(len(piece) > 1 for piece in frozen),  # how a user-defined piece, cut out, is found
    )


def _pre_tokenizers(model: ModelProto) -> list[pre_tokenizers.PreTokenizer]:
    """Cuts where SentencePiece always cuts, so that pieces which it never picks are not seen."""
    own = normalize.user_defined(model)
    characters, neighbours = _characters(_reachable(model))
    hidden = [piece.piece for piece in model.pieces if piece.type in _HIDDEN]
    if model.trainer_spec.model_type == model.trainer_spec.UNIGRAM:
        cuts = [(start, piece[len(start) :]) for piece in hidden if (start := _cut(piece, characters, neighbours))]
        pattern = "|".join(f"{re.escape(start)}(?={re.escape(end)})" for start, end in cuts)
        return [_split(pattern, "merged_with_previous")] if cuts else []
    if not own:
        return []
    steps = [_split("|".join(map(re.escape, own)))]
    if any(len(piece) > 1 for piece in own):
        spelt = [pieces[0] for pieces in plain(model).encode(hidden, out_type=str)]
        ends = [
            f"{re.escape(first)}(?={re.escape(piece[len(first) :])}\\z)"
            for first, piece in zip(spelt, hidden, strict=True)
        ]
        steps.append(_split(f"\\A(?:{'|'.join(ends)})"))
    return steps


def _split(pattern: str, behavior: str = "isolated") -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(pattern), behavior)


def _decoder(model: ModelProto, newline: str | None) -> decoders.Decoder:
    unknown = model.pieces[_unknown_id(model)].piece
    steps: list = [decoders.Replace(SPACE, " ")]
    if model.trainer_spec.byte_fallback:
        steps.append(decoders.ByteFallback())
    else:
        steps.insert(0, decoders.Replace(unknown, model.trainer_spec.unk_surface))
    steps.append(decoders.Fuse())
    # SentencePiece takes away all spaces of a text that began with a literal U+2581; not where a space may belong to
    # what stands for an unknown character: there that text comes back with its space.
    if model.normalizer_spec.remove_extra_whitespaces and model.trainer_spec.byte_fallback:
        steps.append(decoders.Strip(" ", 2**16, 0))
    elif model.normalizer_spec.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    if newline is not None:
        steps.append(decoders.Replace(newline, "\n"))
    return decoders.Sequence(steps)


def lossless_refusal(model: ModelProto) -> str | None:
    """Why `to_lossless` would not be exact for this model; None where it is."""
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    if trainer.model_type != trainer.UNIGRAM:
        return f"it is a {trainer.ModelType.Name(trainer.model_type)} model, not a UNIGRAM one"
    if normalizer.precompiled_charsmap:
        return f"it normalises text (rule {normalizer.name!r})"
    if normalizer.add_dummy_prefix:
        return "it puts a space in front of the text (add_dummy_prefix)"
    if normalizer.remove_extra_whitespaces:
        return "it removes spaces (remove_extra_whitespaces)"
    if not trainer.byte_fallback:
        return "it has no byte pieces for unknown characters (byte_fallback)"
    if any(piece.type in (USER_DEFINED, UNUSED) for piece in model.pieces):
        return "it has user-defined or unused pieces"
    if any(BYTE_PIECE.fullmatch(piece.piece.replace(SPACE, " ")) for piece in _reachable(model)):
        return "an ordinary piece would be decoded as a byte"
    characters = {piece.piece for piece in _reachable(model) if len(piece.piece) == 1}
    if alien := [piece.piece for piece in model.pieces if piece.type != BYTE and set(piece.piece) - characters]:
        return f"the piece {alien[0]!r} holds a character which is not a piece itself"
    return normalize.refusal(model) or _refusal(model)


def to_lossless(model: ModelProto, name: str = "the model") -> Tokenizer:
    """The fast tokenizer with the ids of a SentencePiece unigram model, for every text without a literal U+2581.

    The vocabulary holds real spaces. Unknown, bos, eos and pad become special tokens. Other control pieces
    (`<reserved_0>`) keep their ids and are not found in text.

    Raises:
        UserError: The conversion would not be exact, and why.
    """
    if reason := lossless_refusal(model):
        raise UserError(
            f"{name} cannot be converted without loss: {reason}", "`tsumugu tokenizer train` makes ones that can"
        )
    vocabulary = [
        (piece.piece.replace(SPACE, " "), piece.score) if piece.type == NORMAL else (piece.piece, NEVER)
        for piece in model.pieces
    ]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=model.trainer_spec.unk_id, byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in special_tokens(model).values()]
    )
    return tokenizer


@dataclass(frozen=True)
class Comparison:
    """How many texts, with how many characters, were cut alike, and how many differed by a tie alone."""

    strings: int
    characters: int
    ties: int


def compare(
    model: ModelProto,
    encode: Callable[[list[str]], Sequence[Sequence[int]]],
    texts: Iterable[str],
    name: str = "the model",
) -> Comparison:
    """Compares SentencePiece with another encoder of the same model, text by text.

    Args:
        model: The original.
        encode: The encoder; its ids have no bos and eos.
        texts: What to compare on.
        name: What to call the model in an error.

    Returns:
        Ties are texts cut otherwise, of which both ways spell the same and score the same within the rounding of
        SentencePiece's float32 sums; 0 for BPE, and for models whose scores lie on the grid.

    Raises:
        UserError: Any other difference; names the text.
    """
    reference = processor(model)
    unigram = model.trainer_spec.model_type == model.trainer_spec.UNIGRAM
    strings = characters = ties = 0
    batch: list[str] = []

    def check() -> None:
        nonlocal ties
        for text, theirs, ours in zip(batch, reference.encode(batch), encode(batch), strict=True):
            if theirs != list(ours):
                if not (unigram and _is_tie(model, reference, theirs, ours)):
                    raise UserError(
                        f"{name} cannot be converted exactly: {_around(text)!r} gives {list(ours)[:40]}, "
                        f"not SentencePiece's {theirs[:40]}",
                        "please report it",
                    )
                ties += 1
        batch.clear()

    for text in texts:
        strings, characters = strings + 1, characters + len(text)
        batch.append(text)
        if len(batch) == 1000:
            check()
    if batch:
        check()
    return Comparison(strings, characters, ties)


def _around(text: str) -> str:
    return text if len(text) <= 200 else text[:200] + "…"


def _is_tie(model: ModelProto, reference: SentencePieceProcessor, theirs: Sequence[int], ours: Sequence[int]) -> bool:
    def spelt(ids: Sequence[int]) -> str:
        return "".join(reference.id_to_piece(list(ids)))

    def score(ids: Sequence[int]) -> float:
        return sum(model.pieces[id].score for id in ids)

    # Sums of float32 are off by up to 2**-24 of their size at each addition; those of a text, at random, by less than
    # 2**-20 of the whole.
    return spelt(theirs) == spelt(ours) and abs(score(theirs) - score(ours)) <= 2**-20 * abs(score(ours))


def differing_part(tokenizer: Tokenizer, converted: Tokenizer) -> str | None:
    """What makes two tokenizers cut documents differently, of normaliser, pre-tokeniser and model; None if nothing."""
    ours, theirs = json.loads(tokenizer.to_str()), json.loads(converted.to_str())
    return next((part for part in ("normalizer", "pre_tokenizer", "model") if ours[part] != theirs[part]), None)

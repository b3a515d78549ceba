"""Cleaning of documents: characters are mended, personal data is masked, bad text is dropped with a reason.

Everything works on batches of documents, and what looks at every character does so in NumPy over code points. Rules
that know Japanese touch sources of `language: ja` only. A document that fails a rule is dropped with its key in
`CleanConfig` as the reason (of max_top_ngrams and max_duplicate_ngrams: `max_top_2gram`, `max_duplicate_5gram` and so
on), `mojibake`, or `hojichar:FILTER`. Not here: deduplication between documents.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tsumugu.config import CleanConfig
from tsumugu.data.cleaning.code_points import CODE_POINTS, blocks, codes_of, joined
from tsumugu.data.cleaning.normalize import Language, Normalizer
from tsumugu.data.cleaning.personal_data import MASKS
from tsumugu.data.cleaning.quality import NGRAM_SIZES, character_measures, ngram_measures, ngram_name, sentence_measures
from tsumugu.errors import UserError


class Cleaned(NamedTuple):
    """What became of a document: its text, mended and masked, and the reason why it is dropped, else None."""

    text: str
    dropped: str | None


class Cleaner:
    """The rules of one source, made ready once; called with batches of documents.

    Args:
        rules: What to do; `rules.rules` is set (`PrepareConfig.clean_of` sees to it).
        language: What the source holds. Japanese rules touch `ja`, min_latin touches `en`; of `code` only control
            characters that are never code are removed.

    Raises:
        UserError: The file of NG words cannot be used, or a HojiChar filter does not exist or refuses its arguments.
    """

    def __init__(self, rules: CleanConfig, language: Language):
        self._rules = rules
        active = rules.rules not in (None, "none")
        self._normalize = Normalizer(rules, language) if active else None
        self._limits = _limits(rules, language) if rules.rules == "swallow" else []
        self._masks = [MASKS[kind] for kind in rules.mask] if active else []
        self._ng_words = (
            _NgWords(rules.ng_words, self._normalize, language) if self._normalize and rules.ng_words else None
        )
        self._hojichar = _hojichar_filters(rules.hojichar) if active else []

    def __call__(self, texts: Sequence[str], places: Sequence[str] | None = None) -> list[Cleaned]:
        """Cleans documents; as many come back, in the same order.

        Args:
            texts: The documents.
            places: Where each was read, for messages.

        Raises:
            UserError: A HojiChar filter fails.
        """
        if not self._normalize:
            return [Cleaned(text, None) for text in texts]
        cleaned, dropped = [], []
        for block in blocks(texts):
            block_texts, broken = self._normalize(block)
            cleaned += block_texts
            dropped += ["mojibake" if is_broken else None for is_broken in broken]
        for measure, limits in self._limits:
            kept = [index for index, reason in enumerate(dropped) if reason is None]
            found = measure([cleaned[index] for index in kept])
            for key, limit in limits.items():
                values = found[key[4:]]
                for index in np.flatnonzero(values < limit if key.startswith("min_") else values > limit).tolist():
                    dropped[kept[index]] = dropped[kept[index]] or key
        if self._ng_words and self._rules.max_ng_words < 1:  # of Japanese letters, words of others may cover more
            kept = [index for index, reason in enumerate(dropped) if reason is None]
            shares = self._ng_words([cleaned[index] for index in kept])
            for index, share in zip(kept, shares, strict=True):
                if share > self._rules.max_ng_words:
                    dropped[index] = "max_ng_words"
        for mask in self._masks:
            cleaned = [mask(text) for text in cleaned]  # what is dropped may be kept to be looked at
        if self._hojichar:
            for index, reason in enumerate(dropped):
                if reason is None:
                    place = places[index] if places else f"document {index + 1}"
                    cleaned[index], dropped[index] = _apply_hojichar(self._hojichar, cleaned[index], place)
        return [Cleaned(text, reason) for text, reason in zip(cleaned, dropped, strict=True)]


_CHARACTER_RULES = ("min_letters", "min_japanese_letters", "min_hiragana", "max_katakana", "min_japanese")
_SENTENCE_RULES = (
    "min_mean_sentence",
    "max_mean_sentence",
    "max_longest_sentence",
    "max_ellipsis",
    "max_duplicate_paragraphs",
    "max_duplicate_paragraph_characters",
    "max_duplicate_sentences",
    "max_duplicate_sentence_characters",
)
_LENGTHS = ("max_mean_sentence", "max_longest_sentence")  # no shares, so that 1 does not switch them off


def _limits(rules: CleanConfig, language: Language) -> list[tuple[Callable, dict[str, float]]]:
    """The quality rules of a language that can fail, min_MEASURE or max_MEASURE, by function; cheap ones first."""
    if language == "ja":
        ngram_limits = [*rules.max_top_ngrams, *rules.max_duplicate_ngrams]
        rules_of = [
            (character_measures, {key: getattr(rules, key) for key in _CHARACTER_RULES}),
            (sentence_measures, {key: getattr(rules, key) for key in _SENTENCE_RULES}),
            (ngram_measures, {f"max_{ngram_name(size)}": ngram_limits[size - 2] for size in NGRAM_SIZES}),
        ]
    else:
        rules_of = [(character_measures, {"min_latin": rules.min_latin if language == "en" else 0})]

    def can_fail(key: str, limit: float) -> bool:
        return limit > 0 if key.startswith("min_") else limit < (math.inf if key in _LENGTHS else 1)

    limits = [(measure, {key: at for key, at in keys.items() if can_fail(key, at)}) for measure, keys in rules_of]
    return [item for item in limits if item[1]]


class _NgWords:
    """Share of each document that words of a list cover, found from left to right, the longest first.

    As Swallow Corpus v1: over the Japanese letters of the document (see `quality.measures`), of other languages over
    all characters. The words are normalised as the text is.
    """

    def __init__(self, path: str, normalize: Normalizer, language: Language):
        try:
            lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8"
            raise UserError(f"clean.ng_words: cannot read {path}: {reason}", "give words, one a line") from None
        words, _ = normalize([line.strip() for line in lines])
        self._words = frozenset(filter(None, words))
        if not self._words:
            raise UserError(f"clean.ng_words: {path} holds no word", "write one word a line")
        self._japanese = language == "ja"
        self._lengths: dict[str, list[int]] = {}
        for first, length in sorted({(word[0], len(word)) for word in self._words}, reverse=True):
            self._lengths.setdefault(first, []).append(length)
        self._first = np.zeros(CODE_POINTS, np.bool_)
        self._first[[ord(first) for first in self._lengths]] = True
        self._pairs = np.zeros(1 << 16, np.bool_)  # of the first two characters, to pass over most places fast
        begins = codes_of("".join(word[:2] for word in self._words if len(word) > 1))
        self._pairs[_pair_slots(begins[::2], begins[1::2])] = True
        self._single = np.zeros(CODE_POINTS, np.bool_)
        self._single[[ord(word) for word in self._words if len(word) == 1]] = True

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        shares = [self._covered(block) for block in blocks(texts)]
        covered = np.concatenate(shares) if shares else np.empty(0)
        counts = character_measures(texts)["japanese_letters" if self._japanese else "letters"]
        return covered / np.maximum(counts, 1)

    def _covered(self, texts: list[str]) -> np.ndarray:
        codes, ends = joined(texts)
        covered = np.zeros(len(texts), np.int64)
        at = np.flatnonzero(self._first[codes])
        at = at[self._single[codes[at]] | self._pairs[_pair_slots(codes[at], codes[at + 1])]]
        together, done = "\n".join(texts), 0
        for place, document in zip(at.tolist(), np.searchsorted(ends, at).tolist(), strict=True):
            if place < done:
                continue
            for length in self._lengths[together[place]]:
                if together[place : place + length] in self._words:
                    covered[document] += length
                    done = place + length
                    break
        return covered


def _pair_slots(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return (first * np.uint32(0x9E3779B1) + second * np.uint32(0x85EBCA77)) >> np.uint32(16)


def _hojichar_filters(items: list[dict[str, Any]]) -> list[tuple[str, Any]]:
    """HojiChar's document filters by class name, each made with its arguments."""
    if not items:
        return []
    try:
        from hojichar.core.filter_interface import Filter  # pyright: ignore[reportMissingImports]
        from hojichar.filters import document_filters  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(f"clean.hojichar: {error}", "pip install hojichar") from None
    known = {
        name: value
        for name, value in vars(document_filters).items()
        if inspect.isclass(value) and issubclass(value, Filter) and value is not Filter
    }
    filters = []
    for index, item in enumerate(items):
        place = f"clean.hojichar[{index}]"
        arguments = {key: value for key, value in item.items() if key != "name"}
        name = item.get("name")
        if name not in known:
            raise UserError(f"{place}: no filter of HojiChar is named {name}", f"known: {', '.join(sorted(known))}")
        # HojiChar takes unknown arguments in silence; p and skip_rejected belong to its own Compose.
        parents = [parent for parent in known[name].__mro__ if issubclass(parent, Filter) and parent is not Filter]
        accepted = {key for parent in parents for key in inspect.signature(parent.__init__).parameters}
        accepted -= {"self", "args", "kwargs", "p", "skip_rejected"}
        if unknown := sorted(set(arguments) - accepted):
            known_here = ", ".join(sorted(accepted)) or "none"
            raise UserError(f"{place}: {name} has no argument {', '.join(unknown)}", f"its arguments: {known_here}")
        try:
            filters.append((name, known[name](**arguments)))
        except Exception as error:  # whatever a filter raises about its arguments
            raise UserError(f"{place}: {name}: {error}", "see the filter's documentation in HojiChar") from None
    return filters


def _apply_hojichar(filters: list[tuple[str, Any]], text: str, place: str) -> tuple[str, str | None]:
    from hojichar.core.models import Document  # pyright: ignore[reportMissingImports]

    document = Document(text)
    for name, one in filters:
        try:
            document = one.apply(document)
        except Exception as error:  # whatever a filter raises about a text, or about its arguments only now
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise UserError(
                f"{place}: HojiChar's {name} fails ({reason})", "check its arguments in clean.hojichar, or leave it out"
            ) from None
        if document.is_rejected:
            return document.text, f"hojichar:{name}"
    return document.text, None

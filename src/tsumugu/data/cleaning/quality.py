"""What the quality rules look at: characters, sentences, repetitions, counted as Swallow Corpus v1 counts them.

Okazaki et al. 2024, "Building a Large Japanese Web Corpus for Large Language Models", and the code published with it.
"""

import functools
import re
from collections.abc import Sequence

import numpy as np

from tsumugu.data.cleaning.code_points import CODE_POINTS, blocks, codes_of


def measures(texts: Sequence[str]) -> dict[str, np.ndarray]:
    """Everything that the quality rules look at, by name, a value a document.

    As Swallow Corpus v1 counts it, with one difference: blank lines, and pieces of white space between sentences, are
    neither paragraphs nor sentences (Swallow's extraction leaves no blank lines; half the lines of other text are).

    - letters: characters of any kind. japanese_letters: hiragana U+3041-3096, katakana U+30A1-30FA, kanji of the BMP
      and 々〇〻, and 、，。．！？.
    - hiragana, katakana: their share of japanese_letters. japanese: share of japanese_letters in letters.
      latin: share of Latin letters among the letters of all scripts.
    - mean_sentence, longest_sentence: in characters. A sentence ends after one of 。．！？!? or with its line; further
      end marks that follow are not counted. ellipsis: share of sentences that end in … or ・.
    - duplicate_paragraphs, duplicate_sentences: repetitions over all; duplicate_..._characters: their characters over
      the characters of all. A paragraph is a line.
    - top_Ngram (2 to 4): occurrences of the most frequent N characters over the number of N-grams of the document.
    - duplicate_Ngram (5 to 10): different N-grams that occur more than once over different N-grams.

    N-grams are counted exactly: they are sorted by their code points, nothing is hashed.
    """
    return character_measures(texts) | sentence_measures(texts) | ngram_measures(texts)


def character_measures(texts: Sequence[str]) -> dict[str, np.ndarray]:
    """The part of `measures` that counts characters by class."""
    kinds = _character_kinds()
    counts = np.zeros((len(texts), _KINDS), np.int64)
    row = 0
    for block in blocks(texts):
        found = kinds[codes_of("".join(block))]
        stop = 0
        for text in block:
            start, stop = stop, stop + len(text)
            counts[row] = np.bincount(found[start:stop], minlength=_KINDS)
            row += 1
    letters = counts.sum(1)
    japanese = counts[:, [_HIRAGANA, _KATAKANA, _KANJI, _MARK]].sum(1)
    script_letters = counts[:, [_HIRAGANA, _KATAKANA, _KANJI, _LATIN, _LETTER]].sum(1)
    return {
        "letters": letters,
        "japanese_letters": japanese,
        "hiragana": _share(counts[:, _HIRAGANA], japanese),
        "katakana": _share(counts[:, _KATAKANA], japanese),
        "japanese": _share(japanese, letters),
        "latin": _share(counts[:, _LATIN], script_letters),
    }


_SENTENCE = re.compile(r"[^。．！？!?\n]+[。．！？!?]?")
NGRAM_SIZES = range(2, 11)


def sentence_measures(texts: Sequence[str]) -> dict[str, np.ndarray]:
    """The part of `measures` that looks at sentences and paragraphs."""
    names = ("mean_sentence", "longest_sentence", "ellipsis")
    names += ("duplicate_sentences", "duplicate_sentence_characters")
    names += ("duplicate_paragraphs", "duplicate_paragraph_characters")
    values = np.zeros((len(names), len(texts)))
    for row, text in enumerate(texts):
        found = _SENTENCE.findall(text)
        complete = sum(map(len, found)) + text.count("\n") == len(text)  # else surplus end marks belong to no sentence
        lines = text.split("\n")
        paragraphs = lines if complete else ["".join(_SENTENCE.findall(line)) for line in lines]
        paragraphs = [paragraph for paragraph in paragraphs if paragraph and not paragraph.isspace()]
        sentences = [sentence for sentence in found if not sentence.isspace()]
        if sentences:
            lengths = list(map(len, sentences))
            ellipses = sum(sentence.rstrip().endswith(("…", "・")) for sentence in sentences)
            values[:3, row] = sum(lengths) / len(lengths), max(lengths), ellipses / len(lengths)
            values[3:5, row] = _duplicate_shares(sentences)
            values[5:, row] = _duplicate_shares(paragraphs)
    return dict(zip(names, values, strict=True))


def _duplicate_shares(items: list[str]) -> tuple[float, float]:
    """Repetitions over all items, and the same by characters."""
    different = set(items)
    characters = sum(map(len, items))
    return (len(items) - len(different)) / len(items), (characters - sum(map(len, different))) / characters


_END = CODE_POINTS  # stands behind the last character of a document and occurs in none


def ngram_measures(texts: Sequence[str]) -> dict[str, np.ndarray]:
    """The part of `measures` that counts N-grams.

    The positions of a document are sorted by the three characters that begin there (3 x 21 bits: no hash). From then
    on only positions whose N-gram occurs more than once are sorted further, by (group, next character): all others
    stay alone for every greater N. An N-gram that would begin too near to the end holds `_END` and is alone, too.
    """
    found = {ngram_name(size): np.zeros(len(texts)) for size in NGRAM_SIZES}
    row = 0
    for block in blocks(texts):
        for name, values in _block_ngrams(block).items():
            found[name][row : row + len(block)] = values
        row += len(block)
    return found


def ngram_name(size: int) -> str:
    return f"top_{size}gram" if size < 5 else f"duplicate_{size}gram"


def _block_ngrams(texts: list[str]) -> dict[str, np.ndarray]:
    lengths = np.array([len(text) for text in texts])
    starts = np.cumsum(lengths + 2) - (lengths + 2)  # two _END behind each document
    codes = codes_of("\0\0".join([*texts, ""])).astype(np.uint64)
    codes[starts + lengths] = codes[starts + lengths + 1] = _END
    keys = codes[:-2] << np.uint64(42)
    keys |= codes[1:-1] << np.uint64(21)
    keys |= codes[2:]
    order = np.concatenate(
        [np.argsort(keys[start : start + length]) + start for start, length in zip(starts, lengths, strict=True)]
    )
    keys = keys[order]
    documents = np.repeat(np.arange(len(texts)), lengths)
    changes = keys[1:] ^ keys[:-1]
    other_document = documents[1:] != documents[:-1]
    found = {}
    first = np.ones(len(keys), np.bool_)  # begins a group of equal N-grams
    for size, lowest in ((2, 21), (3, 0)):
        first[1:] = (changes >> np.uint64(lowest) != 0) | other_document
        found[ngram_name(size)] = _share(_largest_group(first, documents, lengths >= size), lengths - size + 1)
    alone = np.zeros(len(texts), np.int64)  # positions whose N-gram occurs once
    for size in NGRAM_SIZES[2:]:
        last = np.append(first[1:], True)
        repeated = ~(first & last)
        groups = np.cumsum(first)[repeated].astype(np.uint64)
        alone += np.bincount(documents[~repeated], minlength=len(texts))
        order, documents = order[repeated], documents[repeated]
        keys = groups << np.uint64(21) | codes[order + size - 1]
        sorting = np.argsort(keys)
        order, keys = order[sorting], keys[sorting]  # documents stay in order: their groups do
        first = np.ones(len(keys), np.bool_)
        first[1:] = keys[1:] != keys[:-1]
        if size == 4:
            counts = _largest_group(first, documents, lengths >= size)
            found[ngram_name(size)] = _share(counts, lengths - size + 1)
        else:
            last = np.append(first[1:], True)[: len(first)]
            different = np.bincount(documents[first], minlength=len(texts)) + alone - np.minimum(size - 1, lengths)
            duplicate = np.bincount(documents[first & ~last], minlength=len(texts))
            found[ngram_name(size)] = _share(duplicate, different)
    return found


def _largest_group(first: np.ndarray, documents: np.ndarray, at_least: np.ndarray) -> np.ndarray:
    """Size of the largest group of every document; `at_least` where it has none."""
    largest = at_least.astype(np.int64)
    begins = np.flatnonzero(first)
    np.maximum.at(largest, documents[begins], np.diff(begins, append=len(first)))
    return largest * at_least


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole, 0 where there is nothing."""
    return np.divide(part, whole, out=np.zeros(len(part)), where=whole > 0)


# Classes of characters, as Swallow Corpus v1 counts them.
_OTHER, _HIRAGANA, _KATAKANA, _KANJI, _MARK, _LATIN, _LETTER = range(7)
_KINDS = 7


@functools.cache
def _character_kinds() -> np.ndarray:
    """(code points,) the class of every character."""
    kinds = np.zeros(CODE_POINTS, np.uint8)
    for code in range(0x33480):  # letters end there
        if chr(code).isalpha():
            kinds[code] = _LETTER
    for first, last in ((0x41, 0x5A), (0x61, 0x7A), (0xAA, 0xAA), (0xBA, 0xBA), (0xC0, 0x24F), (0x1E00, 0x1EFF)):
        kinds[first : last + 1] = _LATIN
    for first, last in ((0xFF21, 0xFF3A), (0xFF41, 0xFF5A)):
        kinds[first : last + 1] = _LATIN
    kinds[[0xD7, 0xF7]] = _OTHER  # × ÷
    kinds[0x3041:0x3097] = _HIRAGANA
    kinds[0x30A1:0x30FB] = _KATAKANA
    kinds[0x3400:0xA000] = _KANJI
    kinds[0xF900:0xFB00] = _KANJI
    kinds[[ord(character) for character in "々〇〻"]] = _KANJI
    kinds[[ord(character) for character in "、，。．！？"]] = _MARK
    return kinds

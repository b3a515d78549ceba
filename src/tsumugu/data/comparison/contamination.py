"""Which documents hold a stretch of a benchmark, so that a model is not measured on what it was trained on.

Text is compared as in `shingles`: letters and digits only, whatever their width and case. A document is contaminated by
a benchmark if both have a stretch of `length` characters in common: 32 by default, some 15 Japanese words, longer than
set phrases and shorter than most questions. GPT-4's report (arXiv:2303.08774, appendix C) uses 50 characters of
English, in which a character tells about half as much; where most of a string is not Japanese, Chinese or Korean, twice
the length is needed. Shorter strings of a benchmark, down to half of that, must occur whole; still shorter ones occur
in many documents by chance, and are not looked for.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from tsumugu.data import corpus
from tsumugu.data.comparison.shingles import letters, windows
from tsumugu.errors import UserError

_WIDE = 0x2E80  # first of the code points of kana, kanji and hangul
_FORM_SHARE = 0.5
_FORM_RECORDS = 4
_BATCH_CHARACTERS = 2**16
_PAIRS = 4096


class Coverage(NamedTuple):
    """How much of a benchmark file is looked for.

    Attributes:
        file: The file.
        records: Its records.
        unchecked: Those without any string that is long enough.
        example: Place of the first of these, or "".
    """

    file: str
    records: int
    unchecked: int
    example: str


class Contamination:
    """Finds stretches of benchmarks in documents.

    All strings of all columns count, also those in lists and objects, except for what over half of the records of a
    file (of at least four) have in common: that is its form, such as a licence or the words that open each question.

    Of each string, hashes of `length / 2` characters are kept at such distances that one lies within any stretch of
    `length`. What has that hash in a document is then compared character by character, so that nothing is found that
    is not there. Memory: some six bytes for each character of the benchmarks.

    Args:
        paths: Files, folders or globs, as a source has them.
        length: Characters of a stretch; even.

    Attributes:
        coverage: Of each file.

    Raises:
        UserError: Files that cannot be read, or hold nothing.
    """

    def __init__(self, paths: list[str], length: int = 32):
        assert length % 2 == 0
        self._anchor = length // 2
        self._reach = 2 * length
        self._files = corpus.find_files(paths)
        records = [(number, record.place, set(_strings(record.values))) for number, record in self._records()]
        filled = {number for number, _, _ in records}
        for number, file in enumerate(self._files):
            if number not in filled:
                raise UserError(f"{file}: holds no record to look for", "remove it from prepare.contamination")
        strings = [string for _, _, held in records for string in sorted(held)]
        record = np.repeat(np.arange(len(records)), [len(held) for _, _, held in records])
        file_of_record = np.array([number for number, _, _ in records], np.int64)

        self._codes, self._ends = letters(strings)
        self._file = file_of_record[record]
        lengths = np.diff(self._ends, prepend=0)
        wide = np.diff(np.append(0, np.cumsum(self._codes >= _WIDE))[self._ends], prepend=0)
        whole = np.where(2 * wide >= lengths, length, 2 * length)
        self._needed = np.minimum(lengths, whole)
        strides = np.where(lengths < whole, lengths + 1, whole - self._anchor + 1)
        anchors = np.where(2 * lengths < whole, 0, (lengths - self._anchor) // strides + 1)
        string = np.repeat(np.arange(len(strings)), anchors)
        offsets = (np.arange(len(string)) - np.repeat(np.cumsum(anchors) - anchors, anchors)) * strides[string]
        hashes, hash_ends = windows(self._codes, self._ends, self._anchor)
        keys = hashes[np.append(0, hash_ends)[string] + offsets]

        content = ~_form(keys, record[string], file_of_record)
        self.coverage = self._coverage(records, set(record[string[content]].tolist()))
        distinct = np.zeros(len(strings), np.bool_)  # a passage of several questions is compared with once
        last_of = {held: index for index, held in enumerate(zip(self._file.tolist(), strings, strict=True))}
        distinct[list(last_of.values())] = True
        used = np.flatnonzero(content & distinct[string])
        used = used[np.argsort(keys[used], kind="stable")]
        self._keys, self._string = keys[used], string[used]
        self._places = np.append(0, self._ends)[self._string] + offsets[used]
        self._shift = np.uint64(64 - min(max(len(used).bit_length() + 5, 12), 26))
        self._present = np.zeros(2 ** (64 - int(self._shift)), np.bool_)
        self._present[self._keys >> self._shift] = True

    def check(self, texts: list[str]) -> list[str | None]:
        """The benchmark file that each text holds a stretch of, where it does."""
        found: list[str | None] = []
        batch: list[str] = []
        size = 0
        for text in texts:
            batch.append(text)
            size += len(text)
            if size >= _BATCH_CHARACTERS:
                found += self._check(batch)
                batch, size = [], 0
        return found + self._check(batch)

    def _check(self, texts: list[str]) -> list[str | None]:
        found: list[str | None] = [None] * len(texts)
        codes, ends = letters(texts)
        hashes, hash_ends = windows(codes, ends, self._anchor)
        hits = np.flatnonzero(self._present[hashes >> self._shift])
        begins, stops = (np.searchsorted(self._keys, hashes[hits], side) for side in ("left", "right"))
        hit = np.repeat(hits, stops - begins)
        entry = np.arange(len(hit)) - np.repeat(np.cumsum(stops - begins) - stops, stops - begins)
        text = np.searchsorted(hash_ends, hit, "right")
        starts, hash_starts = np.append(0, ends)[:-1], np.append(0, hash_ends)[:-1]
        places = hit - hash_starts[text] + starts[text]
        for part in np.split(np.arange(len(hit)), range(_PAIRS, len(hit), _PAIRS)):
            part = part[[found[number] is None for number in text[part].tolist()]] if len(part) else part
            strings = self._string[entry[part]]
            here = (codes, places[part], starts[text[part]], ends[text[part]])
            there = (self._codes, self._places[entry[part]], np.append(0, self._ends)[strings], self._ends[strings])
            common = _common(here, there, range(self._reach)) + _common(here, there, range(-1, -self._reach - 1, -1))
            for index in np.flatnonzero(common >= self._needed[strings])[::-1].tolist():  # the first one stays
                found[text[part[index]]] = self._files[self._file[strings[index]]]
        return found

    def _records(self) -> Iterator[tuple[int, corpus.Record]]:
        for number, file in enumerate(self._files):
            yield from ((number, record) for record in corpus.records(corpus.plan([file])))

    def _coverage(self, records: list[tuple[int, str, set[str]]], checked: set[int]) -> list[Coverage]:
        unchecked: list[list[str]] = [[] for _ in self._files]
        for index, (number, place, _) in enumerate(records):
            if index not in checked:
                unchecked[number].append(place)
        counts = Counter(number for number, _, _ in records)
        return [
            Coverage(file, counts[number], len(places), places[0] if places else "")
            for number, (file, places) in enumerate(zip(self._files, unchecked, strict=True))
        ]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)


def _form(keys: np.ndarray, records: np.ndarray, file_of_record: np.ndarray) -> np.ndarray:
    """Whether each key is in over half of the records of its file."""
    files = file_of_record[records]
    by_key = np.lexsort((records, keys, files))
    keys, records, files = keys[by_key], records[by_key], files[by_key]
    new_key = np.append(True, (keys[1:] != keys[:-1]) | (files[1:] != files[:-1]))[: len(keys)]
    new_record = new_key | np.append(True, records[1:] != records[:-1])[: len(keys)]
    held_by = np.bincount(np.cumsum(new_key) - 1, new_record)
    of = np.bincount(file_of_record)[files[new_key]]
    form = np.empty(len(keys), np.bool_)
    form[by_key] = ((of >= _FORM_RECORDS) & (held_by > _FORM_SHARE * of))[np.cumsum(new_key) - 1]
    return form


def _common(here: tuple, there: tuple, steps: range) -> np.ndarray:
    """How many characters two texts have in common from a place in each onwards, in the direction of the steps.

    Args:
        here: Characters, and of each pair the place, where its text begins, and where it ends.
        there: The same of the other side.
        steps: Distances from the place.
    """
    (codes, place, start, end), (others, other_place, other_start, other_end) = here, there
    first = steps[0]
    if first < 0:
        room = np.minimum(place - start, other_place - other_start)
    else:
        room = np.minimum(end - place, other_end - other_place)
    offsets = np.array(steps)
    inside = np.arange(len(offsets)) < room[:, None]
    equal = inside.copy()
    pair, step = np.nonzero(inside)
    equal[pair, step] = codes[place[pair] + offsets[step]] == others[other_place[pair] + offsets[step]]
    return np.append(equal, np.zeros((len(equal), 1), bool), 1).argmin(1)

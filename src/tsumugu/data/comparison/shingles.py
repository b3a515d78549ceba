"""Text as it is compared: the letters and digits of documents as arrays, and 64-bit hashes of all their windows.

Whitespace, punctuation and control characters are left out, and width and case do not count, so that neither line
breaks nor ，。、 nor ＡＢＣ make two documents differ. Nothing here is what training reads.
"""

import functools
import unicodedata

import numpy as np

_ODD = np.random.Generator(np.random.PCG64(5)).integers(0, 2**64, 64, np.uint64) | np.uint64(1)  # multipliers


@functools.cache
def _table() -> np.ndarray:
    """What each code point is compared as: itself, after NFKC and case folding if that is one character, or nothing."""
    table = np.zeros(0x110000, np.uint32)
    for code in range(0x110000):
        character = chr(code)
        if unicodedata.category(character)[0] not in "ZCP":
            folded = unicodedata.normalize("NFKC", character).casefold()
            table[code] = ord(folded) if len(folded) == 1 else code
    return table


def letters(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """The compared characters of texts, one text after another.

    Returns:
        (characters,) uint32, never 0, and (texts,) int64, where each text ends in it.
    """
    codes = _table()[np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32)]
    kept = np.flatnonzero(codes)
    return codes[kept], np.searchsorted(kept, np.cumsum([len(text) for text in texts], dtype=np.int64))


def windows(codes: np.ndarray, ends: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """64-bit hashes of all windows of `length` characters that lie within one text.

    Args:
        codes: Of `letters`.
        ends: Of `letters`.
        length: At least 2.

    Returns:
        (windows,) uint64, and (texts,) int64, where the windows of each text end in it.
    """
    window_ends = np.cumsum(np.maximum(np.diff(ends, prepend=0) - length + 1, 0))
    if window_ends.size == 0 or window_ends[-1] == 0:
        return np.empty(0, np.uint64), window_ends
    hashes = _mix(_combine(_mix(codes * _ODD[0]), length))
    inside = np.ones(len(codes), bool)
    for back in range(1, length):  # windows that begin there reach into the next text
        inside[ends[ends >= back] - back] = False
    return hashes[inside[: len(hashes)]], window_ends


def _combine(hashes: np.ndarray, length: int) -> np.ndarray:
    """Hashes of `length` neighbours each, from those of half as many."""
    if length == 1:
        return hashes
    half = length // 2
    halves = _combine(hashes, half)
    whole = halves[:-half] * _ODD[length]
    whole += halves[half:]
    return whole[:-1] * _ODD[1] + hashes[length - 1 :] if length % 2 else whole


def _mix(hashes: np.ndarray) -> np.ndarray:
    """Makes every bit depend on all bits (the finaliser of splitmix64, shortened)."""
    hashes ^= hashes >> np.uint64(32)
    hashes *= _ODD[-1]
    hashes ^= hashes >> np.uint64(29)
    return hashes

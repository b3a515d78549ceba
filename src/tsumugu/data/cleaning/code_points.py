"""Batches of documents as arrays of code points: what cleaning computes with."""

from collections.abc import Iterator, Sequence

import numpy as np

CODE_POINTS = 0x110000
_BLOCK = 1 << 17  # characters that are worked on together: what NumPy then holds stays in the cache


def blocks(texts: Sequence[str]) -> Iterator[list[str]]:
    """The texts in groups of about `_BLOCK` characters."""
    block, size = [], 0
    for text in texts:
        if block and size + len(text) > _BLOCK:
            yield block
            block, size = [], 0
        block.append(text)
        size += len(text)
    if block:
        yield block


def codes_of(text: str) -> np.ndarray:
    """(characters,) the code points of a text, read-only."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def joined(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Code points of texts with a newline behind each, and the places of these newlines."""
    return codes_of("\n".join([*texts, ""])), np.cumsum([len(text) + 1 for text in texts]) - 1

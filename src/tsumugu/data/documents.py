"""Documents on their way from reading to encoding: what deduplication and encoding read, in any order, from the disk.

    NNNNN.text      UTF-8 of all documents, one after another (of instructions: the conversation as JSON)
    NNNNN.places    a line a document: where it was read
    NNNNN.npy       a row a document: end in .text, 128-bit keys of its content and of what decides its split (of a
                    conversation, the question), whether it is for validation

One shard a task of the preparation. Nothing here outlives the preparation.
"""

import hashlib
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

ROW = np.dtype([("end", np.int64), ("key", np.uint64, (2,)), ("split_key", np.uint64, (2,)), ("validation", np.bool_)])
_PACKED_ROW = struct.Struct("=q16s16s?")


def key_of(content: str) -> bytes:
    """16 bytes that stand for a content; equal contents, and in practice only they, have equal keys."""
    return hashlib.blake2b(content.encode(), digest_size=16).digest()


class DocumentWriter:
    """Writes one shard; `close` makes it appear whole.

    Args:
        prefix: Path without ending, such as `.work/documents/00000`.
    """

    def __init__(self, prefix: Path):
        prefix.parent.mkdir(parents=True, exist_ok=True)
        self._prefix = prefix
        self._text = open(_hidden(prefix, "text"), "wb")  # noqa: SIM115 - closed by close
        self._places = open(_hidden(prefix, "places"), "w", encoding="utf-8", newline="\n")  # noqa: SIM115
        self._rows = bytearray()  # of dtype ROW: 41 bytes a document
        self._end = 0

    def add(self, content: str, place: str, validation: bool, split_key: str | None = None) -> None:
        """Appends one document; `split_key` decided its split, by default its content."""
        self._end += self._text.write(content.encode())
        self._places.write(place.replace("\n", " ").replace("\r", " ") + "\n")
        key = key_of(content)
        other = key if split_key is None else key_of(split_key)
        self._rows += _PACKED_ROW.pack(self._end, key, other, validation)

    def close(self) -> None:
        self._text.close()
        self._places.close()
        with open(_hidden(self._prefix, "npy"), "wb") as file:
            np.save(file, np.frombuffer(self._rows, ROW))
        for ending in ("text", "places", "npy"):
            _hidden(self._prefix, ending).replace(_final(self._prefix, ending))


class Documents:
    """One shard, memory-mapped.

    Attributes:
        rows: (documents,) of dtype ROW.
    """

    def __init__(self, prefix: Path):
        self._prefix = prefix
        self.rows = np.load(_final(prefix, "npy"), mmap_mode="r")
        text = _final(prefix, "text")
        self._text = np.memmap(text, np.uint8, mode="r") if text.stat().st_size else np.empty(0, np.uint8)

    def __len__(self) -> int:
        return len(self.rows)

    def content(self, index: int) -> str:
        """What `DocumentWriter.add` was given."""
        start = int(self.rows["end"][index - 1]) if index else 0
        return self._text[start : int(self.rows["end"][index])].tobytes().decode()

    def places(self) -> Iterator[str]:
        """Where each document was read."""
        with open(_final(self._prefix, "places"), encoding="utf-8", newline="\n") as file:
            for line in file:
                yield line.removesuffix("\n")


def _hidden(prefix: Path, ending: str) -> Path:
    return prefix.with_name(f".{prefix.name}.{ending}")


def _final(prefix: Path, ending: str) -> Path:
    return prefix.with_name(f"{prefix.name}.{ending}")

"""Which documents share a row in `best_fit` packing: bins planned once, from lengths and a seed, and mapped from disk.

Best-fit-decreasing (Johnson, "Near-optimal bin packing algorithms", 1973; for language models Ding et al., "Fewer
truncations improve language modeling", 2024): documents go, longest first, each into the bin with the least room that
it fits. Lengths are whole numbers up to a row, so that documents of one length are placed together, by bins of equal
room: a million take about a second, and the result is that of placing one after another.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tsumugu.data.sampler import row_at
from tsumugu.data.store import Split

_VERSION = 1
FOLDER = "packing"  # beside the splits of a store


@dataclass(frozen=True)
class Bins:
    """pieces (pieces, 2) int64: the token of the split's stream where a piece begins, and its inputs; a piece reads one
    token more. starts (bins + 1,) int64: the first piece of every bin. inputs: of all pieces.
    """

    pieces: np.ndarray
    starts: np.ndarray
    inputs: int

    def __len__(self) -> int:
        return len(self.starts) - 1

    def pieces_of(self, index: int) -> list[tuple[int, int]]:
        """(first token, inputs) of the pieces of a bin."""
        first, last = self.starts[index : index + 2].tolist()
        return [(start, size) for start, size in self.pieces[first:last].tolist()]


def plan_bins(split: Split, capacity: int, seed: int) -> Bins:
    """The bins of a split, made once and kept beside the store, or in the user's cache where the store is read-only.

    Every process may call it: of those on one host the first makes the plan, the others wait and map its files.

    Args:
        split: Of a store; documents without an input are in no bin.
        capacity: Inputs a bin holds; a longer document is cut into pieces of that many, and a rest.
        seed: Among documents of one length it decides which comes first.
    """
    key = hashlib.sha256(json.dumps([_VERSION, split.identity, capacity, seed]).encode()).hexdigest()[:24]
    for folder in (split.folder.parent / FOLDER, _cache_folder()):
        path = folder / f"{split.folder.name}-{key}"
        with contextlib.suppress(OSError, ValueError):  # ValueError: of a file that a crash cut short
            if not path.exists():
                folder.mkdir(parents=True, exist_ok=True)
                with _locked(folder / ".lock"):
                    if not path.exists():
                        _write(path, make_bins(split.document_bounds(), capacity, seed))
            pieces, starts = (np.load(path / f"{name}.npy", mmap_mode="r") for name in ("pieces", "starts"))
            return Bins(pieces, starts, int(pieces[:, 1].sum()))
    return make_bins(split.document_bounds(), capacity, seed)


def make_bins(bounds: np.ndarray, capacity: int, seed: int) -> Bins:
    """As `plan_bins`, of documents that lie at bounds[i] to bounds[i + 1] of a stream."""
    sizes = np.maximum(np.diff(bounds) - 1, 0)
    pieces_of = -(-sizes // capacity)  # of every document
    document = np.repeat(np.arange(len(sizes)), pieces_of)
    number = np.arange(len(document)) - np.repeat(np.cumsum(pieces_of) - pieces_of, pieces_of)
    starts = bounds[document] + number * capacity
    lengths = np.minimum(capacity, sizes[document] - number * capacity)
    if not len(lengths):
        return Bins(np.zeros((0, 2), np.int64), np.zeros(1, np.int64), 0)
    shuffled = row_at(np.arange(len(lengths)), len(lengths), seed)
    order = shuffled[np.argsort(-lengths[shuffled], kind="stable")]
    bins = best_fit(lengths[order], capacity)
    order, bins = order[np.argsort(bins, kind="stable")], np.bincount(bins)
    pieces = np.stack([starts[order], lengths[order]], axis=1).astype(np.int64)
    return Bins(pieces, np.concatenate([[0], np.cumsum(bins)]), int(lengths.sum()))


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The bin of every item when each goes into the bin with the least room that it fits, or else into a new one.

    Args:
        lengths: (items,), in descending order, from 1 to capacity.
        capacity: Of a bin.
    """
    bin_of = np.empty(len(lengths), np.int64)
    open_bins: dict[int, list[np.ndarray]] = {}  # by room
    rooms = 0  # bit r is set while there are bins with room r
    number = 0
    firsts = np.flatnonzero(np.diff(lengths, prepend=-1)).tolist()
    for first, last in zip(firsts, [*firsts[1:], len(lengths)], strict=True):
        size, at = int(lengths[first]), first
        while at < last:
            if fitting := rooms >> size:
                room = size + (fitting & -fitting).bit_length() - 1
                ids = np.concatenate(open_bins.pop(room))
                rooms ^= 1 << room
            else:
                room, made = capacity, -(-(last - at) // (capacity // size))
                ids = np.arange(number, number + made)
                number += made
            # a bin that has just taken one has the least room for the next of the same size
            each = room // size
            taken = min(last - at, each * len(ids))
            bin_of[at : at + taken] = np.repeat(ids, each)[:taken]
            full, rest = divmod(taken, each)
            parts = {room - each * size: ids[:full], room - rest * size: ids[full : full + 1], room: ids[full + 1 :]}
            if not rest:
                parts = {room - each * size: ids[:full], room: ids[full:]}
            for left, part in parts.items():
                if len(part) and left:
                    open_bins.setdefault(left, []).append(part)
                    rooms |= 1 << left
            at += taken
    return bin_of


def _cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "tsumugu" / FOLDER


def _write(path: Path, bins: Bins) -> None:
    """Writes a folder that is whole or absent."""
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        np.save(temporary / "pieces.npy", bins.pieces)
        np.save(temporary / "starts.npy", bins.starts)
        temporary.chmod(0o755)
        with contextlib.suppress(OSError):  # another host, whose lock is not ours, made the same
            temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield

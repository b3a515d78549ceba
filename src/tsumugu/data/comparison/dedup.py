"""Which documents are copies of others: exact ones by their keys, near ones by MinHash on datatrove's stages.

Everything reads the shards of `documents` and says what is to be removed, and for the sake of which document that
stays; nothing is changed here. The order of documents is: those for validation first, then by task and index; of
documents that are alike, the first stays.

Near duplicates have a true Jaccard similarity, of their sets of character 5-grams, of at least the wanted one.
datatrove's own last stage joins whatever collided, unverified and over any number of links, and is not used: here a
document goes only if it was compared with one that stays and found that similar.

    signatures/bucket_BBB/GGGGG.minhash.sig   datatrove's signatures of group G of shards
    sketches/TTTTT.npy                        a byte of each hash of every document of shard T, to compare quickly
    collisions/BBBBB_00.dups                  datatrove's pairs of documents with equal signatures in bucket B
    candidates/BBBBB/GGGGG.bin                pairs to compare, of bucket B, the later document in group G
    similar/GGGGG.npy                         pairs with their true similarity, of those candidates, in order
    chosen/UUUUU.npy                          what is to be removed of unit U, and for the sake of what
    removed/UUUUU.npy                         the same, for `read_removed`
"""

import bisect
import contextlib
import functools
import itertools
import math
import shutil
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupBuckets
from datatrove.utils.hashing import HashConfig

from tsumugu.data import instructions
from tsumugu.data.comparison.shingles import letters, windows
from tsumugu.data.documents import Documents

Mode = Literal["none", "exact", "near"]
Kind = Literal["text", "instructions"]

REMOVED = np.dtype(
    [
        ("task", np.int32),
        ("document", np.int32),
        ("kept_task", np.int32),
        ("kept_document", np.int32),
        ("similarity", np.float32),
    ]
)
SHINGLE = 5  # characters

_BUCKETS, _ROWS = 48, 4
_HASHES = _BUCKETS * _ROWS
_MULTIPLIERS = np.random.Generator(np.random.PCG64(1)).integers(0, 2**32, _HASHES, np.uint32) | np.uint32(1)
_GROUPS = 512  # at most; datatrove's bucket stage keeps a file of each open
_BLOCK = 2**15  # shingles whose hashes stay in the cache
_COLLISIONS = 2**16  # pairs at a time
_NEIGHBOURS = 4  # nearest and first ones of a run of equal signatures that a document is paired with
_COMPARED = 32  # candidates of a document
_KEEPERS = 8  # further documents, behind those of its candidates that were removed
_OPEN_SHARDS = 64
_CACHE_BYTES = 128 * 2**20
_TRAINING = 2**63
_STAYS = 2**64 - 1  # in place of an order, and no order: so many documents there are never
_TASK, _DOCUMENT = 2**31 - 1, 2**32 - 1
_PAIR = np.dtype([("later", np.uint64), ("earlier", np.uint64)])
_SIMILAR = np.dtype([("later", np.uint64), ("earlier", np.uint64), ("similarity", np.float64)])


class Stage(NamedTuple):
    """What an executor runs: all tasks of a stage before any of the next one."""

    name: str
    pipeline: list[PipelineStep]
    tasks: int


def read_removed(folder: Path, task: int) -> np.ndarray:
    """What a stage found to be removed from one shard, reading little else.

    Args:
        folder: The output of `exact_stage`, or `removed` in the output of `near_stages`.
        task: The shard's.

    Returns:
        (documents,) of dtype REMOVED, by document.
    """
    slices = []
    for path in sorted(folder.glob("[0-9]*.npy")):
        removed = np.load(path, mmap_mode="r")
        tasks = removed["task"]  # bisect reads single values; np.searchsorted would copy them all
        slices.append(removed[bisect.bisect_left(tasks, task) : bisect.bisect_right(tasks, task)])
    return np.sort(np.concatenate([np.empty(0, REMOVED), *slices]), order="document")


def exact_stage(documents: Path, output: Path, modes: list[Mode], input_bytes: int) -> Stage:
    """Finds equal documents.

    Of shards with mode exact or near, all documents but the first of equal ones are removed. Of every shard, also of
    mode none, a training document goes if a document for validation, of whatever shard, equals it (of conversations: if
    the question does).

    A task takes a part of all keys, and some 100 bytes for each document in it: 200 MB for 2 million documents, which
    is what 1 GiB of input holds at 500 bytes a document.

    Args:
        documents: Folder with a shard for each mode.
        output: Folder for what `read_removed` reads.
        modes: Of each shard.
        input_bytes: Size of all input; only the number of tasks depends on it.
    """
    return Stage("exact-duplicates", [_Exact(documents, output, modes)], 1 + input_bytes // 2**30)


class _Exact(PipelineStep):
    type = "DEDUP"
    name = "equal documents"

    def __init__(self, documents: Path, output: Path, modes: list[Mode]):
        super().__init__()
        self.documents = documents
        self.output = output
        self.modes = modes

    def run(self, data=None, rank: int = 0, world_size: int = 1) -> None:
        removed = np.concatenate([self._validated(rank, world_size), self._repeated(rank, world_size)])
        _, first = np.unique(removed[["task", "document"]], return_index=True)
        _write(self.output / f"{rank:05d}.npy", removed[first])

    def _validated(self, part: int, parts: int) -> np.ndarray:
        """Training documents whose split key is that of a document for validation."""
        orders, starts = self._groups("split_key", part, parts)
        training = orders >= _TRAINING
        removed = np.flatnonzero(training & ~training[starts])  # in its order, validation comes first
        return _as_removed(orders[removed], orders[starts[removed]], 1.0)

    def _repeated(self, part: int, parts: int) -> np.ndarray:
        """Documents to be compared that equal an earlier one of these."""
        orders, starts = self._groups("key", part, parts)
        compared = (np.array(self.modes) != "none")[_task(orders)]
        first = np.full(len(orders), len(orders))
        np.minimum.at(first, starts[compared], np.flatnonzero(compared))
        first = first[starts]  # of those to be compared, the first of each group
        removed = np.flatnonzero(compared & (np.arange(len(orders)) != first))
        return _as_removed(orders[removed], orders[first[removed]], 1.0)

    def _groups(self, key: str, part: int, parts: int) -> tuple[np.ndarray, np.ndarray]:
        """Documents with equal keys one after another, in their order, and where the group of each begins."""
        shards = [self._shard(key, task, part, parts) for task in range(len(self.modes))]
        keys, orders = (np.concatenate(column) for column in zip(*shards, strict=True))
        by_key = np.lexsort((orders, keys[:, 1], keys[:, 0]))
        keys, orders = keys[by_key], orders[by_key]
        begins = _begins((keys[1:] != keys[:-1]).any(1), len(keys))
        return orders, np.maximum.accumulate(np.where(begins, np.arange(len(keys)), 0))

    def _shard(self, key: str, task: int, part: int, parts: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys and orders of the documents of a shard whose keys are in this part."""
        rows = Documents(self.documents / f"{task:05d}").rows
        mine = np.flatnonzero(rows[key][:, 0] % np.uint64(parts) == part)
        return rows[key][mine], _orders(task, mine, rows["validation"][mine])


def near_stages(
    documents: Path, exact: Path, output: Path, modes: list[Mode], kind: Kind, min_similarity: float
) -> list[Stage]:
    """Finds near duplicates among the documents that the exact stage left in shards of mode near.

    Documents are compared by the letters and digits of their text (see `shingles`; of instructions, of the contents
    of all messages); those with fewer than five are left alone. Two documents of Jaccard similarity s become
    candidates with a probability of 1 - (1 - s**4)**48: 0.84 at 0.44 (every tenth character edited), 0.9999 at 0.65
    (every twentieth). Of its candidates, a document is compared with the 32 that are closest by their 192 hashes.

    A document that the exact stage kept may go here; what was removed as equal to it is then as similar to what stays.

    Similarities are exact but for 5-grams with equal 64-bit hashes, about one in 10**13 documents of 1,500 characters.

    Memory of a task, for a group of shards (one, or the 512th part of all): signatures, 1 kB for each of its documents;
    candidates, 100 kB for each group and 100 MB; comparison, 200 MB and 60 bytes for each pair of candidates (at most
    384 for each document, in practice a few); the choice, 200 MB and 100 to 300 bytes for each pair that was compared
    (at most 32 for each document). Each of these needs 60 bytes more for each character of the longest document. So
    2 GiB suffice for up to 500 million documents, a million in each group.

    Args:
        documents: Folder with a shard for each mode.
        exact: Output of `exact_stage`.
        output: Folder for what lies between the stages; in the end, `read_removed` reads `removed` in it.
        modes: Of each shard.
        kind: How the contents are read.
        min_similarity: Least Jaccard similarity of what is removed and a document that stays.
    """
    groups = -(-len(modes) // _shards_a_group(len(modes)))
    config = MinhashConfig(
        num_buckets=_BUCKETS, hashes_per_bucket=_ROWS, hash_config=HashConfig(precision=32, hash_fc="sha1")
    )
    buckets = MinhashDedupBuckets(
        str(output / "signatures"), str(output / "collisions"), config=config, lines_to_buffer=1000
    )
    return [
        Stage("near-signatures", [_Signatures(documents, exact, output, modes, kind)], groups),
        Stage("near-candidates", [buckets, _Candidates(output, len(modes))], _BUCKETS),
        Stage("near-comparison", [_Compare(documents, output, kind, min_similarity)], groups),
        Stage("near-choice", [_Choose(documents, output, len(modes), kind, min_similarity)], 1),
    ]


def compared_text(content: str, kind: Kind) -> str:
    """What is compared of a document: its text, or the contents of its messages (without `input`, the passage)."""
    if kind == "text":
        return content
    return "\n".join(message.content for message in instructions.from_json(content))


class _Signatures(PipelineStep):
    """Writes datatrove's signatures of a group of shards, and the sketches of each.

    datatrove's own step would do so from shingles of ours, but it loads spaCy, and takes documents one by one.
    """

    type = "DEDUP"
    name = "signatures"

    def __init__(self, documents: Path, exact: Path, output: Path, modes: list[Mode], kind: Kind):
        super().__init__()
        self.documents = documents
        self.exact = exact
        self.output = output
        self.modes = modes
        self.kind: Kind = kind

    def run(self, data=None, rank: int = 0, world_size: int = 1) -> None:
        shards_a_group = _shards_a_group(len(self.modes))
        group = range(len(self.modes))[rank * shards_a_group : (rank + 1) * shards_a_group]
        tasks = [task for task in group if self.modes[task] == "near"]
        shards = [Documents(self.documents / f"{task:05d}") for task in tasks]
        hashes = np.empty((_HASHES, sum(map(len, shards))), np.uint32)
        numbers = np.empty(hashes.shape[1], np.uint32)
        done = 0
        for task, shard in zip(tasks, shards, strict=True):
            sketches = np.zeros((len(shard), _HASHES), np.uint8)
            for indexes, shingles, ends in self._batches(shard, task):
                columns = slice(done, done + len(indexes))
                _minhash((shingles >> np.uint64(32)).astype(np.uint32), ends, hashes[:, columns])
                numbers[columns] = _to_numbers(task, indexes, len(self.modes))
                sketches[indexes] = hashes[:, columns].T  # the lowest byte
                done += len(indexes)
            _write(self.output / "sketches" / f"{task:05d}.npy", sketches)
        for bucket in range(_BUCKETS):
            rows = hashes[bucket * _ROWS : (bucket + 1) * _ROWS, :done]
            by_hash = np.lexsort(rows[::-1])  # of equal ones, the earlier document first
            records = np.vstack([rows[:, by_hash], numbers[:done][by_hash]]).T.astype("<u4")
            path = self.output / "signatures" / f"bucket_{bucket:03d}" / f"{rank:05d}.minhash.sig"
            with _appearing(path) as hidden:
                hidden.write_bytes(records.tobytes())

    def _batches(self, shard: Documents, task: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(indexes of documents, their shingles, where those of each end), of those that have any."""
        left = np.setdiff1d(np.arange(len(shard)), read_removed(self.exact, task)["document"])
        size = np.diff(shard.rows["end"], prepend=0)[left]
        for batch in np.split(left, np.flatnonzero(np.diff(np.cumsum(size) // (3 * _BLOCK))) + 1):
            texts = [compared_text(shard.content(index), self.kind) for index in batch.tolist()]
            shingles, ends = windows(*letters(texts), SHINGLE)
            some = np.diff(ends, prepend=0) > 0
            if some.any():
                yield batch[some], shingles, ends[some]


def _minhash(shingles: np.ndarray, ends: np.ndarray, least: np.ndarray) -> None:
    """The least value of each hash function over the shingles of each document.

    The functions are multiplications by odd numbers modulo 2**32, which permute what is evenly spread already.

    Args:
        shingles: (shingles,) uint32, of one document after another.
        ends: (documents,), where each ends; none is empty.
        least: (hashes, documents) uint32, to be filled.
    """
    least[:] = 2**32 - 2  # datatrove takes one more for the end of a file
    products = np.empty(min(_BLOCK, len(shingles)), np.uint32)
    for start in range(0, len(shingles), _BLOCK):
        block = shingles[start : start + _BLOCK]
        product = products[: len(block)]
        documents = slice(np.searchsorted(ends, start, "right"), np.searchsorted(ends, start + len(block)) + 1)
        begins = np.maximum(np.append(0, ends)[documents] - start, 0)
        for row, multiplier in zip(least, _MULTIPLIERS, strict=True):
            np.multiply(block, multiplier, out=product)
            np.minimum(row[documents], np.minimum.reduceat(product, begins), out=row[documents])


class _Candidates(PipelineStep):
    """Makes pairs to compare of the collisions in a bucket.

    datatrove pairs a document with the one before it in a run of equal signatures. If those two are not alike, either
    may still be like another one; so a document is paired with the four before it, and with the first four, which most
    probably stay: in runs of up to nine documents, all are paired with all.
    """

    type = "DEDUP"
    name = "candidates"

    def __init__(self, output: Path, shards: int):
        super().__init__()
        self.output = output
        self.shards = shards

    def run(self, data=None, rank: int = 0, world_size: int = 1) -> None:
        with (
            _appearing(self.output / "candidates" / f"{rank:05d}") as hidden,
            open(self.output / "collisions" / f"{rank:05d}_00.dups", "rb") as file,
        ):
            hidden.mkdir()
            while len(collisions := np.fromfile(file, "<u4", 4 * _COLLISIONS)):
                groups, numbers = collisions.reshape(-1, 2).T
                places = _to_places(groups, numbers, self.shards).reshape(-1, 2)
                pairs = _pairs_of_runs(places)
                groups = _task(pairs["later"]) // _shards_a_group(self.shards)  # now of pairs
                by_group = np.argsort(groups, kind="stable")
                for group, mine in _split(groups[by_group], by_group):
                    with open(hidden / f"{group:05d}.bin", "ab") as output:
                        output.write(pairs[mine].tobytes())


def _pairs_of_runs(links: np.ndarray) -> np.ndarray:
    """Pairs of documents in the same run.

    Args:
        links: (pairs, 2) places; a run is a chain of pairs, each beginning with what ended the one before.

    Returns:
        (pairs,) of dtype _PAIR.
    """
    begins = _begins(links[1:, 0] != links[:-1, 1], len(links))
    lengths = np.diff(np.flatnonzero(np.append(begins, True))) + 1
    first = np.repeat(np.cumsum(lengths) - lengths, lengths)  # where the run of each member begins
    position = np.arange(len(first)) - first
    members = np.empty(len(first), np.uint64)
    members[position > 0] = links[:, 1]
    members[position == 0] = links[begins, 0]
    pairs = []
    for number in range(1, _NEIGHBOURS + 1):
        later = np.flatnonzero(position >= number)
        pairs.append((later, later - number))
        later = np.flatnonzero(position >= _NEIGHBOURS + number)
        pairs.append((later, first[later] + number - 1))
    later, earlier = (np.concatenate(column) for column in zip(*pairs, strict=True))
    result = np.empty(len(later), _PAIR)
    result["later"], result["earlier"] = members[later], members[earlier]
    return result


class _Compare(PipelineStep):
    """Computes the true similarity of the candidates whose later document is in a group."""

    type = "DEDUP"
    name = "comparison"

    def __init__(self, documents: Path, output: Path, kind: Kind, min_similarity: float):
        super().__init__()
        self.documents = documents
        self.output = output
        self.kind: Kind = kind
        self.min_similarity = min_similarity

    def run(self, data=None, rank: int = 0, world_size: int = 1) -> None:
        shingles = _Shingles(self.documents, self.kind)
        files = sorted((self.output / "candidates").glob(f"[0-9]*/{rank:05d}.bin"))
        pairs = np.concatenate([np.empty(0, _PAIR), *(np.fromfile(file, _PAIR) for file in files)])
        pairs = pairs[np.lexsort((pairs["earlier"], pairs["later"]))]
        pairs = self._closest(pairs[_begins(pairs[1:] != pairs[:-1], len(pairs))])
        similar = np.empty(len(pairs), _SIMILAR)
        for number in range(len(pairs)):
            later, earlier = pairs[number].item()
            orders = sorted(shingles.order(place) for place in (later, earlier))
            similar[number] = (orders[1], orders[0], shingles.similarity(later, earlier))
        _write(self.output / "similar" / f"{rank:05d}.npy", similar[np.lexsort((similar["earlier"], similar["later"]))])

    def _closest(self, pairs: np.ndarray) -> np.ndarray:
        """Of each later document, the pairs that agree in the most hashes, and in enough to be similar at all.

        Of pairs with the wanted similarity, one in 100,000 agrees in fewer (4.27 standard deviations).
        """
        s = self.min_similarity
        enough = s * _HASHES - 4.27 * math.sqrt(_HASHES * s * (1 - s))
        agreeing = np.empty(len(pairs), np.uint8)
        for start in range(0, len(pairs), _COLLISIONS):
            part = slice(start, start + _COLLISIONS)
            later, earlier = (self._sketches(pairs[column][part]) for column in ("later", "earlier"))
            agreeing[part] = (later == earlier).sum(1)
        pairs, agreeing = pairs[agreeing >= enough], agreeing[agreeing >= enough]
        closest = np.lexsort((pairs["earlier"], 255 - agreeing, pairs["later"]))
        later = pairs["later"][closest]
        rank = np.arange(len(later)) - np.searchsorted(later, later)
        return pairs[np.sort(closest[rank < _COMPARED])]

    def _sketches(self, places: np.ndarray) -> np.ndarray:
        sketches = np.empty((len(places), _HASHES), np.uint8)
        by_task = np.argsort(places, kind="stable")
        for task, mine in _split(_task(places[by_task]), by_task):
            shard = np.load(self.output / "sketches" / f"{task:05d}.npy", mmap_mode="r")
            sketches[mine] = shard[_document(places[mine])]
        return sketches


class _Choose(PipelineStep):
    """Goes through the documents that are like others, in their order, and removes those that are like one that stays.

    A document that is like removed ones only, or was paired with them, is compared with those that these were removed
    for: a copy of a copy, of which the original was no candidate, is found so.

    Units are what the documents for validation, and then those for training, of each group of shards are; one at a time
    is in memory. What was removed of earlier ones is looked up in their files.
    """

    type = "DEDUP"
    name = "choice"

    def __init__(self, documents: Path, output: Path, shards: int, kind: Kind, min_similarity: float):
        super().__init__()
        self.documents = documents
        self.output = output
        self.shards = shards
        self.kind: Kind = kind
        self.min_similarity = min_similarity

    def run(self, data=None, rank: int = 0, world_size: int = 1) -> None:
        shingles = _Shingles(self.documents, self.kind)
        starts = np.arange(0, self.shards, _shards_a_group(self.shards)).astype(np.uint64) << np.uint64(32)
        starts = np.concatenate([starts, starts | np.uint64(_TRAINING)])  # the least order of each unit
        files = [self.output / "similar" / f"{group:05d}.npy" for group in range(len(starts) // 2)]
        bounds = [np.append(np.searchsorted(np.load(file)["later"], starts), len(_mapped(file))) for file in files]
        for unit in range(len(starts)):
            parts = [
                _mapped(file)[bound[unit] : bound[unit + 1]]
                for file, bound in zip(files, bounds, strict=True)
                if bound[unit] < bound[unit + 1]
            ]
            pairs = np.concatenate([np.empty(0, _SIMILAR), *parts])
            pairs = pairs[np.lexsort((pairs["earlier"], -pairs["similarity"], pairs["later"]))]
            kept_before = self._kept(pairs["earlier"], starts[: unit + 1])
            removed, kept, similarities = self._choose(pairs, kept_before, shingles)
            _write(self.output / "chosen" / f"{unit:05d}.npy", np.array([removed, kept]))
            _write(self.output / "removed" / f"{unit:05d}.npy", _as_removed(removed, kept, similarities))

    def _kept(self, orders: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """What each document was removed for, _STAYS for those that were not, or are of the last unit."""
        kept = np.full(len(orders), _STAYS, np.uint64)
        by_order = np.argsort(orders, kind="stable")
        units = np.searchsorted(starts, orders[by_order], "right") - 1
        for unit, mine in _split(units, by_order):
            if unit < len(starts) - 1:
                removed, kept_of = _mapped(self.output / "chosen" / f"{unit:05d}.npy")
                place = np.minimum(np.searchsorted(removed, orders[mine]), max(len(removed) - 1, 0))
                found = removed[place] == orders[mine] if len(removed) else np.zeros(len(mine), bool)
                kept[mine[found]] = kept_of[place[found]]
        return kept

    def _choose(
        self, pairs: np.ndarray, kept_before: np.ndarray, shingles: "_Shingles"
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(what is removed of a unit, what for, their similarities), by order.

        Args:
            pairs: Those whose later document is in the unit, by it, the most similar first.
            kept_before: What their earlier documents were removed for, of `_kept`.
        """
        gone: dict[int, tuple[int, float]] = {}
        for document, mine in _split(pairs["later"], np.arange(len(pairs))):
            others = pairs["earlier"][mine].tolist()
            staying: dict[int, float] = {}
            behind: dict[int, None] = {}
            values = zip(others, pairs["similarity"][mine].tolist(), kept_before[mine].tolist(), strict=True)
            for other, similarity, kept in values:
                if other in gone:
                    behind[gone[other][0]] = None
                elif kept != _STAYS:
                    behind[kept] = None
                else:
                    staying[other] = similarity
            if not any(similarity >= self.min_similarity for similarity in staying.values()):
                for other in itertools.islice((other for other in behind if other not in others), _KEEPERS):
                    staying[other] = shingles.similarity(document & ~_TRAINING, other & ~_TRAINING)
            best = max(staying, key=lambda other: (staying[other], -other), default=None)
            if best is not None and staying[best] >= self.min_similarity:
                gone[document] = best, staying[best]
        kept = np.array([kept for kept, _ in gone.values()], np.uint64)
        return np.array(list(gone), np.uint64), kept, np.array([similarity for _, similarity in gone.values()])


class _Shingles:
    """The sets of shingles of documents, by place; those last used stay in memory."""

    def __init__(self, documents: Path, kind: Kind):
        self._kind: Kind = kind
        self._shard = functools.lru_cache(_OPEN_SHARDS)(lambda task: Documents(documents / f"{task:05d}"))
        self._sets: OrderedDict[int, np.ndarray] = OrderedDict()
        self._bytes = 0

    def order(self, place: int) -> int:
        """The place, above all places of validation if it is for training."""
        validation = self._shard(place >> 32).rows["validation"][place & _DOCUMENT]
        return place if validation else place | _TRAINING

    def similarity(self, one: int, other: int) -> float:
        """Jaccard similarity of two documents."""
        sets = self._set(one), self._set(other)
        both = np.sort(np.concatenate(sets))
        common = np.count_nonzero(both[1:] == both[:-1])
        return common / (len(both) - common)

    def _set(self, place: int) -> np.ndarray:
        if place in self._sets:
            self._sets.move_to_end(place)
            return self._sets[place]
        content = self._shard(place >> 32).content(place & _DOCUMENT)
        shingles = np.unique(windows(*letters([compared_text(content, self._kind)]), SHINGLE)[0])
        self._sets[place] = shingles
        self._bytes += shingles.nbytes
        while self._bytes > _CACHE_BYTES and len(self._sets) > 1:
            self._bytes -= self._sets.popitem(last=False)[1].nbytes
        return shingles


# A place is a task and a document in one number; an order is a place, with the highest bit set for training.


def _task(orders: np.ndarray) -> np.ndarray:
    return (orders >> 32 & _TASK).astype(np.int64)


def _document(orders: np.ndarray) -> np.ndarray:
    return (orders & _DOCUMENT).astype(np.int64)


def _orders(task: int, documents: np.ndarray, validation: np.ndarray) -> np.ndarray:
    return (
        np.uint64(task << 32) | documents.astype(np.uint64) | np.where(validation, np.uint64(0), np.uint64(_TRAINING))
    )


def _as_removed(orders: np.ndarray, kept: np.ndarray, similarity: np.ndarray | float) -> np.ndarray:
    removed = np.empty(len(orders), REMOVED)
    removed["task"], removed["document"] = _task(orders), _document(orders)
    removed["kept_task"], removed["kept_document"] = _task(kept), _document(kept)
    removed["similarity"] = similarity
    return removed[np.lexsort((removed["document"], removed["task"]))]


# datatrove names a document by the number of a file and 32 bits: its file is our group of shards, and the bits are the
# shard in the group and the document in the shard.


def _shards_a_group(shards: int) -> int:
    return -(-shards // _GROUPS)


def _number_bits(shards: int) -> int:
    return 32 - (_shards_a_group(shards) - 1).bit_length()


def _to_numbers(task: int, documents: np.ndarray, shards: int) -> np.ndarray:
    assert documents.max() < 2 ** _number_bits(shards)
    return documents | (task % _shards_a_group(shards)) << _number_bits(shards)


def _to_places(groups: np.ndarray, numbers: np.ndarray, shards: int) -> np.ndarray:
    groups, numbers = groups.astype(np.uint64), numbers.astype(np.uint64)
    tasks = groups * _shards_a_group(shards) + (numbers >> _number_bits(shards))
    return tasks << 32 | numbers & 2 ** _number_bits(shards) - 1


def _begins(changes: np.ndarray, count: int) -> np.ndarray:
    """Where runs begin, of `count` items that change, or not, from one to the next."""
    return np.append(True, changes)[:count]


def _split(keys: np.ndarray, values: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """The values of each run of equal keys."""
    starts = np.flatnonzero(_begins(keys[1:] != keys[:-1], len(keys)))
    for start, stop in itertools.pairwise(np.append(starts, len(keys))):
        yield int(keys[start]), values[start:stop]


@contextlib.contextmanager
def _appearing(path: Path) -> Iterator[Path]:
    """A path for a file or folder that gets its name, in place of an older one, when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    hidden = path.with_name(f".{path.name}")
    _remove(hidden)
    yield hidden
    if path.is_dir():
        shutil.rmtree(path)
    hidden.replace(path)


def _mapped(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="r")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _write(path: Path, array: np.ndarray) -> None:
    with _appearing(path) as hidden, open(hidden, "wb") as file:
        np.save(file, array)

"""The token store: documents as token ids in Megatron's MMIDIDX files, with a supervision mask where there is one.

    manifest.json            kind, tokenizer fingerprint, counts, size and sha256 of every file
    tokenizer/               the tokenizer, its contract and its chat template, if it has one
    train/00000.bin          token ids, document after document (uint16 or int32)
    train/00000.idx          MMIDIDX: dtype, length and byte offset of every document
    train/00000.mask         supervised data only: one byte a token, 1 = supervised
    validation/...

Megatron-LM, NeMo, gpt-neox and nanotron read the `.bin`/`.idx` pairs. The manifest is written last: a folder without
one is no store. This module writes, maps and verifies; it neither tokenises nor makes batches.
"""

import bisect
import hashlib
import itertools
import json
import mmap
import os
import resource
import struct
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tsumugu.errors import UserError

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
SPLITS = ("train", "validation")

TOKENIZER = "tokenizer"

_KINDS = ("text", "instructions")
# What is read back of a manifest: keys and types, lists with the shape of their items, and `...` for every key.
_FILES = {...: {"size": int, "sha256": str}}
_COUNTS = {"documents": int, "tokens": int, "longest_document": int}
_MANIFEST = {
    "kind": str,
    "tokenizer": {"fingerprint": str, "files": _FILES},
    "template": (str, dict, type(None)),
    "add_bos": bool,
    "add_eos": bool,
    "splits": {split: {**_COUNTS, "shards": [{**_COUNTS, "name": str, "files": _FILES}]} for split in SPLITS},
}

_IDX_HEADER = b"MMIDIDX\x00\x00"
_DTYPE_CODES: dict[int, type] = {4: np.int32, 8: np.uint16}  # the codes that megatron-core gives these dtypes


def token_dtype(vocab_size: int) -> type:
    """uint16 below 65,500 ids and int32 from there, which is where megatron-core cuts."""
    return np.uint16 if vocab_size < 65500 else np.int32


class ShardWriter:
    """Writes one shard: `add` documents, then `close`, which writes the index and makes the files appear.

    Args:
        prefix: Path without ending, such as `store/train/00000`.
        dtype: numpy dtype of the ids, from `token_dtype`.
        supervised: Whether a mask is written too.
    """

    def __init__(self, prefix: Path, dtype: type, supervised: bool):
        prefix.parent.mkdir(parents=True, exist_ok=True)
        self.prefix = prefix
        self.dtype = np.dtype(dtype)
        self.lengths: list[int] = []
        self.supervised_tokens = 0
        self._files = {ending: _HashedFile(prefix, ending) for ending in (("bin", "mask") if supervised else ("bin",))}

    def add(self, ids: np.ndarray, mask: np.ndarray | None = None) -> None:
        """Appends one document: ids (tokens,) and, in a supervised store, mask (tokens,) of zeros and ones."""
        self._files["bin"].write(np.asarray(ids, dtype=self.dtype).tobytes())
        if "mask" in self._files:
            assert mask is not None
            assert len(mask) == len(ids)
            self._files["mask"].write(np.asarray(mask, dtype=np.uint8).tobytes())
        self.supervised_tokens += len(ids) if mask is None else int(mask.sum())
        self.lengths.append(len(ids))

    def close(self) -> dict | None:
        """Writes the index and renames every file into place; an empty shard leaves no file.

        Returns:
            The shard's entry in the manifest (counts, sizes and hashes), None for an empty shard.
        """
        if not self.lengths:
            for file in self._files.values():
                file.discard()
            return None
        lengths = np.asarray(self.lengths, dtype=np.int32)
        pointers = np.zeros(len(lengths), dtype=np.int64)
        np.cumsum(lengths[:-1].astype(np.int64) * self.dtype.itemsize, out=pointers[1:])
        code = next(code for code, dtype in _DTYPE_CODES.items() if self.dtype == dtype)
        idx = self._files["idx"] = _HashedFile(self.prefix, "idx")
        # one sequence a document: the document index counts one more than there are documents
        idx.write(_IDX_HEADER + struct.pack("<QBQQ", 1, code, len(lengths), len(lengths) + 1))
        for array in (lengths, pointers, np.arange(len(lengths) + 1, dtype=np.int64)):
            idx.write(array.tobytes())
        return {
            "name": self.prefix.name,
            "documents": len(lengths),
            "tokens": int(lengths.sum(dtype=np.int64)),
            "supervised_tokens": self.supervised_tokens,
            "longest_document": int(lengths.max()),
            "files": {f"{self.prefix.name}.{ending}": file.publish() for ending, file in self._files.items()},
        }


class _HashedFile:
    """A file that is hashed while it is written, under a temporary name until it is published."""

    def __init__(self, prefix: Path, ending: str):
        self._final = prefix.with_name(f"{prefix.name}.{ending}")
        self._temporary = prefix.with_name(f".{prefix.name}.{ending}")
        self._stream = open(self._temporary, "wb")  # noqa: SIM115 - closed by publish and discard
        self._hash = hashlib.sha256()

    def write(self, data: bytes) -> None:
        self._stream.write(data)
        self._hash.update(data)

    def publish(self) -> dict:
        self._stream.close()
        self._temporary.replace(self._final)
        return {"size": self._final.stat().st_size, "sha256": self._hash.hexdigest()}

    def discard(self) -> None:
        self._stream.close()
        self._temporary.unlink()


class Shard:
    """One shard, memory-mapped. Nothing of it is read here but the ends of its index.

    Attributes:
        tokens: (tokens,) ids of all documents, one after another.
        mask: (tokens,) bool, True = supervised, or None where the shard has no mask.
        documents: How many.

    Raises:
        UserError: Files that are cut short, of another format, or do not belong together.
    """

    def __init__(self, prefix: Path):
        self.prefix = prefix
        idx_path, bin_path, mask_path = (
            prefix.with_name(f"{prefix.name}.{ending}") for ending in ("idx", "bin", "mask")
        )
        idx = _map(idx_path)
        if idx[:9] != _IDX_HEADER or len(idx) < 34:
            raise UserError(f"{idx_path}: not an MMIDIDX index", "prepare the store again")
        version, code, sequences, documents = struct.unpack("<QBQQ", idx[9:34])
        if version != 1 or code not in _DTYPE_CODES:
            raise UserError(f"{idx_path}: version {version}, dtype code {code} is not read here", "prepare again")
        if not sequences or documents < 2 or len(idx) < 34 + 12 * sequences + 8 * documents:
            raise UserError(f"{idx_path} is cut short", "prepare the store again")
        self._lengths = np.frombuffer(idx, np.int32, sequences, offset=34)
        self._pointers = np.frombuffer(idx, np.int64, sequences, offset=34 + 4 * sequences)
        self._sequence_of_document = np.frombuffer(idx, np.int64, documents, offset=34 + 12 * sequences)
        self.documents = documents - 1
        self._bin = _map(bin_path)
        self._mask = _map(mask_path) if mask_path.exists() else None
        for mapped in filter(None, (self._bin, self._mask)):
            mapped.madvise(mmap.MADV_RANDOM)  # rows are far apart: what lies around one is not read along with it
        dtype = np.dtype(_DTYPE_CODES[code])
        size = int(self._pointers[-1]) + int(self._lengths[-1]) * dtype.itemsize
        if len(self._bin) != size or (self._mask is not None and len(self._mask) * dtype.itemsize != size):
            raise UserError(f"{prefix}: the files differ in length", "prepare the store again")
        self.tokens = np.frombuffer(self._bin, dtype)
        self.mask = None if self._mask is None else np.frombuffer(self._mask, bool)

    def document(self, index: int) -> slice:
        """Where a document lies among the tokens, after checking that it begins and ends where its neighbours do."""
        itemsize, sequences = self.tokens.itemsize, len(self._lengths)
        first, last = index, index + 1
        if sequences != self.documents:  # Megatron's documents may have several sequences, ours have one
            first, last = (int(place) for place in self._sequence_of_document[index : index + 2])
        if 0 <= first < last <= sequences:
            start, end = int(self._pointers[first]), len(self._bin)
            stop = int(self._pointers[last]) if last < sequences else end
            length = int(self._lengths[first]) if last == first + 1 else int(self._lengths[first:last].sum())
            if 0 <= start <= stop <= end and stop - start == length * itemsize:
                return slice(start // itemsize, stop // itemsize)
        raise UserError(f"{self.prefix}.idx: documents do not follow one another", "prepare the store again")

    def starts(self, documents: slice) -> np.ndarray:
        """Tokens (documents,) int64 at which these documents begin."""
        if len(self._lengths) == self.documents:
            return self._pointers[documents] // self.tokens.itemsize
        return self._pointers[self._sequence_of_document[:-1][documents]] // self.tokens.itemsize

    def documents_before(self, token: int) -> int:
        """How many documents begin before a token."""
        return bisect.bisect_left(range(self.documents), token, key=lambda i: int(self.starts(slice(i, i + 1))[0]))

    def announce(self, part: slice) -> None:
        """Lets the kernel begin to read these tokens from disk, and does not wait for it."""
        for mapped, itemsize in ((self._bin, self.tokens.itemsize), (self._mask, 1)):
            if mapped is not None:
                start = part.start * itemsize // mmap.PAGESIZE * mmap.PAGESIZE
                mapped.madvise(mmap.MADV_WILLNEED, start, part.stop * itemsize - start)


def _map(path: Path) -> mmap.mmap:
    if not path.is_file():
        raise UserError(f"{path} is missing", "prepare the store again")
    with open(path, "rb") as file:
        if not os.fstat(file.fileno()).st_size:
            raise UserError(f"{path} is empty", "prepare the store again")
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


class Split:
    """One split of a store as a single stream of tokens, whatever the number of shards.

    Its sizes come from the manifest; a shard is mapped when it is first read, so that opening takes no longer for
    many documents.

    Args:
        folder: `store/train` or `store/validation`.
        shards: Their entries in the manifest, in order.
    """

    def __init__(self, folder: Path, shards: list[dict]):
        self.folder, self._entries = folder, shards
        self._token_starts = list(itertools.accumulate((shard["tokens"] for shard in shards), initial=0))
        self._document_starts = list(itertools.accumulate((shard["documents"] for shard in shards), initial=0))
        self.longest_document = max((shard["longest_document"] for shard in shards), default=0)
        self._shards: dict[int, Shard] = {}
        self._self: weakref.ref[Split] = weakref.ref(self)

    @property
    def tokens(self) -> int:
        return self._token_starts[-1]

    @property
    def documents(self) -> int:
        return self._document_starts[-1]

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Tokens [start, stop) of the stream as int64, and their supervision mask (bool), None where none is stored.

        Raises:
            UserError: A shard that is not what the manifest says.
        """
        ids, masks = [], []
        for shard, part in self._parts(start, stop):  # copies: a view would keep its shard open
            ids.append(shard.tokens[part].astype(np.int64))
            if shard.mask is not None:
                masks.append(shard.mask[part].copy())
        return _joined(ids), _joined(masks) if masks else None

    def document(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids (tokens,) int64 and supervision mask (tokens,) bool of one document, all ones where none is stored."""
        ids, mask = self.read(*self.span(index))
        return ids, np.ones(len(ids), bool) if mask is None else mask

    def span(self, index: int) -> tuple[int, int]:
        """Where a document begins and ends in the stream."""
        shard_index = bisect.bisect_right(self._document_starts, index) - 1
        part = self._shard(shard_index).document(index - self._document_starts[shard_index])
        offset = self._token_starts[shard_index]
        return offset + part.start, offset + part.stop

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """Tokens of the stream, from `start` to before `stop`, at which documents begin."""
        found, offset = [np.zeros(0, np.int64)], start
        for shard, part in self._parts(start, stop):
            first, last = (shard.documents_before(token) for token in (part.start, part.stop))
            found.append(shard.starts(slice(first, last)) + (offset - part.start))
            offset += part.stop - part.start
        return np.concatenate(found)

    def document_bounds(self) -> np.ndarray:
        """(documents + 1,) int64: where every document begins and ends in the stream.

        Raises:
            UserError: Documents that do not follow one another.
        """
        bounds = [np.zeros(1, np.int64)]
        for index, offset in enumerate(self._token_starts[:-1]):
            shard = self._shard(index)
            starts = np.append(shard.starts(slice(None)), len(shard.tokens))
            if starts[0] != 0 or (np.diff(starts) < 0).any():
                raise UserError(f"{shard.prefix}.idx: documents do not follow one another", "prepare the store again")
            bounds.append(starts[1:] + offset)
        return np.concatenate(bounds)

    @property
    def identity(self) -> list:
        """What tells the documents of this split from those of others: the hashes of its indexes, in order."""
        return [file["sha256"] for shard in self._entries for name, file in shard["files"].items() if ".idx" in name]

    def announce(self, start: int, stop: int) -> None:
        """Lets the kernel begin to read tokens [start, stop) from disk, and does not wait for it."""
        for shard, part in self._parts(start, stop):
            shard.announce(part)

    def _parts(self, start: int, stop: int) -> Iterator[tuple[Shard, slice]]:
        shard_index = bisect.bisect_right(self._token_starts, start) - 1
        while start < stop:
            offset, end = self._token_starts[shard_index : shard_index + 2]
            yield self._shard(shard_index), slice(start - offset, min(stop, end) - offset)
            start, shard_index = end, shard_index + 1

    def _shard(self, index: int) -> Shard:
        key = self._self, index
        if index in self._shards:
            _mapped.move_to_end(key)
        else:
            _make_room()
            self._shards[index] = self._map_shard(index)
            _mapped[key] = None
        return self._shards[index]

    def _map_shard(self, index: int) -> Shard:
        entry = self._entries[index]
        shard = Shard(self.folder / entry["name"])
        if (len(shard.tokens), shard.documents) != (entry["tokens"], entry["documents"]):
            raise UserError(f"{shard.prefix}.idx is not what the manifest says", "prepare the store again")
        return shard


def _joined(arrays: list[np.ndarray]) -> np.ndarray:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


# The shards that this process has mapped, of all stores together, as split and place; the least recently used first.
_mapped: OrderedDict[tuple[weakref.ref[Split], int], None] = OrderedDict()


def _make_room() -> None:
    """Before one more shard is mapped: a map of Python's holds a file open, and a shard has up to three.

    Half of the files that may be open are the stores'. The system's limit is raised as far as it may be where that is
    too low; beyond it, the least recently used shard goes.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 2 * 3 * (len(_mapped) + 1)
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = 2 * needed if hard == resource.RLIM_INFINITY else min(2 * needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    while _mapped and soft != resource.RLIM_INFINITY and soft < 2 * 3 * (len(_mapped) + 1):
        (split, index), _ = _mapped.popitem(last=False)
        if (found := split()) is not None:
            del found._shards[index]


@dataclass(frozen=True, kw_only=True)
class Store:
    """An opened store: its manifest and its splits."""

    path: Path
    manifest: dict
    train: Split
    validation: Split

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the tokenizer whose ids the store holds."""
        return self.manifest["tokenizer"]["fingerprint"]

    @property
    def supervised(self) -> bool:
        return self.manifest["kind"] == "instructions"


def open_store(path: Path) -> Store:
    """Opens a store, after checking that every shard of its manifest is there at its size.

    Raises:
        UserError: No store there, or files missing or of another size.
    """
    manifest = _check_sizes(path)
    train, validation = (Split(path / split, manifest["splits"][split]["shards"]) for split in SPLITS)
    return Store(path=path, manifest=manifest, train=train, validation=validation)


def verify(path: Path) -> None:
    """Reads every file of a store, its tokenizer's too, and compares its sha256 with the manifest.

    Raises:
        UserError: The first file that differs, is missing, or has come to the tokenizer since.
    """
    manifest = _check_sizes(path)
    of_tokenizer = manifest["tokenizer"]["files"]
    if added := sorted({file.name for file in (path / TOKENIZER).iterdir()} - of_tokenizer.keys()):
        raise UserError(f"{path / TOKENIZER / added[0]} is no file of the store", "move it elsewhere")
    for name, entry in [*((f"{TOKENIZER}/{name}", entry) for name, entry in of_tokenizer.items()), *_files(manifest)]:
        _check_size(path / name, entry)
        if sha256(path / name) != entry["sha256"]:
            raise UserError(f"{path / name} is not what was written (its sha256 differs)", "prepare the store again")


def read_manifest(path: Path) -> dict:
    """The manifest of the store at `path`, or a UserError where there is none."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} holds no token store", "make one with `tsumugu prepare`") from None
    except ValueError as error:
        raise UserError(f"{path / MANIFEST} is damaged ({error})", "prepare the store again") from None
    if not isinstance(manifest, dict):
        raise UserError(f"{path / MANIFEST} is damaged (it holds no JSON object)", "prepare the store again")
    if manifest.get("version") != FORMAT_VERSION:
        raise UserError(f"{path}: store version {manifest.get('version')} is not read here", "prepare the store again")
    if fault := _fault(manifest, _MANIFEST):
        raise UserError(f"{path / MANIFEST} is damaged ({fault})", "prepare the store again")
    if manifest["kind"] not in _KINDS:
        raise UserError(f"{path}: a store of {manifest['kind']!r} is not read here", f"known: {', '.join(_KINDS)}")
    return manifest


def _fault(content: Any, shape: Any, place: str = "") -> str | None:
    """What is missing or of another type in what was read from JSON, by its first place; None where nothing is."""
    if isinstance(shape, dict) and isinstance(content, dict):
        wanted = {key: shape[...] for key in content} if ... in shape else shape
        parts = {f"{place}.{key}".removeprefix("."): (content.get(key, _fault), inner) for key, inner in wanted.items()}
    elif isinstance(shape, list) and isinstance(content, list):
        parts = {f"{place}[{index}]": (item, shape[0]) for index, item in enumerate(content)}
    else:
        fits = not isinstance(shape, dict | list) and isinstance(content, shape)
        return None if fits else f"it lacks {place}" if content is _fault else f"{place} is {content!r:.80}"
    return next(filter(None, (_fault(item, inner, at) for at, (item, inner) in parts.items())), None)


def describe_split(shards: list[dict]) -> dict:
    """The manifest entry of one split, from the entries of its shards."""
    return {
        **{key: sum(shard[key] for shard in shards) for key in ("documents", "tokens", "supervised_tokens")},
        "longest_document": max((shard["longest_document"] for shard in shards), default=0),
        "shards": shards,
    }


def describe_files(folder: Path) -> dict:
    """Size and sha256 of every file of a folder, by name, as the manifest holds them."""
    return {file.name: {"size": file.stat().st_size, "sha256": sha256(file)} for file in sorted(folder.iterdir())}


def sha256(file: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _check_sizes(path: Path) -> dict:
    manifest = read_manifest(path)
    for name, entry in _files(manifest):
        _check_size(path / name, entry)
    return manifest


def _check_size(file: Path, entry: dict) -> None:
    if not file.is_file():
        raise UserError(f"{file} is missing", "prepare the store again")
    if file.stat().st_size != entry["size"]:
        raise UserError(f"{file} has {file.stat().st_size} bytes, not {entry['size']}", "prepare the store again")


def _files(manifest: dict) -> Iterable[tuple[str, dict]]:
    for split in SPLITS:
        for shard in manifest["splits"][split]["shards"]:
            for name, entry in shard["files"].items():
                yield f"{split}/{name}", entry

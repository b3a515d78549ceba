"""The token store: documents as token ids in Megatron's MMIDIDX files, with a supervision mask where there is one.

    manifest.json            kind, tokenizer fingerprint, counts, size and sha256 of every file
    tokenizer/               the tokenizer and its contract
    train/00000.bin          token ids, document after document (uint16 or int32)
    train/00000.idx          MMIDIDX: dtype, length and byte offset of every document
    train/00000.mask         supervised data only: one byte a token, 1 = supervised
    validation/...

Megatron-LM, NeMo, gpt-neox and nanotron read the `.bin`/`.idx` pairs. The manifest is written last: a folder without
one is no store. This module writes, maps and verifies; it neither tokenises nor makes batches.
"""

import hashlib
import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tsumugu.errors import UserError

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
SPLITS = ("train", "validation")

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
        self._bin = open(self._temporary("bin"), "wb")
        self._mask = open(self._temporary("mask"), "wb") if supervised else None

    def _temporary(self, ending: str) -> Path:
        return self.prefix.with_name(f".{self.prefix.name}.{ending}")

    def add(self, ids: np.ndarray, mask: np.ndarray | None = None) -> None:
        """Appends one document: ids (tokens,) and, in a supervised store, mask (tokens,) of zeros and ones."""
        self._bin.write(np.ascontiguousarray(ids, dtype=self.dtype).tobytes())
        if self._mask is not None:
            assert mask is not None and len(mask) == len(ids)
            mask = np.ascontiguousarray(mask, dtype=np.uint8)
            self._mask.write(mask.tobytes())
            self.supervised_tokens += int(mask.sum())
        self.lengths.append(len(ids))

    def close(self) -> None:
        """Writes the index and renames every file into place; an empty shard leaves no file."""
        endings = ["bin", "mask"] if self._mask is not None else ["bin"]
        self._bin.close()
        if self._mask is not None:
            self._mask.close()
        if not self.lengths:
            for ending in endings:
                self._temporary(ending).unlink()
            return
        lengths = np.asarray(self.lengths, dtype=np.int32)
        pointers = np.zeros(len(lengths), dtype=np.int64)
        np.cumsum(lengths[:-1].astype(np.int64) * self.dtype.itemsize, out=pointers[1:])
        code = next(code for code, dtype in _DTYPE_CODES.items() if self.dtype == dtype)
        with open(self._temporary("idx"), "wb") as idx:
            # one sequence a document: the document index counts one more than there are documents
            idx.write(_IDX_HEADER + struct.pack("<QBQQ", 1, code, len(lengths), len(lengths) + 1))
            idx.write(lengths.tobytes())
            idx.write(pointers.tobytes())
            idx.write(np.arange(len(lengths) + 1, dtype=np.int64).tobytes())
        for ending in [*endings, "idx"]:
            self._temporary(ending).replace(self.prefix.with_suffix(f".{ending}"))


class Shard:
    """One memory-mapped shard.

    Attributes:
        tokens: (tokens,) ids of all documents, one after another.
        mask: (tokens,) 1 = supervised, or None where the shard has no mask.
        starts: (documents + 1,) offset of every document, and the end.
    """

    def __init__(self, prefix: Path):
        idx_path = prefix.with_suffix(".idx")
        with open(idx_path, "rb") as idx:
            if idx.read(9) != _IDX_HEADER:
                raise UserError(f"{idx_path}: not an MMIDIDX index", "prepare the store again")
            version, code, sequences, documents = struct.unpack("<QBQQ", idx.read(25))
            if version != 1 or code not in _DTYPE_CODES:
                raise UserError(f"{idx_path}: version {version}, dtype code {code} is not read here", "prepare again")
            lengths = np.fromfile(idx, dtype=np.int32, count=sequences)
            pointers = np.fromfile(idx, dtype=np.int64, count=sequences)
            sequence_of_document = np.fromfile(idx, dtype=np.int64, count=documents)
        dtype = np.dtype(_DTYPE_CODES[code])
        ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
        if not np.array_equal(pointers, ends[:-1] * dtype.itemsize):
            raise UserError(f"{idx_path}: documents do not follow one another", "prepare the store again")
        self.starts = ends[sequence_of_document]
        self.tokens = np.memmap(prefix.with_suffix(".bin"), dtype=dtype, mode="r")
        mask_path = prefix.with_suffix(".mask")
        self.mask = np.memmap(mask_path, dtype=np.uint8, mode="r") if mask_path.exists() else None
        if len(self.tokens) != ends[-1] or (self.mask is not None and len(self.mask) != ends[-1]):
            raise UserError(f"{prefix}: the files differ in length", "prepare the store again")


class Split:
    """One split of a store as a single stream of tokens, whatever the number of shards.

    Args:
        folder: `store/train` or `store/validation`.
        names: Shard names in order, from the manifest.
    """

    def __init__(self, folder: Path, names: Iterable[str]):
        self.shards = [Shard(folder / name) for name in names]
        self._token_starts = np.cumsum([0] + [len(shard.tokens) for shard in self.shards])
        self._document_starts = np.cumsum([0] + [len(shard.starts) - 1 for shard in self.shards])

    @property
    def tokens(self) -> int:
        return int(self._token_starts[-1])

    @property
    def documents(self) -> int:
        return int(self._document_starts[-1])

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [start, stop) of the stream as int64, and their supervision mask (all ones where none is stored)."""
        ids, masks = [], []
        shard_index = int(np.searchsorted(self._token_starts, start, side="right")) - 1
        while start < stop:
            offset = int(self._token_starts[shard_index])
            shard = self.shards[shard_index]
            part = slice(start - offset, min(stop - offset, len(shard.tokens)))
            ids.append(shard.tokens[part].astype(np.int64))
            masks.append(shard.mask[part].astype(bool) if shard.mask is not None else np.ones(len(ids[-1]), bool))
            start += len(ids[-1])
            shard_index += 1
        return np.concatenate(ids), np.concatenate(masks)

    def document(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids (tokens,) int64 and supervision mask (tokens,) bool of one document."""
        shard_index = int(np.searchsorted(self._document_starts, index, side="right")) - 1
        starts = self.shards[shard_index].starts
        local = index - int(self._document_starts[shard_index])
        offset = int(self._token_starts[shard_index])
        return self.read(offset + int(starts[local]), offset + int(starts[local + 1]))


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
    """Maps a store, after checking that every file of its manifest is there at its size.

    Raises:
        UserError: No store there, or files missing or of another size.
    """
    manifest = read_manifest(path)
    for name, entry in _files(manifest):
        file = path / name
        if not file.is_file():
            raise UserError(f"{file} is missing", "prepare the store again")
        if file.stat().st_size != entry["size"]:
            raise UserError(f"{file} has {file.stat().st_size} bytes, not {entry['size']}", "prepare the store again")
    train, validation = (
        Split(path / split, (shard["name"] for shard in manifest["splits"][split]["shards"])) for split in SPLITS
    )
    return Store(path=path, manifest=manifest, train=train, validation=validation)


def verify(path: Path) -> None:
    """Reads every file of a store and compares its sha256 with the manifest.

    Raises:
        UserError: The first file that differs.
    """
    for name, entry in _files(open_store(path).manifest):
        if sha256(path / name) != entry["sha256"]:
            raise UserError(f"{path / name} is not what was written (its sha256 differs)", "prepare the store again")


def read_manifest(path: Path) -> dict:
    """The manifest of the store at `path`, or a UserError where there is none."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} holds no token store", "make one with `tsumugu prepare`") from None
    if manifest["version"] != FORMAT_VERSION:
        raise UserError(f"{path}: store version {manifest['version']} is not read here", "prepare the store again")
    return manifest


def describe_shards(path: Path, split: str) -> dict:
    """The manifest entry of one split, from the files in `path/split`: counts, sizes and hashes."""
    shards = []
    for idx in sorted((path / split).glob("*.idx")):
        shard = Shard(idx.with_suffix(""))
        files = {
            file.name: {"size": file.stat().st_size, "sha256": sha256(file)}
            for file in (idx.with_suffix(ending) for ending in (".bin", ".idx", ".mask"))
            if file.exists()
        }
        shards.append(
            {
                "name": idx.stem,
                "documents": len(shard.starts) - 1,
                "tokens": len(shard.tokens),
                "supervised_tokens": int(shard.mask.sum()) if shard.mask is not None else len(shard.tokens),
                "longest_document": int(np.diff(shard.starts).max()),
                "files": files,
            }
        )
    return {
        **{key: sum(shard[key] for shard in shards) for key in ("documents", "tokens", "supervised_tokens")},
        "longest_document": max((shard["longest_document"] for shard in shards), default=0),
        "shards": shards,
    }


def sha256(file: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _files(manifest: dict) -> Iterable[tuple[str, dict]]:
    for split in SPLITS:
        for shard in manifest["splits"][split]["shards"]:
            for name, entry in shard["files"].items():
                yield f"{split}/{name}", entry

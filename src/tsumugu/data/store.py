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

_MANIFEST_KEYS = ("kind", "tokenizer", "template", "add_bos", "splits")  # those that are read back

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
    """One memory-mapped shard.

    Attributes:
        tokens: (tokens,) ids of all documents, one after another.
        mask: (tokens,) 1 = supervised, or None where the shard has no mask.
        starts: (documents + 1,) offset of every document, and the end.
    """

    def __init__(self, prefix: Path):
        idx_path, bin_path, mask_path = (
            prefix.with_name(f"{prefix.name}.{ending}") for ending in ("idx", "bin", "mask")
        )
        with open(idx_path, "rb") as idx:
            header = idx.read(34)
            if header[:9] != _IDX_HEADER or len(header) < 34:
                raise UserError(f"{idx_path}: not an MMIDIDX index", "prepare the store again")
            version, code, sequences, documents = struct.unpack("<QBQQ", header[9:])
            if version != 1 or code not in _DTYPE_CODES:
                raise UserError(f"{idx_path}: version {version}, dtype code {code} is not read here", "prepare again")
            if idx_path.stat().st_size < 34 + 12 * sequences + 8 * documents:
                raise UserError(f"{idx_path} is cut short", "prepare the store again")
            lengths = np.fromfile(idx, dtype=np.int32, count=sequences)
            pointers = np.fromfile(idx, dtype=np.int64, count=sequences)
            sequence_of_document = np.fromfile(idx, dtype=np.int64, count=documents)
        dtype = np.dtype(_DTYPE_CODES[code])
        ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
        if not np.array_equal(pointers, ends[:-1] * dtype.itemsize):
            raise UserError(f"{idx_path}: documents do not follow one another", "prepare the store again")
        self.starts = ends[sequence_of_document]
        self.tokens = np.memmap(bin_path, dtype=dtype, mode="r")
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
    manifest = _check_sizes(path)
    train, validation = (
        Split(path / split, (shard["name"] for shard in manifest["splits"][split]["shards"])) for split in SPLITS
    )
    return Store(path=path, manifest=manifest, train=train, validation=validation)


def verify(path: Path) -> None:
    """Reads every file of a store and compares its sha256 with the manifest.

    Raises:
        UserError: The first file that differs.
    """
    for name, entry in _files(_check_sizes(path)):
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
    if missing := [key for key in _MANIFEST_KEYS if key not in manifest]:
        raise UserError(f"{path / MANIFEST} is damaged (it lacks {', '.join(missing)})", "prepare the store again")
    return manifest


def describe_split(shards: list[dict]) -> dict:
    """The manifest entry of one split, from the entries of its shards."""
    return {
        **{key: sum(shard[key] for shard in shards) for key in ("documents", "tokens", "supervised_tokens")},
        "longest_document": max((shard["longest_document"] for shard in shards), default=0),
        "shards": shards,
    }


def sha256(file: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _check_sizes(path: Path) -> dict:
    manifest = read_manifest(path)
    for name, entry in _files(manifest):
        file = path / name
        if not file.is_file():
            raise UserError(f"{file} is missing", "prepare the store again")
        if file.stat().st_size != entry["size"]:
            raise UserError(f"{file} has {file.stat().st_size} bytes, not {entry['size']}", "prepare the store again")
    return manifest


def _files(manifest: dict) -> Iterable[tuple[str, dict]]:
    for split in SPLITS:
        for shard in manifest["splits"][split]["shards"]:
            for name, entry in shard["files"].items():
                yield f"{split}/{name}", entry

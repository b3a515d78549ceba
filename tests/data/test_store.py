"""The token store against megatron-core's reader and writer, and its checks."""

import json
import struct
import subprocess
import sys
import tracemalloc
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support.stores import write_store

from tsumugu.data.store import Shard, ShardWriter, Split, describe_split, open_store, sha256, token_dtype, verify
from tsumugu.errors import UserError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset", reason="megatron-core is for Linux")


def _documents(highest_id: int, number: int = 40, seed: int = 0) -> list[np.ndarray]:
    draw = np.random.default_rng(seed)
    documents = [draw.integers(0, highest_id, size=length) for length in draw.integers(1, 90, size=number)]
    documents[3][0] = highest_id
    return documents


def _write(prefix: Path, documents: list[np.ndarray], dtype: type, masks: list[np.ndarray] | None = None) -> dict:
    writer = ShardWriter(prefix, dtype, supervised=masks is not None)
    for index, ids in enumerate(documents):
        writer.add(ids, masks[index] if masks else None)
    entry = writer.close()
    assert entry is not None
    return entry


@pytest.mark.parametrize("vocab_size", [2, 65_499, 65_500, 65_501, 250_000])
def test_ids_have_the_width_that_megatron_gives_them(vocab_size: int):
    assert token_dtype(vocab_size) is megatron.DType.optimal_dtype(vocab_size)


@pytest.mark.parametrize("vocab_size", [65_499, 65_500, 151_936])
def test_megatron_reads_what_we_write(tmp_path: Path, vocab_size: int):
    documents = _documents(vocab_size - 1)
    _write(tmp_path / "00000", documents, token_dtype(vocab_size))
    theirs = megatron.IndexedDataset(str(tmp_path / "00000"))
    assert len(theirs) == len(documents)
    assert list(theirs.document_indices) == list(range(len(documents) + 1))
    assert list(theirs.sequence_lengths) == [len(ids) for ids in documents]
    for found, written in zip(theirs[:], documents, strict=True):
        assert found.dtype == token_dtype(vocab_size)
        np.testing.assert_array_equal(found, written)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_we_read_what_megatron_writes(tmp_path: Path, dtype: type):
    documents = _documents(60_000)
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "00000.bin"), dtype=dtype)
    for ids in documents:  # up to three sequences a document
        parts = [part for part in np.array_split(ids, 3) if len(part)]
        builder.add_document(np.concatenate(parts), [len(part) for part in parts])
    builder.finalize(str(tmp_path / "00000.idx"))
    shard = Shard(tmp_path / "00000")
    assert (shard.documents, len(shard.tokens), shard.mask) == (len(documents), sum(map(len, documents)), None)
    for index, written in enumerate(documents):
        np.testing.assert_array_equal(shard.tokens[shard.document(index)], written)


def test_shards_are_one_stream(tmp_path: Path):
    parts = [_documents(500, number=7, seed=seed) for seed in range(3)]
    masks = [[ids % 3 == 0 for ids in documents] for documents in parts]
    entries = [
        _write(tmp_path / f"{number:05d}", documents, np.uint16, masks[number])
        for number, documents in enumerate(parts)
    ]
    split = Split(tmp_path, entries)
    everything = [ids for documents in parts for ids in documents]
    stream = np.concatenate(everything)
    assert (split.tokens, split.documents) == (len(stream), len(everything))
    draw = np.random.default_rng(1)
    for start, stop in np.sort(draw.integers(0, len(stream) + 1, size=(200, 2)), axis=1):
        if start < stop:
            ids, mask = split.read(int(start), int(stop))
            np.testing.assert_array_equal(ids, stream[start:stop])
            np.testing.assert_array_equal(mask, stream[start:stop] % 3 == 0)
    for index, written in enumerate(everything):
        ids, mask = split.document(index)
        np.testing.assert_array_equal(ids, written)
        np.testing.assert_array_equal(mask, written % 3 == 0)


def test_a_shard_is_described_as_it_lies_on_disk(tmp_path: Path):
    documents = _documents(500)
    entry = _write(tmp_path / "00007", documents, np.uint16, [ids % 2 for ids in documents])
    assert sorted(entry["files"]) == sorted(path.name for path in tmp_path.iterdir())
    for name, file in entry["files"].items():
        assert file == {"size": (tmp_path / name).stat().st_size, "sha256": sha256(tmp_path / name)}
    split = describe_split([entry, entry])
    assert split["documents"] == 2 * len(documents)
    assert split["tokens"] == 2 * sum(map(len, documents))
    assert split["supervised_tokens"] == 2 * sum(int((ids % 2).sum()) for ids in documents)
    assert split["longest_document"] == max(map(len, documents))


def test_an_empty_shard_leaves_no_file_and_an_unfinished_one_no_final_name(tmp_path: Path):
    assert ShardWriter(tmp_path / "empty" / "00000", np.uint16, supervised=True).close() is None
    assert list((tmp_path / "empty").iterdir()) == []
    writer = ShardWriter(tmp_path / "killed" / "00000", np.uint16, supervised=True)
    writer.add(np.array([1, 2]), np.array([0, 1]))
    assert all(path.name.startswith(".") for path in (tmp_path / "killed").iterdir())


def _store(path: Path) -> Path:
    return write_store(path / "store", [[5, 6, 7], [8, 9, 10]], [[5, 6, 7]], masks=[[0, 0, 1], [0, 1, 1]])


@pytest.mark.parametrize(
    "name",
    [*("train/00000.bin", "train/00000.idx", "train/00000.mask", "validation/00000.bin"), "tokenizer/contract.json"],
)
def test_verify_finds_a_flipped_bit_in_every_file(tmp_path: Path, name: str):
    store = _store(tmp_path)
    verify(store)
    content = (store / name).read_bytes()
    for position in range(0, len(content), 1 + len(content) // 200):
        changed = bytearray(content)
        changed[position] ^= 1 << (position % 8)
        (store / name).write_bytes(changed)
        with pytest.raises(UserError, match=name.split("/")[1]):
            verify(store)


def test_verify_finds_what_is_missing_of_the_tokenizer_and_what_has_come_to_it(tmp_path: Path):
    store = _store(tmp_path)
    (store / "tokenizer" / "special_tokens_map.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer/special_tokens_map\.json is no file of the store"):
        verify(store)
    (store / "tokenizer" / "special_tokens_map.json").unlink()
    (store / "tokenizer" / "contract.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer/contract\.json is missing"):
        verify(store)


@pytest.mark.parametrize("name", ["train/00000.bin", "train/00000.idx", "train/00000.mask", "validation/00000.bin"])
def test_opening_finds_a_missing_and_a_shortened_file(tmp_path: Path, name: str):
    store = _store(tmp_path)
    assert open_store(store).train.documents == 2
    (store / name).write_bytes((store / name).read_bytes()[:-1])
    with pytest.raises(UserError, match=name):
        open_store(store)
    (store / name).unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        open_store(store)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"version": 99}', '{"name": "other"}', '{"version": 1}'])
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, content: str):
    store = _store(tmp_path)
    (store / "manifest.json").write_text(content)
    with pytest.raises(UserError):
        open_store(store)


def _places(content: object, path: tuple = ()) -> Iterator[tuple]:
    """Every key and index inside, as the path to it."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from _places(value, (*path, key))


def _first_tokens(path: Path) -> None:
    store = open_store(path)
    for split in (store.train, store.validation):
        split.read(0, 3)


def test_whatever_is_missing_or_wrong_in_a_manifest_is_one_clear_error(tmp_path: Path):
    """Each key taken away, and each value replaced by one of another type: refused, or nothing that is ever read."""
    store = _store(tmp_path)
    whole = json.loads((store / "manifest.json").read_text())
    unread = {"supervised_tokens", "vocab_size"}
    for path in _places(whole):
        for replaced in (None, "gone", 0.5, [3], {"3": 3}):
            manifest = json.loads(json.dumps(whole))
            inside = manifest
            for key in path[:-1]:
                inside = inside[key]
            if replaced is None:
                del inside[path[-1]]
            else:
                inside[path[-1]] = replaced
            (store / "manifest.json").write_text(json.dumps(manifest))
            takes_any_text = path[-1] in ("fingerprint", "template", "sha256") and replaced == "gone"
            removes_an_item = replaced is None and (path[-2:-1] == ("files",) or path[-1] == 0)
            takes_a_template = path[-1] == "template" and isinstance(replaced, dict)
            if path[-1] in unread or takes_any_text or takes_a_template or removes_an_item:
                continue
            with pytest.raises(UserError, match=str(store)) as caught:
                _first_tokens(store)
            if path != ("version",) and replaced is None:
                assert f"it lacks {path[0]}" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "images"}, "a store of 'images' is not read here .*text, instructions"),
        ({"tokenizer": {}}, r"manifest\.json is damaged \(it lacks tokenizer\.fingerprint\)"),
        ({"splits": {"train": {}}}, r"it lacks splits\.train\.documents"),
    ],
)
def test_the_place_in_a_manifest_is_named(tmp_path: Path, change: dict, message: str):
    store = _store(tmp_path)
    manifest = json.loads((store / "manifest.json").read_text())
    (store / "manifest.json").write_text(json.dumps(manifest | change))
    with pytest.raises(UserError, match=message):
        open_store(store)


@pytest.mark.parametrize("length", [0, 5, 20, 34, 60])
def test_an_index_cut_short_is_refused(tmp_path: Path, length: int):
    _write(tmp_path / "00000", _documents(500), np.uint16)
    idx = tmp_path / "00000.idx"
    idx.write_bytes(idx.read_bytes()[:length])
    with pytest.raises(UserError, match=r"00000\.idx"):
        Shard(tmp_path / "00000")


def test_a_flipped_bit_of_an_index_never_gives_other_documents(tmp_path: Path):
    """Indices are read piece by piece, and what is read is checked: an error that names the shard, or the truth."""
    written = [[5, 6, 7], [8], [9, 10, 11, 12], [13, 14]]
    path = write_store(tmp_path / "store", written)
    idx = path / "train" / "00000.idx"
    content, refused = idx.read_bytes(), 0
    for position in range(len(content) * 8):
        changed = bytearray(content)
        changed[position // 8] ^= 1 << (position % 8)
        idx.write_bytes(changed)
        split = open_store(path).train
        for index in (2, 0, 3, 1):
            try:
                found = split.document(index)[0].tolist()
            except UserError as error:
                found, refused = written[index] if "00000" in str(error) else [], refused + 1
            assert found == written[index]
    assert refused > len(content)


def test_a_shard_that_is_not_what_the_manifest_says_is_refused_when_it_is_read(tmp_path: Path):
    store = _store(tmp_path)
    entry = _write(tmp_path / "00000", [np.array([5, 6]), np.array([7, 8]), np.array([9, 10])], np.uint16)
    for name in ("00000.bin", "00000.idx"):
        (tmp_path / name).replace(store / "train" / name)
    manifest = json.loads((store / "manifest.json").read_text())
    manifest["splits"]["train"]["shards"][0]["files"] |= entry["files"]
    (store / "manifest.json").write_text(json.dumps(manifest))
    (store / "train" / "00000.mask").write_bytes(bytes(6))
    with pytest.raises(UserError, match=r"train/00000\.idx is not what the manifest says"):
        open_store(store).train.read(0, 2)


def test_ten_million_documents_are_opened_without_reading_them(tmp_path: Path):
    documents, tokens = 10**7, 10**9
    store = write_store(tmp_path / "store", [[5, 6]])
    idx, ids = store / "train" / "00000.idx", store / "train" / "00000.bin"
    with open(idx, "r+b") as file:  # all holes, but for the last document and those in the middle
        file.write(idx.read_bytes()[:9] + struct.pack("<QBQQ", 1, 8, documents, documents + 1))
        for place in (documents // 2, documents // 2 + 1, documents - 1):
            file.seek(34 + 4 * place)
            file.write(struct.pack("<i", 100))
            file.seek(34 + 4 * documents + 8 * place)
            file.write(struct.pack("<q", 200 * place))
        file.truncate(34 + 12 * documents + 8 * (documents + 1))
    with open(ids, "wb") as file:
        file.seek(tokens)
        file.write(np.arange(50, dtype=np.uint16).tobytes())
        file.truncate(2 * tokens)
    manifest = json.loads((store / "manifest.json").read_text())
    sizes = {"documents": documents, "tokens": tokens, "longest_document": 100}
    files = {path.name: {"size": path.stat().st_size, "sha256": ""} for path in (idx, ids)}
    manifest["splits"]["train"]["shards"] = [{"name": "00000", **sizes, "files": files}]
    (store / "manifest.json").write_text(json.dumps(manifest))
    tracemalloc.start()
    split = open_store(store).train
    found = split.read(tokens // 2, tokens // 2 + 50)[0].tolist(), split.document(documents // 2)[0].tolist()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found == (list(range(50)), [*range(50), *[0] * 50])
    assert (split.documents, split.tokens, split.longest_document) == (documents, tokens, 100)
    assert peak < 500_000


def test_more_shards_are_read_than_files_may_be_open(tmp_path: Path):
    """Of thirty splits together, as of ten stores and more."""
    entries = [_write(tmp_path / f"{n:05d}", [np.array([n, n + 1])], np.uint16, [np.array([1, 0])]) for n in range(60)]
    script = f"""
import gc, pathlib, resource
resource.setrlimit(resource.RLIMIT_NOFILE, (50, 70))
from tsumugu.data.store import Split
splits = [Split(pathlib.Path({str(tmp_path)!r}), {entries!r}) for _ in range(30)]
for split in splits:
    for index in range(60):
        ids, mask = split.document(index)
        assert (ids.tolist(), mask.tolist()) == ([index, index + 1], [True, False])
    split.announce(0, 120)
    assert split.read(0, 120)[0].tolist() == [id for n in range(60) for id in (n, n + 1)]
for index in list(range(60)) * 2:
    assert [split.document(index)[0].tolist() for split in splits] == [[index, index + 1]] * 30
open_files = lambda: len(list(pathlib.Path("/proc/self/fd").iterdir()))
many = open_files()
splits = split = None
gc.collect()
assert open_files() < 10 < many  # a store that is not read any more holds none
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_folder_without_a_store_is_named(tmp_path: Path):
    with pytest.raises(UserError, match="holds no token store"):
        open_store(tmp_path / "nothing")

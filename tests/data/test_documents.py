"""Documents between reading and encoding come back as they were given, in any order."""

import hashlib
import tracemalloc
from pathlib import Path

import numpy as np

from tsumugu.data.documents import Documents, DocumentWriter

CONTENTS = ["吾輩は猫である。", "", "名前は\nまだ無い🐈", "吾輩は猫である。"]


def test_contents_places_and_splits_come_back(tmp_path: Path):
    writer = DocumentWriter(tmp_path / "00003")
    for number, content in enumerate(CONTENTS):
        writer.add(content, f"file, line {number}", validation=number == 2)
    writer.close()
    documents = Documents(tmp_path / "00003")
    assert [documents.content(index) for index in (3, 1, 0, 2)] == [CONTENTS[index] for index in (3, 1, 0, 2)]
    assert documents.rows["validation"].tolist() == [False, False, True, False]
    assert list(documents.places()) == [f"file, line {number}" for number in range(4)]


def test_keys_are_of_the_content(tmp_path: Path):
    writer = DocumentWriter(tmp_path / "00000")
    for content in CONTENTS:
        writer.add(content, "here", validation=False)
    writer.close()
    keys = Documents(tmp_path / "00000").rows["key"]
    assert keys[0].tobytes() == hashlib.blake2b("吾輩は猫である。".encode(), digest_size=16).digest()
    assert np.array_equal(keys[0], keys[3])
    assert len({key.tobytes() for key in keys}) == 3


def test_a_writer_keeps_little_of_a_document_in_memory(tmp_path: Path):
    writer = DocumentWriter(tmp_path / "00000")
    for number in range(100):  # what is allocated once
        writer.add(f"{number}番", "here", validation=False)
    tracemalloc.start()
    for number in range(10_000):
        writer.add(f"{number}番", "here", number % 2 == 0, split_key="鍵")
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert kept < 10_000 * 80
    writer.close()
    assert Documents(tmp_path / "00000").rows["validation"].sum() == 5000


def test_an_unfinished_shard_is_no_shard(tmp_path: Path):
    DocumentWriter(tmp_path / "00000").add("途中", "here", validation=False)
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith(".")]


def test_a_shard_without_documents(tmp_path: Path):
    DocumentWriter(tmp_path / "00000").close()
    documents = Documents(tmp_path / "00000")
    assert len(documents) == 0
    assert list(documents.places()) == []

"""Best-fit packing: as one document after another would be placed, whole, planned once, and the same everywhere."""

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
from support.stores import random_documents, write_store

from tsumugu.data.bins import best_fit, make_bins, plan_bins
from tsumugu.data.packing import IGNORE_INDEX, BestFit, Concatenated
from tsumugu.data.store import open_store
from tsumugu.errors import UserError


def one_after_another(lengths: list[int], capacity: int) -> list[int]:
    rooms: list[int] = []
    placed = []
    for length in lengths:
        fitting = [(room, index) for index, room in enumerate(rooms) if room >= length]
        if not fitting:
            rooms.append(capacity)
            fitting = [(capacity, len(rooms) - 1)]
        room, index = min(fitting)
        rooms[index] = room - length
        placed.append(index)
    return placed


@pytest.mark.parametrize("seed", range(20))
def test_bins_are_as_full_as_placing_one_after_another_makes_them(seed: int):
    draw = np.random.default_rng(seed)
    capacity = int(draw.integers(5, 60))
    lengths = np.sort(draw.integers(1, capacity + 1, 200))[::-1]
    expected = np.bincount(one_after_another(lengths.tolist(), capacity), lengths)
    found = np.bincount(best_fit(lengths, capacity), lengths)
    assert sorted(found) == sorted(expected)  # which of two bins of equal room is taken makes no difference
    assert found.max() <= capacity


@pytest.mark.parametrize("capacity", [1, 5, 16, 100])
def test_every_label_of_every_document_stands_in_one_row_once(tmp_path: Path, capacity: int):
    documents = [*random_documents(40, seed=1), [9]]  # one without an input
    rows = BestFit(open_store(write_store(tmp_path / "store", documents)).train, capacity, 3, False, seed=1)
    found = []
    for index in range(len(rows)):
        row = rows.row(index)
        assert len(row) == sum(row.documents) == rows.length(index) <= capacity
        found += zip(row.inputs.tolist(), row.labels.tolist(), strict=True)
    expected = [pair for document in documents for pair in itertools.pairwise(document)]
    assert sorted(found) == sorted(expected)


def test_the_plan_depends_on_lengths_and_seed_alone_and_is_made_once(tmp_path: Path, monkeypatch):
    split = open_store(write_store(tmp_path / "store", random_documents(50, seed=2))).train
    first = plan_bins(split, 20, seed=1)
    monkeypatch.setattr("tsumugu.data.bins.make_bins", None)  # is not called again
    again = plan_bins(split, 20, seed=1)
    monkeypatch.undo()
    assert isinstance(again.pieces, np.memmap)
    expected, other = (make_bins(split.document_bounds(), 20, seed) for seed in (1, 2))
    for bins in (first, again):
        assert np.array_equal(bins.pieces, expected.pieces)
        assert np.array_equal(bins.starts, expected.starts)
    assert not np.array_equal(other.pieces, expected.pieces)


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_store_that_is_read_only_has_its_plan_in_the_users_cache(tmp_path: Path, monkeypatch):
    store = write_store(tmp_path / "store", random_documents(9, seed=3))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    store.chmod(0o555)
    assert len(plan_bins(open_store(store).train, 20, seed=1))
    assert list((tmp_path / "cache").rglob("pieces.npy"))


def test_without_a_place_for_the_plan_it_stays_in_memory(tmp_path: Path, monkeypatch):
    store = write_store(tmp_path / "store", random_documents(9, seed=3))
    (store / "packing").write_text("in the way")
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    split = open_store(store).train
    found = plan_bins(split, 20, seed=1)
    assert np.array_equal(found.pieces, make_bins(split.document_bounds(), 20, 1).pieces)


def test_an_example_longer_than_a_row_is_refused(tmp_path: Path):
    split = open_store(write_store(tmp_path / "store", [[5] * 11], masks=[[1] * 11])).train
    with pytest.raises(UserError, match="11 tokens"):
        BestFit(split, 9, 3, supervised=True, seed=0)
    assert len(BestFit(split, 9, 3, supervised=False, seed=0)) == 2


def test_a_packed_batch_restarts_positions_and_counts_its_filling_as_a_document(tmp_path: Path):
    split = open_store(write_store(tmp_path / "store", [[5, 6, 7, 8], [9, 10, 11]], masks=[[0, 0, 1, 1], [0, 0, 1]]))
    rows = BestFit(split.train, 7, 3, supervised=True, seed=0)
    batch = rows.collate([rows.row(0), None])
    ignored = IGNORE_INDEX
    assert batch.input_ids.tolist() == [[5, 6, 7, 9, 10, 3, 3], [3] * 7]
    assert batch.labels.tolist() == [[ignored, 7, 8, ignored, 11, ignored, ignored], [ignored] * 7]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 1], list(range(7))]
    assert batch.boundaries.tolist() == [0, 3, 5, 7, 14]
    assert batch.attention_mask is None
    assert (batch.lengths, batch.squared_lengths) == ([5, 0], 9 + 4)


def test_documents_of_blocks_are_kept_apart_and_no_label_crosses(tmp_path: Path):
    split = open_store(write_store(tmp_path / "store", [[5, 6, 7], [8], [9, 10, 11, 12], [13, 14]])).train
    rows = Concatenated(split, 4, 3, document_mask=True)
    made = [rows.row(index) for index in range(len(rows))]
    assert [row.documents for row in made] == [[3, 1], [4], [1]]
    ignored = IGNORE_INDEX
    assert [row.labels.tolist() for row in made] == [[6, 7, ignored, ignored], [10, 11, 12, ignored], [14]]

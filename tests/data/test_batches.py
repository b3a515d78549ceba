"""Batches: the same rows in a step, however they are dealt out."""

from pathlib import Path

import numpy as np
import pytest
from support.stores import random_documents, write_store

from tsumugu.data.batches import Share, training_batches, validation_batches
from tsumugu.data.packing import Batch, Concatenated, LeftPadded
from tsumugu.data.store import open_store
from tsumugu.errors import UserError

SPLITS = [(1, 8), (2, 4), (4, 2), (2, 1), (8, 1), (1, 1)]  # (processes, rows a micro batch) of a global batch of 8


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> LeftPadded:
    documents = random_documents(21, seed=2)
    return LeftPadded(open_store(write_store(tmp_path_factory.mktemp("batches") / "store", documents)).train, 16, 3)


def _contents(batches: list[Batch]) -> list[tuple]:
    """The filled rows of batches without their padding."""
    return sorted(
        (tuple(ids[len(ids) - length :]), tuple(labels[len(ids) - length :]))
        for batch in batches
        for ids, labels, length in zip(batch.input_ids, batch.labels, batch.lengths, strict=True)
        if length
    )


def _expected(rows: LeftPadded, indices: list[int]) -> list[tuple]:
    return sorted((tuple(rows.row(index).inputs), tuple(rows.row(index).labels)) for index in indices)


def _shares(world_size: int, micro: int) -> list[Share]:
    return [
        Share(rank=rank, world_size=world_size, global_batch_size=8, micro_batch_size=micro)
        for rank in range(world_size)
    ]


@pytest.mark.parametrize(("world_size", "micro"), SPLITS)
def test_a_step_holds_the_same_rows_on_any_number_of_processes(rows: LeftPadded, world_size: int, micro: int):
    whole = _shares(1, 8)[0]
    for step in (0, 1, 2, 5, 1000):
        one = training_batches(rows, step, whole, seed=9, total_rows=10**6)
        parts = [training_batches(rows, step, share, 9, 10**6) for share in _shares(world_size, micro)]
        assert {len(batches) for batches in parts} == {8 // (world_size * micro)}
        assert {batch.input_ids.shape[0] for batches in parts for batch in batches} == {micro}
        assert _contents([batch for batches in parts for batch in batches]) == _contents(one)
        assert len(_contents(one)) == 8


def test_an_epoch_is_every_row_once(rows: LeftPadded):
    share = _shares(1, 8)[0]
    batches = [batch for step in range(21) for batch in training_batches(rows, step, share, seed=9, total_rows=10**6)]
    assert _contents(batches) == _expected(rows, 8 * list(range(21)))  # 168 positions are 8 epochs of 21 rows


@pytest.mark.parametrize(("world_size", "micro"), SPLITS)
def test_the_run_ends_at_its_last_row(rows: LeftPadded, world_size: int, micro: int):
    shares = _shares(world_size, micro)
    steps = [[training_batches(rows, step, share, 9, total_rows=21) for share in shares] for step in range(3)]
    everything = [batch for step in steps for batches in step for batch in batches]
    assert _contents(everything) == _expected(rows, list(range(21)))
    assert {len(batches) for batches in steps[2]} == {8 // (world_size * micro)}  # empty ones keep ranks in step


@pytest.mark.parametrize(("world_size", "micro"), SPLITS)
def test_validation_covers_every_row_once(rows: LeftPadded, world_size: int, micro: int):
    parts = [list(validation_batches(rows, share, None)) for share in _shares(world_size, micro)]
    assert len({len(batches) for batches in parts}) == 1
    assert _contents([batch for batches in parts for batch in batches]) == _expected(rows, list(range(21)))
    limited = [list(validation_batches(rows, share, 2)) for share in _shares(world_size, micro)]
    assert _contents([batch for batches in limited for batch in batches]) == _expected(rows, list(range(16)))


def test_validation_of_concatenated_rows_counts_every_label_once(tmp_path: Path):
    documents = random_documents(9, seed=4)
    split = open_store(write_store(tmp_path / "store", documents)).train
    rows = Concatenated(split, 7, 3)
    labels = [batch.labels for share in _shares(2, 2) for batch in validation_batches(rows, share, None)]
    found = np.concatenate([batch[batch >= 0] for batch in labels])
    stream = [token for document in documents for token in document]
    assert sorted(found) == sorted(stream[1:])


def test_a_batch_that_cannot_be_dealt_out_is_refused():
    with pytest.raises(UserError, match=r"8 is not a multiple of .* 3 × 2 processes"):
        Share(rank=0, world_size=2, global_batch_size=8, micro_batch_size=3)

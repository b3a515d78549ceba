"""Batches: the same rows in a step, however they are dealt out."""

from pathlib import Path

import numpy as np
import pytest
from support.stores import random_documents, write_store

from tsumugu.config import DataConfig, MixedStore, Stage
from tsumugu.data.batches import Share, training_batches, validation_batches
from tsumugu.data.mixture import Mixture, mix
from tsumugu.data.packing import Batch, Concatenated, LeftPadded
from tsumugu.data.store import open_store
from tsumugu.errors import UserError

SPLITS = [(1, 8), (2, 4), (4, 2), (2, 1), (8, 1), (1, 1)]  # (processes, rows a micro batch) of a global batch of 8


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> LeftPadded:
    documents = random_documents(21, seed=2)
    return LeftPadded(open_store(write_store(tmp_path_factory.mktemp("batches") / "store", documents)).train, 16, 3)


def _training(rows: LeftPadded, step: int, share: Share, total: int = 10**6) -> list[Batch]:
    mixture = mix(DataConfig(store="", packing="pad_left"), [len(rows)], total, share.global_batch_size, seed=9)
    return training_batches([rows], mixture, step, share)[0]


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
        one = _training(rows, step, whole)
        parts = [_training(rows, step, share) for share in _shares(world_size, micro)]
        assert {len(batches) for batches in parts} == {8 // (world_size * micro)}
        assert {batch.input_ids.shape[0] for batches in parts for batch in batches} == {micro}
        assert _contents([batch for batches in parts for batch in batches]) == _contents(one)
        assert len(_contents(one)) == 8


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[LeftPadded], Mixture]:
    """Three stores of which the third may be read twice, with other weights from the fifth step of nine on."""
    folder = tmp_path_factory.mktemp("mixed")
    rows = [
        LeftPadded(open_store(write_store(folder / str(seed), random_documents(number, seed=seed))).train, 16, 3)
        for seed, number in enumerate((40, 21, 5))
    ]
    weights = {"a": 5, "b": 2, "c": 3}
    data = DataConfig(
        stores=[MixedStore(name=n, path=n, weight=w, max_epochs=2 if n == "c" else None) for n, w in weights.items()],
        stages=[Stage(from_step=4, weights={"a": 1, "b": 6, "c": 1})],
        packing="pad_left",
    )
    return rows, mix(data, [len(of_store) for of_store in rows], 70, 8, seed=9)


@pytest.mark.parametrize(("world_size", "micro"), SPLITS)
def test_a_step_of_a_mixture_holds_the_same_rows_on_any_number_of_processes(mixed, world_size: int, micro: int):
    rows, mixture = mixed
    stores, indices = mixture.at(np.arange(70))
    for step in (8, 3, 0, 4, 9):  # in any order: nothing is kept between steps
        here = slice(8 * step, min(8 * step + 8, 70))
        expected = [_expected(rows[s], [i])[0] for s, i in zip(stores[here], indices[here], strict=True)]
        parts = [training_batches(rows, mixture, step, share) for share in _shares(world_size, micro)]
        assert _contents([batch for batches, _ in parts for batch in batches]) == sorted(expected)
        assert sorted(np.concatenate([taken for _, taken in parts])) == sorted(stores[here])
        for batches, taken in parts:  # the stores are those of the filled rows, in their order
            lengths = [length for batch in batches for length in batch.lengths]
            assert all(lengths[: len(taken)])
            assert not any(lengths[len(taken) :])


def test_an_epoch_is_every_row_once(rows: LeftPadded):
    share = _shares(1, 8)[0]
    batches = [batch for step in range(21) for batch in _training(rows, step, share)]
    assert _contents(batches) == _expected(rows, 8 * list(range(21)))  # 168 positions are 8 epochs of 21 rows


@pytest.mark.parametrize(("world_size", "micro"), SPLITS)
def test_the_run_ends_at_its_last_row(rows: LeftPadded, world_size: int, micro: int):
    shares = _shares(world_size, micro)
    steps = [[_training(rows, step, share, total=21) for share in shares] for step in range(3)]
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

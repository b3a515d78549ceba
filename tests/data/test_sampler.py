"""The order of the data: a permutation an epoch, in constant memory, and never another one than today."""

import time
import tracemalloc

import numpy as np
import pytest

from tsumugu.data.sampler import row_at


@pytest.mark.parametrize("rows", [*range(1, 70), 255, 256, 257, 1023, 4096, 4097, 99_991])
def test_every_epoch_is_a_permutation(rows: int):
    for epoch in (0, 1, 7):
        order = row_at(np.arange(epoch * rows, (epoch + 1) * rows), rows, seed=3)
        np.testing.assert_array_equal(np.sort(order), np.arange(rows))


def test_epochs_and_seeds_give_other_orders():
    def order(epoch: int, seed: int) -> tuple:
        return tuple(row_at(np.arange(epoch * 1000, (epoch + 1) * 1000), 1000, seed))

    assert len({order(epoch, seed) for epoch in range(10) for seed in range(10)}) == 100


def test_a_position_alone_gives_what_the_whole_gives():
    whole = row_at(np.arange(3000), 1000, seed=5)
    assert [int(row_at(position, 1000, 5)[0]) for position in range(0, 3000, 37)] == whole[::37].tolist()


def test_the_order_stays_what_it_is():
    # Values of the first release: a run that is resumed with a later one must go on with the same rows.
    assert row_at(np.arange(12), 10, seed=1234).tolist() == [7, 6, 8, 9, 0, 4, 2, 3, 5, 1, 6, 1]
    assert row_at(np.array([0, 1, 10**13, 10**15 + 7]), 10**13, seed=0).tolist() == [
        6160728741510,
        3646985211744,
        6747540342356,
        7287223048845,
    ]
    assert row_at(np.arange(4), 1_000_003, seed=2**63 - 1).tolist() == [809753, 364825, 875106, 457914]


def test_ten_trillion_rows_take_no_more_memory_or_time_than_a_thousand():
    def cost(rows: int) -> tuple[float, int]:
        positions = np.arange(5 * rows, 5 * rows + 64)
        tracemalloc.start()
        started = time.perf_counter()
        row_at(positions, rows, seed=1)
        seconds, (_, peak) = time.perf_counter() - started, tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return seconds, peak

    cost(1000)
    seconds, peak = cost(10**13)
    assert peak < 100_000
    assert seconds < 0.5
    far = row_at(np.arange(10**15, 10**15 + 5000), 10**13, seed=1)
    assert far.min() >= 0
    assert far.max() < 10**13
    assert len(set(far.tolist())) == 5000


def _order(rows: int, seed: int, epoch: int = 0) -> np.ndarray:
    return row_at(np.arange(epoch * rows, (epoch + 1) * rows), rows, seed)


@pytest.mark.parametrize("rows", [500, 4096, 5000])
def test_neighbouring_seeds_epochs_and_positions_do_not_resemble_each_other(rows: int):
    # The correlation of two independent permutations has standard deviation 1 / sqrt(rows - 1).
    bound = 4.5 / np.sqrt(rows - 1)
    for seed in range(20):
        order = _order(rows, seed)
        for other in (_order(rows, seed + 1), _order(rows, seed, epoch=1), np.roll(order, 1), np.arange(rows)):
            assert abs(np.corrcoef(order, other)[0, 1]) < bound
            assert (order == other).sum() < 12  # equal places of random permutations: about one


def test_every_row_stands_at_every_place_equally_often():
    # Chi-square of 50 rows over 3,000 seeds: mean 49, standard deviation sqrt(98); the 1 - 1e-6 quantile is 108.
    places = [0, 1, 24, 49]
    found = np.array([row_at(np.array(places), 50, seed) for seed in range(3000)])
    for column in found.T:
        counts = np.bincount(column, minlength=50)
        assert ((counts - 60) ** 2 / 60).sum() < 108

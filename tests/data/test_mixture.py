"""The mixture: what is planned of every store, computed by hand, and that every stretch of the run holds to it."""

import contextlib
import itertools
import json
import re
import tracemalloc
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from tsumugu.config import DataConfig, MixedStore, Stage
from tsumugu.data.mixture import BLOCK, Mixture, Past, mix, report, table
from tsumugu.data.sampler import row_at
from tsumugu.errors import UserError

LENGTH = 8


def data_of(stores: dict[str, dict], *stages: tuple[int, dict[str, float]]) -> DataConfig:
    return DataConfig(
        stores=[MixedStore(name=name, path=name, **keys) for name, keys in stores.items()],
        stages=[Stage(from_step=step, weights=weights) for step, weights in stages],
        sequence_length=LENGTH,
    )


def counts_of(data: DataConfig, rows: list[int], total: int, batch: int = 10) -> list[list[int]]:
    return [list(stage) for stage in mix(data, rows, total, batch, seed=1).counts]


@pytest.mark.parametrize(
    ("stores", "stages", "rows", "total", "expected"),
    [
        ({"a": {"weight": 3}, "b": {"weight": 1}}, [], [900, 900], 1000, [[750, 250]]),
        ({"a": {"weight": 0.2}, "b": {"weight": 0.1}, "c": {"weight": 0}}, [], [9, 9, 9], 99, [[66, 33, 0]]),
        # a third of 100 is 33 1/3: the row that is left goes to one of them
        ({"a": {"weight": 1}, "b": {"weight": 1}, "c": {"weight": 1}}, [], [9, 9, 9], 100, [[34, 33, 33]]),
        # b wants 500 rows and has 50, twice; what it leaves goes to a and c as 3 to 1
        (
            {"a": {"weight": 3}, "b": {"weight": 4, "max_epochs": 2}, "c": {"weight": 1}},
            [],
            [900, 50, 900],
            1000,
            [[675, 100, 225]],
        ),
        # with what b leaves, a too would pass its limit of 630, and c takes the rest
        (
            {"a": {"weight": 3, "max_epochs": 0.7}, "b": {"weight": 4, "max_epochs": 2}, "c": {"weight": 1}},
            [],
            [900, 50, 900],
            1000,
            [[630, 100, 270]],
        ),
        # stages of 600 and 400 rows
        (
            {"a": {"weight": 1}, "b": {"weight": 0}},
            [(60, {"a": 1, "b": 3})],
            [900, 900],
            1000,
            [[600, 0], [100, 300]],
        ),
        # b may have 90 rows: with a thirteenth of its weight 3 : 1/13 and 1 : 3/13, which is 15 of 600 and 75 of 400
        (
            {"a": {"weight": 3}, "b": {"weight": 1, "max_epochs": 3}},
            [(60, {"a": 1, "b": 3})],
            [900, 30],
            1000,
            [[585, 15], [325, 75]],
        ),
        # only a can fill the first stage, and needs all its rows for that; b and c share the second as 3 to 1
        (
            {"a": {"weight": 1, "max_epochs": 1}, "b": {"weight": 0}, "c": {"weight": 0}},
            [(60, {"a": 4, "b": 3, "c": 1})],
            [600, 900, 900],
            1000,
            [[600, 0, 0], [0, 300, 100]],
        ),
        # neither has rows to spare: the second stage needs all of a, so that the first reads b alone
        (
            {"a": {"weight": 1, "max_epochs": 1}, "b": {"weight": 1, "max_epochs": 2}},
            [(60, {"a": 1, "b": 0})],
            [400, 300],
            1000,
            [[0, 600], [400, 0]],
        ),
        # 800 tokens are 100 rows, a tenth of either stage
        (
            {"a": {"weight": 3}, "b": {"tokens": 800}, "c": {"weight": 1}},
            [(60, {"a": 1, "c": 1})],
            [900, 900, 900],
            1000,
            [[405, 60, 135], [180, 40, 180]],
        ),
        # budgets alone: the run ends with the last of their rows, in its hundredth step
        ({"a": {"tokens": 7000}, "b": {"tokens": 950}}, [], [900, 900], 1000, [[875, 119]]),
    ],
)
def test_what_is_planned(stores: dict, stages: list, rows: list[int], total: int, expected: list[list[int]]):
    assert counts_of(data_of(stores, *stages), rows, total) == expected


def test_limits_and_budgets_hold_to_the_row_however_many_stages_there_are():
    generator = np.random.default_rng(0)
    for _ in range(60):
        number = int(generator.integers(2, 6))
        rows = generator.integers(1, 300, number).tolist()
        stores: dict[str, dict] = {f"s{i}": {"weight": float(generator.random() + 0.01)} for i in range(number)}
        for i in range(1, number):
            stores[f"s{i}"]["max_epochs"] = int(generator.integers(1, 4))
        stores["budget"] = {"tokens": int(generator.integers(1, 800))}
        cuts = sorted(generator.choice(np.arange(1, 40), 4, replace=False).tolist())
        stages = [(cut, {f"s{i}": float(generator.random() + 0.01) for i in range(number)}) for cut in cuts]
        mixture = mix(data_of(stores, *stages), [*rows, 50], 400, 10, seed=1)
        assert [sum(stage) for stage in mixture.counts] == [10 * n for n in np.diff([0, *cuts, 40])]
        for i in range(1, number):
            limit = rows[i] * stores[f"s{i}"]["max_epochs"]
            assert mixture.planned[i] <= limit
            if f"s{i}" in mixture.cut:
                assert mixture.planned[i] >= limit - len(stages)  # but for the rounding of every stage
        assert mixture.planned[-1] == -(-stores["budget"]["tokens"] // LENGTH)
        assert min(map(min, mixture.counts)) >= 0


STORES = {"web": {"weight": 0.7}, "code": {"weight": 0.2}, "math": {"weight": 0.1, "max_epochs": 2}}
ROWS = [300_007, 80_000, 20_011]


@pytest.fixture(scope="module")
def mixture() -> Mixture:
    """Three stores over 2,000 steps of 300 rows, the last quarter of them with other weights."""
    data = data_of(STORES, (1500, {"web": 0.2, "code": 0.2, "math": 0.6}))
    return mix(data, ROWS, 600_000, 300, seed=1234)


@pytest.fixture(scope="module")
def order(mixture: Mixture) -> tuple[np.ndarray, np.ndarray]:
    return mixture.at(np.arange(mixture.total))


def test_every_stretch_has_the_planned_shares(mixture: Mixture, order: tuple[np.ndarray, np.ndarray]):
    stores, _ = order
    for start, stop, counts in zip(mixture.starts, [*mixture.starts[1:], mixture.total], mixture.counts, strict=True):
        for store, count in enumerate(counts):
            share = Fraction(count, stop - start)
            taken = np.concatenate([[0], np.cumsum(stores[start:stop] == store)])
            assert taken[-1] == count
            # from the start of the stage: within a few rows at any place
            assert np.abs(taken - np.arange(stop - start + 1) * float(share)).max() < 16
            # any 100,000 rows: within 0.1 %
            window = (taken[100_000:] - taken[:-100_000]) / 100_000
            assert np.abs(window - float(share)).max() < 0.001


def test_every_store_has_its_own_order_over_all_stages(mixture: Mixture, order: tuple[np.ndarray, np.ndarray]):
    """Its uses, one after another, are full permutations; those of another stage go on where the last one stopped."""
    stores, rows = order
    assert len(set(mixture.seeds)) == 3
    for store, (available, seed) in enumerate(zip(ROWS, mixture.seeds, strict=True)):
        uses = rows[stores == store]
        np.testing.assert_array_equal(uses, row_at(np.arange(mixture.planned[store]), available, seed))
        for epoch in range(len(uses) // available):
            assert len(np.unique(uses[epoch * available : (epoch + 1) * available])) == available
    assert mixture.planned[2] == 2 * 20_011  # math wants more and may be read twice


def test_a_position_alone_gives_what_the_whole_gives(mixture: Mixture, order: tuple[np.ndarray, np.ndarray]):
    positions = [*range(0, 600_000, 7919), 449_999, 450_000, 599_999]
    alone = [tuple(int(found[0]) for found in mixture.at(np.array([position]))) for position in positions]
    assert alone == [(int(order[0][position]), int(order[1][position])) for position in positions]
    mixed_up = np.random.default_rng(0).permutation(600_000)[:5000]
    for found, whole in zip(mixture.at(mixed_up), order, strict=True):
        np.testing.assert_array_equal(found, whole[mixed_up])


def test_no_store_stands_at_the_same_places_of_every_block(order: tuple[np.ndarray, np.ndarray]):
    """Else one rank would get the same store over and over. A fair coin gives 350 ± 10 of 500; ten such to be sure."""
    blocks = order[0][: 500 * BLOCK].reshape(500, BLOCK)
    assert np.abs((blocks == 0).sum(axis=0) - 350).max() < 60


def test_the_order_stays_what_it_is():
    # Values of the first release with mixtures: a run that is resumed with a later one must go on with the same rows.
    mixture = mix(data_of({"a": {"weight": 2}, "b": {"weight": 1}}), [10, 4], 96, 8, seed=1234)
    stores, rows = mixture.at(np.array([*range(12), 90, 95]))
    assert stores.tolist() == [0, 0, 1, 1, 0, 0, 1, 0, 1, 0, 1, 0, 1, 0]
    assert rows.tolist() == [0, 2, 2, 1, 7, 8, 0, 3, 3, 9, 1, 4, 2, 6]


@pytest.mark.parametrize("total", [20, 50, 100, 140])
def test_runs_and_ends_shorter_than_a_block_are_shuffled_too(total: int):
    mixture = mix(data_of({"a": {"weight": 7}, "b": {"weight": 3}}), [1000, 1000], total, 10, seed=1)
    stores = mixture.at(np.arange(total))[0].tolist()
    assert Counter(stores) == {0: total * 7 // 10, 1: total * 3 // 10}
    end = stores[total // BLOCK * BLOCK % total :]  # the last block
    assert end not in (sorted(end), sorted(end, reverse=True))


def test_one_store_has_the_order_of_a_run_without_a_mixture():
    positions = np.arange(5000)
    for data in (DataConfig(store="a"), data_of({"a": {"weight": 0.1}}), data_of({"a": {"weight": 1}}, (7, {"a": 2}))):
        stores, rows = mix(data, [999], 5000, 10, seed=77).at(positions)
        assert not stores.any()
        np.testing.assert_array_equal(rows, row_at(positions, 999, 77))


def test_ten_trillion_tokens_take_no_more_memory_than_a_thousand():
    def peak(scale: int) -> int:
        rows = [3 * scale + 1, 2 * scale, scale]
        mixture = mix(data_of(STORES), rows, 6 * scale, 1, seed=1)
        positions = np.arange(3 * scale, 3 * scale + 64)
        mixture.at(positions)
        tracemalloc.start()
        mixture.at(positions)
        _, size = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return size

    small = peak(1000)
    assert peak(10**12) < small + 10_000 < 200_000


def test_exactness_does_not_end_where_64_bits_do():
    """Rows times rows is 10^25 here; shares and the uniqueness of rows hold in the middle, and the end is the end."""
    data = data_of({"web": {"weight": 0.61}, "code": {"weight": 0.27}, "math": {"weight": 0.12}})
    mixture = mix(data, [10**13, 3 * 10**12, 10**12], 10**13, 1000, seed=5)
    assert mixture.planned == [61 * 10**11, 27 * 10**11, 12 * 10**11]
    stores, rows = mixture.at(np.arange(5 * 10**12 + 12_345, 5 * 10**12 + 12_345 + 50_000))
    for store, share in enumerate((0.61, 0.27, 0.12)):
        assert abs((stores == store).sum() - share * 50_000) < 16
        assert len(np.unique(rows[stores == store])) == (stores == store).sum()
    stores, rows = mixture.at(np.arange(10**13 - 500, 10**13))
    for store, (planned, available) in enumerate(zip(mixture.planned, mixture.rows, strict=True)):
        uses = np.arange(planned - (stores == store).sum(), planned)
        np.testing.assert_array_equal(rows[stores == store], row_at(uses, available, mixture.seeds[store]))


@pytest.mark.parametrize(
    ("stores", "stages", "message"),
    [
        ({"a": {"weight": 1}}, [(50, {"a": 1})], r"data\.stages\[0\]\.from_step is 50, the run has 50 steps"),
        (
            {"a": {"weight": 1, "max_epochs": 2}, "b": {"weight": 1, "max_epochs": 1.5}},
            [],
            # 200 + 150 rows
            r"max_epochs of data\.stores \(a: 2, b: 1\.5\) leaves rows for 35 steps, the run has 50",
        ),
        ({"a": {"weight": 1, "max_epochs": 0.05}}, [], "leaves rows for 0 steps"),
        # from step 30 on b alone is read, which has 100 rows
        (
            {"a": {"weight": 1}, "b": {"weight": 0, "max_epochs": 1}},
            [(30, {"a": 0, "b": 1})],
            "leaves rows for 40 steps, the run has 50",
        ),
        ({"a": {"tokens": 3000}, "b": {"weight": 1, "max_epochs": 1}}, [], "leaves rows for 47 steps"),
        (
            {"a": {"tokens": 3000}, "b": {"tokens": 900}},
            [],
            # 375 and 112.5 rows
            r"3904 in all, in whole rows; the run has 4000 .*make it 49 steps \(train\.max_tokens 3904\)",
        ),
        (
            {"a": {"tokens": 4000}, "b": {"weight": 1}},
            [],
            "4000 in all, in whole rows; the run has 4000 and leaves none to the weights .* to 51 steps or more",
        ),
        (
            {"a": {"tokens": 801, "max_epochs": 1}, "b": {"weight": 1}},
            [],
            r"data\.stores\[0\]\.tokens \(a\) is 801, its max_epochs 1 allows 800",
        ),
    ],
)
def test_what_does_not_fit_the_run_is_refused(stores: dict, stages: list, message: str):
    """A run of 50 steps of 10 rows; every store has 100 rows."""
    with pytest.raises(UserError, match=message):
        mix(data_of(stores, *stages), [100] * len(stores), 500, 10, seed=1)


def random_case(generator: np.random.Generator, tokens: bool) -> tuple[dict, list, list[int], int]:
    """Stores, stages and rows, small enough to be tight often, and a number of steps."""
    number, steps = int(generator.integers(1, 5)), int(generator.integers(4, 30))
    stores: dict[str, dict] = {f"s{i}": {"weight": int(generator.integers(0, 4))} for i in range(number)}
    stores["s0"]["weight"] = 1
    for store in stores.values():
        if generator.random() < 0.85:
            store["max_epochs"] = int(generator.integers(1, 3))
    cuts = sorted(generator.choice(np.arange(1, steps), int(generator.integers(0, 4)), replace=False).tolist())
    stages = []
    for cut in cuts:
        weights = generator.integers(0, 3, number)
        weights[generator.integers(number)] = 1
        stages.append((cut, dict(zip(stores, weights.tolist(), strict=True))))
    if tokens:
        stores["budget"] = {"tokens": int(generator.integers(1, 24 * steps))}
    return stores, stages, generator.integers(1, 60, len(stores)).tolist(), steps


def enough_for(stores: dict, stages: list, rows: list[int], steps: int, batch: int) -> bool:
    """Hall's condition: no set of stages needs more rows than all stores together that it may read."""
    weights = [{name: keys["weight"] for name, keys in stores.items()}, *(weights for _, weights in stages)]
    starts = [0, *(cut for cut, _ in stages)]
    lengths = [batch * max(0, min(end, steps) - start) for start, end in zip(starts, [*starts[1:], steps], strict=True)]
    have = {
        name: keys.get("max_epochs", np.inf) * available
        for (name, keys), available in zip(stores.items(), rows, strict=True)
    }
    return all(
        sum(lengths[stage] for stage in chosen)
        <= sum(have[name] for name in stores if any(weights[stage][name] > 0 for stage in chosen))
        for size in range(1, len(lengths) + 1)
        for chosen in itertools.combinations(range(len(lengths)), size)
    )


@pytest.mark.parametrize("tokens", [False, True])
def test_a_run_is_refused_only_where_no_division_will_do_and_the_advice_works(tokens: bool):
    generator = np.random.default_rng(int(tokens))
    planned = refused = followed = 0
    for _ in range(1000):
        stores, stages, rows, steps = random_case(generator, tokens)
        batch = 3
        names = list(stores)
        try:
            mixture = mix(data_of(stores, *stages), rows, steps * batch, batch, seed=1)
        except UserError as error:
            message = str(error)
            if "leaves none to the weights" in message:  # the advice of that is to lengthen the run
                longer = int(re.search(r"lengthen the run to (\d+) steps", message)[1])  # type: ignore[index]
                with contextlib.suppress(UserError):  # for the next reason, if there is one
                    mix(data_of(stores, *stages), rows, longer * batch, batch, seed=1)
                with pytest.raises(UserError, match="leaves none to the weights"):
                    mix(data_of(stores), rows, (longer - 1) * batch, batch, seed=1)
                continue
            if "allows" in message:
                continue
            refused += 1
            found = re.search(r"leaves rows for (\d+) steps, the run has (\d+)", message)
            assert found
            possible = int(found[1])
            assert int(found[2]) == steps
            if not tokens:
                assert possible == max(n for n in range(steps) if enough_for(stores, stages, rows, n, batch))
            assert ("shorten the run" in message) == (possible > 0)
            if possible:
                followed += 1
                kept = [stage for stage in stages if stage[0] < possible]
                beyond = re.search(r"without data\.stages\[(\d+)\]", message)
                assert (int(beyond[1]) if beyond else len(stages)) == len(kept)
                mix(data_of(stores, *kept), rows, possible * batch, batch, seed=1)
            continue
        planned += 1
        if not tokens:
            assert enough_for(stores, stages, rows, steps, batch)
        cuts = [0, *(cut for cut, _ in stages), steps]
        assert [sum(stage) for stage in mixture.counts] == [batch * n for n in np.diff(cuts)]
        for index, name in enumerate(names):
            taken = [stage[index] for stage in mixture.counts]
            assert min(taken) >= 0
            assert sum(taken) <= stores[name].get("max_epochs", np.inf) * rows[index]
            if "tokens" in stores[name]:
                assert sum(taken) == -(-stores[name]["tokens"] // LENGTH)
            else:
                for count, weights in zip(
                    taken, [{name: stores[name]["weight"]}, *(w for _, w in stages)], strict=True
                ):
                    assert count == 0 or weights[name] > 0
    assert min(planned, refused, followed) > 50


def test_every_store_has_one_factor_in_all_stages():
    """It is 1 for those without a limit, and less than 1 only for those that are read just as often as they may be."""
    generator = np.random.default_rng(3)
    for _ in range(40):
        weights = generator.random((4, 5)) + 0.02
        rows = generator.integers(10**5, 10**7, 5).tolist()
        stores: dict[str, dict] = {f"s{i}": {"weight": float(weights[0, i])} for i in range(5)}
        for i in range(2, 5):
            stores[f"s{i}"]["max_epochs"] = int(generator.integers(1, 4))
        stages = [(10 * at, {f"s{i}": float(weights[at, i]) for i in range(5)}) for at in (1, 2, 3)]
        mixture = mix(data_of(stores, *stages), rows, 40 * 10**6, 10**6, seed=1)
        factors = np.array(mixture.counts) / weights
        factors /= factors[:, :1]  # of s0, whose factor is 1
        np.testing.assert_allclose(factors, factors[:1].repeat(4, axis=0), rtol=1e-3)
        for i in range(5):
            cut = f"s{i}" in mixture.cut
            assert factors[0, i] < 1 if cut else abs(factors[0, i] - 1) < 1e-3
            assert not cut or mixture.planned[i] == rows[i] * stores[f"s{i}"]["max_epochs"]


def test_budgets_alone_are_rounded_up_to_whole_rows():
    data = data_of({"a": {"tokens": 9}, "b": {"tokens": 7}})  # two rows and one, though 16 tokens would be two rows
    with pytest.raises(UserError, match=r"24 in all, in whole rows.*make it 3 steps \(train\.max_tokens 24\)"):
        mix(data, [9, 9], 2, 1, seed=1)
    assert mix(data, [9, 9], 3, 1, seed=1).planned == [2, 1]


def test_budgets_that_leave_no_row_to_the_weights_are_refused():
    data = data_of(
        {"a": {"tokens": 9}, "b": {"tokens": 9}, "c": {"weight": 1}}
    )  # 18 tokens of 32, and four rows of four
    with pytest.raises(UserError, match="32 in all, in whole rows; the run has 32 and leaves none to the weights"):
        mix(data, [9, 9, 9], 4, 1, seed=1)


def test_plan_and_what_was_seen_as_json_and_as_a_table():
    data = data_of({"web": {"weight": 1}, "math": {"weight": 1, "max_epochs": 2}}, (5, {"web": 1, "math": 0}))
    mixture = mix(data, [100, 10], 100, 10, seed=1)
    stores = mixture.at(np.arange(40))[0]
    seen = [int((stores == store).sum()) for store in range(2)]
    reported = json.loads(json.dumps(report(mixture, seen, [rows * LENGTH for rows in seen])))
    assert reported["rows"] == 100
    assert reported["stages"] == [
        {"from_row": 0, "planned_shares": {"web": 0.6, "math": 0.4}},
        {"from_row": 50, "planned_shares": {"web": 1.0, "math": 0.0}},
    ]
    math = reported["stores"]["math"]
    assert (math["planned_rows"], math["planned_epochs"], math["cut_by_max_epochs"]) == (20, 2, True)
    assert (math["seen_rows"], math["seen_tokens"]) == (seen[1], seen[1] * LENGTH)
    assert math["seen_share"] == seen[1] / 40
    assert math["seen_epochs"] == seen[1] / 10
    lines = table(reported).splitlines()
    assert [line.split()[0] for line in lines] == ["store", "web", "math"]
    assert "20.000%" in lines[2]
    assert lines[2].endswith("cut by max_epochs")
    assert len({len(line) for line in lines[:2]}) == 1
    assert Counter(itertools.chain(*(line.split() for line in lines)))["80.000%"] == 1


def test_rows_used_before_a_position_are_those_that_stand_before_it():
    stages = [(7, {"a": 1, "b": 4})]
    for past in (None, Past(position=30, uses=(11, 17), seeds=(None, 3))):
        mixture = mix(data_of({"a": {"weight": 2}, "b": {"weight": 1}}, *stages), [100, 60], 203, 10, 1, past)
        begin, used = (past.position, past.uses) if past else (0, (0, 0))
        stores, _ = mixture.at(np.arange(begin, 203))
        for position in (begin, begin + 1, 64, 70, 71, 133, 134, 198, 203, 210):
            counted = np.bincount(stores[: position - begin], minlength=2) + used
            assert mixture.uses_before(position) == counted.tolist()


def test_budgets_and_limits_count_what_was_read_before():
    """Of the 80 rows of b 30 were read, of the 12 that a may give 5; the rest goes to c."""
    data = data_of({"a": {"weight": 9, "max_epochs": 3}, "b": {"tokens": 80 * LENGTH}, "c": {"weight": 1}})
    mixture = mix(data, [4, 500, 500], 200, 10, 1, Past(position=50, uses=(5, 30, 15), seeds=(None,) * 3))
    assert mixture.planned == [12, 80, 15 + 150 - 50 - 7]
    stores, rows = mixture.at(np.arange(50, 200))
    assert np.bincount(stores).tolist() == [7, 50, 93]
    whole_epochs = mix(data, [4, 500, 500], 200, 10, 1).at(np.arange(200))
    read = whole_epochs[1][whole_epochs[0] == 0]
    assert rows[stores == 0].tolist() == read[5:12].tolist()

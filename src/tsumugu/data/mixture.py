"""Which store's row stands at which position, when a run reads several stores: a pure function, like the order itself.

Weights, token budgets and limits on epochs become whole numbers of rows, for every store in every stage, once, at the
start; a store that its limit holds back has its weight lowered, by one factor in all stages. From them follows, for any
position in constant memory, how often each store was read before it. Stores are interleaved by rounding their
cumulative shares, and shuffled within short blocks, so that every stretch of the run has the planned shares to within a
few rows; within a store the n-th use is `row_at(n, ...)`, so that every epoch of every store is a full permutation.
"""

import hashlib
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from tsumugu.config import DataConfig
from tsumugu.data.sampler import row_at
from tsumugu.errors import UserError

BLOCK = 64  # positions whose stores are shuffled among themselves: no rank gets the same store over and over


@dataclass(frozen=True)
class Past:
    """What an earlier run has read, where this run goes on from it.

    Each store goes on in its own order where it was, so that no row comes twice before its epoch is over. In which turn
    several stores are read is planned anew over what remains: it depends on the length and the weights of a run.

    Attributes:
        position: Rows that its steps had room for.
        uses: Rows read of every store of this run.
        seeds: The seed of the store's order there; None for a store that it did not read.
    """

    position: int
    uses: tuple[int, ...]
    seeds: tuple[int | None, ...]


@dataclass(frozen=True)
class Mixture:
    """The plan of a run: rows of every store in every stage.

    Attributes:
        names: The stores.
        rows: Rows an epoch of each store.
        seeds: Seeds of their orders.
        seed: Seed of how they are interleaved.
        starts: First position of every stage.
        counts: [stage][store] rows that the stage takes of the store.
        cut: Stores whose share is less than their weight, because of max_epochs.
    """

    names: tuple[str, ...]
    rows: tuple[int, ...]
    seeds: tuple[int, ...]
    seed: int
    starts: tuple[int, ...]
    counts: tuple[tuple[int, ...], ...]
    cut: frozenset[str]

    @property
    def total(self) -> int:
        """Rows of the run, and of the one from which it goes on."""
        return self.starts[-1] + sum(self.counts[-1])

    @property
    def planned(self) -> list[int]:
        """Rows of the run by store."""
        return [sum(column) for column in zip(*self.counts, strict=True)]

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The stores (as places in `names`) and their rows at the given positions, each in [0, total)."""
        positions = np.asarray(positions, dtype=np.int64)
        stores, uses = np.zeros_like(positions), np.zeros_like(positions)
        stage_of = np.searchsorted(self.starts, positions, side="right") - 1
        for stage in np.unique(stage_of).tolist():
            here = stage_of == stage
            stores[here], uses[here] = self._in_stage(stage, positions[here] - self.starts[stage])
        return stores, row_at(uses, np.array(self.rows)[stores], np.array(self.seeds)[stores])

    def uses_before(self, position: int) -> list[int]:
        """How many rows of every store stand before a position."""
        position = min(position, self.total)
        stage = int(np.searchsorted(self.starts, position, side="right")) - 1
        counts, inside = self.counts[stage], position - self.starts[stage]
        uses = np.array([sum(earlier) for earlier in zip(*self.counts[:stage], strict=True)] or [0] * len(self.names))
        read = self._read_in(stage)
        block_start = inside // BLOCK * BLOCK
        uses[read] += _divide(np.array([block_start]), [counts[i] for i in read])[:, 0]
        chosen, _ = self._in_stage(stage, np.arange(block_start, inside))
        return (uses + np.bincount(chosen, minlength=len(uses))).tolist()

    def _read_in(self, stage: int) -> list[int]:
        """Stores of which the stage takes rows, in descending order of how many."""
        counts = self.counts[stage]
        return sorted((i for i, count in enumerate(counts) if count), key=lambda i: (-counts[i], self.names[i]))

    def _in_stage(self, stage: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Stores at positions counted from the start of the stage, and how often each was used before in the run."""
        counts = self.counts[stage]
        length = sum(counts)
        read = self._read_in(stage)
        used = np.array([sum(earlier[i] for earlier in self.counts[:stage]) for i in read])
        if len(read) == 1:
            return np.full_like(positions, read[0]), used[0] + positions
        blocks, block_of = np.unique(positions // BLOCK, return_inverse=True)
        first = blocks * BLOCK
        last = np.minimum(first + BLOCK, length)
        before, after = (_divide(ends, [counts[i] for i in read]) for ends in (first, last))
        ends = np.cumsum(after - before, axis=0)  # in a block whose stores are not yet shuffled
        number = self.starts[stage] // BLOCK + stage + blocks  # another one for every block of the run
        inside = np.broadcast_to(np.arange(BLOCK), (len(blocks), BLOCK))
        sizes = np.broadcast_to((last - first)[:, None], inside.shape)  # the stage may end within a block
        drawn = number[:, None] * sizes + np.minimum(inside, sizes - 1)
        shuffled = row_at(drawn.ravel(), sizes.ravel(), self.seed).reshape(inside.shape)
        shuffled = np.where(inside < sizes, shuffled, inside)
        chosen = (shuffled >= ends[:, :, None]).sum(axis=0)
        # among the places of the block that have the same store, the first is its next use, and so on
        rank = np.argsort(np.argsort(chosen, axis=1, kind="stable"), axis=1)
        place = block_of, positions % BLOCK
        store = chosen[place]
        uses = used[store] + after[store, block_of] - ends[store, block_of] + rank[place]
        return np.array(read)[store], uses


def mix(data: DataConfig, rows: Sequence[int], total: int, batch: int, seed: int, past: Past | None = None) -> Mixture:
    """The plan of a run.

    A store with `tokens` has so many, rounded up to whole rows, spread evenly over the run; the rest of every stage is
    divided by weight. Where every store has `tokens`, the run ends with the last of them. A store that would be read
    more often than its max_epochs has its weight lowered, in all stages by the same factor, until it is read just so
    often; the others keep theirs. Only where no division of rows at all would do is the run refused.

    Args:
        data: Stores and stages; its `entries` in the order of `rows`.
        rows: Rows an epoch of every store.
        total: Rows of the run.
        batch: Rows a step.
        seed: train.seed; a store that is alone has the order of that seed, others one of seed and name.
        past: What the run goes on from; `total`, budgets, max_epochs and stages count it in.

    Raises:
        UserError: Stages, budgets or max_epochs that do not fit the run.
    """
    entries, steps = data.entries, -(-total // batch)
    names = tuple(entry.name for entry in entries)
    for index, stage in enumerate(data.stages):
        if stage.from_step >= steps:
            raise UserError(
                f"data.stages[{index}].from_step is {stage.from_step}, the run has {steps} steps",
                "lower it, or remove the stage",
            )
    none = Past(0, (0,) * len(names), (None,) * len(names))
    begin, used = (past or none).position, (past or none).uses
    limits = [
        None if entry.max_epochs is None else int(round(entry.max_epochs * available, 6))
        for entry, available in zip(entries, rows, strict=True)
    ]
    budgets = _budgets(data, limits, total, batch, past or none)
    limits = [None if limit is None else max(0, limit - n) for limit, n in zip(limits, used, strict=True)]
    weights = [[entry.weight or 0 for entry in entries]]
    weights += [[stage.weights.get(name, 0) for name in names] for stage in data.stages]
    if all(entry.tokens for entry in entries):
        total, weights, budgets = begin + sum(budgets), [budgets], [0] * len(entries)
    stage_starts = [0, *(stage.from_step * batch for stage in data.stages)]
    over = sum(start <= begin for start in stage_starts) - 1  # stages that are over when the run begins
    weights, stage_starts = weights[over:], [begin, *stage_starts[over + 1 :]]

    def starts_of(run: int) -> list[int]:
        return [start for start in stage_starts if start < run]

    def lengths_of(run: int) -> list[int]:
        starts = starts_of(run)
        if not starts:
            return []
        return [end - start for start, end in zip(starts, [*starts[1:], run], strict=True)]

    if (found := plan(lengths_of(total), weights, budgets, limits)) is None:

        def fits(steps: int) -> bool:
            _, left = _spread(lengths_of(steps * batch), budgets)
            return _fill([[0] * len(names) for _ in left], left, weights, limits)

        possible = _last_true(fits, (begin + sum(budgets)) // batch, steps)
        raise _short_of_rows(data, possible, steps)
    counts, cut = found
    seeds = tuple(seed if len(names) == 1 else _seed_of(f"{seed} {name}") for name in names)
    return Mixture(
        names=names,
        rows=tuple(rows),
        seeds=tuple(own if old is None else old for own, old in zip(seeds, (past or none).seeds, strict=True)),
        seed=_seed_of(str(seed)),
        starts=((0,) if past else ()) + tuple(starts_of(total)),
        counts=((tuple(used),) if past else ()) + tuple(map(tuple, counts)),
        cut=frozenset(names[store] for store in cut),
    )


def report(mixture: Mixture, rows: Sequence[int], tokens: Sequence[int]) -> dict:
    """What is planned for every store and what was seen of it so far, in `rows` and `tokens`; shares are of rows."""
    total, seen = mixture.total, max(1, sum(rows))
    stores = {
        name: {
            "planned_share": planned / total,
            "planned_epochs": planned / available,
            "planned_rows": planned,
            "cut_by_max_epochs": name in mixture.cut,
            "seen_share": rows[index] / seen,
            "seen_epochs": rows[index] / available,
            "seen_rows": rows[index],
            "seen_tokens": tokens[index],
        }
        for index, (name, planned, available) in enumerate(
            zip(mixture.names, mixture.planned, mixture.rows, strict=True)
        )
    }
    stages = [
        {
            "from_row": start,
            "planned_shares": dict(zip(mixture.names, (count / max(1, sum(counts)) for count in counts), strict=True)),
        }
        for start, counts in zip(mixture.starts, mixture.counts, strict=True)
    ]
    return {"rows": total, "stores": stores, "stages": stages}


def table(reported: dict) -> str:
    """A report in lines for a terminal."""
    width = max(5, *(len(name) for name in reported["stores"]))
    lines = [f"{'store':{width}}  planned share  seen share  planned epochs  seen epochs"]
    for name, store in reported["stores"].items():
        lines.append(
            f"{name:{width}}  {store['planned_share']:13.3%}  {store['seen_share']:10.3%}  "
            f"{store['planned_epochs']:14.3f}  {store['seen_epochs']:11.3f}"
            + ("  cut by max_epochs" if store["cut_by_max_epochs"] else "")
        )
    return "\n".join(lines)


def plan(
    lengths: Sequence[int],
    weights: Sequence[Sequence[float]],
    budgets: Sequence[int],
    limits: Sequence[int | None],
) -> tuple[list[list[int]], set[int]] | None:
    """Whole rows of every store in every stage.

    Of all divisions within the limits it is the one nearest to the weights, in the sense of relative entropy: that is
    what one factor a store means, which is 1 where its limit does not hold it back (Csiszár 1975, I-projection).

    Args:
        lengths: Rows of every stage.
        weights: [stage][store], 0 for a store that has a budget; stages that the run does not reach may follow.
        budgets: [store] rows over the run, spread evenly, together no more than `lengths`; 0 for one read by weight.
        limits: [store] rows over the run at most, or None.

    Returns:
        [stage][store] rows, and the stores that were cut to their limits; None where limits leave a stage short.
    """
    stages, stores = range(len(lengths)), range(len(budgets))
    spread, left = _spread(lengths, budgets)
    if not _fill([[0] * len(stores) for _ in stages], left, weights, limits):
        return None
    factors = _factors(left, weights, limits)

    shares = [[Fraction(weights[stage][s]) * Fraction(factors[s]) for s in stores] for stage in stages]
    targets = [[left[stage] * share / (sum(shares[stage]) or 1) for share in shares[stage]] for stage in stages]
    for s in stores:  # the factors are right to a part of a row; limits are exact
        wanted, limit = sum((target[s] for target in targets), Fraction(0)), limits[s]
        if limit is not None and wanted > limit:
            for target in targets:
                target[s] *= limit / wanted
    counts = [[int(rows) for rows in target] for target in targets]
    owed = [sum((target[s] for target in targets), Fraction(0)) - sum(row[s] for row in counts) for s in stores]
    filled = _fill(counts, left, weights, limits, owed)
    assert filled, "what could be filled from nothing can be filled from a part"
    both = [[a + b for a, b in zip(*rows, strict=True)] for rows in zip(spread, counts, strict=True)]
    return both, {s for s in stores if factors[s] < 1}


def _spread(lengths: Sequence[int], budgets: Sequence[int]) -> tuple[list[list[int]], list[int]]:
    """[stage][store] rows of the budgets, and the rows that they leave to the weights in every stage."""
    ends = np.array([0, *itertools.accumulate(lengths)])
    *spread, left = np.diff(_divide(ends, [*budgets, int(ends[-1]) - sum(budgets)])).tolist()
    return [list(stage) for stage in zip(*spread, strict=True)], left


def _factors(left: Sequence[int], weights: Sequence[Sequence[float]], limits: Sequence[int | None]) -> list[float]:
    """The factor of every store's weights, at most 1, with which no store passes its limit.

    One store after another is brought down to its limit, and again where others have come down since. Factors only
    fall, and towards the answer: to lower one raises what the others are given. Nothing but what IEEE 754 rounds
    exactly is used, so that every machine finds the same.
    """
    factors = [1.0] * len(limits)

    def rows(store: int, factor: float, others: list[float]) -> float:
        owns = [weight[store] * factor for weight in weights]
        return sum(n * own / (own + other) for n, own, other in zip(left, owns, others, strict=False) if own > 0)

    for _ in range(300):
        settled = True
        for store, limit in enumerate(limits):
            if limit is None:
                continue
            others = [
                sum(w * f for s, (w, f) in enumerate(zip(row, factors, strict=True)) if s != store) for row in weights
            ]
            allowed = limit * (1 + 1e-12) + 1e-6
            low, high = 1e-200, factors[store]
            if rows(store, high, others) <= allowed or high <= low:
                continue
            settled = False
            for _ in range(70):
                middle = math.sqrt(low) * math.sqrt(high)
                low, high = (low, middle) if rows(store, middle, others) > limit else (middle, high)
            factors[store] = low
        if settled:
            break
    return factors


def _fill(
    counts: list[list[int]],
    left: Sequence[int],
    weights: Sequence[Sequence[float]],
    limits: Sequence[int | None],
    owed: list[Fraction] | None = None,
) -> bool:
    """Adds rows to counts until every stage has as many as `left` says, and whether it could be done at all.

    The store that is owed most comes first. Where all stores of a stage are at their limits, one is taken from another
    stage, in which others have rows left, and so on (augmenting paths; Ford and Fulkerson 1956).
    """
    stores = range(len(limits))
    owed = owed or [Fraction(0)] * len(stores)
    used = [sum(row[s] for row in counts) for s in stores]

    def room(store: int) -> int:
        limit = limits[store]
        return sum(left) if limit is None else limit - used[store]

    for stage, length in enumerate(left):
        while (missing := length - sum(counts[stage])) > 0:
            # How every store is reached: the stage that would read it, and the store that this stage gives up for it.
            reached = {s: (stage, -1) for s in sorted(stores, key=lambda s: -owed[s]) if weights[stage][s] > 0}
            for store in (queue := list(reached)):
                if room(store) > 0:
                    break
                for other in range(len(left)):
                    if counts[other][store] > 0:
                        new = [s for s in stores if weights[other][s] > 0 and s not in reached]
                        reached |= dict.fromkeys(new, (other, store))
                        queue += new
            else:
                return False
            path = [(store, *reached[store])]
            while path[-1][2] >= 0:
                path.append((path[-1][2], *reached[path[-1][2]]))
            most = min([missing, room(store), *(counts[at][given] for _, at, given in path if given >= 0)])
            rows = most if missing > len(stores) else 1  # the last ones singly, each to the store that is owed most
            used[store] += rows
            owed[store] -= rows
            for taken, at, given in path:
                counts[at][taken] += rows
                if given >= 0:
                    counts[at][given] -= rows
    return True


def _short_of_rows(data: DataConfig, possible: int, steps: int) -> UserError:
    """The refusal of a run whose limits leave a stage without rows, with what can be done about it."""
    limited = ", ".join(f"{entry.name}: {entry.max_epochs:g}" for entry in data.entries if entry.max_epochs is not None)
    shorter = f", or shorten the run to {possible} steps" if possible else ""
    beyond = [index for index, stage in enumerate(data.stages) if stage.from_step >= possible]
    if possible and beyond:
        shorter += f" without data.stages[{beyond[0]}]" + (" and those after it" if len(beyond) > 1 else "")
    return UserError(
        f"max_epochs of data.stores ({limited}) leaves rows for {possible} steps, the run has {steps}",
        f"raise it, give a store without it a weight in every stage{shorter}",
    )


def _budgets(data: DataConfig, limits: Sequence[int | None], total: int, batch: int, past: Past) -> list[int]:
    """Rows left of every store that has a token budget, else 0, after checking that they fit a run of `total` rows."""
    entries, length = data.entries, data.sequence_length
    for index, (entry, limit) in enumerate(zip(entries, limits, strict=True)):
        if entry.tokens is not None and limit is not None and entry.tokens > limit * length:
            raise UserError(
                f"data.stores[{index}].tokens ({entry.name}) is {entry.tokens}, its max_epochs {entry.max_epochs:g} "
                f"allows {limit * length}",
                "lower tokens, or raise max_epochs",
            )
    left = [max(0, (entry.tokens or 0) - used * length) for entry, used in zip(entries, past.uses, strict=True)]
    budgets = [-(-tokens // length) for tokens in left]
    asked, steps = past.position + sum(budgets), -(-total // batch)
    needed = -(-asked // batch)
    told = f"the tokens of data.stores are {asked * length} in all, in whole rows; the run has {total * length}"
    if all(entry.tokens for entry in entries):
        if needed != steps:
            raise UserError(
                f"{told} ({steps} steps)",
                f"make it {needed} steps (train.max_tokens {asked * length}), "
                "or give a store a weight in place of tokens to take the rest",
            )
    elif asked >= total:
        raise UserError(
            f"{told} and leaves none to the weights",
            f"lower them, or lengthen the run to {asked // batch + 1} steps or more",
        )
    return budgets


def _last_true(holds: Callable[[int], bool], low: int, high: int) -> int:
    """The largest number between `low` and `high` for which `holds`, which it does up to there; 0 where there is none.

    But for rounding: the division of budgets among stages may tip a case that is tight to the row, so the number found
    is held to what is asked of it.
    """
    first = low
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    while low > first and not holds(low):
        low -= 1
    return low if low > first else 0


def _seed_of(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") >> 1


def _divide(rows: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    """How many of the first `rows` of sum(counts) fall to each part: (parts, rows), cumulative shares made whole.

    One part after another is split off what the parts before it have left, each rounded to the nearest. So parts never
    shrink as `rows` grows, they add up to `rows`, and all have exactly `counts` at the end. With counts in descending
    order a part is never further than (1 + 1/2 + ... + 1/parts) / 2 + 1/2 from its exact share.
    """
    rest, remaining, parts = rows, sum(counts), []
    for count in counts[:-1]:
        parts.append(_rounded(rest, count, remaining) if count else np.zeros_like(rest))
        rest, remaining = rest - parts[-1], remaining - count
    return np.stack([*parts, rest])


def _rounded(rows: np.ndarray, count: int, whole: int) -> np.ndarray:
    """rows × count / whole to the nearest, exactly, where the product may have more than 64 bits.

    The estimate in floating point is off by one at most, and what remains is small: right also modulo 2^64.
    """
    quotient = np.rint(rows * (count / whole)).astype(np.int64)
    remainder = rows * np.int64(count) - quotient * np.int64(whole)
    return quotient + (2 * remainder >= whole) - (2 * remainder < -whole)

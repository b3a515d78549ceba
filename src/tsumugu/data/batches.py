"""Which rows one process reads for a step: the micro batches of its share of the global batch.

Positions are dealt out so that a step holds the same rows on any number of processes and micro batches. Nothing is
kept between steps: the batches of step 1,000,000 are made without those before it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from tsumugu.data.mixture import Mixture
from tsumugu.data.packing import Batch, Row, Rows
from tsumugu.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Share:
    """This process's share of every global batch, as `rank` of the `world_size` processes that read different rows.

    With `by_length` the rows of a step are dealt out longest first, so that micro batches, and what all processes do at
    the same time, are of like length; which rows a step holds stays the same.
    """

    rank: int
    world_size: int
    global_batch_size: int
    micro_batch_size: int
    by_length: bool = False

    def __post_init__(self):
        check_batch(self.global_batch_size, self.micro_batch_size, self.world_size)

    def positions(self, step: int) -> list[np.ndarray]:
        """Positions (micro_batch_size,) of every micro batch of this process in the step."""
        start, stop = step * self.global_batch_size, (step + 1) * self.global_batch_size
        dealt = np.arange(start, stop).reshape(-1, self.world_size, self.micro_batch_size)
        return list(dealt[:, self.rank])


def check_batch(global_batch_size: int, micro_batch_size: int, processes: int) -> None:
    """Raises UserError where a step does not give every process that reads rows of its own whole micro batches."""
    rows = micro_batch_size * processes
    if global_batch_size % rows:
        raise UserError(
            f"train.global_batch_size {global_batch_size} is not a multiple of train.micro_batch_size "
            f"{micro_batch_size} × {processes} processes that read different rows",
            f"use a multiple of {rows}, or a smaller micro batch",
        )


def rows_read(rows: Sequence[Rows], mixture: Mixture, step: int, share: Share) -> tuple[np.ndarray, np.ndarray]:
    """Stores and their rows that this process reads in a step, in order; fewer where the run ends within it.

    Args:
        rows: The rows of every store of the mixture, all of one packing.
        mixture: Which store and row stands at which position.
        step: The step, counted from 0.
        share: What this process takes of it.
    """
    positions = np.concatenate(share.positions(step))
    if not share.by_length:
        return mixture.at(positions[positions < mixture.total])
    first = step * share.global_batch_size
    stores, indices = mixture.at(np.arange(first, max(first, min(first + share.global_batch_size, mixture.total))))
    lengths = [rows[store].length(index) for store, index in zip(stores.tolist(), indices.tolist(), strict=True)]
    longest_first = np.argsort(-np.array(lengths, dtype=np.int64), kind="stable")
    places = positions - first
    mine = longest_first[places[places < len(lengths)]]
    return stores[mine], indices[mine]


def training_batches(rows: Sequence[Rows], mixture: Mixture, step: int, share: Share) -> tuple[list[Batch], np.ndarray]:
    """The micro batches of one step: shuffled rows, and empty ones where the run ends within the step.

    Args:
        As of `rows_read`.

    Returns:
        The batches, and the stores of their rows, one batch after another, without the empty ones.
    """
    stores, indices = rows_read(rows, mixture, step, share)
    taken: list[Row | None] = [
        rows[store].row(index) for store, index in zip(stores.tolist(), indices.tolist(), strict=True)
    ]
    size = share.micro_batch_size
    taken += [None] * (share.global_batch_size // share.world_size - len(taken))
    # the disk reads the next step while the model computes this one
    for store, index in zip(*(array.tolist() for array in rows_read(rows, mixture, step + 1, share)), strict=True):
        rows[store].announce(index)
    return [rows[0].collate(taken[start : start + size]) for start in range(0, len(taken), size)], stores


def validation_batches(rows: Rows, share: Share, limit: int | None) -> Iterator[Batch]:
    """Every row once, in order (or `limit` global batches); every process yields the same number of batches."""
    steps = -(-len(rows) // share.global_batch_size)
    for step in range(min(steps, limit) if limit else steps):
        for position in np.concatenate(share.positions(step + 1)).tolist():
            if position < len(rows):
                rows.announce(position)
        for positions in share.positions(step):
            yield rows.collate([rows.row(p) if p < len(rows) else None for p in positions.tolist()])

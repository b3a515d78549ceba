"""Which rows one process reads for a step: the micro batches of its share of the global batch.

Positions are dealt out so that a step holds the same rows on any number of processes and micro batches. Nothing is
kept between steps: the batches of step 1,000,000 are made without those before it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from tsumugu.data.packing import Batch, Concatenated, LeftPadded
from tsumugu.data.sampler import row_at
from tsumugu.errors import UserError

Rows = Concatenated | LeftPadded


@dataclass(frozen=True, kw_only=True)
class Share:
    """This process's share of every global batch."""

    rank: int
    world_size: int
    global_batch_size: int
    micro_batch_size: int

    def __post_init__(self):
        rows = self.micro_batch_size * self.world_size
        if self.global_batch_size % rows:
            raise UserError(
                f"train.global_batch_size {self.global_batch_size} is not a multiple of train.micro_batch_size "
                f"{self.micro_batch_size} × {self.world_size} processes",
                f"use a multiple of {rows}, or a smaller micro batch",
            )

    def positions(self, step: int) -> list[np.ndarray]:
        """Positions (micro_batch_size,) of every micro batch of this process in the step."""
        start, stop = step * self.global_batch_size, (step + 1) * self.global_batch_size
        dealt = np.arange(start, stop).reshape(-1, self.world_size, self.micro_batch_size)
        return list(dealt[:, self.rank])


def training_batches(rows: Rows, step: int, share: Share, seed: int, total_rows: int) -> list[Batch]:
    """The micro batches of one step: shuffled rows, and empty ones from position `total_rows` on."""
    batches = []
    for positions in share.positions(step):
        indices = row_at(positions, len(rows), seed)
        batches.append(
            rows.collate(
                [
                    rows.row(int(index)) if position < total_rows else None
                    for position, index in zip(positions, indices, strict=True)
                ]
            )
        )
    return batches


def validation_batches(rows: Rows, share: Share, limit: int | None) -> Iterator[Batch]:
    """Every row once, in order (or `limit` global batches); every process yields the same number of batches."""
    steps = -(-len(rows) // share.global_batch_size)
    for step in range(min(steps, limit) if limit else steps):
        for positions in share.positions(step):
            yield rows.collate([rows.row(int(p)) if p < len(rows) else None for p in positions])

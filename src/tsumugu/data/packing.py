"""From a split of a store to rows of inputs and labels.

A row of T inputs reads T + 1 tokens; labels are shifted here, once, and nowhere else: `labels[t]` is the token after
`inputs[t]`, or IGNORE_INDEX where that token is not supervised, or padding.
"""

from dataclasses import dataclass

import numpy as np

from tsumugu.data.store import Split
from tsumugu.errors import UserError

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Row:
    """One row before padding: the tokens that it reads, and their supervision mask where there is one."""

    ids: np.ndarray
    mask: np.ndarray | None

    def __len__(self) -> int:
        """Its inputs; a document of one token has none."""
        return max(0, len(self.ids) - 1)

    @property
    def inputs(self) -> np.ndarray:
        return self.ids[:-1]

    @property
    def labels(self) -> np.ndarray:
        return self.ids[1:] if self.mask is None else np.where(self.mask[1:], self.ids[1:], IGNORE_INDEX)


@dataclass(frozen=True)
class Batch:
    """input_ids_BT, labels_BT, and for padded rows attention_mask_BT (1 = a token) with position_ids_BT.

    `lengths` are the inputs of every row without padding, 0 for an empty one.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    lengths: list[int]
    attention_mask: np.ndarray | None = None
    position_ids: np.ndarray | None = None


class _Rows:
    """Rows of a split, of which `_span` says where they begin and end in its stream of tokens."""

    split: Split

    def _span(self, index: int) -> tuple[int, int]:
        raise NotImplementedError

    def row(self, index: int) -> Row:
        return Row(*self.split.read(*self._span(index)))

    def announce(self, index: int) -> None:
        """The row will be read soon."""
        self.split.announce(*self._span(index))


class Concatenated(_Rows):
    """Fixed blocks of the token stream, over document boundaries. The last block may be shorter."""

    def __init__(self, split: Split, sequence_length: int, pad_id: int):
        self.split = split
        self.sequence_length = sequence_length
        self.pad_id = pad_id

    def __len__(self) -> int:
        """Rows an epoch; every token but the first is a label exactly once."""
        return max(0, -(-(self.split.tokens - 1) // self.sequence_length))

    def _span(self, index: int) -> tuple[int, int]:
        start = index * self.sequence_length
        return start, min(start + self.sequence_length + 1, self.split.tokens)

    def collate(self, rows: list[Row | None]) -> Batch:
        """Rows (None = an empty one) as a batch; short rows are filled on the right, which causality makes harmless."""
        shape = (len(rows), self.sequence_length)
        inputs, labels = np.full(shape, self.pad_id), np.full(shape, IGNORE_INDEX)
        for filled, row in enumerate(rows):
            if row is not None:
                inputs[filled, : len(row)] = row.inputs
                labels[filled, : len(row)] = row.labels
        return Batch(inputs, labels, _lengths(rows))


class LeftPadded(_Rows):
    """A document a row, padded on the left to the longest of the batch; what is padding is known from the lengths.

    Raises:
        UserError: A document is longer than a row: cutting it would cut its stop token off.
    """

    def __init__(self, split: Split, sequence_length: int, pad_id: int):
        longest = split.longest_document
        if longest > sequence_length + 1:
            raise UserError(
                f"{split.folder}: its longest example has {longest} tokens, data.sequence_length is {sequence_length}",
                f"set data.sequence_length to {longest - 1}, or prepare with prepare.max_length {sequence_length + 1}",
            )
        self.split = split
        self.pad_id = pad_id

    def __len__(self) -> int:
        return self.split.documents

    def _span(self, index: int) -> tuple[int, int]:
        return self.split.span(index)

    def collate(self, rows: list[Row | None]) -> Batch:
        """Rows (None = an empty one) as a batch."""
        lengths = _lengths(rows)
        width = max(1, *lengths)
        inputs, labels = (np.full((len(rows), width), filler) for filler in (self.pad_id, IGNORE_INDEX))
        # an empty row attends to itself: a row that attends to nothing has no defined softmax
        padding = [width - length if length else 0 for length in lengths]
        for filled, row in enumerate(rows):
            if row is not None and lengths[filled]:
                inputs[filled, padding[filled] :] = row.inputs
                labels[filled, padding[filled] :] = row.labels
        positions = np.arange(width) - np.array(padding)[:, None]
        attention = (positions >= 0).astype(np.int64)
        return Batch(inputs, labels, lengths, attention, np.maximum(positions, 0))


PACKINGS = {"concatenate": Concatenated, "pad_left": LeftPadded}


def _lengths(rows: list[Row | None]) -> list[int]:
    return [0 if row is None else len(row) for row in rows]

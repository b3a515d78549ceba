"""From a split of a store to rows of inputs and labels.

A document of n tokens has n - 1 inputs, and labels are shifted here, once, and nowhere else: `labels[t]` is the token
after `inputs[t]`, or IGNORE_INDEX where that token is not supervised, or of another document that is kept apart, or
padding. What is padding is known from lengths, never from the values of tokens.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from tsumugu.config import DataConfig
from tsumugu.data.bins import Bins, plan_bins
from tsumugu.data.store import Split
from tsumugu.errors import UserError

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Row:
    """One row before padding: inputs and labels (tokens,) int64.

    `documents` are the lengths of the documents in it, one after another, where they are kept apart; else None.
    """

    inputs: np.ndarray
    labels: np.ndarray
    documents: list[int] | None = None

    def __len__(self) -> int:
        """Its inputs; a document of one token has none."""
        return len(self.inputs)


@dataclass(frozen=True)
class Batch:
    """input_ids_BT and labels_BT; with padding on the left attention_mask_BT (1 = a token) and position_ids_BT.

    `lengths` are the inputs of every row without padding, 0 for an empty one. Where documents are kept apart,
    `documents` are the lengths of those of every row, position_ids_BT restart with each, and what fills a row up counts
    as one more document there.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    lengths: list[int]
    attention_mask: np.ndarray | None = None
    position_ids: np.ndarray | None = None
    documents: list[list[int]] | None = None

    @property
    def squared_lengths(self) -> int:
        """The sum of the squares of what attends to itself: documents that are kept apart, or rows."""
        apart = [self.lengths] if self.documents is None else self.documents
        return sum(length**2 for lengths in apart for length in lengths)

    @property
    def boundaries(self) -> np.ndarray | None:
        """(documents + 1,) int32: where documents, and what fills rows up, begin and end, rows laid end to end."""
        if self.documents is None:
            return None
        lengths = [part for parts in self.documents for part in _filled_up(parts, self.input_ids.shape[1])]
        return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


class _Rows:
    """Rows of a split, of which `_span` says where they begin and end in its stream of tokens."""

    split: Split
    pad_id: int

    def _span(self, index: int) -> tuple[int, int]:
        raise NotImplementedError

    def length(self, index: int) -> int:
        """Inputs of a row, without reading it."""
        start, stop = self._span(index)
        return max(0, stop - start - 1)

    def row(self, index: int) -> Row:
        return _row(*self.split.read(*self._span(index)))

    def announce(self, index: int) -> None:
        """The row will be read soon."""
        self.split.announce(*self._span(index))


class Concatenated(_Rows):
    """Fixed blocks of the token stream, over document boundaries. The last block may be shorter.

    Args:
        split: Of a store.
        sequence_length: Inputs a row.
        pad_id: What fills rows up.
        document_mask: Whether the documents of a row are kept apart; the first token of a document is no label then.
    """

    def __init__(self, split: Split, sequence_length: int, pad_id: int, document_mask: bool = False):
        self.split = split
        self.sequence_length = sequence_length
        self.pad_id = pad_id
        self.document_mask = document_mask

    def __len__(self) -> int:
        """Rows an epoch; every token but the first is a label exactly once, unless documents are kept apart."""
        return max(0, -(-(self.split.tokens - 1) // self.sequence_length))

    def _span(self, index: int) -> tuple[int, int]:
        start = index * self.sequence_length
        return start, min(start + self.sequence_length + 1, self.split.tokens)

    def row(self, index: int) -> Row:
        row = super().row(index)
        if not self.document_mask:
            return row
        start, stop = self._span(index)
        begun = self.split.document_starts(start + 1, stop) - start
        labels = row.labels.copy()
        labels[begun - 1] = IGNORE_INDEX
        ends = [0, *begun[begun < len(row)].tolist(), len(row)]
        return Row(row.inputs, labels, [stop - start for start, stop in pairwise(ends)])

    def collate(self, rows: list[Row | None]) -> Batch:
        """Rows (None = an empty one) as a batch; short rows are filled on the right, which causality makes harmless."""
        return _filled_right(rows, self.sequence_length, self.pad_id, apart=self.document_mask)


class LeftPadded(_Rows):
    """A document a row, padded on the left to the longest of the batch.

    Raises:
        UserError: A document is longer than a row: cutting it would cut its stop token off.
    """

    def __init__(self, split: Split, sequence_length: int, pad_id: int):
        _check_longest(split, sequence_length)
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


class RightPadded(LeftPadded):
    """A document a row, padded on the right to the longest of the batch.

    No token attends to what comes after it, so that padding on the right needs no mask, and positions count from 0.
    """

    def collate(self, rows: list[Row | None]) -> Batch:
        """Rows (None = an empty one) as a batch."""
        return _filled_right(rows, max(1, *_lengths(rows)), self.pad_id, apart=False)


class BestFit(_Rows):
    """Whole documents packed into rows, as tightly as best-fit-decreasing does; all are kept apart.

    Args:
        split: Of a store.
        sequence_length: Inputs a row.
        pad_id: What fills rows up.
        supervised: Of a store of instructions, whose examples must fit a row; longer texts are cut into pieces.
        seed: Of which documents meet in a row.

    Raises:
        UserError: An example of instructions is longer than a row.
    """

    def __init__(self, split: Split, sequence_length: int, pad_id: int, supervised: bool, seed: int):
        if supervised:
            _check_longest(split, sequence_length)
        self.split = split
        self.sequence_length = sequence_length
        self.pad_id = pad_id
        self.bins: Bins = plan_bins(split, sequence_length, seed)

    def __len__(self) -> int:
        return len(self.bins)

    @property
    def filled(self) -> float:
        """Share of the positions of all rows that hold a token."""
        return self.bins.inputs / max(1, len(self) * self.sequence_length)

    def length(self, index: int) -> int:
        return sum(size for _, size in self.bins.pieces_of(index))

    def row(self, index: int) -> Row:
        pieces = self.bins.pieces_of(index)
        rows = [_row(*self.split.read(start, start + size + 1)) for start, size in pieces]
        inputs, labels = (np.concatenate(parts) for parts in zip(*((r.inputs, r.labels) for r in rows), strict=True))
        return Row(inputs, labels, [size for _, size in pieces])

    def announce(self, index: int) -> None:
        for start, size in self.bins.pieces_of(index):
            self.split.announce(start, start + size + 1)

    def collate(self, rows: list[Row | None]) -> Batch:
        """Rows (None = an empty one) as a batch."""
        return _filled_right(rows, self.sequence_length, self.pad_id, apart=True)


Rows = Concatenated | LeftPadded | BestFit


def rows_of(config: DataConfig, split: Split, pad_id: int, supervised: bool, seed: int) -> Rows:
    """The rows of a split as `data` asks for them.

    Args:
        config: packing, sequence_length and document_mask.
        split: Of a store.
        pad_id: What fills rows up; it is never seen.
        supervised: Whether the store holds instructions.
        seed: train.seed.

    Raises:
        UserError: A document does not fit a row and must not be cut.
    """
    length = config.sequence_length
    if config.packing == "concatenate":
        return Concatenated(split, length, pad_id, config.document_mask)
    if config.packing == "best_fit":
        return BestFit(split, length, pad_id, supervised, seed)
    return (LeftPadded if config.packing == "pad_left" else RightPadded)(split, length, pad_id)


def _row(ids: np.ndarray, mask: np.ndarray | None) -> Row:
    return Row(ids[:-1], ids[1:] if mask is None else np.where(mask[1:], ids[1:], IGNORE_INDEX))


def _lengths(rows: list[Row | None]) -> list[int]:
    return [0 if row is None else len(row) for row in rows]


def _filled_right(rows: list[Row | None], width: int, pad_id: int, apart: bool) -> Batch:
    """Rows filled up on the right to `width`; with `apart` their documents are kept apart."""
    inputs, labels = (np.full((len(rows), width), filler) for filler in (pad_id, IGNORE_INDEX))
    for filled, row in enumerate(rows):
        if row is not None:
            inputs[filled, : len(row)] = row.inputs
            labels[filled, : len(row)] = row.labels
    if not apart:
        return Batch(inputs, labels, _lengths(rows))
    documents = [[] if row is None else row.documents or [] for row in rows]
    positions = [np.concatenate([np.arange(part) for part in _filled_up(parts, width)]) for parts in documents]
    return Batch(inputs, labels, _lengths(rows), position_ids=np.stack(positions), documents=documents)


def _filled_up(documents: list[int], width: int) -> list[int]:
    rest = width - sum(documents)
    return [*documents, rest] if rest else documents


def _check_longest(split: Split, sequence_length: int) -> None:
    longest = split.longest_document
    if longest > sequence_length + 1:
        raise UserError(
            f"{split.folder}: its longest example has {longest} tokens, data.sequence_length is {sequence_length}",
            f"set data.sequence_length to {longest - 1}, or prepare with prepare.max_length {sequence_length + 1}",
        )

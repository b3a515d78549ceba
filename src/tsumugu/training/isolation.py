"""The check at the start of a run whose rows hold several documents: does this model keep them apart?

Whether a model does depends on its architecture, its attention and the version of transformers, and where it does not,
nothing fails: losses are a few tenths off. So two documents are sent through the run's own model, in one row and alone.
"""

from collections.abc import Callable

import numpy as np
import torch

from tsumugu.data.packing import Batch, Row, Rows

# Of the largest logit. A document that is kept apart is computed from the same numbers by the same operations, whatever
# stands before it in the row: its logits do not move at all. Alone it stands elsewhere in the row, and differs by
# rounding.
_MOVES = 2**-10
_ROUNDING = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}


@torch.no_grad()
def crossing(
    logits: Callable[[Batch], torch.Tensor], rows: Rows, shape: tuple[int, int], vocabulary: int, dtype: torch.dtype
) -> float:
    """How far the logits of a document depend on what stands before it in the row, by three forward passes.

    Every process calls it.

    Args:
        logits: The model: a batch to (batch, tokens, vocabulary).
        rows: What makes its batches; its documents are kept apart.
        shape: Rows and tokens of a micro batch.
        vocabulary: Ids are below.
        dtype: In which the model computes.

    Returns:
        0 where they do not but for rounding, else their largest change over the largest logit.
    """
    micro_batch, length = shape
    if length < 2:
        return 0.0
    ids = np.arange(length) * 7 % vocabulary
    first, second = np.split(ids[: length // 3 + 1 + length // 2], [length // 3 + 1])
    other = (first + 1) % vocabulary

    def of_last(*documents: np.ndarray) -> torch.Tensor:
        inputs = np.concatenate(documents)
        row = Row(inputs, inputs, [len(document) for document in documents])
        found = logits(rows.collate([row] * micro_batch))[0]
        return found[len(inputs) - len(documents[-1]) : len(inputs)].double()

    behind_first, behind_other, alone = of_last(first, second), of_last(other, second), of_last(second)
    largest = alone.abs().max()
    moved, differs = (((behind_first - those).abs().max() / largest).item() for those in (behind_other, alone))
    return 0.0 if moved <= _MOVES and differs <= _ROUNDING[dtype] else max(moved, differs)

"""The loss: a sum over supervised tokens, which the trainer divides by their number in the whole step."""

import torch
import torch.nn.functional as F

from tsumugu.data.packing import IGNORE_INDEX


def summed_loss(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """Sum of the cross entropies (nats) of the labels that are not IGNORE_INDEX, in float32 or the logits' float64.

    Args:
        logits_BTV: (batch, tokens, vocabulary).
        labels_BT: (batch, tokens), shifted already: the label at t is what the logits at t predict.
    """
    logits = logits_BTV.flatten(0, 1)
    if logits.dtype != torch.float64:
        logits = logits.float()
    return F.cross_entropy(logits, labels_BT.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")

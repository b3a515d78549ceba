"""Loss, perplexity and bits per byte over a store or over texts.

What is predicted, and from which context, is laid down in pieces of a stream of tokens before anything is computed: a
piece is read by the model alone, so that documents are kept apart whatever the model. The pieces are put into batches
by their lengths, and the batches are dealt out to the processes; sums are taken in float64, once, over all batches.
So the figures are the same on any number of processes, and differ by rounding alone with the size of the batches.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from tsumugu.data.packing import IGNORE_INDEX
from tsumugu.data.store import Split
from tsumugu.errors import UserError
from tsumugu.evaluate.models import out_of_memory_explained
from tsumugu.tokenizer.contract import Contract
from tsumugu.training.storages import Group, together

Packing = Literal["documents", "concatenate", "document_mask"]
LONGEST_WINDOW = 2048  # inputs, where nobody says another number

# Ids (tokens,) and supervision mask (tokens,), or None for all, of tokens [start, stop) of a stream.
Read = Callable[[int, int], tuple[np.ndarray, np.ndarray | None]]


@dataclass(frozen=True)
class Windows:
    """How a stream of tokens is cut into pieces.

    Attributes:
        packing: documents: each by itself. concatenate: the stream as one. document_mask: the blocks of concatenate,
            in which documents are kept apart.
        length: Inputs a window.
        stride: Inputs from one window to the next: windows that overlap predict only what those before did not.
    """

    packing: Packing
    length: int
    stride: int


@dataclass(frozen=True)
class Sums:
    """nats of the predicted tokens, their number, and the bytes of text that they stand for."""

    nats: float
    tokens: int
    bytes: int

    def figures(self) -> dict[str, Any]:
        """loss in nats a token, perplexity, bits per byte, and what they are over."""
        loss = self.nats / self.tokens
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700)),
            "bits_per_byte": self.nats / math.log(2) / self.bytes if self.bytes else None,
            "tokens": self.tokens,
            "bytes": self.bytes,
        }


def pieces_of(bounds: np.ndarray, windows: Windows) -> np.ndarray:
    """The pieces in which documents are read.

    Args:
        bounds: (documents + 1,) where documents begin and end in their stream.
        windows: How they are cut.

    Returns:
        (pieces, 3) int64: the first token that a piece reads, the one after its last, and its first label. Every token
        but the first of what is read by itself is the label of exactly one piece.
    """
    if windows.packing == "concatenate":
        bounds = bounds[[0, -1]]
    pieces: list[tuple[int, int, int]] = []
    for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        pieces += _cut(start, stop, windows)
    return np.array(pieces, np.int64).reshape(-1, 3)


def _cut(start: int, stop: int, windows: Windows) -> Iterator[tuple[int, int, int]]:
    label, at = start + 1, start
    while label < stop:
        blocks = windows.packing == "document_mask"
        end = min((at // windows.length + 1) * windows.length if blocks else at + windows.length, stop - 1)
        yield at, end + 1, label
        label, at = end + 1, end if blocks else at + windows.stride


def store_pieces(split: Split, supervised: bool, windows: Windows) -> np.ndarray:
    """The pieces of a split, as `pieces_of` cuts it.

    Raises:
        UserError: An empty split, or an example of instructions that would be cut.
    """
    if not split.tokens:
        raise UserError(f"{split.folder} holds no document", "choose another --split, or prepare a larger corpus")
    if supervised and split.longest_document > windows.length + 1:
        raise UserError(
            f"{split.folder}: its longest example has {split.longest_document} tokens, the window {windows.length}",
            "examples are not cut: use a model with more positions, or prepare with a smaller prepare.max_length",
        )
    whole = windows.packing == "concatenate"
    return pieces_of(np.array([0, split.tokens]) if whole else split.document_bounds(), windows)


def choose_windows(
    supervised: bool,
    longest: int | None,
    positions: Sequence[int | None],
    of_run: dict[str, Any],
    packing: Packing | None = None,
    length: int | None = None,
    stride: int | None = None,
) -> Windows:
    """The windows of a store or of texts: what the user asks for, else what the run was trained with, else defaults.

    Args:
        supervised: Of a store of instructions, whose examples are read one by one and whole.
        longest: Of such a store, the longest example.
        positions: Of the models that are compared.
        of_run: The section `data` of a run's configuration, or {}.
        packing: As the user asks for.
        length: Likewise; default: of the run, else LONGEST_WINDOW, or fewer where a model has fewer positions.
        stride: Likewise; default: the length.

    Raises:
        UserError: What a model or the store does not allow.
    """
    limits = [number for number in positions if number is not None]
    if supervised:
        if packing not in (None, "documents") or length is not None or stride is not None:
            raise UserError(
                "a store of instructions is read example by example, whole",
                "leave out --packing, --sequence-length and --stride",
            )
        whole = max(1, (longest or 2) - 1)
        windows = Windows("documents", whole, whole)
        hint = "examples are not cut: use models with more positions"
    else:
        of_training = "document_mask" if of_run.get("document_mask") else of_run.get("packing", "concatenate")
        trained = of_training if of_training in ("concatenate", "document_mask") else "documents"
        inputs = length or min([of_run.get("sequence_length") or LONGEST_WINDOW, *limits])
        windows = Windows(packing or trained, inputs, stride or inputs)
        hint = "give a smaller --sequence-length"
    if limits and windows.length > min(limits):
        raise UserError(f"windows of {windows.length} tokens, but a model has {min(limits)} positions", hint)
    if windows.stride > windows.length:
        raise UserError(
            f"--stride {windows.stride} is longer than the windows of {windows.length}", "use a smaller one"
        )
    if windows.stride != windows.length and windows.packing == "document_mask":
        raise UserError("--stride does not go with --packing document_mask", "use --packing documents")
    return windows


def score(
    model: torch.nn.Module,
    pieces: np.ndarray,
    read: Read,
    contract: Contract,
    batch_size: int,
    group: Group,
    what: str = "",
) -> Sums:
    """The sums over the supervised tokens of the pieces; every process calls it, and all get them.

    Args:
        model: A causal language model in evaluation mode, whole on this process's device.
        pieces: Of `pieces_of`.
        read: Of their stream.
        contract: Whose token lengths turn labels into bytes.
        batch_size: Pieces a batch.
        group: The processes.
        what: For the progress bar.

    Raises:
        UserError: Too little memory for a batch, or no supervised token.
    """
    device = next(model.parameters()).device
    token_bytes = np.array(contract.token_bytes, np.int64)
    longest_first = np.argsort(pieces[:, 0] - pieces[:, 1], kind="stable")
    batches = [longest_first[at : at + batch_size] for at in range(0, len(pieces), batch_size)]
    rank, world_size = dist.get_rank(), dist.get_world_size()

    def own_batches() -> list[tuple[float, int, int]]:
        found = []
        for index in tqdm(range(rank, len(batches), world_size), desc=what, disable=None if rank == 0 else True):
            inputs, labels = _batch(pieces[batches[index]], read)
            predicted = labels[labels != IGNORE_INDEX]
            if len(predicted):
                nats = _summed_loss(model, torch.from_numpy(inputs).to(device), torch.from_numpy(labels).to(device))
                found.append((nats, len(predicted), int(token_bytes[predicted].sum())))
        return found

    with out_of_memory_explained(batch_size, device):
        sums = [batch for part in together(group, own_batches) for batch in part]
    tokens = sum(tokens for _, tokens, _ in sums)
    if not tokens:
        raise UserError(f"{what}: no token to predict", "give documents of two tokens or more")
    # fsum does not depend on the order, which is that of the processes
    return Sums(math.fsum(nats for nats, _, _ in sums), tokens, sum(size for _, _, size in sums))


def _batch(pieces: np.ndarray, read: Read) -> tuple[np.ndarray, np.ndarray]:
    """input_ids_BT and labels_BT, filled up on the right, which no token attends to."""
    width = int((pieces[:, 1] - pieces[:, 0]).max()) - 1
    inputs, labels = np.zeros((len(pieces), width), np.int64), np.full((len(pieces), width), IGNORE_INDEX)
    for row, (start, stop, label) in enumerate(pieces.tolist()):
        ids, mask = read(start, stop)
        size = stop - start - 1
        inputs[row, :size] = ids[:-1]
        labels[row, :size] = ids[1:] if mask is None else np.where(mask[1:], ids[1:], IGNORE_INDEX)
        labels[row, : label - start - 1] = IGNORE_INDEX
    return inputs, labels


@torch.no_grad()
def _summed_loss(model: torch.nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> float:
    """Row by row, since logits take more memory than anything else; each token in float32, the sum in float64."""
    nats = torch.zeros((), dtype=torch.float64, device=inputs.device)
    for logits_TV, labels_T in zip(model(input_ids=inputs, use_cache=False).logits, labels, strict=True):
        logits = logits_TV if logits_TV.dtype == torch.float64 else logits_TV.float()
        nats += F.cross_entropy(logits, labels_T, ignore_index=IGNORE_INDEX, reduction="none").double().sum()
    return nats.item()

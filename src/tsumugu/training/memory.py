"""Out of memory: where the memory of this process is, and which changes of the configuration would save how much."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from tsumugu.config import TrainingRun
from tsumugu.errors import UserError
from tsumugu.kernels.cross_entropy import LOGITS_AT_A_TIME
from tsumugu.model import masters
from tsumugu.training.optimizer import MasterAdamW

GIB = 2**30

# Of what a decoder layer keeps for backward, 34 bytes a token and hidden unit in 16 bits (Korthikanti et al. 2022,
# without the attention matrix, which fused attention does not keep): the outputs of the matrix products and of
# attention are 20, its input is 2.
_KEPT_BY_SELECTIVE = 20 / 34
_KEPT_BY_FULL = 2 / 34


@dataclass(frozen=True)
class Memory:
    """Bytes on this process's device."""

    weights: int
    trained: int
    """Of the weights, those that are: as much as their gradients will take."""
    gradients: int
    """With the sums that wait for the exchange."""
    waiting: int
    """Of the gradients, sums on their way to the other devices, with parallel.sync_each_micro_batch false."""
    moments: int
    logits: int
    """Of one micro batch: in the compute dtype, in float32, and the log-probabilities that the loss keeps."""
    activations: int
    """What is left of the peak: also gathered weights, buffers of collectives and whatever else was in use."""
    unused: int
    """Held by torch's allocator, in pieces too small to be used."""


@dataclass(frozen=True)
class Change:
    """A change of the configuration, the bytes that it would save (about), and what it costs."""

    setting: str
    saves: int
    cost: str


def measure(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: TrainingRun,
    vocabulary: int,
    compute_dtype: torch.dtype,
    device: torch.device,
    chunked_loss: bool,
    waiting: list[torch.Tensor],
) -> Memory:
    """Where the memory of this process is, from the tensors themselves and the peak of the device (0 on a CPU).

    `waiting` are the sums of `Exchange.waiting`.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]  # also where FSDP2 has gathered them
    low_bits = [master.low for p in parameters if (master := masters.of(p))]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    weights = _bytes([*parameters, *frozen, *low_bits, *model.buffers()], device)
    trained = _bytes([*parameters, *low_bits], device)
    sums = [held.total for held in optimizer.sums.values()] if isinstance(optimizer, MasterAdamW) else []
    gradients = _bytes([*sums, *waiting, *(p.grad for p in parameters if p.grad is not None)], device)
    moments = _bytes((value for state in optimizer.state.values() for value in state.values()), device)
    tokens = config.train.micro_batch_size * config.data.sequence_length
    float_bytes = 8 if compute_dtype == torch.float64 else 4
    copies = 2 if compute_dtype.itemsize < 4 else 1  # the loss is computed in float32
    logits = tokens * vocabulary * (compute_dtype.itemsize + copies * float_bytes)
    if chunked_loss:
        logits = min(tokens * vocabulary, LOGITS_AT_A_TIME) * compute_dtype.itemsize
    cuda = device.type == "cuda"
    peak = torch.cuda.max_memory_allocated(device) if cuda else 0
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device) if cuda else 0
    activations = max(0, peak - weights - gradients - moments - logits)
    return Memory(weights, trained, gradients, _bytes(waiting, device), moments, logits, activations, unused)


def changes(config: TrainingRun, memory: Memory, world_size: int) -> list[Change]:
    """What would save memory, the one that costs the least speed first; savings are estimates.

    Args:
        config: As it is.
        memory: Of this process.
        world_size: Processes, or with parallel.tensor_degree groups of them.
    """
    parallel, found = config.parallel, []
    of_batch = memory.activations + memory.logits
    shard = parallel.shard_degree or world_size // (parallel.replicate_degree or 1)
    if memory.waiting:
        saved = memory.waiting - memory.waiting // shard
        found.append(Change("parallel.sync_each_micro_batch true", saved, "more communication"))
    micro_batch, length = config.train.micro_batch_size, config.data.sequence_length
    if micro_batch > 1:
        smaller = next(size for size in range(micro_batch // 2, 0, -1) if micro_batch % size == 0)
        saved = of_batch - of_batch * smaller // micro_batch
        found.append(Change(f"train.micro_batch_size {smaller}", saved, "more, smaller matrix products"))
    of_shards = memory.weights + max(memory.gradients - memory.waiting, memory.trained) + memory.moments
    if shard < world_size:
        saved = of_shards * (world_size - shard)
        setting = f"parallel.shard_degree {world_size}, parallel.replicate_degree 1"
        found.append(Change(setting, saved // world_size, "more communication"))
    checkpointing = parallel.activation_checkpointing
    if checkpointing == "none" and not parallel.offload_activations:
        saved = round(memory.activations * (1 - _KEPT_BY_SELECTIVE))
        found.append(
            Change(
                "parallel.activation_checkpointing selective", saved, "what lies between matrix products is done twice"
            )
        )
    if checkpointing != "full":
        kept = 1 if checkpointing == "none" else _KEPT_BY_SELECTIVE
        saved = round(memory.activations * (1 - _KEPT_BY_FULL / kept))
        found.append(
            Change("parallel.activation_checkpointing full", saved, "a second forward: about a third more work")
        )
    if not parallel.offload_optimizer:
        found.append(Change("parallel.offload_optimizer true", of_shards, "the optimizer's step is taken on the host"))
    if checkpointing != "selective" and parallel.tensor_degree == 1 and not parallel.offload_activations:
        cost = "they travel to the host and back"
        found.append(Change("parallel.offload_activations true", memory.activations, cost))
    if length > 1:
        cost = "other rows: what is learned changes"
        found.append(Change(f"data.sequence_length {length // 2}", of_batch // 2, cost))
    return found


def out_of_memory(
    error: torch.OutOfMemoryError, place: str, memory: Memory | None, options: list[Change], device: torch.device
) -> tuple[str, UserError]:
    """A block for the terminal, and the error that ends the command.

    Args:
        error: As torch raised it.
        place: Rank, and what it was doing.
        memory: None where there is no model yet.
        options: From `changes`; the first three that save something are shown.
        device: Of this process.
    """
    lines = [f"tsumugu: out of memory: {place}: {next(iter(str(error).splitlines()), '')}"]
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        lines.append(f"  the device has {_gib(total)} GiB, {_gib(free)} of them free now")
    if memory is not None:
        for name in ("weights", "gradients", "moments", "logits", "activations", "unused"):
            what = {
                "logits": "logits (of a micro batch)",
                "activations": "activations and all else",
                "unused": "unused, in small pieces",
            }
            lines.append(f"  {what.get(name, name):<26} {_gib(getattr(memory, name)):>9} GiB")
    chosen = [change for change in options if change.saves > 0][:3]
    if chosen:
        lines.append("  what saves memory, cheapest first (about):")
    lines += [f"  {change.setting:<58} saves {_gib(change.saves):>8} GiB; {change.cost}" for change in chosen]
    if memory is not None and memory.unused > GIB:
        lines.append(
            "  and the environment variable PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True joins the small pieces"
        )
    hint = " or ".join(f"set {change.setting}" for change in chosen) or "use more or larger devices"
    return "\n".join(lines) + "\n", UserError(f"out of memory: {place}", hint)


def _bytes(tensors: Iterable, device: torch.device) -> int:
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in local if t.device.type == device.type
    }
    return sum(storages.values())


def _gib(size: int) -> str:
    return f"{size / GIB:.3g}"


def say(text: str) -> None:
    """On this process's terminal: the others may not run out of memory, and their command line prints one line."""
    sys.stderr.write(text)
    sys.stderr.flush()

"""Which process this is among how many, on which device: torchrun's environment, or one process alone.

A process group always exists, also with one process, so that there is one code path.
"""

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist

from tsumugu.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Environment:
    """rank of world_size processes, local_rank on this host, and the device that this process computes on."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device


@contextlib.contextmanager
def process_group(timeout: timedelta | None = None) -> Iterator[Environment]:
    """Joins the process group that the launcher describes, and leaves it at the end.

    Args:
        timeout: Of its collectives; None: torch's own (gloo: 30 minutes, NCCL: 10).

    torchrun (under Slurm: `slurm.adopt_step`) sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; without
    them this is the only process. A group that exists already is used as it is.

    Raises:
        UserError: More processes than GPUs on this host.
    """
    world_size, local_rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _end_with_parent()
    if torch.cuda.is_available():
        device = torch.device("cuda", _gpu(local_rank, torch.cuda.device_count()))
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
    joined_here = not dist.is_initialized()
    if joined_here:
        if world_size > 1:
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield Environment(dist.get_rank(), dist.get_world_size(), local_rank, device)
    finally:
        if joined_here:
            dist.destroy_process_group()


def _gpu(local_rank: int, gpus: int) -> int:
    """Which of the GPUs that this process sees is its own: Slurm may show every task one alone (--gpus-per-task)."""
    if gpus == 1:
        return 0
    if local_rank >= gpus:
        raise UserError(f"local rank {local_rank}: this host has {gpus} GPUs", "start one process a GPU")
    return local_rank


def _end_with_parent() -> None:
    """Has the system kill this process when torchrun is killed, which would leave it training beside the next start.

    Linux alone offers it: prctl(2), PR_SET_PDEATHSIG.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def on_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """A copy there, queued behind the work that a GPU has, so that the host goes on."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def on_main(action: Callable[[], T]) -> T:
    """Calls `action` on the main process alone; every process gets what it returned, or raises what it raised.

    So nobody waits for a main process that has failed. What it returns or raises must be picklable.
    """
    outcome: list = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = action()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)  # over gloo, whose timeout leaves time to read large files
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]

"""`launch local`: torchrun in this process, training in one child process a device."""

import logging
import os
import sys
import uuid

import torch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from tsumugu.errors import UserError


def launch(arguments: list[str], processes: int | None = None) -> int:
    """Runs `tsumugu ARGUMENTS` in several processes that find each other on this machine.

    Args:
        arguments: The arguments of the subcommand, such as ["train", "--config", "x.yaml"].
        processes: Default: one a GPU; without GPUs, one.

    Returns:
        The exit code: that of the first process that failed, or 0.
    """
    count = processes or torch.cuda.device_count() or 1
    cores = os.cpu_count() or 1
    if not torch.cuda.is_available() and count > cores:
        raise UserError(f"--processes {count} on {cores} cores", f"use {cores} or fewer")
    # torchrun's own default is one thread a process, whatever the machine
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // count)))
    # and it kills children 30 s after it asked them to stop, whether or not their checkpoint is written
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "300")
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the children say what is wrong
    launch_config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    try:
        elastic_launch(launch_config, sys.executable)("-m", "tsumugu", *arguments)
    except ChildFailedError as error:
        first = min(error.failures.values(), key=lambda failure: failure.timestamp)
        return first.exitcode if first.exitcode > 0 else 128 - first.exitcode
    except SignalException:  # the children were given time to save, and say how far they came
        return 3
    return 0

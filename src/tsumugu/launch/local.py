"""`launch local`: torchrun in this process, training in one child process a device."""

import dataclasses
import logging
import os
import sys
from datetime import datetime
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from tsumugu.errors import UserError


def _cores() -> int:
    """Those that this process may use: a container or a Slurm step has fewer than the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def most_processes() -> int:
    """The processes that this machine has room for: one a GPU, without GPUs one a core."""
    return torch.cuda.device_count() or _cores()


_NOT_RETRIED = (2, 3)  # the input is wrong: it stays so; interrupted: as asked


def launch(arguments: list[str], run_dir: Path, processes: int | None = None, max_restarts: int = 0) -> int:
    """Runs `tsumugu train ARGUMENTS` in several processes that find each other on this machine.

    Rank 0 has the console to itself. What the others say comes there too, with their rank before it, and into
    RUN/logs/START/attempt_0/RANK/std{out,err}.log, which are torchrun's names.

    Args:
        arguments: Of `tsumugu train`, but for --run-dir.
        run_dir: The run folder.
        processes: Default: one a GPU; without GPUs, one.
        max_restarts: How often all are started again, from the newest checkpoint, after one of them has died.

    Returns:
        The exit code: 0, that of the first process that failed, 3 for a run that was interrupted and can go on.

    Raises:
        UserError: More processes than the machine has GPUs, or cores.
    """
    count = torch.cuda.device_count() or 1 if processes is None else processes
    if not 1 <= count <= most_processes():
        devices = "GPUs" if torch.cuda.is_available() else "cores"
        raise UserError(f"--processes {count}: this machine has {most_processes()} {devices}", "use one each at most")
    prepare_environment(count, shutdown_seconds=300)
    launch_config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=datetime.now().strftime("%Y-%m-%d-%H-%M-%S"),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        log_line_prefix_template="[rank ${rank}] ",
    )
    code = 0
    try:
        for restart in range(max_restarts + 1):
            logged = dataclasses.replace(launch_config, logs_specs=_logs(run_dir, count))
            code, rank = run_workers(logged, "tsumugu", "train", f"--run-dir={run_dir}", *arguments)
            if code in (0, *_NOT_RETRIED) or restart == max_restarts:
                break
            ended = f"signal {code - 128}" if code > 128 else f"exit code {code}"
            print(
                f"tsumugu: rank {rank} ended with {ended}: restart {restart + 1} of {max_restarts}, from "
                f"{_newest(run_dir)}",
                file=sys.stderr,
                flush=True,
            )
    except SignalException as error:  # the children were given time to save, and said how far they came
        from tsumugu.training.trainer import SAVED  # imported late: transformers takes seconds

        return 3 if (run_dir / SAVED).exists() else 128 + error.sigval
    return code


def _logs(run_dir: Path, processes: int) -> DefaultLogsSpecs:
    """Where a start's output goes; each start has its own, since torchrun would remove the last one's files."""
    tee = {rank: Std.ALL if rank else Std.NONE for rank in range(processes)}
    return DefaultLogsSpecs(log_dir=str(run_dir / "logs"), tee=tee)


def prepare_environment(processes: int, shutdown_seconds: int) -> None:
    """What torchrun would do otherwise than is good for `processes` processes on this machine.

    Args:
        processes: On this machine.
        shutdown_seconds: How long they have to end after they were asked to; torchrun's own limit is 30.
    """
    # torchrun's own default is one thread a process, whatever the machine
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // processes)))
    # and it kills children so soon after it asked them to stop, whether or not their checkpoint is written
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(shutdown_seconds))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the children say what is wrong


def run_workers(launch_config: LaunchConfig, module: str, *arguments: str) -> tuple[int, int]:
    """Runs `python -m MODULE ARGUMENTS` in all processes of a launch.

    Returns:
        Exit code, 128 + N for a signal N, and the rank that had it first.
    """
    try:
        elastic_launch(launch_config, sys.executable)("-m", module, *arguments)
    except ChildFailedError as error:
        # a process that ends takes others with it, which then end with codes of their own
        rank, first = min(
            error.failures.items(), key=lambda item: (item[1].exitcode not in _NOT_RETRIED, item[1].timestamp)
        )
        return first.exitcode if first.exitcode > 0 else 128 - first.exitcode, rank
    return 0, 0


def _newest(run_dir: Path) -> str:
    from tsumugu.training.checkpoint import complete_steps

    steps = complete_steps(run_dir)
    return f"step {steps[-1]}" if steps else "the start"

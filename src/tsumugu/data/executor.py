"""Runs the stages of a preparation: on processes of this machine, on a Slurm cluster, or on a Ray cluster.

Tasks, completion markers and the two clusters are datatrove's. Its local executor waits for ever for a worker that was
killed; here a dead worker is an error that names what it was reading, and no worker outlives its parent.
"""

import contextlib
import multiprocessing
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import traceback
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.executor import LocalPipelineExecutor
from datatrove.executor.slurm import SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from loguru import logger
from tqdm import tqdm

from tsumugu.config import PrepareConfig
from tsumugu.errors import UserError

SLURM_JOBS = "slurm-jobs.txt"  # in a working folder: the ids of what was submitted, one a line
_PROGRESS = "progress.bin"
_LONGEST_ARRAY = 1000  # tasks of an array that Slurm allows unless configured otherwise


@dataclass(frozen=True)
class Stage:
    """Tasks that may run side by side, all of them before the next stage.

    Attributes:
        name: Of its folder of markers and logs.
        pipeline: datatrove steps.
        inputs: What each task works on, for messages.
        sizes: Work of each task, in bytes of input that it shares with the other stages.
    """

    name: str
    pipeline: list[PipelineStep]
    inputs: list[str]
    sizes: list[float]

    @property
    def tasks(self) -> int:
        return len(self.inputs)


class Progress:
    """What one task writes about its way through its input, for the bar of the main process.

    Args:
        folder: The stage's, below the working folder.
        rank: The task.
    """

    def __init__(self, folder: Path, rank: int):
        self._shares = np.memmap(folder / _PROGRESS, np.float32, mode="r+")
        self._rank = rank

    def show(self, share: float) -> None:
        """`share` of the task is done, from 0 to 1."""
        self._shares[self._rank] = share


def run_local(stages: list[Stage], work: Path, workers: int) -> None:
    """Runs every stage to its end on processes of this machine; tasks that are marked as done are left out.

    Args:
        stages: In order.
        work: Folder for markers, logs and progress; what is there is gone on with.
        workers: Processes at most; 1: none but this one.

    Raises:
        UserError: A task's own, or a worker that was killed, with what it worked on.
    """
    executors = [_local(stage, work) for stage in stages]
    left = [executor.get_incomplete_ranks() for executor in executors]
    workers = min(workers, max(map(len, left), default=0))
    for stage, ranks in zip(stages, left, strict=True):
        _reset_progress(work / stage.name, stage.tasks, ranks)
    with _progress_bar(work, stages), _pool(executors, workers) as pool:
        for index, ranks in enumerate(left):
            if pool:
                _run_stage(pool, stages[index], index, ranks)
            else:
                for rank in ranks:
                    executors[index].run_task(rank)


def run_slurm(stages: list[Stage], work: Path, config: PrepareConfig) -> str:
    """Submits every stage that is not done, each after the one before; returns at once.

    Returns:
        What was submitted, or what still runs, in a line.

    Raises:
        UserError: No sbatch on this machine, or sbatch refuses.
    """
    if not shutil.which("sbatch"):
        raise UserError(
            "prepare.executor is slurm, but there is no sbatch here", "run it on a login node of the cluster"
        )
    if waiting := unfinished_jobs(work):
        return f"{len(waiting)} jobs of an earlier call still run or wait: {', '.join(waiting)}"
    logger.disable("datatrove")
    settings = config.slurm
    jobs: list[str] = []
    for stage in stages:
        executor = _Slurm(
            pipeline=stage.pipeline,
            tasks=stage.tasks,
            time=settings.time,
            partition=settings.partition or "",
            mem_per_cpu_gb=settings.memory_gib,
            workers=config.workers or -1,
            job_name=f"tsumugu-{stage.name}",
            qos="",
            env_command=settings.setup or f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH",
            # one array a stage, whatever its tasks; what waits for a stage that failed is not left in the queue
            tasks_per_job=-(-stage.tasks // _LONGEST_ARRAY),
            sbatch_args={"kill-on-invalid-dep": "yes", **settings.options},
            depends_job_id=jobs[-1] if jobs else None,  # pyright: ignore[reportArgumentType]
            logging_dir=str((work / stage.name).absolute()),
        )
        if not (left := executor.get_incomplete_ranks()):
            continue
        _reset_progress(work / stage.name, stage.tasks, left)
        try:
            executor.run()
        except subprocess.CalledProcessError as error:
            for job in jobs:
                subprocess.run(["scancel", job], check=False)
            raise UserError(
                f"sbatch refuses stage {stage.name} (exit code {error.returncode})", "see the line above"
            ) from None
        jobs.append(str(executor.job_id))
        (work / SLURM_JOBS).write_text("\n".join(jobs))
    return f"submitted as jobs {', '.join(jobs)}, each after the one before; logs are in {work}/*/slurm_logs"


def run_ray(stages: list[Stage], work: Path, workers: int | None) -> None:
    """Runs every stage to its end on the Ray cluster that this machine belongs to.

    Raises:
        UserError: ray is not installed, or tasks failed.
    """
    try:
        import ray  # noqa: F401 # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError("prepare.executor is ray, which is not installed", "pip install 'ray[default]'") from None
    from datatrove.executor.ray import RayPipelineExecutor

    for stage in stages:
        folder = str((work / stage.name).absolute())
        _reset_progress(work / stage.name, stage.tasks, list(range(stage.tasks)))
        executor = RayPipelineExecutor(
            pipeline=stage.pipeline, tasks=stage.tasks, workers=workers or -1, logging_dir=folder
        )
        executor.run()
        if failed := executor.get_incomplete_ranks():
            raise UserError(
                f"{len(failed)} of {stage.tasks} tasks of stage {stage.name} failed, the first on "
                f"{stage.inputs[failed[0]]}",
                f"see {folder}/logs/task_{failed[0]:05d}.log; run again to go on where it stopped",
            )


class _Local(LocalPipelineExecutor):
    """datatrove's executor without its logs, which take longer than a small task."""

    def run_task(self, rank: int) -> None:
        """Runs the pipeline for one task and marks it as done."""
        logger.disable("datatrove")
        data: Any = None
        for step in self.pipeline:
            data = step(data, rank, self.world_size)
        deque(data or (), maxlen=0)
        self.mark_rank_as_completed(rank)
        Progress(Path(self.logging_dir.path), rank).show(1)


class _Slurm(SlurmPipelineExecutor):
    """datatrove's executor without a partition where none is named, and without its job that merges statistics."""

    def get_sbatch_args(self, max_array: int = 1) -> dict:
        arguments = super().get_sbatch_args(max_array)
        return {key: value for key, value in arguments.items() if value or key != "partition"}

    def launch_merge_stats(self) -> None:
        pass


def _local(stage: Stage, work: Path) -> _Local:
    folder = str((work / stage.name).absolute())  # datatrove would expand a ~
    return _Local(pipeline=list(stage.pipeline), tasks=stage.tasks, workers=1, logging_dir=folder)


def unfinished_jobs(work: Path) -> list[str]:
    """The jobs that were submitted for a working folder, as its SLURM_JOBS says, and that still run or wait.

    Raises:
        UserError: There may be some, but squeue does not say.
    """
    jobs_file = work / SLURM_JOBS
    if not jobs_file.exists():
        return []
    # of everybody, since several may share a folder; %F: of all tasks of an array, the array's id
    command = ["squeue", "--noheader", "--format=%F"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        raise UserError(
            f"{work} was submitted to Slurm, and squeue does not say whether its jobs still run",
            "ask again on a login node of the cluster",
        ) from None
    return sorted(set(jobs_file.read_text().split()) & set(found))


@contextlib.contextmanager
def _pool(executors: list[_Local], workers: int) -> Iterator[list[tuple[multiprocessing.Process, Connection]]]:
    """Worker processes with a connection to each; none for one worker."""
    context = multiprocessing.get_context("spawn")
    pool = []
    try:
        for _ in range(workers if workers > 1 else 0):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, executors), daemon=True)
            process.start()
            theirs.close()
            pool.append((process, ours))
        yield pool
    finally:
        for process, _ in pool:
            process.terminate()
        for process, connection in pool:
            process.join()
            connection.close()


def _run_stage(
    pool: list[tuple[multiprocessing.Process, Connection]], stage: Stage, index: int, ranks: list[int]
) -> None:
    waiting = list(reversed(ranks))
    working: dict[Connection, int] = {}
    idle = [connection for _, connection in pool]
    while waiting or working:
        while waiting and idle:
            connection = idle.pop()
            working[connection] = waiting.pop()
            with _expecting_life(stage.inputs[working[connection]]):
                connection.send((index, working[connection]))
        for connection in wait(list(working)):
            assert isinstance(connection, Connection)
            rank = working.pop(connection)
            with _expecting_life(stage.inputs[rank]):
                error = connection.recv()
            if error is not None:
                raise error
            idle.append(connection)


@contextlib.contextmanager
def _expecting_life(input: str) -> Iterator[None]:
    """Says what a worker works on, or was to, where it turns out to be dead."""
    try:
        yield
    except (EOFError, ConnectionResetError, BrokenPipeError):
        raise UserError(
            f"the worker process that worked on {input} was killed, most often for lack of memory",
            "use fewer prepare.workers; run again to go on where it stopped",
        ) from None


def _work(connection: Connection, executors: list[_Local]) -> None:
    """A worker: takes (stage, rank) until its parent ends it, or ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the parent answers it
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    while True:
        index, rank = connection.recv()
        try:
            executors[index].run_task(rank)
            connection.send(None)
        except (UserError, OSError) as error:
            connection.send(error)
        except Exception:
            connection.send(RuntimeError(traceback.format_exc()))


def _reset_progress(folder: Path, tasks: int, left: list[int]) -> None:
    shares = np.ones(tasks, np.float32)
    shares[left] = 0
    folder.mkdir(exist_ok=True)
    shares.tofile(folder / _PROGRESS)


@contextlib.contextmanager
def _progress_bar(work: Path, stages: list[Stage]) -> Iterator[None]:
    """One bar over all stages, in bytes of the input."""
    shares = [np.memmap(work / stage.name / _PROGRESS, np.float32, mode="r") for stage in stages]

    def done() -> int:
        return int(sum(float(np.dot(share, stage.sizes)) for share, stage in zip(shares, stages, strict=True)))

    total = int(sum(sum(stage.sizes) for stage in stages))
    bar = tqdm(total=total, initial=done(), unit="B", unit_scale=True, desc="prepare", disable=None)
    finished = threading.Event()

    def watch() -> None:
        while not finished.wait(0.2):
            current = next((stage for share, stage in zip(shares, stages, strict=True) if share.min() < 1), None)
            if current:
                bar.set_description(f"prepare: {current.name}", refresh=False)
            bar.update(done() - bar.n)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()
        bar.update(done() - bar.n)
        bar.close()

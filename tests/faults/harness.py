"""A tiny job that is killed, asked to stop, robbed of its disk or of whole files, and started again until it is done.

    python tests/faults/harness.py --runs 100

Every process of the job is a real one: it is forked from this one, which has imported torch already, and trains over
gloo. As torchrun does, the harness ends the other processes once one has failed. After every attempt what COMPLETE
promised must still be there, and at the end weights, moments and figures must be those of an undisturbed run, bit for
bit.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from support.models import tiny_config
from support.runs import figures, run_config
from support.stores import random_documents, write_store

from tsumugu.config import TrainingRun
from tsumugu.errors import UserError
from tsumugu.training import checkpoint
from tsumugu.training.trainer import train

STEPS, EVERY, WORLD_SIZE = 12, 2, 2
KINDS = (
    "SIGKILL to all",
    "SIGKILL to one rank",
    "SIGTERM to all",
    "SIGTERM to one rank",
    "SIGKILL inside a save",
    "full disk inside a save",
    "truncated file afterwards",
    "flipped bit afterwards",
)
INTERRUPTED, WRONG_INPUT = 3, 2
SAVING = ("checkpoint.py", "saving.py", "storages.py")  # the modules whose lines are moments of a save
COUNT, LINES = "count lines", "lines"


@dataclass(frozen=True)
class Fault:
    """What happens in one attempt: `rank` is whom it strikes, `moment` when, from 0 to 1."""

    kind: str
    rank: int
    moment: float


@dataclass
class Ended:
    """A run that came through: how often it was started, and what differs from the undisturbed one."""

    attempts: int
    struck: list[str]
    differences: list[str]


def make_job(folder: Path) -> TrainingRun:
    """A model with dropout on 30 documents, with a checkpoint every second step."""
    write_store(folder / "store", random_documents(30, seed=1), random_documents(9, seed=2))
    dropout = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
    tiny_config("gpt2", tied=True, **dropout).save_pretrained(folder / "model")
    changes = {
        "model.config": str(folder / "model"),
        "train.max_steps": STEPS,
        "train.global_batch_size": 4,
        "optimizer.learning_rate": 1e-2,
        "checkpoint.every": EVERY,
        "evaluate.every": 4,
    }
    return run_config(folder / "store", changes)


def undisturbed(config: TrainingRun, run_dir: Path) -> None:
    """The run that all others must equal; it also counts the lines that are executed for its checkpoints."""
    assert _attempt(config, run_dir, Fault(COUNT, 0, 0.0)) == 0


def disturbed(config: TrainingRun, run_dir: Path, faults: list[Fault], expected: Path) -> Ended:
    """Starts a job with one fault after another, then without any until it is done."""
    struck, attempts, newest = [], 0, 0
    damaged: dict[Path, int] = {}  # files that were damaged here, and when
    lines = int((expected / LINES).read_text())
    for fault in faults:
        attempts += 1
        code = _attempt(config, run_dir, fault, lines)
        promised = checkpoint.complete_steps(run_dir)
        still_damaged = {
            file.parent for file, time in damaged.items() if file.exists() and file.stat().st_mtime_ns == time
        }
        for folder in (checkpoint.folder(run_dir, step) for step in promised):
            if folder not in still_damaged:
                checkpoint.check(folder)
        assert max(promised, default=0) >= newest, f"{run_dir}: the checkpoint of step {newest} is gone after {fault}"
        if code == 0:
            break
        struck.append(fault.kind)
        newest = max(promised, default=0)
        if len(promised) > 1 and fault.kind.endswith("afterwards"):
            file = _damage(checkpoint.folder(run_dir, newest), fault)
            damaged[file] = file.stat().st_mtime_ns
            newest = promised[-2]
    while (code := _attempt(config, run_dir, None)) != 0:
        raise AssertionError(f"{run_dir}: exit {code} without a fault, after {struck}")
    return Ended(attempts + 1, struck, _differences(run_dir, expected))


def _attempt(config: TrainingRun, run_dir: Path, fault: Fault | None, lines: int = 0) -> int:
    """Starts the job once; 0, 2 and 3 as `tsumugu train` exits, else what the first process to fail exited with."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as scratch:
        ranks = [
            context.Process(target=_rank, args=(rank, Path(scratch), config, run_dir, fault, lines))
            for rank in range(WORLD_SIZE)
        ]
        for process in ranks:
            process.start()
        if fault and fault.kind not in (COUNT, "SIGKILL inside a save", "full disk inside a save"):
            _signal_later(ranks, run_dir, fault)
        return _wait(ranks)


def _wait(ranks: list) -> int:
    while all(process.exitcode is None or process.exitcode == 0 for process in ranks):
        if all(process.exitcode == 0 for process in ranks):
            return 0
        time.sleep(0.005)
    deadline = time.monotonic() + 5
    while any(process.exitcode is None for process in ranks) and time.monotonic() < deadline:
        time.sleep(0.005)
    for process in ranks:
        if process.exitcode is None:
            process.kill()
        process.join()
    codes = [process.exitcode for process in ranks]
    return next((code for code in codes if code in (WRONG_INPUT, INTERRUPTED)), next(code for code in codes if code))


def _signal_later(ranks: list, run_dir: Path, fault: Fault) -> None:
    """Once the run has come to the step of the fault: to one process or to all."""
    step = int(fault.moment * STEPS)
    deadline = time.monotonic() + 60
    while all(process.exitcode is None for process in ranks) and time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError, ValueError):
            if any(line["step"] >= step for line in figures(run_dir)):
                break
        time.sleep(0.002)
    time.sleep(fault.moment * STEPS % 1 * 0.05)
    number = signal.SIGTERM if "SIGTERM" in fault.kind else signal.SIGKILL
    for process in [ranks[fault.rank]] if fault.kind.endswith("one rank") else ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)


def _rank(rank: int, scratch: Path, config: TrainingRun, run_dir: Path, fault: Fault | None, lines: int) -> None:
    code = 1
    try:
        log = os.open(scratch / f"{rank}.log", os.O_CREAT | os.O_WRONLY)
        os.dup2(log, 1)
        os.dup2(log, 2)
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{scratch}/rendezvous", rank=rank, world_size=WORLD_SIZE)
        traced = [0]
        if fault and fault.rank == rank and fault.kind in (COUNT, "SIGKILL inside a save"):
            _trace(traced, None if fault.kind == COUNT else int(fault.moment * lines))
        if fault and fault.kind == "full disk inside a save":
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python does by itself
            limit = int(200_000 * fault.moment)  # a rank's file of a checkpoint has more
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        outcome = train(config, run_dir)
        if fault and fault.kind == COUNT and rank == fault.rank:
            (run_dir / LINES).write_text(str(traced[0]))
        code = INTERRUPTED if outcome.interrupted else 0
    except UserError:
        code = WRONG_INPUT
    finally:
        os._exit(code)


def _trace(count: list[int], last: int | None) -> None:
    """Counts the lines executed in the modules that save, in every thread; SIGKILL after the last."""
    files = {str(path) for path in Path(checkpoint.__file__).parent.glob("*.py") if path.name in SAVING}

    def local(_frame, event, _argument):
        if event == "line":
            count[0] += 1
            if last is not None and count[0] > last:
                os.kill(os.getpid(), signal.SIGKILL)
        return local

    def trace(frame, _event, _argument):
        return local if frame.f_code.co_filename in files else None

    threading.settrace(trace)
    sys.settrace(trace)


def _damage(folder: Path, fault: Fault) -> Path:
    """Cuts the end off a file that COMPLETE lists, or flips one of its bits; the file."""
    names = sorted(json.loads((folder / checkpoint.COMPLETE).read_text()))
    file = folder / names[int(fault.moment * len(names))]
    content = bytearray(file.read_bytes())
    place = int(fault.moment * 7919) % len(content)
    if fault.kind.startswith("truncated"):
        file.write_bytes(content[:place])
    else:
        content[place] ^= 1 << fault.rank
        file.write_bytes(content)
    return file


def _differences(run_dir: Path, expected: Path) -> list[str]:
    found, wanted = (_tensors(folder) for folder in (run_dir, expected))
    differences = [name for name in wanted if not torch.equal(found[name], wanted[name])]
    differences += sorted(found.keys() ^ wanted.keys())
    if figures(run_dir) != figures(expected):
        differences.append("metrics.jsonl")
    return differences


def _tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the last checkpoint, whole."""
    reader = dcp.FileSystemReader(checkpoint.folder(run_dir, STEPS))
    stored = reader.read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in stored.items()
        if hasattr(entry, "size")
    }
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def random_faults(generator: random.Random, kind: str) -> list[Fault]:
    """One to three faults, the first of the given kind."""
    kinds = [kind, *generator.choices(KINDS, k=generator.randint(0, 2))]
    return [Fault(kind, generator.randrange(WORLD_SIZE), generator.random()) for kind in kinds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    started, struck, runs, attempts, different = time.monotonic(), Counter(), Counter(), 0, 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        config = make_job(folder)
        undisturbed(config, folder / "undisturbed")
        for run in range(options.runs):
            faults = random_faults(random.Random(options.seed * 1_000_003 + run), KINDS[run % len(KINDS)])
            ended = disturbed(config, folder / f"{run}", faults, folder / "undisturbed")
            attempts += ended.attempts
            struck.update(ended.struck)
            runs.update(set(ended.struck))
            different += bool(ended.differences)
            if ended.differences:
                print(f"run {run}: {faults}: {', '.join(ended.differences)}", file=sys.stderr)
    print("| fault | times | in runs |\n| --- | --- | --- |")
    for kind in KINDS:
        print(f"| {kind} | {struck[kind]} | {runs[kind]} |")
    print(f"\n{options.runs} runs, {attempts} starts, {different} of other results, {time.monotonic() - started:.0f} s")
    sys.exit(bool(different))


if __name__ == "__main__":
    main()

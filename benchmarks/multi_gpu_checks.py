"""Over NCCL: every mesh trains as one GPU does, runs move between meshes, and dead or stuck processes end or restart.

    python benchmarks/multi_gpu_checks.py               # on all GPUs of this host (2, 4 or 8)

Small models, through `tsumugu launch local` as a user starts it. Losses of every mesh and of tensor parallelism are
compared with those of one GPU in float32 and bf16; a run of one GPU goes on on all of them and back; one rank is killed
and the run restarts; one is stopped and the others say where they wait. Exit code 1 where something is off.
"""

import argparse
import contextlib
import functools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from fast_checks import FAILED, SHAPES, VOCABULARY, check
from throughput import random_store
from transformers import AutoConfig

STEPS = 12


def meshes(gpus: int) -> list[dict[str, int]]:
    found = [{"shard_degree": gpus}, {"replicate_degree": gpus, "shard_degree": 1}]
    found += [{"shard_degree": gpus // 2, "replicate_degree": 2}] if gpus >= 4 else []
    found += [{"shard_degree": gpus // 2, "tensor_degree": 2}]
    return found


def started(folder: Path, name: str, processes: int, *flags: str, launch: tuple[str, ...] = ()) -> subprocess.Popen:
    """A run of a folder's configuration, whose output goes to a file beside it."""
    command = [sys.executable, "-m", "tsumugu", "launch", "local", f"--processes={processes}", *launch]
    command += ["--config", str(folder / "config.yaml"), "--run-dir", str(folder / name), *flags]
    with open(folder / f"{name}.log", "a") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def losses(folder: Path, name: str) -> np.ndarray:
    lines = map(json.loads, (folder / name / "metrics.jsonl").read_text().splitlines())
    found = {line["step"]: line["loss"] for line in lines if "loss" in line}
    return np.array([found[step] for step in sorted(found)])


def trained(folder: Path, name: str, processes: int, *flags: str) -> np.ndarray:
    """Losses of a run that must end well."""
    code = started(folder, name, processes, *flags).wait()
    if code not in (0, 3):
        print((folder / f"{name}.log").read_text()[-2000:])
        check(f"{name}: exit code", code, 0)
        return np.array([np.nan])
    return losses(folder, name)


def worker(run_dir: Path, rank: int) -> int:
    """The process id of a rank of a run."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (process / "cmdline").read_bytes().decode(errors="replace")
            environment = (process / "environ").read_bytes().split(b"\0")
            if f"--run-dir={run_dir}" in command and f"RANK={rank}".encode() in environment:
                return int(process.name)
    raise SystemExit(f"no process of rank {rank} of {run_dir}")


def wait_for(text: str, log: Path, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not re.search(text, log.read_text() if log.exists() else ""):
        if time.monotonic() > end:
            raise SystemExit(f"{text} did not appear in {log}")
        time.sleep(0.2)


def configure(folder: Path, shape: str) -> None:
    AutoConfig.for_model(shape, vocab_size=VOCABULARY + 24, **SHAPES[shape]).save_pretrained(folder / "model")
    random_store(folder / "store", VOCABULARY, 400_000)
    content = {
        "model": {"config": str(folder / "model")},
        "data": {"store": str(folder / "store"), "sequence_length": 256, "audit": "off"},
        "train": {"max_steps": STEPS, "global_batch_size": 16, "micro_batch_size": 1, "log_every": 1, "log_to": []},
        "optimizer": {"learning_rate": 1e-3},
        "schedule": {"warmup_steps": 3},
    }
    (folder / "config.yaml").write_text(json.dumps(content))  # which YAML includes


def check_meshes(folder: Path, shape: str, dtype: str, gpus: int) -> None:
    allowed = {"float32": 2e-5, "bfloat16": 5e-3}[dtype]
    flags = (f"--train.dtype={dtype}", *(["--parallel.compile=false"] if dtype == "float32" else []))
    one = trained(folder, "one", 1, *flags)
    for mesh in meshes(gpus):
        degrees = [f"--parallel.{key}={degree}" for key, degree in mesh.items()]
        name = "-".join(f"{key.partition('_')[0]}{degree}" for key, degree in mesh.items())
        found = trained(folder, name, gpus, *flags, *degrees)
        same = found.shape == one.shape
        check(f"{shape}, {dtype}, {name}", float(np.abs(found / one - 1).max()) if same else np.nan, allowed)


def check_moves(folder: Path, gpus: int) -> None:
    """A third of the steps each on one GPU, all, and one again."""
    whole = trained(folder, "whole", 1)
    for processes, stop in ((1, STEPS // 3), (gpus, 2 * STEPS // 3), (1, None)):
        trained(folder, "moved", processes, *([f"--train.stop_after={stop}"] if stop else []))
    found = losses(folder, "moved")
    check("from one GPU to all and back", float(np.abs(found / whole - 1).max()), 5e-3)


def check_killed(folder: Path, gpus: int) -> None:
    whole = trained(folder, "undisturbed", gpus, "--checkpoint.every=3", "--train.max_steps=60")
    run = started(folder, "killed", gpus, "--checkpoint.every=3", "--train.max_steps=60", launch=("--max-restarts=2",))
    wait_for(r"step 9/", folder / "killed.log")
    os.kill(worker(folder / "killed", 1), signal.SIGKILL)
    check("a rank is killed: exit code", run.wait(), 0)
    found = losses(folder, "killed")
    same = found.shape == whole.shape
    check("… and losses are those of an undisturbed run", float(np.abs(found - whole).max()) if same else np.nan, 0)


def check_stuck(folder: Path, gpus: int) -> None:
    run = started(folder, "stuck", gpus, "--train.max_steps=100000", "--train.hang_timeout=20")
    log = folder / "stuck.log"
    wait_for(r"step 9/", log)
    stopped = worker(folder / "stuck", 1)
    os.kill(stopped, signal.SIGSTOP)
    try:
        wait_for(r"rank 0: rank 1 gives no sign of life", log)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(stopped, signal.SIGCONT)
    check("a rank that is stuck ends the run (exit code is not 0)", float(run.wait() == 0), 0)
    print("       " + next(line for line in log.read_text().splitlines() if "no progress" in line)[:200])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", choices=list(SHAPES), help="default: gpt_neox and llama")
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count(), help="processes; without GPUs by gloo")
    parser.add_argument("--at-once", type=int, default=4, help="checks at the same time, on the same GPUs")
    arguments = parser.parse_args()
    gpus = arguments.gpus
    print(f"{gpus} × {torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'}, torch {torch.__version__}")
    jobs: list[tuple[str, Callable[[Path], None]]] = [
        ("gpt_neox", lambda folder: check_moves(folder, gpus)),
        ("gpt_neox", lambda folder: check_killed(folder, gpus)),
        ("gpt_neox", lambda folder: check_stuck(folder, gpus)),
    ]
    for shape in arguments.shape or ["gpt_neox", "llama"]:
        for dtype in ("float32", "bfloat16"):
            jobs.append((shape, functools.partial(check_meshes, shape=shape, dtype=dtype, gpus=gpus)))

    def take(job: tuple[str, Callable[[Path], None]]) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            configure(Path(scratch), job[0])
            job[1](Path(scratch))

    with ThreadPoolExecutor(arguments.at_once) as pool:
        list(pool.map(take, jobs))
    print(f"\nfailed: {', '.join(FAILED)}" if FAILED else "\nall is well")
    sys.exit(bool(FAILED))


if __name__ == "__main__":
    main()

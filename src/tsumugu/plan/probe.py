"""`tsumugu plan --probe`: 20 steps of a recipe on this machine, and the efficiencies that explain their duration."""

import dataclasses
import json
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers

from tsumugu.config import TrainingRun
from tsumugu.distributed.environment import process_group
from tsumugu.errors import UserError
from tsumugu.plan import instances, memory, planning
from tsumugu.plan import time as timing
from tsumugu.plan.command import Asked
from tsumugu.training.signals import StopRequest
from tsumugu.training.trainer import Trainer

STEPS, WARM = 20, 5

# of a CPU no peak is known: its efficiencies are over these, and say what it reached
_CPU_FLOPS, _CPU_BANDWIDTH = 1e12, 100e9
_START = timing.Calibration(matrix=0.6, attention=0.4, varlen=0.2, memory=0.8, launch=6e-6)


def probe(run: TrainingRun, asked: Asked, file: Path) -> str:
    """Trains and writes the calibration; a line about it.

    The efficiencies are those of the shipped calibration (or, of a device that has none, common ones), all of them
    changed by one factor: so many numbers cannot be told from one duration.

    Raises:
        UserError: The recipe cannot be trained here, or the device's peaks are not known.
    """
    cluster = instances.this_machine()
    gpu = with_nominal_rates(cluster.gpu)
    if gpu.half_flops is None or gpu.bandwidth is None:
        raise UserError(f"the peaks of {gpu.name} are not known", "plan knows those of data/instances.json")
    if not file.parent.is_dir():
        raise UserError(f"--probe {file}: there is no folder {file.parent}", "make it first")
    rows, short = run.train.micro_batch_size, _short(run)
    seconds, peak = _measure(short)
    setup = memory.set_up(short, planning.find_model_config(short, asked.vocab_size), gpu.device(), 1)
    kernels = timing.whole(timing.step_of(setup, memory.trace_model(setup, rows), rows))
    flops = gpu.flops(setup.dtype)
    if flops is None:
        raise UserError(f"the peak of {gpu.name} in {setup.dtype} is not known", "set train.dtype to bfloat16")
    start = timing.shipped(gpu) or _START
    calibration = timing.scaled(start, [timing.Observation(kernels, flops, gpu.bandwidth, seconds)])
    today = f"{datetime.now(UTC):%Y-%m-%d}"
    source = f"{gpu.name}, {today}, torch {torch.__version__}, transformers {transformers.__version__}: {STEPS} steps"
    calibration = dataclasses.replace(calibration, source=source)
    measured = {"step_seconds": seconds, "memory_peak_gib": peak / planning.GIB if peak else None}
    content = dataclasses.asdict(calibration) | {"device": gpu.name, "measured": measured}
    file.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    tokens = 2 * rows * run.data.sequence_length / seconds
    return f"{file}: {tokens:,.0f} tokens/s on one device ({source})"


def _short(run: TrainingRun) -> TrainingRun:
    """The run on one device and for few steps, without what needs more of either."""
    train = dataclasses.replace(
        run.train, max_steps=STEPS, max_tokens=None, max_epochs=None, global_batch_size=2 * run.train.micro_batch_size,
        start_state="weights", profile_steps=None, memory_snapshot=None, log_to=[],
    )  # fmt: skip
    data = dataclasses.replace(run.data, store=run.data.entries[0].path, stores=[], stages=[], audit="off")
    schedule = dataclasses.replace(run.schedule, kind="constant", warmup_steps=0, decay_steps=None)
    parallel = dataclasses.replace(run.parallel, shard_degree=None, replicate_degree=None)
    return dataclasses.replace(run, train=train, data=data, schedule=schedule, parallel=parallel)


def with_nominal_rates(gpu: instances.Gpu) -> instances.Gpu:
    """A CPU with the rates that its efficiencies are relative to; every other device as it is."""
    if gpu.name != "CPU":
        return gpu
    rates = {"half_flops": _CPU_FLOPS, "float_flops": _CPU_FLOPS, "bandwidth": _CPU_BANDWIDTH}
    return dataclasses.replace(gpu, **rates)


def _measure(run: TrainingRun) -> tuple[float, int]:
    """Seconds of a step, and the peak of a GPU's memory in bytes (0 of a CPU)."""
    with tempfile.TemporaryDirectory() as folder, process_group() as environment:
        trainer = Trainer(run, Path(folder), environment)
        cuda, started = environment.device.type == "cuda", 0.0
        for step in range(STEPS):
            if step == WARM:
                if cuda:
                    torch.cuda.synchronize()
                    torch.cuda.reset_peak_memory_stats()
                started = time.perf_counter()
            launched = trainer.train_step(StopRequest())
            assert launched is not None
            launched.figures()
            trainer.step = step + 1
        seconds = (time.perf_counter() - started) / (STEPS - WARM)
        return seconds, torch.cuda.max_memory_allocated() if cuda else 0

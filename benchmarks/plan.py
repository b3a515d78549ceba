"""What `tsumugu plan` predicts, beside what is measured: peak memory and tokens a second, on one GPU and on several.

    python benchmarks/plan.py --gpus 4 --out DIR       # every case, each in a process of its own, four at a time
    python benchmarks/plan.py --gpus 2 --out DIR --case "7b, 2 GPUs"      # one of several GPUs, under torchrun
    python benchmarks/plan.py --predict                # predictions alone, for an H100; no GPU is needed
    python benchmarks/plan.py --compare DIR            # predictions beside what was measured into DIR, or into a log
    python benchmarks/plan.py --processes 2 4          # sharded on processes of this CPU: bytes of all tensors

Every case trains a shape on random tokens through the trainer itself, two or four micro batches a step. Measured are,
of steps that are not the first ones: torch's peak of allocated memory, what its allocator holds, what the device has in
use beside that, the memory between steps, after forward and at the peaks of forward, backward and the rest of the step,
tokens a second, and milliseconds by part and by kind of kernel. Prints Markdown; DIR gets a JSON file and a log a case.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

GIB = 2**30


@dataclass(frozen=True)
class Case:
    """A preset, rows a micro batch, tokens a row, what the configuration changes; GPUs, and micro batches a step."""

    preset: str
    rows: int
    length: int
    changes: dict[str, dict[str, Any]] = field(default_factory=dict)
    processes: int = 1
    micro_batches: int = 2

    @property
    def tokens(self) -> int:
        return self.rows * self.length * self.processes * self.micro_batches


def _parallel(**changes: Any) -> dict[str, dict[str, Any]]:
    return {"parallel": changes}


def _sharded(preset: str, rows: int, processes: int, **parallel: Any) -> Case:
    return Case(preset, rows, 2048, _parallel(**parallel), processes, micro_batches=4)


CASES = {
    "tiny": Case("tiny", 8, 512),
    "tiny, long": Case("tiny", 32, 2048),
    "tiny, float32": Case("tiny", 16, 1024, {"train": {"dtype": "float32"}}),
    "qwen3-0.6b": Case("qwen3-0.6b", 4, 2048),
    "qwen3-0.6b, selective": Case("qwen3-0.6b", 8, 2048, _parallel(activation_checkpointing="selective")),
    "qwen3-0.6b, full, 4096": Case("qwen3-0.6b", 8, 4096, _parallel(activation_checkpointing="full")),
    "llama-1b, 4096": Case("llama-1b", 4, 4096),
    "llama-1b, document mask": Case("llama-1b", 8, 2048, {"data": {"document_mask": True}}),
    "1b, 4 × 1024": Case("1b", 4, 1024),
    "1b": Case("1b", 8, 2048),
    "1b, budget 0.7": Case("1b", 12, 2048, _parallel(activation_memory_budget=0.7)),
    "1b, selective": Case("1b", 12, 2048, _parallel(activation_checkpointing="selective")),
    "1b, full": Case("1b", 16, 2048, _parallel(activation_checkpointing="full")),
    "1b, every 2nd full": Case(
        "1b", 12, 2048, _parallel(activation_checkpointing="full", checkpoint_every_nth_layer=2)
    ),
    "1b, document mask": Case("1b", 8, 2048, {"data": {"document_mask": True}}),
    "1b, float32": Case("1b", 2, 2048, {"train": {"dtype": "float32"}}),
    "1b, float16": Case("1b", 4, 2048, {"train": {"dtype": "float16"}} | _parallel(sync_each_micro_batch=True)),
    "1b, FSDP2": Case("1b", 4, 2048, _parallel(fsdp=True, sync_each_micro_batch=True)),
    "1b, FSDP2, gathered twice": Case(
        "1b", 8, 2048, _parallel(fsdp=True, sync_each_micro_batch=True, reshard_after_forward="always")
    ),
    "1b, whole logits": Case("1b", 8, 2048, _parallel(chunked_loss=False)),
    "1b, not compiled": Case("1b", 4, 2048, _parallel(compile=False)),
    "1b, not compiled, selective": Case("1b", 8, 2048, _parallel(compile=False, activation_checkpointing="selective")),
    "3.6b, 1 row": Case("3.6b", 1, 2048),
    "3.6b, 3 rows": Case("3.6b", 3, 2048),
    "3.6b, budget 0.6": Case("3.6b", 4, 2048, _parallel(activation_memory_budget=0.6)),
    "3.6b, selective": Case("3.6b", 4, 2048, _parallel(activation_checkpointing="selective")),
    "3.6b, full": Case("3.6b", 8, 2048, _parallel(activation_checkpointing="full")),
    "3.6b, whole logits": Case("3.6b", 2, 2048, _parallel(chunked_loss=False)),
    "1b, 1 GPU": _sharded("1b", 8, 1),
    "3.6b, 1 GPU": _sharded("3.6b", 3, 1),
    "7b, 1 GPU": _sharded("7b", 3, 1),
    "3.6b, 2 GPUs": _sharded("3.6b", 3, 2),
    "3.6b, 2 GPUs, each micro batch": _sharded("3.6b", 3, 2, sync_each_micro_batch=True),
    "7b, 2 GPUs": _sharded("7b", 3, 2),
    "7b, 2 GPUs, each micro batch": _sharded("7b", 3, 2, sync_each_micro_batch=True),
    "7b, 2 GPUs, each micro batch, 6 rows": _sharded("7b", 6, 2, sync_each_micro_batch=True),
}


def _start() -> Any:
    from tsumugu.plan.time import Calibration

    return Calibration(matrix=0.7, attention=0.4, varlen=0.2, memory=0.8, launch=6e-6, eager=0.5, optimizer=0.8)


def run_config(case: str, folder: Path) -> Any:
    """The configuration of a case, on a store and a model configuration in a folder."""
    from tsumugu import config

    of = CASES[case]
    sections = {name: of.changes.get(name, {}) for name in ("data", "train", "parallel")}
    return config.TrainingRun(
        model=config.ModelConfig(config=str(folder / of.preset)),
        tokenizer=config.TokenizerConfig(),
        data=config.DataConfig(store=str(folder / "store"), sequence_length=of.length, audit="off", **sections["data"]),
        train=config.TrainConfig(
            max_steps=10**6, global_batch_size=of.rows * of.processes * of.micro_batches, micro_batch_size=of.rows,
            log_to=[], **sections["train"],
        ),
        optimizer=config.OptimizerConfig(),
        schedule=config.ScheduleConfig(warmup_steps=10),
        parallel=config.ParallelConfig(**sections["parallel"]),
        checkpoint=config.CheckpointConfig(),
        evaluate=config.EvaluateConfig(),
        guard=config.GuardConfig(),
    )  # fmt: skip


def prepare(folder: Path) -> None:
    """The model configurations and a store of random tokens, for all cases."""
    from throughput import random_store

    from tsumugu.model.presets import preset_config
    from tsumugu.tokenizer.contract import read_contract

    if not (folder / "store").exists():
        random_store(folder / "store", 30000, 2_000_000)
    contract = read_contract(folder / "store" / "tokenizer")
    for preset in {case.preset for case in CASES.values()}:
        model_config = preset_config(preset, contract)
        model_config.max_position_embeddings = max(model_config.max_position_embeddings, 4096)
        model_config.save_pretrained(folder / preset)


def predict(case: str, folder: Path, device: Any) -> tuple[dict[str, Any], Any]:
    """What plan says of the memory of a case, and the kernels of a step."""
    from tsumugu.model.build import read_config
    from tsumugu.plan import memory
    from tsumugu.plan import time as timing

    started = time.perf_counter()
    run = run_config(case, folder)
    setup = memory.set_up(run, read_config(str(folder / CASES[case].preset)), device, CASES[case].processes)
    rows = run.train.micro_batch_size
    traces = memory.trace_model(setup, rows)
    parts, held = memory.peak_and_held(setup, traces, rows)
    found = {
        "held_gib": held / GIB,
        "peak_gib": sum(parts.values()) / GIB,
        "parts_gib": {part: size / GIB for part, size in parts.items()},
        "seconds": time.perf_counter() - started,
    }
    return found, (setup, timing.step_of(setup, traces, rows))


def observations(step: Any, setup: Any, found: dict[str, Any]) -> dict[str, Any]:
    """A measured step as a whole, and by kinds of kernels, which a profile has told apart.

    What products do to their sums is a part of them. Torch's own kernels are told apart from compiled ones only where
    layers are not compiled; else the two, and what is in no other kind, are one observation.
    """
    from tsumugu.plan import time as timing

    gpu, kernels = gpu_of(found), timing.whole(step)
    rates = gpu.flops(setup.dtype), gpu.bandwidth
    result = {"step": timing.Observation(kernels, *rates, found["step_seconds"])}
    by_kind, rest = found.get("kernels"), found.get("milliseconds", {}).get("rest")
    if by_kind is None or setup.processes > 1:
        return result
    attention = "varlen" if setup.run.data.documents_apart else "attention"
    others = sum(spent for kind, spent in by_kind.items() if kind not in ("matrix products", "attention")) - rest
    own = kernels.only("eager")
    kinds = {
        "matrix": (kernels.only("matrix") + kernels.only("sum"), by_kind["matrix products"]),
        attention: (kernels.only(attention), by_kind["attention"]),
        "optimizer": (kernels.only("optimizer"), rest),
        **({"memory": (kernels.only("memory") + own, others)} if setup.parallel.compile else {"eager": (own, others)}),
    }
    for kind, (of_kind, milliseconds) in kinds.items():
        result[kind] = timing.Observation(of_kind, *rates, milliseconds / 1e3)
    return result


def calibrate(known: dict[str, Any], measured: dict[str, dict], but: str | None = None) -> Any:
    """The efficiencies that explain the measured cases by kinds of kernels, all times the one factor that makes their
    steps right: a device also waits between kernels.

    Args:
        known: Setups and steps.
        measured: Of them.
        but: A case whose shape is left out. What its layers that are not compiled reach is told by the others of them.
    """
    from tsumugu.plan import time as timing

    kinds, steps = [], []
    for case, (setup, step) in known.items():
        if case not in measured or setup.processes > 1:
            continue
        found = observations(step, setup, measured[case])
        apart = but is None or CASES[case].preset != CASES[but].preset
        kinds += [each for kind, each in found.items() if apart or (kind == "eager" and case != but)]
        steps += [found["step"]] if apart else []
    if not steps:
        return None
    link = timing.shipped(gpu_of(next(iter(measured.values())))).link
    return dataclasses.replace(timing.scaled(timing.fit(kinds, _start()), steps), link=link)


def tokens_per_second(case: str, known: dict[str, Any], gpu: Any, calibration: Any) -> float:
    from tsumugu.plan import instances
    from tsumugu.plan import time as timing

    setup, step = known[case]
    cluster = instances.Cluster("", gpu, CASES[case].processes, 1, None)
    return CASES[case].tokens / timing.step_time(setup, step, cluster, calibration).total


def measure(case: str, folder: Path, out: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Trains some steps of a case."""
    import throughput
    import torch

    from tsumugu.distributed.environment import process_group
    from tsumugu.training.trainer import Trainer

    started = time.perf_counter()
    with process_group() as environment:
        trainer = Trainer(run_config(case, folder), out / f"run-{environment.rank}", environment)
        print("\n".join(trainer.paths), flush=True)
        built = time.perf_counter()
        throughput.take(trainer, arguments.warm)
        warmed = time.perf_counter()
        throughput.reset_peak()
        throughput.take(trainer, 1)
        begun = time.perf_counter()
        throughput.take(trainer, arguments.steps)
        seconds = (time.perf_counter() - begun) / arguments.steps
        result: dict[str, Any] = {
            "case": case,
            "device": "CPU",
            "tokens_per_second": CASES[case].tokens / seconds,
            "step_seconds": seconds,
            "build_seconds": built - started,
            "warm_seconds": warmed - built,
        }
        if torch.cuda.is_available():
            free, total = torch.cuda.mem_get_info()
            reserved = torch.cuda.memory_reserved()
            result |= {
                "device": torch.cuda.get_device_name(),
                "peak_gib": torch.cuda.max_memory_allocated() / GIB,
                "reserved_gib": torch.cuda.max_memory_reserved() / GIB,
                "beside_gib": (total - free - reserved) / GIB,
                "total_gib": total / GIB,
            }
            result |= {"phases_gib": phases(trainer), "milliseconds": throughput.parts(trainer)}
            result |= throughput.kernels_of(lambda: throughput.take(trainer, 1))
        return result


def phases(trainer: Any) -> dict[str, float]:
    """Memory between steps and after the last forward pass of a step, and the peaks of its phases, in GiB."""
    import throughput
    import torch

    found: dict[str, float] = {"lasting": torch.cuda.memory_allocated() / GIB}
    own_loss, own_mark = trainer._summed_loss, trainer._mark

    def phase(name: str) -> None:
        found[name] = torch.cuda.max_memory_allocated() / GIB
        torch.cuda.reset_peak_memory_stats()

    def summed_loss(batch: Any) -> Any:
        phase("peak_before")
        loss = own_loss(batch)
        phase("peak_forward")
        found["after_forward"] = torch.cuda.memory_allocated() / GIB
        return loss

    def marked(doing: str, *rest: Any) -> None:
        if doing.startswith("reducing the loss"):
            phase("peak_backward")
        own_mark(doing, *rest)

    trainer._summed_loss, trainer._mark = summed_loss, marked
    throughput.take(trainer, 1)
    phase("peak_rest")
    del trainer._summed_loss, trainer._mark
    return found


def device_of(arguments: argparse.Namespace, measured: dict[str, dict]) -> Any:
    """The device of the measurements, of this machine, or an H100."""
    import torch

    from tsumugu.distributed import paths

    for found in measured.values():
        gpu = gpu_of(found)
        memory = int(found["total_gib"] * GIB) if "total_gib" in found else gpu.memory - gpu.withheld
        return paths.Device(type="cuda", name=found["device"], memory=memory, capability=(9, 0))
    if torch.cuda.is_available() and not arguments.predict:
        return paths.this_device(torch.device("cuda", 0))
    return paths.Device(type="cuda", name="NVIDIA H100", memory=int(79.1 * GIB), capability=(9, 0))


def measurements(place: Path) -> dict[str, dict]:
    """What was measured, by case: of a folder with a file a case, or of a log with a line a case."""
    if place.is_dir():
        texts = [file.read_text() for file in place.glob("*.json") if file.name != "predictions.json"]
    else:
        texts = place.read_text().splitlines()
    found = {each["case"]: each for each in map(json.loads, texts)}
    return {case: found[case] for case in CASES if case in found}


def gpu_of(found: dict[str, Any]) -> Any:
    from tsumugu.plan import instances

    return instances.gpu(next(name for name in instances.facts()["gpus"] if name in found["device"]))


def fit_and_predict(known: dict[str, Any], predicted: dict[str, Any], measured: dict[str, dict], shipped: bool) -> None:
    """Tokens a second, each shape with the calibration of the others, or all with the shipped one; and the calibration
    on all."""
    from tsumugu.plan import time as timing

    for case in known:
        gpu = gpu_of(measured[case])
        calibration = timing.shipped(gpu) if shipped else calibrate(known, measured, but=case)
        if calibration:
            predicted[case]["tokens_per_second"] = tokens_per_second(case, known, gpu, calibration)
    if not shipped and (calibration := calibrate(known, measured)):
        print(json.dumps(dataclasses.asdict(calibration)))


def file_name(case: str) -> str:
    return "".join(c if c.isalnum() or c in ".-" else "_" for c in case) + ".json"


def run_all(cases: list[str], arguments: argparse.Namespace) -> None:
    """Every case in processes of its own, as many at once as --gpus allows, the largest models first."""
    here, out = Path(__file__), arguments.out
    environment = os.environ | {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "PYTHONUNBUFFERED": "1"}
    common = ["--out", str(out), "--warm", str(arguments.warm), "--steps", str(arguments.steps)]
    waiting = [case for case in reversed(cases) if CASES[case].processes <= arguments.gpus]
    for case in set(cases) - set(waiting):
        print(f"{case}: needs {CASES[case].processes} GPUs", flush=True)
    free, running, began = list(range(arguments.gpus)), {}, time.monotonic()
    predicting = subprocess.Popen(
        [sys.executable, here, "--predict", *common, *(f"--case={case}" for case in cases)],
        stdout=(out / "predict.log").open("w"), stderr=subprocess.STDOUT,
        env=environment | {"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    while waiting or running:
        if time.monotonic() - began > arguments.total - 30:
            waiting.clear()
        while waiting and CASES[waiting[0]].processes <= len(free):
            case = waiting.pop(0)
            gpus = [free.pop(0) for _ in range(CASES[case].processes)]
            launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={len(gpus)}"]
            log = (out / file_name(case)).with_suffix(".log").open("w")
            process = subprocess.Popen(
                [sys.executable, *(launch if len(gpus) > 1 else []), here, "--one", case, *common],
                stdout=log, stderr=subprocess.STDOUT,
                env=environment | {"CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus))},
            )  # fmt: skip
            running[case] = gpus, process, time.monotonic()
        for case, (gpus, process, started) in list(running.items()):
            late = time.monotonic() - started > arguments.limit or time.monotonic() - began > arguments.total
            if late and process.poll() is None:
                process.terminate()  # torchrun ends its processes
            if process.poll() is not None:
                del running[case]
                free += gpus
                ended = "done" if process.returncode == 0 else f"exit code {process.returncode}"
                print(f"{case}: {ended} ({time.monotonic() - started:.0f} s)", flush=True)
                if process.returncode:
                    text = (out / file_name(case)).with_suffix(".log").read_text(errors="replace")
                    print("    " + "\n    ".join(text.strip().splitlines()[-4:]), flush=True)
        time.sleep(0.2)
    try:
        predicting.wait(timeout=max(10, arguments.total - (time.monotonic() - began)))
    except subprocess.TimeoutExpired:
        predicting.kill()


def show(cases: list[str], predicted: dict[str, Any], measured: dict[str, dict]) -> None:
    """The Markdown table."""
    print(
        "\n| case | rows × tokens | predicted GiB | measured GiB | error | held, predicted | held GiB "
        "| tokens/s, predicted | tokens/s | error |"
    )
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for case in cases:
        of_plan, found = predicted.get(case, {}), measured.get(case, {})
        print(
            f"| {case} | {CASES[case].rows} × {CASES[case].length} "
            f"| {cell(of_plan, 'peak_gib', '.2f')} | {cell(found, 'peak_gib', '.2f')} "
            f"| {error(of_plan, found, 'peak_gib')} "
            f"| {cell(of_plan, 'held_gib', '.2f')} | {cell(found, 'reserved_gib', '.2f')} "
            f"| {cell(of_plan, 'tokens_per_second', ',.0f')} "
            f"| {cell(found, 'tokens_per_second', ',.0f')} | {error(of_plan, found, 'tokens_per_second')} |"
        )


def show_sharded(counts: list[int]) -> None:
    """The cases of `tests/plan/test_peak.py` on processes of this CPU: bytes of all tensors at the peak of a step."""
    sys.path[:0] = [str(Path(__file__).parent.parent / "tests"), str(Path(__file__).parent.parent / "tests" / "plan")]
    import test_peak as sharded

    print("\n| processes | model | configuration | micro batches | predicted MiB | measured MiB | error |")
    print("| ---: | --- | --- | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as folder:
        sharded.make(Path(folder))
        for count in counts:
            cases = sharded.SHARDED[count]
            found = sharded.run_ranks(sharded.all_measured, count, Path(folder), cases, count)
            for index, (model, changes, micro_batches) in enumerate(cases):
                most = max(of_rank[index] for of_rank in found)
                predicted = sharded.predicted(Path(folder), model, changes, count, micro_batches)
                said = ", ".join(f"{key.partition('.')[2]} {value}" for key, value in changes.items())
                print(
                    f"| {count} | {model} | {said} | {micro_batches} | {predicted / 2**20:.2f} | {most / 2**20:.2f} "
                    f"| {predicted / most - 1:+.1%} |",
                    flush=True,
                )


def cell(values: dict[str, Any], key: str, form: str) -> str:
    return format(values[key], form) if values.get(key) is not None else "–"


def error(predicted: dict[str, Any], found: dict[str, Any], key: str) -> str:
    if predicted.get(key) is None or found.get(key) is None:
        return "–"
    return f"{predicted[key] / found[key] - 1:+.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--predict", action="store_true", help="measure nothing")
    parser.add_argument("--compare", type=Path, metavar="DIR|LOG", help="measure nothing: compare with what was")
    parser.add_argument("--shipped", action="store_true", help="with --compare: by the calibration of tsumugu")
    parser.add_argument("--case", action="append", choices=list(CASES), help="one case; may be repeated")
    parser.add_argument("--without", action="append", choices=list(CASES), default=[], help="with --compare: not this")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs that are used at once")
    parser.add_argument("--processes", type=int, nargs="+", help="sharded on so many processes of this CPU instead")
    parser.add_argument("--warm", type=int, default=3, help="steps before measuring")
    parser.add_argument("--steps", type=int, default=6, help="steps measured")
    parser.add_argument("--limit", type=float, default=120, help="seconds of one case")
    parser.add_argument("--total", type=float, default=540, help="seconds of all; what is left then is left out")
    parser.add_argument("--out", type=Path, default=Path("/tmp/tsumugu-plan"), help="a folder for JSON and logs")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.processes:
        show_sharded(arguments.processes)
        return
    measured = measurements(arguments.compare) if arguments.compare else {}
    cases = arguments.case or [case for case in measured or CASES if case not in arguments.without]
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    shared = Path("/tmp/tsumugu-plan-inputs")
    if arguments.one:
        found = measure(arguments.one, shared, out, arguments)
        if os.environ.get("RANK", "0") == "0":
            (out / file_name(arguments.one)).write_text(json.dumps(found, indent=1))
        return
    prepare(shared)
    predicted: dict[str, Any] = {}
    if arguments.predict or arguments.compare:
        known = {}
        for case in cases:
            predicted[case], known[case] = predict(case, shared, device_of(arguments, measured))
            (out / "predictions.json").write_text(json.dumps(predicted, indent=1))
        if arguments.compare:
            fit_and_predict(known, predicted, measured, arguments.shipped)
    else:
        run_all(cases, arguments)
        measured = measurements(out)
        if (out / "predictions.json").exists():
            predicted = json.loads((out / "predictions.json").read_text())
    show(cases, predicted, measured)


if __name__ == "__main__":
    main()

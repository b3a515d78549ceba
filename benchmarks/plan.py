"""What `tsumugu plan` predicts of one GPU, beside what is measured there: peak memory and tokens a second.

    python benchmarks/plan.py --gpus 4 --out DIR       # every case, each in a process of its own, four at a time
    python benchmarks/plan.py --predict                # predictions alone, for an H100; no GPU is needed
    python benchmarks/plan.py --compare DIR            # predictions beside what was measured into DIR

Every case trains a shape on random tokens through the trainer itself, two micro batches a step. Measured are, of steps
that are not the first ones: torch's peak of allocated memory, what its allocator holds, what the device has in use
beside that, the memory between steps, after forward and at the peaks of forward, backward and the rest of the step,
tokens a second, and milliseconds by part and by kind of kernel. Prints Markdown; DIR gets a JSON file and a log a case.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

GIB, ACCUMULATED = 2**30, 2

# name: preset, rows a micro batch, tokens a row, and what the configuration changes
CASES: dict[str, tuple[str, int, int, dict[str, dict[str, Any]]]] = {
    "tiny": ("tiny", 8, 512, {}),
    "tiny, long": ("tiny", 32, 2048, {}),
    "tiny, float32": ("tiny", 16, 1024, {"train": {"dtype": "float32"}}),
    "qwen3-0.6b": ("qwen3-0.6b", 4, 2048, {}),
    "qwen3-0.6b, selective": ("qwen3-0.6b", 8, 2048, {"parallel": {"activation_checkpointing": "selective"}}),
    "qwen3-0.6b, full, 4096": ("qwen3-0.6b", 8, 4096, {"parallel": {"activation_checkpointing": "full"}}),
    "llama-1b, 4096": ("llama-1b", 4, 4096, {}),
    "llama-1b, document mask": ("llama-1b", 8, 2048, {"data": {"document_mask": True}}),
    "1b, 4 × 1024": ("1b", 4, 1024, {}),
    "1b": ("1b", 8, 2048, {}),
    "1b, budget 0.7": ("1b", 12, 2048, {"parallel": {"activation_memory_budget": 0.7}}),
    "1b, selective": ("1b", 12, 2048, {"parallel": {"activation_checkpointing": "selective"}}),
    "1b, full": ("1b", 16, 2048, {"parallel": {"activation_checkpointing": "full"}}),
    "1b, every 2nd full": (
        "1b", 12, 2048, {"parallel": {"activation_checkpointing": "full", "checkpoint_every_nth_layer": 2}},
    ),
    "1b, document mask": ("1b", 8, 2048, {"data": {"document_mask": True}}),
    "1b, float32": ("1b", 2, 2048, {"train": {"dtype": "float32"}}),
    "1b, float16": ("1b", 4, 2048, {"train": {"dtype": "float16"}}),
    "1b, FSDP2": ("1b", 4, 2048, {"parallel": {"fsdp": True}}),
    "1b, FSDP2, gathered twice": ("1b", 8, 2048, {"parallel": {"fsdp": True, "reshard_after_forward": "always"}}),
    "1b, whole logits": ("1b", 8, 2048, {"parallel": {"chunked_loss": False}}),
    "1b, not compiled": ("1b", 4, 2048, {"parallel": {"compile": False}}),
    "1b, not compiled, selective": (
        "1b", 8, 2048, {"parallel": {"compile": False, "activation_checkpointing": "selective"}},
    ),
    "3.6b, 1 row": ("3.6b", 1, 2048, {}),
    "3.6b, 3 rows": ("3.6b", 3, 2048, {}),
    "3.6b, budget 0.6": ("3.6b", 4, 2048, {"parallel": {"activation_memory_budget": 0.6}}),
    "3.6b, selective": ("3.6b", 4, 2048, {"parallel": {"activation_checkpointing": "selective"}}),
    "3.6b, full": ("3.6b", 8, 2048, {"parallel": {"activation_checkpointing": "full"}}),
    "3.6b, whole logits": ("3.6b", 2, 2048, {"parallel": {"chunked_loss": False}}),
}  # fmt: skip


def _start() -> Any:
    from tsumugu.plan.time import Calibration

    return Calibration(matrix=0.7, attention=0.4, varlen=0.2, memory=0.8, launch=6e-6)


def run_config(case: str, folder: Path) -> Any:
    """The configuration of a case, on a store and a model configuration in a folder."""
    from tsumugu import config

    preset, rows, length, changes = CASES[case]
    sections = {name: changes.get(name, {}) for name in ("data", "train", "parallel")}
    return config.TrainingRun(
        model=config.ModelConfig(config=str(folder / preset)),
        tokenizer=config.TokenizerConfig(),
        data=config.DataConfig(store=str(folder / "store"), sequence_length=length, audit="off", **sections["data"]),
        train=config.TrainConfig(
            max_steps=10**6, global_batch_size=rows * ACCUMULATED, micro_batch_size=rows, log_to=[],
            **sections["train"],
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
    for preset in {preset for preset, *_ in CASES.values()}:
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
    setup = memory.set_up(run, read_config(str(folder / CASES[case][0])), device, processes=1)
    rows = run.train.micro_batch_size
    traces = memory.trace_model(setup, rows)
    parts = memory.peak(setup, traces, rows)
    found = {
        "peak_gib": sum(parts.values()) / GIB,
        "parts_gib": {part: size / GIB for part, size in parts.items()},
        "seconds": time.perf_counter() - started,
    }
    return found, (setup, timing.step_of(setup, traces, rows))


def observations(step: Any, setup: Any, found: dict[str, Any]) -> list[Any]:
    """A measured step as a whole, and by kinds of kernels, which a profile has told apart."""
    from tsumugu.plan import time as timing

    gpu, kernels = gpu_of(found), timing.whole(step)
    rates = gpu.flops(setup.dtype), gpu.bandwidth
    by_kind = dict(found.get("kernels", {}))
    attention = "varlen" if setup.run.data.documents_apart else "attention"
    milliseconds = {"matrix": by_kind.pop("matrix products", 0), attention: by_kind.pop("attention", 0)}
    milliseconds["memory"] = sum(by_kind.values())
    result = [timing.Observation(kernels, *rates, found["step_seconds"])]
    for kind, spent in milliseconds.items():
        if spent:
            result.append(timing.Observation(kernels.only(kind), *rates, spent / 1e3))
    return result


def tokens_per_second(case: str, known: dict[str, Any], folder: Path) -> tuple[float, Any] | None:
    """Predicted with a calibration on the measured cases of all other shapes; None where there are none."""
    from tsumugu.plan import instances
    from tsumugu.plan import time as timing

    preset, rows, length = CASES[case][:3]
    others, gpu = [], instances.gpu("H100")
    for other, (setup, step) in known.items():
        file = folder / file_name(other)
        if CASES[other][0] != preset and file.exists():
            measured = json.loads(file.read_text())
            others, gpu = others + observations(step, setup, measured), gpu_of(measured)
    if not others:
        return None
    calibration = timing.fit(others, _start())
    setup, step = known[case]
    taken = timing.step_time(setup, step, instances.Cluster("", gpu, 1, 1, None), calibration)
    return rows * ACCUMULATED * length / taken.total, calibration


def measure(case: str, folder: Path, out: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Trains some steps of a case."""
    import throughput
    import torch

    from tsumugu.distributed.environment import process_group
    from tsumugu.training.trainer import Trainer

    rows, length = CASES[case][1:3]
    started = time.perf_counter()
    with process_group() as environment:
        trainer = Trainer(run_config(case, folder), out / "run", environment)
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
            "tokens_per_second": rows * ACCUMULATED * length / seconds,
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


def device_of(arguments: argparse.Namespace) -> Any:
    """The device of the measurements, of this machine, or an H100."""
    import torch

    from tsumugu.distributed import paths

    for file in arguments.out.glob("*.json") if arguments.compare else ():
        found = json.loads(file.read_text())
        if "total_gib" in found:
            memory = int(found["total_gib"] * GIB)
            return paths.Device(type="cuda", name=found["device"], memory=memory, capability=(9, 0))
    if torch.cuda.is_available() and not arguments.predict:
        return paths.this_device(torch.device("cuda", 0))
    return paths.Device(type="cuda", name="NVIDIA H100", memory=int(79.1 * GIB), capability=(9, 0))


def gpu_of(found: dict[str, Any]) -> Any:
    from tsumugu.plan import instances

    return instances.gpu(next(name for name in instances.facts()["gpus"] if name in found["device"]))


def fit_and_predict(known: dict[str, Any], predicted: dict[str, Any], out: Path) -> None:
    """Tokens a second, each shape with the calibration of the others; and the calibration on all."""
    import dataclasses

    from tsumugu.plan import time as timing

    for case in known:
        if found := tokens_per_second(case, known, out):
            predicted[case]["tokens_per_second"] = found[0]
    every = []
    for case, (setup, step) in known.items():
        file = out / file_name(case)
        if file.exists():
            every += observations(step, setup, json.loads(file.read_text()))
    if every:
        print(json.dumps(dataclasses.asdict(timing.fit(every, _start()))))
    (out / "predictions.json").write_text(json.dumps(predicted, indent=1))


def file_name(case: str) -> str:
    return "".join(c if c.isalnum() or c in ".-" else "_" for c in case) + ".json"


def run_all(cases: list[str], arguments: argparse.Namespace) -> None:
    """Every case in a process of its own, --gpus of them at once, the largest models first."""
    here, out = Path(__file__), arguments.out
    environment = os.environ | {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "PYTHONUNBUFFERED": "1"}
    common = ["--out", str(out), "--warm", str(arguments.warm), "--steps", str(arguments.steps)]
    waiting, running, began = list(reversed(cases)), {}, time.monotonic()
    predicting = subprocess.Popen(
        [sys.executable, here, "--predict", *common, *(f"--case={case}" for case in cases)],
        stdout=(out / "predict.log").open("w"), stderr=subprocess.STDOUT,
        env=environment | {"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    while waiting or running:
        for gpu in range(arguments.gpus):
            if gpu not in running and waiting:
                if time.monotonic() - began > arguments.total - 30:
                    waiting.clear()
                    break
                case = waiting.pop(0)
                log = (out / file_name(case)).with_suffix(".log").open("w")
                process = subprocess.Popen(
                    [sys.executable, here, "--one", case, *common],
                    stdout=log, stderr=subprocess.STDOUT, env=environment | {"CUDA_VISIBLE_DEVICES": str(gpu)},
                )  # fmt: skip
                running[gpu] = case, process, time.monotonic()
        for gpu, (case, process, started) in list(running.items()):
            late = time.monotonic() - started > arguments.limit or time.monotonic() - began > arguments.total
            if late and process.poll() is None:
                process.kill()
            if process.poll() is not None:
                del running[gpu]
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


def show(cases: list[str], out: Path) -> None:
    """The Markdown table."""
    predictions = out / "predictions.json"
    predicted = json.loads(predictions.read_text()) if predictions.exists() else {}
    print(
        "\n| case | rows × tokens | predicted GiB | measured GiB | error | held GiB "
        "| tokens/s, predicted | tokens/s | error |"
    )
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for case in cases:
        file, of_plan = out / file_name(case), predicted.get(case, {})
        found = json.loads(file.read_text()) if file.exists() else {}
        print(
            f"| {case} | {CASES[case][1]} × {CASES[case][2]} "
            f"| {cell(of_plan, 'peak_gib', '.2f')} | {cell(found, 'peak_gib', '.2f')} "
            f"| {error(of_plan, found, 'peak_gib')} "
            f"| {cell(found, 'reserved_gib', '.2f')} | {cell(of_plan, 'tokens_per_second', ',.0f')} "
            f"| {cell(found, 'tokens_per_second', ',.0f')} | {error(of_plan, found, 'tokens_per_second')} |"
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
    parser.add_argument("--compare", type=Path, metavar="DIR", help="measure nothing: compare with what is in DIR")
    parser.add_argument("--case", action="append", choices=list(CASES), help="one case; may be repeated")
    parser.add_argument("--gpus", type=int, default=1, help="cases at once, each on a GPU of its own")
    parser.add_argument("--warm", type=int, default=3, help="steps before measuring")
    parser.add_argument("--steps", type=int, default=6, help="steps measured")
    parser.add_argument("--limit", type=float, default=120, help="seconds of one case")
    parser.add_argument("--total", type=float, default=540, help="seconds of all; what is left then is left out")
    parser.add_argument("--out", type=Path, default=Path("/tmp/tsumugu-plan"), help="a folder for JSON and logs")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    cases = arguments.case or list(CASES)
    out = arguments.out = arguments.compare or arguments.out
    out.mkdir(parents=True, exist_ok=True)
    shared = Path("/tmp/tsumugu-plan-inputs")
    if arguments.one:
        found = measure(arguments.one, shared, out, arguments)
        (out / file_name(arguments.one)).write_text(json.dumps(found, indent=1))
        return
    prepare(shared)
    if arguments.predict or arguments.compare:
        arguments.predict = True
        predicted, known = {}, {}
        for case in cases:
            try:
                predicted[case], known[case] = predict(case, shared, device_of(arguments))
            except Exception as failure:  # the others are still of use
                print(f"{case}: {type(failure).__name__}: {failure}", file=sys.stderr)
            (out / "predictions.json").write_text(json.dumps(predicted, indent=1))
        if arguments.compare:
            fit_and_predict(known, predicted, out)
    else:
        run_all(cases, arguments)
    show(cases, out)


if __name__ == "__main__":
    main()

"""Tokens a second of pretraining on one GPU: tsumugu, each of its tricks and all together, and Hugging Face's Trainer.

    python benchmarks/throughput.py --preset 3.6b                       # the rows below, one Markdown table
    python benchmarks/throughput.py --preset 1b --row "fast micro=8" --row "hf micro=8"
    python benchmarks/throughput.py --preset llama-7b --layers 8 --sizes '{"num_key_value_heads": 8}'     # other shapes
    python benchmarks/throughput.py --preset 7b --scaling 8              # from one GPU to eight
    python benchmarks/throughput.py --preset tiny --quick                # a CPU will do: does it run?

Every row trains the same shape on the same random tokens, four micro batches a step, in a process of its own, which may
fail (out of memory) or be stopped (--limit) without ending the run. A row is a way and settings, such as
`fast micro=4 budget=0.6`:

    way         fast: what tsumugu does by itself; fsdp: FSDP2 over the one process (parallel.fsdp true);
                hf: transformers' Trainer with fused AdamW, bf16 autocast and torch.compile;
                litgpt: its model in the loop of its `pretrain` (Fabric bf16-mixed, torch.compile), if installed
                titan: torchtitan's Llama in the steps of its trainer (0.2.2; several GPUs by its FSDP2), if installed
    micro=N     rows a micro batch
    recompute=  none | selective | full (hf: full is gradient_checkpointing)
    budget=X    parallel.activation_memory_budget
    fp8=X       parallel.fp8: tensorwise | rowwise
    sums=0      weights' gradients are added to their sums by passes of their own
    chunk=N     2^N logits at a time; 0: whole logits (parallel.chunked_loss false)
    triton=0    torch's operations in place of the kernels in Triton
    same=1      train.deterministic
    masks=1     transformers looks for masks, and the host waits for the device
    attention=  flash | cudnn: that kernel alone
    inductor=X  a switch of torch._inductor.config that is turned on, such as max_autotune_gemm
    gpus=N      on N GPUs, each with so many rows a micro batch: tsumugu sharded over all of them, or as the next say;
                hf: FSDP2 by accelerate
    shard=N     parallel.shard_degree
    reshard=X   parallel.reshard_after_forward; hf: never or always (its default)
    sync=X      parallel.sync_each_micro_batch: 1 | 0
    prefetch=N  parallel.prefetch
    liger=1     hf: with Liger's kernels, where they are installed and know the model, and without torch.compile, which
                fails on them (torch 2.11, Liger 0.8.5)

MFU is by the design's convention (`model.flops`). Milliseconds are of a micro batch's forward and backward pass and of
what comes after the last (norm, clipping, optimizer), by CUDA events. --out keeps every row's JSON and log, in which
also stands where the device's time goes by kind of kernel, from a profile of one step: with several GPUs also how long
collectives ran while nothing was computed (exposed). Figures are of the first GPU, tokens of all.
"""

import argparse
import itertools
import json
import os
import queue
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROWS = {
    "3.6b": [
        "hf micro=2", "hf micro=8 recompute=full", "litgpt micro=2", "fsdp micro=2 chunk=0 masks=1",
        "fast micro=2 chunk=0 masks=1 triton=0 sums=0", "fast micro=2 chunk=0 masks=1 sums=0",
        "fast micro=2 chunk=0 sums=0", "fast micro=2 sums=0", "fast micro=2", "fast micro=3", "fast micro=3 sums=0",
        "fast micro=4 budget=0.8", "fast micro=4 budget=0.6", "fast micro=3 attention=flash",
        "fast micro=3 attention=cudnn", "fast micro=4 fp8=tensorwise", "fast micro=4 fp8=rowwise",
    ],
    "1b": [
        "hf micro=8", "litgpt micro=8", "fsdp micro=8 chunk=0 masks=1", "fast micro=8 chunk=0 masks=1 sums=0",
        "fast micro=8 sums=0", "fast micro=8", "fast micro=8 attention=flash", "fast micro=8 attention=cudnn",
        "fast micro=12", "fast micro=16 budget=0.7", "fast micro=8 fp8=tensorwise",
    ],
}  # fmt: skip
SCALING = {  # rows a micro batch of tsumugu and of transformers' Trainer
    "1b": (8, 8), "3.6b": (3, 2), "7b": (3, 2), "13b": (2, 1),
}  # fmt: skip
OTHERS = ["hf micro=2", "hf micro=2 liger=1", "titan micro=2", "fsdp micro=2 chunk=0 masks=1", "fast micro=2"]
MICRO_BATCHES, SEED = 4, 1
KINDS = {  # of kernels, by parts of their names; the first that fits
    "tsumugu": ("_adamw", "_accumulate", "_cross_entropy"),
    "attention": ("flash", "fmha", "sdpa", "attention"),
    "matrix products": ("gemm", "nvjet", "cutlass", "xmma", "cublas", "splitk"),
    "compiled": ("triton_",),
    "copies": ("Memcpy", "Memset", "copy"),
    "collectives": ("nccl",),
    "norm": ("norm_cast", "lpnorm", "LpNorm"),
}


def settings(row: str) -> tuple[str, dict[str, str]]:
    way, *rest = row.split()
    return way, dict(item.split("=", 1) for item in rest)


def random_store(path: Path, vocabulary: int, tokens: int) -> None:
    """A token store of random ids."""
    import numpy as np

    from tsumugu.data import store
    from tsumugu.tokenizer.contract import VERSION

    draw = np.random.default_rng(0)
    writer = store.ShardWriter(path / "train" / "00000", np.uint16, supervised=False)
    for _ in range(tokens // 65536 + 1):
        writer.add(draw.integers(4, vocabulary, 65536))
    shard = writer.close()
    assert shard is not None
    contract = {"version": VERSION, "fingerprint": "none", "vocab_size": vocabulary, "unk_id": 0, "bos_id": 1}
    contract |= {"eos_id": 2, "pad_id": 3, "adds_bos": False, "adds_eos": False, "newline": "expressible"}
    contract |= {"golden": [], "token_bytes": [0] * 4 + [3] * (vocabulary - 4)}
    (path / "tokenizer").mkdir(parents=True)
    (path / "tokenizer" / "contract.json").write_text(json.dumps(contract), encoding="utf-8")
    manifest = {"version": store.FORMAT_VERSION, "kind": "text", "template": None, "add_bos": False, "add_eos": True}
    manifest |= {"tokenizer": {"fingerprint": "none", "vocab_size": vocabulary, "files": {}}}
    manifest |= {"splits": {"train": store.describe_split([shard]), "validation": store.describe_split([])}}
    (path / store.MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")


def of_tsumugu(way: str, options: dict[str, str], arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures one row of tsumugu's, through its Trainer."""
    import torch

    from tsumugu import config
    from tsumugu.distributed import exchange
    from tsumugu.distributed.environment import process_group
    from tsumugu.kernels import cross_entropy, masters
    from tsumugu.model import attention
    from tsumugu.training import trainer as trainer_module
    from tsumugu.training.deterministic import deterministic
    from tsumugu.training.trainer import Trainer

    chunk = int(options.get("chunk", 27))
    cross_entropy.LOGITS_AT_A_TIME = 2**chunk
    if options.get("triton") == "0":
        cross_entropy.fused = masters.fused = lambda tensor: False
    if options.get("sums") == "0":
        trainer_module.sum_in_products = lambda module, sums: None
        exchange._summed = lambda *_: []
    if options.get("masks") == "1":
        attention.without_masks = lambda model: None
    micro, processes = int(options.get("micro", 1)), int(options.get("gpus", 1))
    run = config.TrainingRun(
        model=config.ModelConfig(config=str(arguments.out / "model")),
        tokenizer=config.TokenizerConfig(),
        data=config.DataConfig(store=str(arguments.out / "store"), sequence_length=arguments.length, audit="off"),
        train=config.TrainConfig(
            max_steps=10**6, global_batch_size=micro * MICRO_BATCHES * processes, micro_batch_size=micro, seed=SEED
        ),
        optimizer=config.OptimizerConfig(),
        schedule=config.ScheduleConfig(warmup_steps=10),
        parallel=config.ParallelConfig(
            fsdp=True if way == "fsdp" else None,
            shard_degree=int(options["shard"]) if "shard" in options else None,
            reshard_after_forward=options.get("reshard", "auto"),  # type: ignore[arg-type]
            sync_each_micro_batch=options["sync"] == "1" if "sync" in options else None,
            prefetch=int(options.get("prefetch", 1)),
            chunked_loss=None if chunk else False,
            activation_checkpointing=options.get("recompute", "none"),  # type: ignore[arg-type]
            fp8=options.get("fp8"),  # type: ignore[arg-type]
            activation_memory_budget=float(options["budget"]) if "budget" in options else None,
        ),
        checkpoint=config.CheckpointConfig(),
        evaluate=config.EvaluateConfig(),
        guard=config.GuardConfig(),
    )
    with deterministic(options.get("same") == "1"), process_group() as environment:
        trainer = Trainer(run, arguments.out / "run", environment)
        print("\n".join(trainer.paths), trainer.model.config._attn_implementation, sep="\n", flush=True)
        built = time.perf_counter()
        loss = take(trainer, arguments.warm)
        print(f"first steps {time.perf_counter() - built:.1f} s, loss {loss:.4f}", flush=True)
        reset_peak()
        started = time.perf_counter()
        loss = take(trainer, arguments.steps)
        seconds = (time.perf_counter() - started) / arguments.steps
        result = figures(trainer.model, options, seconds, arguments) | {"loss": loss}
        if torch.cuda.is_available():
            result |= {"milliseconds": parts(trainer)} | kernels_of(lambda: take(trainer, 1))
        return result


def take(trainer: Any, steps: int) -> float:
    """Takes steps as the trainer does, a step ahead of the device; the loss of the last."""
    from tsumugu.training.signals import StopRequest

    previous = launched = None
    for _ in range(steps):
        launched = trainer.train_step(StopRequest())
        trainer.step += 1
        if previous is not None:
            previous.figures()
        previous = launched
    assert launched is not None
    return launched.figures().loss


def parts(trainer: Any) -> dict[str, float]:
    """Milliseconds of the device: forward and backward of a micro batch, and the rest of a step."""
    import torch

    marks: list[tuple[str, torch.cuda.Event]] = []

    def mark(name: str) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        marks.append((name, event))

    own_loss, own_mark = trainer._summed_loss, trainer._mark

    def summed_loss(batch: Any) -> Any:
        mark("forward")
        loss = own_loss(batch)
        mark("backward")
        return loss

    def marked(doing: str, *rest: Any) -> None:
        if doing.startswith("reducing the loss"):
            mark("rest")
        own_mark(doing, *rest)

    trainer._summed_loss, trainer._mark = summed_loss, marked
    take(trainer, 2)
    mark("end")
    del trainer._summed_loss, trainer._mark
    torch.cuda.synchronize()
    sums: dict[str, list[float]] = {}
    for (name, event), (_, after) in itertools.pairwise(marks):
        sums.setdefault(name, []).append(event.elapsed_time(after))
    return {name: sum(times) / len(times) for name, times in sums.items()}


def kernels_of(step: Any) -> dict[str, Any]:
    """Milliseconds of a step by kind of kernel, and what it spent most on."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    times: dict[str, float] = {}
    counts: dict[str, int] = {}
    spans: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for event in profiler.events() or ():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            spans["nccl" in event.name].append((event.time_range.start, event.time_range.end))
            times[event.name] = times.get(event.name, 0) + event.time_range.elapsed_us() / 1e3
            counts[event.name] = counts.get(event.name, 0) + 1
    kinds: dict[str, float] = {}
    for name, spent in times.items():
        kind = next((kind for kind, marks in KINDS.items() if any(mark in name for mark in marks)), "others")
        kinds[kind] = kinds.get(kind, 0) + spent
    top = sorted(times, key=lambda name: -times[name])[:40]
    for name in top:
        print(f"{times[name]:9.2f} ms {counts[name]:6d} × {name[:150]}")
    ordered = {kind: round(spent, 2) for kind, spent in sorted(kinds.items(), key=lambda item: -item[1])}
    return {"kernels": ordered, "exposed_ms": (length(spans[True] + spans[False]) - length(spans[False])) / 1e3}


def length(spans: list[tuple[float, float]]) -> float:
    """Of the union of spans."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def reset_peak() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def figures(model: Any, options: dict[str, str], seconds: float, arguments: argparse.Namespace) -> dict[str, Any]:
    import torch

    from tsumugu.model.flops import flops, peak_flops

    rows = int(options.get("micro", 1)) * MICRO_BATCHES  # of one GPU
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    peak, done = peak_flops(device), flops(model, rows * arguments.length, rows * arguments.length**2)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "tokens_per_second": rows * arguments.length / seconds * int(options.get("gpus", 1)),
        "mfu": done / seconds / peak if peak else None,
        "step_seconds": seconds,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30 if device.type == "cuda" else None,
    }


def one_row(row: str, arguments: argparse.Namespace) -> None:
    import torch

    way, options = settings(row)
    if options.get("attention") in ("flash", "cudnn"):
        torch.backends.cuda.enable_flash_sdp(options["attention"] == "flash")
        torch.backends.cuda.enable_cudnn_sdp(options["attention"] == "cudnn")
        torch.backends.cuda.enable_mem_efficient_sdp(False)
        torch.backends.cuda.enable_math_sdp(False)
    if "inductor" in options:
        from torch._inductor import config as inductor

        setattr(inductor, options["inductor"], True)
    if way in ("hf", "litgpt", "titan"):
        import throughput_peers

        model, measured = getattr(throughput_peers, way)(options, arguments)
        result = figures(model, options, measured.pop("step_seconds"), arguments) | measured
    else:
        result = of_tsumugu(way, options, arguments)
    if os.environ.get("RANK", "0") == "0":
        (arguments.out / f"{file_name(row)}.json").write_text(json.dumps({"row": row, **result}, indent=1))


def file_name(row: str) -> str:
    return "".join(c if c.isalnum() or c in ".-" else "_" for c in row)


def prepare(arguments: argparse.Namespace) -> None:
    """The model's configuration and the store, for all rows."""
    from tsumugu.model.presets import preset_config
    from tsumugu.tokenizer.contract import read_contract

    arguments.out.mkdir(parents=True, exist_ok=True)
    if not (arguments.out / "store").exists():
        random_store(arguments.out / "store", arguments.vocabulary, 2_000_000)
    model_config = preset_config(arguments.preset, read_contract(arguments.out / "store" / "tokenizer"))
    if arguments.layers:
        model_config.num_hidden_layers = arguments.layers
    for name, size in json.loads(arguments.sizes).items():
        setattr(model_config, name, size)
    model_config.save_pretrained(arguments.out / "model")


def measure_rows(script: str, rows: list[str], arguments: argparse.Namespace) -> dict[str, str]:
    """Runs `script --one ROW` for every row in a process of its own, --gpus at a time, each on another GPU.

    A row that was measured has left a JSON file in --out, named by `file_name`.

    Returns:
        How each ended.
    """
    began, ends = time.monotonic(), {}
    free: queue.SimpleQueue[int] = queue.SimpleQueue()
    for gpu in range(arguments.gpus):
        free.put(gpu)

    def measure(row: str) -> None:
        gpu = free.get()
        try:
            left = arguments.total - (time.monotonic() - began)
            ends[row] = _in_a_process(script, row, gpu, left, arguments) if left > 30 else "not measured"
        finally:
            free.put(gpu)

    with ThreadPoolExecutor(arguments.gpus) as pool:
        list(pool.map(measure, rows))
    return ends


def _in_a_process(script: str, row: str, gpu: int, left: float, arguments: argparse.Namespace) -> str:
    started = time.monotonic()
    environment = os.environ | {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "PYTHONUNBUFFERED": "1"}
    processes = settings(row)[1].get("gpus", "1")
    if arguments.gpus > 1 and processes == "1":
        environment |= {"CUDA_VISIBLE_DEVICES": str(gpu)}
    file, log = (arguments.out / f"{file_name(row)}.{kind}" for kind in ("json", "log"))
    file.unlink(missing_ok=True)
    launched = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [
        sys.executable,
        *(launched if processes != "1" else []),
        script,
        *sys.argv[1:],
        "--out",
        str(arguments.out),
        "--one",
        row,
    ]
    with open(log, "w") as stream:
        try:
            limit = min(arguments.limit, left)
            code = subprocess.run(
                command, stdout=stream, stderr=subprocess.STDOUT, timeout=limit, env=environment
            ).returncode
            text = log.read_text(errors="replace")
            end = "out of memory" if "out of memory" in text.lower() else f"exit code {code}"
        except subprocess.TimeoutExpired:
            end = "stopped"
    print(f"{row}: {'measured' if file.exists() else end} ({time.monotonic() - started:.0f} s)", flush=True)
    if not file.exists():
        print("    " + "\n    ".join(log.read_text(errors="replace").strip().splitlines()[-4:]), flush=True)
    return end


def cell(value: Any, form: str) -> str:
    return "–" if value is None else format(value, form)


def show(rows: list[str], arguments: argparse.Namespace, ended: dict[str, str]) -> None:
    """The Markdown table, and where the device's time goes."""
    found = {}
    for row in rows:
        file = arguments.out / f"{file_name(row)}.json"
        if file.exists():
            found[row] = json.loads(file.read_text())
    device = next((result["device"] for result in found.values()), "")
    print(f"\n{arguments.preset}, {device}, sequence {arguments.length}, {MICRO_BATCHES} micro batches a step\n")
    print("| row | tokens/s | MFU | peak GiB | reserved | forward ms | backward ms | rest ms | loss |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for row in rows:
        if row not in found:
            print(f"| {row} | {ended.get(row, '')} | | | | | | | |")
            continue
        result = found[row]
        times = result.get("milliseconds", {})
        values = [
            cell(result["tokens_per_second"], ",.0f"), cell(result["mfu"], ".1%"), cell(result["peak_gib"], ".1f"),
            cell(result["reserved_gib"], ".1f"),
            *(cell(times.get(part), ".1f") for part in ("forward", "backward", "rest")), cell(result["loss"], ".4f"),
        ]  # fmt: skip
        print(f"| {row} | {' | '.join(values)} |")
    print()
    for row, result in found.items():
        if "kernels" in result:
            kinds = ", ".join(f"{kind} {spent:.0f}" for kind, spent in result["kernels"].items())
            print(f"{row}: ms a step: {kinds}; collectives exposed {result['exposed_ms']:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="3.6b", help="a shape of model.presets")
    parser.add_argument("--layers", type=int, help="another number of decoder layers")
    parser.add_argument("--sizes", default="{}", help="JSON: other values of the model's configuration")
    parser.add_argument("--row", action="append", help="a row to measure, in place of the preset's; may be repeated")
    parser.add_argument("--scaling", type=int, metavar="N", help="in place of the preset's rows: on 1, 2, 4 … N GPUs")
    parser.add_argument("--only", action="append", help="of the preset's rows those with this text")
    parser.add_argument("--length", type=int, default=2048, help="tokens a row")
    parser.add_argument("--vocabulary", type=int, default=30000, help="of the random tokens")
    parser.add_argument("--warm", type=int, default=3, help="steps before measuring")
    parser.add_argument("--steps", type=int, default=6, help="steps measured")
    parser.add_argument("--limit", type=float, default=120, help="seconds of one row")
    parser.add_argument("--total", type=float, default=570, help="seconds of all; rows after that are left out")
    parser.add_argument("--gpus", type=int, default=1, help="rows measured at a time, each on a GPU of its own")
    parser.add_argument("--quick", action="store_true", help="short rows and two steps")
    parser.add_argument("--out", type=Path, help="a folder for JSON and logs")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.length, arguments.warm, arguments.steps = 64, 1, 2
    arguments.out = arguments.out or Path("/tmp/throughput") / arguments.preset
    if arguments.one:
        one_row(arguments.one, arguments)
        return
    prepare(arguments)
    rows = arguments.row or ROWS.get(arguments.preset, OTHERS)
    if arguments.scaling:
        ours, theirs = SCALING[arguments.preset]
        counts = [count for count in (1, 2, 4, 8) if count <= arguments.scaling]
        rows = [f"{way} micro={micro} gpus={n}" for n in counts for way, micro in (("fast", ours), ("hf", theirs))]
    rows = [row for row in rows if not arguments.only or any(text in row for text in arguments.only)]
    ended = measure_rows(__file__, rows, arguments)
    show(rows, arguments, ended)


if __name__ == "__main__":
    main()

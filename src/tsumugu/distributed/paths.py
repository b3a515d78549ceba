"""Which of the fast paths this run takes, on what condition, and what it falls back to: decided once, and printed.

Every fallback computes the same numbers, but for rounding, more slowly or in more memory. What a user has asked for and
the device cannot do is refused.
"""

import dataclasses
import importlib.util
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tsumugu.config import ParallelConfig
from tsumugu.errors import UserError
from tsumugu.kernels import has_triton

GATHERED_SHARE = 0.1  # of a device's memory; what all layers' gathered weights may take by default
SUMS_SHARE = 0.2  # of a device's memory; what the sums of all gradients may take by default
BFLOAT16_SINCE = (8, 0)  # compute capability: Ampere's matrix units are the first that know it
TRITON_SINCE = (7, 0)
FP8_SINCE = (8, 9)  # Ada


@dataclass(frozen=True, kw_only=True)
class Device:
    """What the conditions depend on.

    `memory` is in bytes; `capability` is CUDA's. `no_compiler` says what torch.compile lacks, or nothing.
    """

    type: str
    name: str
    memory: int | None = None
    capability: tuple[int, int] = (0, 0)
    no_compiler: str | None = None


def this_device(device: torch.device) -> Device:
    """The device of this process, with what is installed beside it."""
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        capability = (found.major, found.minor)
        lacking = _missing_compiler("gcc", "clang") or (
            "Triton is not installed" if importlib.util.find_spec("triton") is None else None
        )
        return Device(
            type="cuda", name=found.name, memory=found.total_memory, capability=capability, no_compiler=lacking
        )
    return Device(type="cpu", name="CPU", no_compiler=_missing_compiler("g++", "clang++"))


def compute_dtype(wanted: str | None, device: Device) -> str:
    """The name of the dtype of the computation, by train.dtype or the device."""
    if wanted is not None:
        return wanted
    return "bfloat16" if device.type == "cuda" and device.capability >= BFLOAT16_SINCE else "float32"


def decide(
    config: ParallelConfig, device: Device, shard_degree: int, weight_bytes: int, *, processes: int, dtype: str
) -> ParallelConfig:
    """The section of the configuration with nothing left to decide.

    Args:
        config: As the user has it.
        device: Of this process; they are taken to be alike.
        shard_degree: Of the mesh.
        weight_bytes: Of the whole model in the compute dtype.
        processes: Of the whole run.
        dtype: Of the computation.

    Raises:
        UserError: torch.compile or fp8 is asked for where it cannot work, or parallel.fsdp is false where it is needed.
    """
    reason = _no_compile(device, config)
    if config.compile and reason:
        raise UserError(f"parallel.compile is true, but {reason}", "set parallel.compile to false")
    compiled = device.type == "cuda" and not reason if config.compile is None else config.compile
    if config.activation_memory_budget is not None and not compiled:
        raise UserError(
            "parallel.activation_memory_budget is for compiled layers, and they are not compiled",
            "set parallel.activation_checkpointing instead",
        )
    if config.fp8 and (reason := _no_fp8(device, dtype, compiled)):
        raise UserError(f"parallel.fp8 is {config.fp8}, but {reason}", "leave it out")
    needed = _why_fsdp(config, processes, dtype)
    if config.fsdp is False and needed:
        raise UserError(f"parallel.fsdp is false, but {needed}", "leave it out")
    reshard = config.reshard_after_forward
    if reshard == "auto":
        fits = shard_degree == 1 if device.memory is None else weight_bytes < GATHERED_SHARE * device.memory
        reshard = "never" if fits else "always"
    fsdp = bool(needed) if config.fsdp is None else config.fsdp
    sync = config.sync_each_micro_batch
    if sync is None:
        sync = device.memory is None or sums_bytes(weight_bytes, dtype) >= SUMS_SHARE * device.memory
    return dataclasses.replace(
        config, compile=compiled, reshard_after_forward=reshard, fsdp=fsdp, sync_each_micro_batch=sync
    )


def sums_bytes(weight_bytes: int, dtype: str) -> int:
    """Of the gradients of all weights, summed over a step: float32, or float64 with such weights."""
    return weight_bytes * (1 if dtype in ("float32", "float64") else 2)


def describe(
    *,
    asked: ParallelConfig,
    asked_dtype: str | None,
    decided: ParallelConfig,
    dtype: str,
    device: Device,
    attention: str,
    mesh: dict[str, int],
    weight_bytes: int,
    whole_logits: str | None,
) -> list[str]:
    """A line for every path: what is taken, and why.

    Args:
        asked: The section as the user has it.
        asked_dtype: train.dtype.
        decided: `decide` of the section.
        dtype: Of the computation.
        device: Of this process.
        attention: transformers' name of the implementation that the model uses.
        mesh: The degree of every axis.
        weight_bytes: Of the whole model in the compute dtype.
        whole_logits: Why the loss is not taken in chunks; None: it is.
    """
    cuda = device.type == "cuda"
    capability = f", compute capability {device.capability[0]}.{device.capability[1]}" if cuda else ""
    memory = f", {_gib(device.memory)}" if device.memory else ""
    lines = {
        "device": f"{device.name}{memory}{capability}",
        "dtype": f"{dtype} ({_why_dtype(dtype, asked_dtype, device)})"
        + (f"; layers' matrix products in fp8, scaled {decided.fp8} (parallel.fp8)" if decided.fp8 else ""),
        "attention": f"{attention} ({_why_attention(attention, dtype, device)})",
        "optimizer": _described_optimizer(decided, dtype, cuda),
        "compile": _described_compile(asked, decided, device),
        "sharding": " × ".join(f"{axis} {degree}" for axis, degree in mesh.items())
        + f"; layers' weights {_described_reshard(asked, decided, device, weight_bytes)}"
        + f"; gradients are exchanged {_described_sync(asked, decided, device, sums_bytes(weight_bytes, dtype))}"
        if decided.fsdp
        else f"none ({'parallel.fsdp' if asked.fsdp is False else 'one device holds all'})",
        "loss": "in chunks of tokens" if whole_logits is None else f"of whole logits ({whole_logits})",
        "recomputation": _described_recomputation(decided),
        "offloading": _described_offloading(decided, cuda),
    }
    return [f"{name}: {line}" for name, line in lines.items()]


def _why_fsdp(config: ParallelConfig, processes: int, dtype: str) -> str | None:
    """Why parameters must be FSDP2's, or None."""
    if processes > 1:
        return f"there are {processes} processes"
    if config.offload_optimizer:
        return "parallel.offload_optimizer is FSDP2's"
    return "float16 weights cannot be split from their masters" if dtype == "float16" else None


def _described_optimizer(decided: ParallelConfig, dtype: str, cuda: bool) -> str:
    where = "on the host" if decided.offload_optimizer or not cuda else "on the GPU"
    if decided.fsdp is False and dtype == "bfloat16":
        how = "one kernel of Triton's" if cuda and has_triton() else "torch's operations"
        return f"AdamW, {where}, by {how}; float32 masters are bfloat16 weights and 16 bits beside them"
    return f"fused AdamW, {where}"


def _missing_compiler(*names: str, which: Callable[[str], str | None] = shutil.which) -> str | None:
    chosen = os.environ.get("CXX" if "g++" in names else "CC")
    tried = (chosen,) if chosen else names
    return None if any(which(name) for name in tried) else f"there is no {' or '.join(tried)}"


def _no_compile(device: Device, config: ParallelConfig) -> str | None:
    """Why torch.compile cannot work on the device, or None."""
    if device.no_compiler:
        return device.no_compiler
    # torch 2.13 ends with errors of its own where recomputation is off or sizes change; 2.11 was measured on a GPU
    if config.tensor_degree > 1 and not torch.__version__.startswith("2.11."):
        return f"torch {torch.__version__} does not compile every layer that parallel.tensor_degree splits"
    if device.type == "cuda" and device.capability < TRITON_SINCE:
        return f"Triton needs compute capability {_version(TRITON_SINCE)}, {device.name} has " + _version(
            device.capability
        )
    return None


def _no_fp8(device: Device, dtype: str, compiled: bool) -> str | None:
    """Why layers cannot multiply in fp8, or None."""
    if device.type != "cuda" or device.capability < FP8_SINCE:
        return f"it needs a GPU of compute capability {_version(FP8_SINCE)} or more"
    if importlib.util.find_spec("torchao") is None:
        return "torchao is not installed (pip install 'tsumugu[fp8]')"
    if dtype != "bfloat16":
        return f"train.dtype is {dtype}"
    return None if compiled else "layers are not compiled"


def _why_dtype(dtype: str, asked: str | None, device: Device) -> str:
    slow = dtype == "bfloat16" and device.type == "cuda" and device.capability < BFLOAT16_SINCE
    if slow:
        return f"train.dtype; emulated: bfloat16 needs compute capability {_version(BFLOAT16_SINCE)}"
    if asked is not None:
        return "train.dtype" + ("; with a dynamic loss scale" if dtype == "float16" else "")
    if dtype == "bfloat16":
        return f"a GPU of compute capability {_version(BFLOAT16_SINCE)} or more"
    return "a CPU" if device.type == "cpu" else f"bfloat16 needs compute capability {_version(BFLOAT16_SINCE)}"


def _why_attention(attention: str, dtype: str, device: Device) -> str:
    if attention != "sdpa":
        return "the model's"
    if device.type == "cpu":
        return "the CPU's fused kernel where no row is padded, else the plain one"
    if dtype in ("bfloat16", "float16") and device.capability >= BFLOAT16_SINCE:
        return (
            f"{dtype} and compute capability {_version(BFLOAT16_SINCE)} or more: fused attention where no row is padded"
        )
    return f"no fused attention: {dtype} on compute capability {_version(device.capability)}"


def _described_compile(config: ParallelConfig, decided: ParallelConfig, device: Device) -> str:
    if decided.compile:
        why = "parallel.compile" if config.compile else f"a GPU of compute capability {_version(TRITON_SINCE)} or more"
        return f"every decoder layer ({why})"
    why = "parallel.compile" if config.compile is False else _no_compile(device, config) or "a CPU"
    return f"no ({why})"


def _described_reshard(config: ParallelConfig, decided: ParallelConfig, device: Device, weight_bytes: int) -> str:
    what = (
        "stay gathered from forward to backward" if decided.reshard_after_forward == "never" else "are gathered twice"
    )
    if config.reshard_after_forward != "auto":
        return f"{what} (parallel.reshard_after_forward)"
    if device.memory is None:
        return what + (" (shard degree 1)" if decided.reshard_after_forward == "never" else " (memory is not known)")
    than = "less" if decided.reshard_after_forward == "never" else "not less"
    limit = f"{GATHERED_SHARE:.0%} of {_gib(device.memory)}"
    return f"{what} (all together {_gib(weight_bytes)}, {than} than {limit})"


def _described_sync(config: ParallelConfig, decided: ParallelConfig, device: Device, sums: int) -> str:
    what = "every micro batch" if decided.sync_each_micro_batch else "once a step"
    if config.sync_each_micro_batch is not None:
        return f"{what} (parallel.sync_each_micro_batch)"
    if device.memory is None:
        return f"{what} (memory is not known)"
    than = "not less" if decided.sync_each_micro_batch else "less"
    return f"{what} (their sums take {_gib(sums)}, {than} than {SUMS_SHARE:.0%} of {_gib(device.memory)})"


def _described_recomputation(decided: ParallelConfig) -> str:
    what = {
        "none": "none",
        "selective": "all but matrix products and attention",
        "full": "all but the layers' inputs",
    }[decided.activation_checkpointing]
    if decided.activation_memory_budget is not None:
        what += f"; within layers what exceeds {decided.activation_memory_budget:.0%} of what backward needs"
    nth = decided.checkpoint_every_nth_layer
    return what + (f", of every layer whose number is a multiple of {nth}" if nth > 1 and what != "none" else "")


def _described_offloading(decided: ParallelConfig, cuda: bool) -> str:
    on = [name for name in ("offload_activations", "offload_optimizer") if getattr(decided, name)]
    if not on:
        return "none"
    if cuda:
        return " and ".join(f"parallel.{name}" for name in on)
    return f"no effect: {' and '.join(f'parallel.{name}' for name in on)} on a CPU, where all is on the host"


def _gib(size: int) -> str:
    return f"{size / 2**30:.3g} GiB"


def _version(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"

"""What is known of GPUs and of the instances that have them: dated facts in data/instances.json."""

import dataclasses
import functools
import json
import os
import re
from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch

from tsumugu.distributed import paths
from tsumugu.errors import UserError

MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A device. Rates are peaks of data sheets; None where they are not known."""

    name: str
    memory: int | None
    withheld: int = 0
    """Bytes of `memory` that CUDA never gives out."""
    capability: tuple[int, int] = (0, 0)
    half_flops: float | None = None
    """Dense FLOP/s in bfloat16 and float16."""
    float_flops: float | None = None
    """FLOP/s in float32."""
    bandwidth: float | None = None
    """Bytes a second of its memory."""
    link: float | None = None
    """Bytes a second to the other devices of its host, in one direction."""

    def flops(self, dtype: torch.dtype) -> float | None:
        return {2: self.half_flops, 4: self.float_flops}.get(dtype.itemsize)

    def device(self) -> paths.Device:
        """As `paths` knows devices; on instances everything that it can use is there."""
        if self.name == "CPU":
            return paths.Device(type="cpu", name=self.name)
        return paths.Device(type="cuda", name=f"NVIDIA {self.name}", memory=self.memory, capability=self.capability)


@dataclass(frozen=True)
class Cluster:
    """Hosts with devices.

    Attributes:
        name: The instance type, or `this machine`.
        gpu: The devices, all alike.
        per_host: Devices of a host.
        hosts: Their number.
        network: Bytes a second of each host to the others, in one direction; None where it is not known.
    """

    name: str
    gpu: Gpu
    per_host: int
    hosts: int
    network: float | None

    @property
    def devices(self) -> int:
        return self.per_host * self.hosts


@functools.cache
def facts() -> dict[str, Any]:
    """data/instances.json."""
    return json.loads(resources.files("tsumugu.plan").joinpath("data/instances.json").read_text(encoding="utf-8"))


def gpu(name: str) -> Gpu:
    """A GPU by its name in the facts."""
    found = facts()["gpus"][name]

    def rate(key: str, unit: float) -> float | None:
        return None if found[key] is None else found[key] * unit

    return Gpu(
        name=name,
        memory=found["memory_mib"] * MIB,
        withheld=round(found["memory_mib"] * MIB * facts()["withheld"]),
        capability=tuple(found["capability"]),
        half_flops=rate("bf16_tflops", 1e12),
        float_flops=rate("fp32_tflops", 1e12),
        bandwidth=rate("memory_gb_s", 1e9),
        link=rate("link_gb_s", 1e9),
    )


def cluster(instance_type: str, count: int) -> Cluster:
    """So many instances of a type; `ml.` in front of it may be left out.

    Raises:
        UserError: The type is not known.
    """
    known = facts()["instances"]
    name = instance_type if instance_type in known else f"ml.{instance_type}"
    if name not in known:
        raise UserError(f"--instance-type {instance_type} is not known", f"known: {', '.join(known)}")
    found = known[name]
    return Cluster(name, gpu(found["gpu"]), found["gpus"], count, found["network_gbit_s"] * 1e9 / 8)


def this_machine() -> Cluster:
    """The devices of this machine; a CPU is one device of which no rate is known, with the memory of the host."""
    if not torch.cuda.is_available():
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Cluster("this machine", Gpu(name="CPU", memory=memory), 1, 1, None)
    device = paths.this_device(torch.device("cuda", 0))
    found = gpu_of(device.name, device.memory or 0)
    own = dataclasses.replace(found, memory=device.memory, withheld=0, capability=device.capability)
    return Cluster("this machine", own, torch.cuda.device_count(), 1, None)


def gpu_of(name: str, memory: int) -> Gpu:
    """The GPU that CUDA calls so, of several sizes the nearest; one of which no rate is known where it is in no facts.

    PCIe cards and pairs (NVL) have lower rates than the modules of the same name, which the facts are of.
    """
    words = set(re.split(r"\W+", name))
    known = [gpu(each) for each in facts()["gpus"] if each.partition("-")[0] in words]
    if not known or words & {"PCIe", "PCIE", "NVL"}:
        return Gpu(name=name, memory=memory)
    return min(known, key=lambda each: abs((each.memory or 0) - memory))

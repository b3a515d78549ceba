"""How long a step takes: every kernel at the slower of two rates, matrix units or memory, and what the network adds.

The kernels are those that `trace` saw. Each rate is the peak of the data sheet times an efficiency that was measured
(see `Calibration`). FSDP2's collectives run beside the computation of a layer: what they take longer is added.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from tsumugu.errors import UserError
from tsumugu.plan.instances import Cluster, Gpu
from tsumugu.plan.memory import Setup, Traces, Weight
from tsumugu.plan.trace import Work

KINDS = ("matrix", "attention", "varlen", "memory")


@dataclass(frozen=True)
class Calibration:
    """Measured efficiencies.

    Attributes:
        matrix: Of matrix products, over the peak of the matrix units.
        attention: Of attention, likewise.
        varlen: Of attention within documents, likewise.
        memory: Of what reads and writes, over the bandwidth of the memory.
        launch: Seconds of the host for every kernel; a device that is faster than that waits.
        network: Of collectives, over the bandwidth of links and network.
        source: Where it was measured, on what, when.
    """

    matrix: float
    attention: float
    varlen: float
    memory: float
    launch: float
    network: float = 1.0
    source: str = ""


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step: the micro batches' forward and backward passes, what comes after them, and what of
    the communication nothing else is done during."""

    forward: float
    backward: float
    rest: float
    communication: float

    @property
    def total(self) -> float:
        return self.forward + self.backward + self.rest + self.communication


class Kernels:
    """Kernels by kind, each with how often it runs."""

    def __init__(self, work: Iterable[tuple[str, float, float]]):
        rows = [(KINDS.index(kind), flops, moved, 1) for kind, flops, moved in work]
        self._rows = np.array(rows, dtype=float).reshape(-1, 4)

    def __add__(self, other: "Kernels") -> "Kernels":
        both = Kernels(())
        both._rows = np.concatenate([self._rows, other._rows])
        return both

    def only(self, kind: str) -> "Kernels":
        result = Kernels(())
        result._rows = self._rows[self._rows[:, 0] == KINDS.index(kind)]
        return result

    def merged(self) -> "Kernels":
        """With those that are alike, as in layers that are alike, as one that runs so much more often."""
        kernels, which = np.unique(self._rows[:, :3], axis=0, return_inverse=True)
        result = Kernels(())
        result._rows = np.column_stack([kernels, np.bincount(which.reshape(-1), weights=self._rows[:, 3])])
        return result

    def repeated(self, times: int) -> "Kernels":
        result = Kernels(())
        result._rows = self._rows * [1, 1, 1, times]
        return result

    def seconds(self, flops: float, bandwidth: float, calibration: Calibration) -> float:
        """At a device's peaks, or at the rate at which the host starts them."""
        kinds, operations, moved, times = self._rows.T
        efficiency = np.array([calibration.matrix, calibration.attention, calibration.varlen, 1.0])[kinds.astype(int)]
        each = np.maximum(operations / (flops * efficiency), moved / (bandwidth * calibration.memory))
        return max(float(each @ times), float(times.sum()) * calibration.launch)


@dataclass(frozen=True)
class Step:
    """The kernels of a step on one device, and the bytes of each layer's collectives (the root's come last).

    Attributes:
        forward: Of every layer for one micro batch, and of what lies around them.
        backward: Likewise.
        rest: After the last micro batch.
        gathered: Bytes of the weights that are gathered before a layer is computed, in forward and in backward.
        reduced: Bytes of the gradients that are reduced after backward.
        micro_batches: Of the step.
    """

    forward: list[Kernels]
    backward: list[Kernels]
    rest: Kernels
    gathered: list[tuple[int, int]]
    reduced: list[int]
    micro_batches: int


def step_of(setup: Setup, traces: Traces, micro_batch: int) -> Step:
    """What a step of a run consists of."""
    parallel, count = setup.parallel, setup.micro_batches(micro_batch)
    fsdp, shards = parallel.fsdp is not False, setup.degrees["shard"]
    wide = setup.master_dtype.itemsize
    groups = [*traces.layer_weights, traces.root_weights]
    traced: list[Any] = [*traces.layers, traces.root]
    forward, backward, gathered, reduced = [], [], [], []
    for index, (weights, each) in enumerate(zip(groups, traced, strict=True)):
        of_root = index == len(groups) - 1
        stays = parallel.reshard_after_forward == "never" or of_root
        to_gather, to_reduce = _gather(weights, shards, wide), _reduce(weights, shards, wide, count)
        first, second = Kernels(each.forward_work), Kernels(each.backward_work)
        if fsdp:
            first += Kernels(to_gather)
            second += Kernels((() if stays else to_gather) + to_reduce)
        else:
            second += Kernels(_accumulate(setup, weights, count, of_root))
        forward.append(first)
        backward.append(second)
        whole = sum(weight.elements(shards) * shards * weight.itemsize for weight in weights) if fsdp else 0
        gathered.append((whole, 0 if stays else whole))
        trained = sum(weight.elements(shards) * shards for weight in weights if weight.trained)
        reduced.append(trained * wide if fsdp else 0)
    trained = [weight for weights in groups for weight in weights if weight.trained]
    elements = [weight.elements(shards if fsdp else 1) for weight in trained]
    return Step(forward, backward, Kernels(_optimizer(setup, elements)), gathered, reduced, count)


def whole(step: Step) -> Kernels:
    """All kernels of a step."""
    result = step.rest
    for kernels in (*step.forward, *step.backward):
        result += kernels.repeated(step.micro_batches)
    return result.merged()


def _gather(weights: Sequence[Weight], shards: int, wide: int) -> Work:
    """Casting a shard, and copying what was gathered to where it is used."""
    shard = sum(weight.elements(shards) for weight in weights)
    itemsize = max((weight.itemsize for weight in weights), default=2)
    cast = shard * (wide + itemsize) if wide != itemsize else 0
    return (("memory", 0, cast), ("memory", 0, 2 * shard * shards * itemsize))


def _reduce(weights: Sequence[Weight], shards: int, wide: int, count: int) -> Work:
    """Copying gradients into a buffer of the masters' dtype, and adding what comes back."""
    trained = [weight for weight in weights if weight.trained]
    shard = sum(weight.elements(shards) for weight in trained)
    itemsize = max((weight.itemsize for weight in trained), default=2)
    moved = shard * shards * (itemsize + wide) + (2 * shard * wide if shards == 1 else 0)
    return (("memory", 0, moved), ("memory", 0, 3 * shard * wide if count > 1 else 0))


def _accumulate(setup: Setup, weights: Sequence[Weight], count: int, of_root: bool) -> Work:
    """Adding gradients to their sums, where matrix products do not (see `kernels.linear`)."""
    wide, found = setup.master_dtype.itemsize, []
    for weight in weights:
        if not weight.trained or (setup.has_split_masters and len(weight.shape) == 2 and not of_root):
            continue
        size = weight.elements(1)
        if setup.has_split_masters:
            found.append(("memory", 0, size * (weight.itemsize + 2 * wide)))
        elif count > 1:
            found.append(("memory", 0, size * 3 * wide))
    return tuple(found)


def _optimizer(setup: Setup, elements: Sequence[int]) -> Work:
    """The norm of the gradients; AdamW, which reads masters, gradients and moments, and writes all but gradients."""
    wide = setup.master_dtype.itemsize
    scaled = 0 if setup.has_split_masters else 2 * wide  # gradients are clipped in a pass of their own
    return tuple(("memory", 0, size * (wide + scaled + 7 * wide)) for size in elements)


def step_time(setup: Setup, step: Step, cluster: Cluster, calibration: Calibration) -> StepTime | None:
    """Seconds of a step; None where the device's rates are not known, or where it waits for the host."""
    flops, bandwidth = cluster.gpu.flops(setup.dtype), cluster.gpu.bandwidth
    if flops is None or bandwidth is None or waits_for_host(setup):
        return None
    forward = [kernels.seconds(flops, bandwidth, calibration) for kernels in step.forward]
    backward = [kernels.seconds(flops, bandwidth, calibration) for kernels in step.backward]
    waits = 0.0
    for computed, (first, _) in zip(forward, step.gathered, strict=True):
        waits += max(0.0, _gathering(setup, cluster, calibration, first) - computed)
    for computed, (_, second), reduced in zip(backward, step.gathered, step.reduced, strict=True):
        taken = _gathering(setup, cluster, calibration, second) + _reducing(setup, cluster, calibration, reduced)
        waits += max(0.0, taken - computed)
    rest = step.rest.seconds(flops, bandwidth, calibration)
    count = step.micro_batches
    return StepTime(count * sum(forward), count * sum(backward), rest, count * waits)


def waits_for_host(setup: Setup) -> bool:
    """Whether a step also takes what nothing here knows the rate of: copies to the host and back, its own AdamW."""
    return setup.on_cuda and (setup.parallel.offload_activations or setup.parallel.offload_optimizer)


def _gathering(setup: Setup, cluster: Cluster, calibration: Calibration, size: int) -> float:
    """An all-gather of `size` bytes over the shards, as a ring: all but its own part comes to every device."""
    return _ring(setup.degrees["shard"], 1, cluster, calibration, size)


def _reducing(setup: Setup, cluster: Cluster, calibration: Calibration, size: int) -> float:
    """A reduce-scatter over the shards, and an all-reduce of what it leaves over the replicas (twice as much)."""
    shards, replicas = setup.degrees["shard"], setup.degrees["replicate"]
    over_replicas = _ring(replicas, shards, cluster, calibration, 2 * size // shards)
    return _ring(shards, 1, cluster, calibration, size) + over_replicas


def _ring(members: int, apart: int, cluster: Cluster, calibration: Calibration, size: int) -> float:
    """Seconds in which `size` bytes go around a ring of devices.

    Args:
        members: Devices of the ring.
        apart: Its neighbours' distance in rank: so many rings share the links and the network of a host.
        cluster: Ranks lie side by side on a host.
        calibration: Of the rates.
        size: In bytes.
    """
    if members == 1 or size == 0:
        return 0.0
    link = cluster.gpu.link or math.inf
    seconds = size * (members - 1) / members / (link * calibration.network)
    hosts = -(-members * apart // cluster.per_host) if members * apart > cluster.per_host else 1
    if hosts > 1 and cluster.network:
        rings = min(apart, cluster.per_host)
        seconds = max(seconds, rings * size * (hosts - 1) / hosts / (cluster.network * calibration.network))
    return seconds


@dataclass(frozen=True)
class Observation:
    """A measured duration of some kernels on a device."""

    kernels: Kernels
    flops: float
    bandwidth: float
    seconds: float


def fit(observations: Sequence[Observation], start: Calibration) -> Calibration:
    """The efficiencies that explain measured durations best (least squares of the logarithms).

    They are held to `start` with the weight of a small part of an observation, so that what the observations do not
    tell stays as it is.
    """
    names = ("matrix", "attention", "varlen", "memory", "launch")
    point = np.log([getattr(start, name) for name in names])
    origin = point.copy()

    def calibration(values: np.ndarray) -> Calibration:
        return replace(start, **{name: float(value) for name, value in zip(names, np.exp(values), strict=True)})

    def cost(values: np.ndarray) -> float:
        guess = calibration(values)
        errors = [math.log(o.kernels.seconds(o.flops, o.bandwidth, guess) / o.seconds) for o in observations]
        return float(np.sum(np.square(errors)) + 0.003 * np.sum(np.square(values - origin)))

    width, best = 0.5, cost(point)
    while width > 1e-4:  # a pattern search: four numbers, and a function that is cheap
        moved = False
        for axis in range(len(names)):
            for sign in (1, -1):
                tried = point.copy()
                tried[axis] += sign * width
                if (value := cost(tried)) < best:
                    point, best, moved = tried, value, True
        if not moved:
            width /= 2
    return calibration(point)


def scaled(start: Calibration, observations: Sequence[Observation]) -> Calibration:
    """The efficiencies of `start` times the one factor at which they explain measured durations best."""

    def with_factor(factor: float) -> Calibration:
        rates = {name: getattr(start, name) * factor for name in ("matrix", "attention", "varlen", "memory")}
        return replace(start, **rates, launch=start.launch / factor)

    errors = [math.log(o.kernels.seconds(o.flops, o.bandwidth, start) / o.seconds) for o in observations]
    return with_factor(math.exp(sum(errors) / len(errors)))  # durations are inverse to the factor


def shipped(gpu: Gpu, file: Path | None = None) -> Calibration | None:
    """The calibration of a GPU: of a file, or the one that comes with tsumugu, or of the most similar GPU that has one.

    Raises:
        UserError: The file is no calibration.
    """
    if file is not None:
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            found = Calibration(**{key: content[key] for key in Calibration.__dataclass_fields__ if key in content})
            if not all(value > 0 for name, value in vars(found).items() if name != "source"):
                raise ValueError("efficiencies are positive numbers")
            device = str(content.get("device", gpu.name))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{file} is no calibration: {error}", "make one with `tsumugu plan --probe FILE`") from None
        if device != gpu.name and "CPU" in (device, gpu.name):
            raise UserError(f"{file} was measured on {device}, the plan is for {gpu.name}", "leave --calibration out")
        return found if device == gpu.name else replace(found, source=f"{found.source}; {gpu.name} was not measured")
    text = resources.files("tsumugu.plan").joinpath("data/calibrations.json").read_text(encoding="utf-8")
    known: dict[str, Any] = json.loads(text)
    if gpu.name == "CPU" or not known:
        return None
    name = gpu.name if gpu.name in known else next(iter(known))
    found = Calibration(**known[name])
    return found if name == gpu.name else replace(found, source=f"{found.source}; {gpu.name} was not measured")

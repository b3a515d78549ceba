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
from tsumugu.plan.memory import Pass, Setup, Traces, Weight, passes
from tsumugu.plan.trace import Work

EFFICIENCIES = ("matrix", "attention", "varlen", "memory", "eager", "optimizer")
KINDS = (*EFFICIENCIES, "sum")

# Seconds of a collective that no bandwidth shortens, by NCCL's own figures for rings (src/graph/tuning.cc, protocol
# Simple): once, and for every step from device to device by NVLink, or from host to host
_COLLECTIVE, _LINK_STEP, _NETWORK_STEP = 8.4e-6, 3.4e-6, 9.6e-6


@dataclass(frozen=True)
class Calibration:
    """Measured efficiencies.

    Attributes:
        matrix: Of matrix products, over the peak of the matrix units.
        attention: Of attention, likewise.
        varlen: Of attention within documents, likewise.
        memory: Of kernels that the compiler writes, and of what products read and write, over the memory's bandwidth.
        launch: Seconds of the host for every kernel; a device that is faster than that waits.
        eager: Of torch's own kernels that are no products, likewise; FSDP2's copies are such.
        optimizer: Of the norm of the gradients and AdamW, likewise.
        link: Of collectives, over the bandwidth between the devices of a host.
        network: Of collectives, over the bandwidth between hosts.
        source: Where it was measured, on what, when.
    """

    matrix: float
    attention: float
    varlen: float
    memory: float
    launch: float
    eager: float = 0.5
    optimizer: float = 0.8
    link: float = 1.0
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
        of, memory = calibration, calibration.memory
        efficiency = np.array([of.matrix, of.attention, of.varlen, *[1.0] * 4])[kinds.astype(int)]
        rate = np.array([memory, memory, memory, memory, of.eager, of.optimizer, memory])[kinds.astype(int)]
        each = np.maximum(operations / (flops * efficiency), moved / (bandwidth * rate))
        return max(float(each @ times), float(times.sum()) * calibration.launch)


@dataclass(frozen=True)
class MicroBatch:
    """Kernels of a micro batch on one device, and the bytes of each layer's collectives (the root's come last).

    Attributes:
        times: Micro batches of a step that are like it.
        forward: Of every layer, and of what lies around them.
        backward: Likewise.
        gathered: Bytes of the weights that are gathered before a layer is computed, in forward and in backward.
        reduced: Bytes of the gradients that are reduced after backward.
    """

    times: int
    forward: list[Kernels]
    backward: list[Kernels]
    gathered: list[tuple[int, int]]
    reduced: list[int]


@dataclass(frozen=True)
class Step:
    """The kernels of a step on one device: of its micro batches that differ, and after the last one."""

    micro_batches: list[MicroBatch]
    rest: Kernels


def step_of(setup: Setup, traces: Traces, micro_batch: int) -> Step:
    """What a step of a run consists of."""
    fsdp, groups = setup.parallel.fsdp is not False, [*traces.layer_weights, traces.root_weights]
    trained = [weight for weights in groups for weight in weights if weight.trained]
    elements = [weight.elements(setup.degrees["shard"] if fsdp else 1) for weight in trained]
    if fsdp:
        micro_batches = [_sharded(setup, traces, each, micro_batch) for each in passes(setup, micro_batch)]
    else:
        micro_batches = [_whole(setup, traces, micro_batch)]
    return Step(micro_batches, Kernels(_optimizer(setup, elements)))


def _whole(setup: Setup, traces: Traces, micro_batch: int) -> MicroBatch:
    """Of a device that holds all."""
    count, forward, backward = setup.micro_batches(micro_batch), [], []
    for weights, each in _groups(traces):
        of_root = each is traces.root
        forward.append(Kernels(each.forward_work))
        backward.append(Kernels(each.backward_work) + Kernels(_accumulate(setup, weights, count, of_root)))
    nothing = [0] * len(forward)
    return MicroBatch(count, forward, backward, [(0, 0)] * len(forward), nothing)


def _sharded(setup: Setup, traces: Traces, which: Pass, micro_batch: int) -> MicroBatch:
    """Of a device under FSDP2."""
    shards, wide = setup.degrees["shard"], setup.master_dtype.itemsize
    count = setup.micro_batches(micro_batch)
    forward, backward, gathered, reduced = [], [], [], []
    for weights, each in _groups(traces):
        again = which.gathers and setup.parallel.reshard_after_forward != "never" and each is not traces.root
        to_gather, whole = _gather(weights, shards, wide), 0
        first, second = Kernels(each.forward_work), Kernels(each.backward_work)
        if which.gathers:
            first += Kernels(to_gather)
            whole = sum(weight.elements(shards) * shards * weight.itemsize for weight in weights)
        second += Kernels(to_gather if again else ())
        second += Kernels(_reduce(weights, shards, wide, which, count))
        forward.append(first)
        backward.append(second)
        gathered.append((whole, whole if again else 0))
        trained = sum(weight.elements(shards) * shards for weight in weights if weight.trained)
        reduced.append(trained * wide if which.reduces else 0)
    return MicroBatch(which.times, forward, backward, gathered, reduced)


def _groups(traces: Traces) -> Iterable[tuple[Sequence[Weight], Any]]:
    """Weights and traces of every layer, and of the root."""
    return zip([*traces.layer_weights, traces.root_weights], [*traces.layers, traces.root], strict=True)


def whole(step: Step) -> Kernels:
    """All kernels of a step."""
    result = step.rest
    for each in step.micro_batches:
        for kernels in (*each.forward, *each.backward):
            result += kernels.repeated(each.times)
    return result.merged()


def _gather(weights: Sequence[Weight], shards: int, wide: int) -> Work:
    """Casting a shard, copying it into the buffer, and copying what was gathered to where it is used."""
    shard = sum(weight.elements(shards) for weight in weights)
    itemsize = max((weight.itemsize for weight in weights), default=2)
    cast = shard * (wide + itemsize) if wide != itemsize else 0
    copied = shard * (shards + 1 if shards > 1 else 1) * 2 * itemsize
    return (("eager", 0, cast), ("eager", 0, copied))


def _reduce(weights: Sequence[Weight], shards: int, wide: int, which: Pass, count: int) -> Work:
    """Making sums of gradients or adding to them, copying gradients or sums into a buffer of the masters' dtype, and
    adding what comes back to what earlier ones of `count` micro batches left."""
    trained = [weight for weight in weights if weight.trained]
    shard = sum(weight.elements(shards) for weight in trained)
    whole, itemsize = shard * shards, max((weight.itemsize for weight in trained), default=2)
    summed = which.sums or which.adds
    moved = []
    if which.sums and itemsize != wide:
        moved.append(whole * (itemsize + wide))
    if which.adds:
        moved.append(whole * (itemsize + 2 * wide))
    if which.reduces:
        moved.append(whole * ((wide if summed else itemsize) + wide) + (2 * shard * wide if shards == 1 else 0))
        moved.append(0 if summed else 3 * shard * wide * (count - 1) / count)
    return tuple(("eager", 0, size) for size in moved)


def _accumulate(setup: Setup, weights: Sequence[Weight], count: int, of_root: bool) -> Work:
    """Adding gradients to their sums, where matrix products do not (see `kernels.linear`)."""
    wide, found = setup.master_dtype.itemsize, []
    for weight in weights:
        if not weight.trained or (setup.has_split_masters and len(weight.shape) == 2 and not of_root):
            continue
        size = weight.elements(1)
        if setup.has_split_masters:
            found.append(("eager", 0, size * (weight.itemsize + 2 * wide)))
        elif count > 1:
            found.append(("eager", 0, size * 3 * wide))
    return tuple(found)


def _optimizer(setup: Setup, elements: Sequence[int]) -> Work:
    """The norm of the gradients; AdamW, which reads masters, gradients and moments, and writes all but gradients."""
    wide = setup.master_dtype.itemsize
    scaled = 0 if setup.has_split_masters else 2 * wide  # gradients are clipped in a pass of their own
    return tuple(("optimizer", 0, size * (wide + scaled + 7 * wide)) for size in elements)


def step_time(setup: Setup, step: Step, cluster: Cluster, calibration: Calibration) -> StepTime | None:
    """Seconds of a step; None where the device's rates are not known, or where it waits for the host."""
    flops, bandwidth = cluster.gpu.flops(setup.dtype), cluster.gpu.bandwidth
    if flops is None or bandwidth is None or waits_for_host(setup):
        return None
    forward = backward = communication = 0.0
    for each in step.micro_batches:
        ahead = [kernels.seconds(flops, bandwidth, calibration) for kernels in each.forward]
        back = [kernels.seconds(flops, bandwidth, calibration) for kernels in each.backward]
        first = [_gathering(setup, cluster, calibration, size) for size, _ in each.gathered]
        second = [_gathering(setup, cluster, calibration, size) for _, size in each.gathered]
        reduced = [_reducing(setup, cluster, calibration, size) for size in each.reduced]
        forward += each.times * sum(ahead)
        backward += each.times * sum(back)
        communication += each.times * _waits(ahead, back, first, second, reduced)
    return StepTime(forward, backward, step.rest.seconds(flops, bandwidth, calibration), communication)


def _waits(
    ahead: Sequence[float],
    back: Sequence[float],
    first: Sequence[float],
    second: Sequence[float],
    reduced: Sequence[float],
) -> float:
    """Seconds of a micro batch's collectives that no computation runs beside.

    A layer's weights are gathered while the layer before it is computed, in forward and in backward; its gradients are
    reduced while the next one is. Nothing is computed beside the root's and the first layer's.

    Args:
        ahead: Seconds of the forward pass of every layer, and of what lies around them, the root's.
        back: Of the backward pass.
        first: Of gathering weights for forward.
        second: Of gathering them again for backward.
        reduced: Of reducing gradients.
    """
    layers = len(ahead) - 1
    waits = first[-1] + sum(first[:1]) + reduced[-1] + sum(reduced[:1])
    for index in range(1, layers):
        waits += max(0.0, first[index] - ahead[index - 1])
    waits += max(0.0, second[layers - 1] - back[-1])
    for index in range(layers):
        before = second[index - 1] if index > 0 else 0.0
        after = reduced[index + 1] if index + 1 < layers else 0.0
        waits += max(0.0, before + after - back[index])
    return waits


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
    seconds = size * (members - 1) / members / (link * calibration.link)
    hosts = -(-members * apart // cluster.per_host) if members * apart > cluster.per_host else 1
    if hosts > 1 and cluster.network:
        rings = min(apart, cluster.per_host)
        seconds = max(seconds, rings * size * (hosts - 1) / hosts / (cluster.network * calibration.network))
    return seconds + _COLLECTIVE + (members - hosts) * _LINK_STEP + (hosts - 1) * _NETWORK_STEP


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
    names = EFFICIENCIES
    point = np.log([getattr(start, name) for name in names])
    origin = point.copy()

    def calibration(values: np.ndarray) -> Calibration:
        return replace(start, **{name: float(value) for name, value in zip(names, np.exp(values), strict=True)})

    def cost(values: np.ndarray) -> float:
        guess = calibration(values)
        errors = [math.log(o.kernels.seconds(o.flops, o.bandwidth, guess) / o.seconds) for o in observations]
        return float(np.sum(np.square(errors)) + 0.003 * np.sum(np.square(values - origin)))

    width, best = 0.5, cost(point)
    while width > 1e-4:  # a pattern search: few numbers, and a function that is cheap
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
        rates = {name: getattr(start, name) * factor for name in EFFICIENCIES}
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

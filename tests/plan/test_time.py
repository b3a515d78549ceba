"""Time: the sample's published table, each row from the others; kernels by hand; rings."""

import math
from pathlib import Path

import pytest
import torch
from support.runs import run_config

from tsumugu.model.presets import sized_config
from tsumugu.plan import instances, memory, time
from tsumugu.plan.time import Calibration, Kernels, Observation

# model, shard degree, rows a device, samples a second: the sample's own figures (32 × A100-40GB, p4d × 4, 2,048 tokens)
SAMPLE = [
    *(("3.6b", 16, 16, 73.2), ("3.6b", 32, 16, 70.6), ("7b", 16, 16, 45.1), ("7b", 32, 16, 45.4)),
    *(("13b", 16, 8, 24.5), ("13b", 32, 8, 24.7)),
]
CLUSTER = instances.cluster("ml.p4d.24xlarge", 4)
START = Calibration(matrix=0.6, attention=0.4, varlen=0.2, memory=0.7, launch=6e-6)


def sample_setup(model: str, shard: int, rows: int, compiled: bool) -> memory.Setup:
    changes = {"model.preset": model, "data.sequence_length": 2048, "train.max_steps": 1}
    changes |= {"train.micro_batch_size": rows, "train.global_batch_size": rows * 32}
    changes |= {"parallel.shard_degree": shard, "parallel.activation_checkpointing": "full"}
    changes |= {"parallel.compile": compiled}
    return memory.set_up(run_config(Path("nowhere"), changes), sized_config(model, 32000), CLUSTER.gpu.device(), 32)


def test_every_row_of_the_samples_table_is_told_by_the_others():
    """The sample's software (PyTorch 1.13) compiled nothing, so its kernels are those of layers not compiled."""
    steps, observations = [], []
    for model, shard, rows, samples in SAMPLE:
        setup = sample_setup(model, shard, rows, compiled=False)
        step = time.step_of(setup, memory.trace_model(setup, rows), rows)
        steps.append((setup, step))
        assert CLUSTER.gpu.half_flops
        assert CLUSTER.gpu.bandwidth
        rates = CLUSTER.gpu.half_flops, CLUSTER.gpu.bandwidth
        observations.append(Observation(time.whole(step), *rates, rows * 32 / samples))
    errors = []
    for index, (setup, step) in enumerate(steps):
        others = observations[:index] + observations[index + 1 :]
        predicted = time.step_time(setup, step, CLUSTER, time.fit(others, START))
        assert predicted
        errors.append(predicted.total / observations[index].seconds - 1)
    assert max(map(abs, errors)) < 0.07
    # the best single TFLOPS constant, even with all rows known: halfway between the extremes of 8N a second
    tflops = [135, 130, 155, 156, 162, 164.5]
    assert max(map(abs, errors)) < max(tflops) / math.sqrt(min(tflops) * max(tflops)) - 1


@pytest.mark.parametrize(("model", "rows"), [("3.6b", 16), ("7b", 16), ("13b", 8)])
def test_every_run_of_the_samples_table_fits(model: str, rows: int):
    for shard in (16, 32):
        setup = sample_setup(model, shard, rows, compiled=True)
        parts, held = memory.peak_and_held(setup, memory.trace_model(setup, rows), rows)
        assert CLUSTER.gpu.memory
        assert sum(parts.values()) + memory.margin(setup, parts, held) < CLUSTER.gpu.memory


def test_a_kernel_takes_the_slower_of_its_two_rates_and_the_host_may_be_slower_still():
    kernels = Kernels([("matrix", 10, 1), ("attention", 10, 1), ("memory", 0, 6)]).repeated(2)
    calibration = Calibration(matrix=0.5, attention=0.25, varlen=1, memory=0.5, launch=0.0, eager=0.25, optimizer=1)
    # at 10 FLOP/s and 4 bytes/s: 2 s, 4 s and 3 s, each twice
    assert kernels.seconds(10, 4, calibration) == pytest.approx(18)
    others = Kernels([("eager", 0, 6), ("optimizer", 0, 6), ("sum", 0, 6)])
    assert others.seconds(10, 4, calibration) == pytest.approx(6 + 1.5 + 3)
    slow_host = Calibration(matrix=0.5, attention=0.25, varlen=1, memory=0.5, launch=5.0)
    assert kernels.seconds(10, 4, slow_host) == pytest.approx(30)
    assert (kernels + kernels).merged().seconds(10, 4, calibration) == pytest.approx(36)
    assert (kernels + kernels).merged().seconds(10, 4, slow_host) == pytest.approx(60)


def test_efficiencies_are_found_again():
    truth = Calibration(matrix=0.62, attention=0.33, varlen=0.5, memory=0.78, launch=1e-9, eager=0.36)
    works = [
        [("matrix", 1e12, 1), ("memory", 0, 1e8), ("eager", 0, 2e10)],
        [("attention", 1e12, 1), ("memory", 0, 3e9)],
        [("matrix", 3e11, 1), ("attention", 2e11, 1), ("memory", 0, 2e10)],
        [("memory", 0, 5e9)],
        [("eager", 0, 5e9)],
    ]
    observations = [Observation(Kernels(w), 1e14, 1e12, Kernels(w).seconds(1e14, 1e12, truth)) for w in works]
    found = time.fit(observations, Calibration(matrix=0.5, attention=0.5, varlen=0.5, memory=0.5, launch=1e-9))
    for name in ("matrix", "attention", "memory", "eager"):
        assert getattr(found, name) == pytest.approx(getattr(truth, name), rel=0.02)


def test_rings():
    """By hand: bytes over rates, and NCCL's latencies: 8.4 µs, 3.4 to the next device and 9.6 to the next host."""
    calibration = Calibration(matrix=1, attention=1, varlen=1, memory=1, launch=0, link=0.5, network=0.25)
    assert CLUSTER.gpu.link
    assert CLUSTER.network
    link, network = CLUSTER.gpu.link / 2, CLUSTER.network / 4
    size = 8 * 10**9
    assert time._ring(8, 1, CLUSTER, calibration, size) == pytest.approx(size * 7 / 8 / link + 32.2e-6)
    # over four hosts three quarters come through each host's network once
    assert time._ring(32, 1, CLUSTER, calibration, size) == pytest.approx(size * 3 / 4 / network + 132.4e-6)
    # replicas on four hosts, eight groups of which share it
    assert time._ring(4, 8, CLUSTER, calibration, size) == pytest.approx(8 * size * 3 / 4 / network + 37.2e-6)
    assert time._ring(1, 1, CLUSTER, calibration, size) == 0


def test_collectives_wait_where_nothing_is_computed_beside_them():
    """Three layers and the root: 1 s forward and 2 s backward each, the root's backward 1 s."""

    def waits(first: list[float], second: list[float], reduced: list[float]) -> float:
        return time._waits([1, 1, 1, 1], [2, 2, 2, 1], first, second, reduced)

    nothing = [0, 0, 0, 0]
    assert waits(nothing, nothing, nothing) == 0
    # before the first layer both its own and the root's; the second's beside the first layer, 0.5 s longer than that
    assert waits([0.25, 1.5, 1, 0.5], nothing, nothing) == 0.25 + 0.5 + 0.5
    # the third layer's beside the head; the others' beside the layer after them, with the gradients of the one after
    assert waits(nothing, [1, 1, 1.5, 0], [0.5, 1, 1.25, 3]) == 0.5 + 0.25 + 0.5 + 3


ONCE = {"parallel.sync_each_micro_batch": False}


@pytest.mark.parametrize(
    ("changes", "passes"),
    [
        # micro batches: times, gathers forward, gathers again, reduces
        ({"parallel.sync_each_micro_batch": True, "parallel.reshard_after_forward": "always"}, [(4, 1, 1, 1)]),
        (ONCE | {"parallel.reshard_after_forward": "always"}, [(1, 1, 1, 0), (2, 1, 1, 0), (1, 1, 1, 1)]),
        (ONCE | {"parallel.reshard_after_forward": "never"}, [(1, 1, 0, 0), (2, 0, 0, 0), (1, 0, 0, 1)]),
    ],
)
def test_collectives_and_copies_of_a_step_by_hand(changes: dict, passes: list[tuple[int, int, int, int]]):
    """A layer of 1b has 12 × 2048² weights and what biases and norms add (0.1 %), on two devices."""
    changes = changes | {"model.preset": "1b", "data.sequence_length": 2048, "train.max_steps": 1}
    config = run_config(Path("nowhere"), changes | {"train.global_batch_size": 8, "parallel.compile": True})
    setup = memory.set_up(config, sized_config("1b", 52096), instances.gpu("H200").device(), 2)
    traces = memory.trace_model(setup, 1)
    step, weights = time.step_of(setup, traces, 1), 12 * 2048**2
    assert len(step.micro_batches) == len(passes)
    own = moved(Kernels(traces.layers[0].backward_work))
    for index, (each, (times, first, second, reduces)) in enumerate(zip(step.micro_batches, passes, strict=True)):
        assert each.times == times
        forward, again = each.gathered[0]
        assert forward == pytest.approx(first * 2 * weights, rel=2e-3)
        assert again == pytest.approx(second * 2 * weights, rel=2e-3)
        assert each.gathered[-1][1] == 0  # the root stays
        assert each.reduced[0] == pytest.approx(reduces * 4 * weights, rel=2e-3)
        copies = second * (weights / 2 * 6 + weights / 2 * 4 + weights * 4)  # cast, into the buffer, out of it
        if len(passes) == 1:
            copies += weights * 6 + weights / 2 * 12 * 3 / 4  # into the buffer, and three times added to what is there
        else:
            copies += weights * (6 if index == 0 else 10) + (weights * 8 if reduces else 0)
        assert moved(each.backward[0]) - own == pytest.approx(copies, rel=2e-3)


def moved(kernels: Kernels) -> float:
    return float(kernels._rows[:, 2] @ kernels._rows[:, 3])


def test_work_of_a_layer_is_what_its_matrix_products_do():
    """2 FLOPs a weight and token forward, 4 backward; with full recomputation 6 backward (less the last product)."""
    weights, tokens = 12 * 2048**2, 2048  # backward also reads and writes the float32 sums of their gradients
    for recomputation, least, most in (("none", 4, 4), ("full", 5, 6)):
        changes = {"model.preset": "1b", "data.sequence_length": tokens, "train.max_steps": 1}
        changes |= {"parallel.activation_checkpointing": recomputation, "train.global_batch_size": 2}
        setup = memory.set_up(
            run_config(Path("nowhere"), changes), sized_config("1b", 52096), instances.gpu("H100").device(), 1
        )
        layer = memory.trace_model(setup, 1).layers[0]
        forward = sum(flops for kind, flops, _ in layer.forward_work if kind == "matrix")
        backward = sum(flops for kind, flops, _ in layer.backward_work if kind == "matrix")
        summed = sum(size for kind, _, size in layer.backward_work if kind == "sum")
        assert summed == (8 * weights if recomputation == "none" else 0)
        assert forward == 2 * weights * tokens
        assert least * weights * tokens <= backward <= most * weights * tokens
        assert setup.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "gib", "found"),
    [
        ("NVIDIA A100-SXM4-40GB", 39.4, 1555e9),
        ("NVIDIA A100-SXM4-80GB", 79.1, 2039e9),
        ("NVIDIA H100 80GB HBM3", 79.1, 3350e9),
        ("NVIDIA H100 PCIe", 79.1, None),
        ("NVIDIA GH200 480GB", 94.5, None),
        ("NVIDIA A10", 22.0, None),
    ],
)
def test_a_gpu_of_this_machine_has_the_rates_of_its_own_kind(name: str, gib: float, found: float | None):
    assert instances.gpu_of(name, int(gib * 2**30)).bandwidth == found


def test_of_float64_no_peak_is_known():
    gpu = instances.gpu("H100")
    assert (gpu.flops(torch.bfloat16), gpu.flops(torch.float32), gpu.flops(torch.float64)) == (989e12, 67e12, None)

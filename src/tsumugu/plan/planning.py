"""A recipe on certain devices: does it fit, how long does it take, what does it cost."""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from tsumugu import interoperability
from tsumugu.config import TrainingRun
from tsumugu.errors import UserError
from tsumugu.model import build
from tsumugu.model.presets import PRESETS, preset_config, sized_config
from tsumugu.plan import memory
from tsumugu.plan import time as timing
from tsumugu.plan.cost import Cost
from tsumugu.plan.instances import Cluster
from tsumugu.tokenizer.contract import read_contract

GIB = 2**30


@dataclass(frozen=True)
class Change:
    """A change of the recipe: the bytes of a device that it would take with it, and whether that fits."""

    setting: str
    total: int
    fits: bool
    cost: str


@dataclass(frozen=True)
class Plan:
    """What is predicted of a run on a cluster.

    Attributes:
        cluster: Where.
        setup: What, with nothing left to decide.
        parts: Bytes of a device at the peak, by part; `margin` is one of them.
        kept: Bytes that all layers keep from forward to backward, by every kind of recomputation; None: not possible.
        device_memory: Bytes; None where it is not known.
        largest_micro_batch: That fits; 0: none.
        smallest_shard_degree: That fits; None: none, or all is on one device.
        changes: What to change where it does not fit.
        step: Seconds of a step by part; None where the device's speed is not known.
        tokens_per_step: Of the whole run's devices.
        model_flops: Of a step, by the design's convention.
        steps: Of the whole run.
        checkpoint_bytes: Of one, on all devices.
        calibration: Where the efficiencies are from.
        cost: None where no price is known.
        servers: What serves the model.
    """

    cluster: Cluster
    setup: memory.Setup
    parts: dict[str, int]
    kept: dict[str, int | None]
    device_memory: int | None
    largest_micro_batch: int
    smallest_shard_degree: int | None
    changes: list[Change]
    step: timing.StepTime | None
    tokens_per_step: int
    model_flops: int
    steps: int
    checkpoint_bytes: int
    calibration: timing.Calibration | None
    cost: Cost | None = None
    servers: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        return self.device_memory is None or self.total <= self.device_memory

    @property
    def tokens_per_second(self) -> float | None:
        return self.tokens_per_step / self.step.total if self.step else None

    @property
    def days(self) -> float | None:
        return self.steps * self.step.total / 86400 if self.step else None

    @property
    def mfu(self) -> float | None:
        peak = self.cluster.gpu.half_flops if self.setup.on_cuda else None  # a CPU's rates are nominal
        return self.model_flops / self.step.total / self.cluster.devices / peak if self.step and peak else None

    @property
    def unmeasured(self) -> list[str]:
        """What is predicted of this run that nothing of its kind was measured for."""
        found, gpu = [], self.cluster.gpu.name
        if self.setup.run.model.lora.rank is not None:
            found.append("the memory of runs with model.lora")
        if self.setup.processes > 2:
            found.append("memory and speed of more than two GPUs")
        if self.step and self.calibration and f"{gpu} was not measured" in self.calibration.source:
            found.append(f"the speed of {gpu}")
        return found

    @property
    def checkpoint_every(self) -> int | None:
        """Steps between checkpoints by Young's and Daly's rule (Daly 2006): √(2 × stall × time between failures).

        A stall is the copy of every device's shards into host memory; devices fail one like the other (see
        data/reliability.json).
        """
        if self.step is None:
            return None
        facts = reliability()
        stall = self.checkpoint_bytes / self.setup.degrees["shard"] / facts["checkpoint_copy_bytes_s"]
        between_failures = facts["device_hours_between_failures"] * 3600 / self.cluster.devices
        return max(1, round(math.sqrt(2 * stall * between_failures) / self.step.total))

    def to_json(self) -> dict[str, Any]:
        """For programs; with several instances there is one for each."""
        parts = {part: size / GIB for part, size in self.parts.items()}
        return {
            "instance_type": self.cluster.name,
            "instance_count": self.cluster.hosts,
            "fits": self.fits,
            "memory_gib": parts | {"total": self.total / GIB},
            "activations_gib": {kind: None if size is None else size / GIB for kind, size in self.kept.items()},
            "device_memory_gib": None if self.device_memory is None else self.device_memory / GIB,
            "micro_batch_size": self.setup.run.train.micro_batch_size,
            "shard_degree": self.setup.degrees["shard"],
            "tokens_per_second": self.tokens_per_second,
            "step_seconds": self.step.total if self.step else None,
            "mfu": self.mfu,
            "days": self.days,
            "cost": self.cost.to_json() if self.cost else None,
            "unmeasured": self.unmeasured,
        }


def reliability() -> dict[str, Any]:
    """data/reliability.json."""
    return json.loads(resources.files("tsumugu.plan").joinpath("data/reliability.json").read_text(encoding="utf-8"))


def plan(
    run: TrainingRun,
    model_config: PretrainedConfig,
    steps: int,
    cluster: Cluster,
    calibration: timing.Calibration | None,
    tokenizer_kind: str | None = None,
) -> Plan:
    """Predicts a run.

    Args:
        run: The recipe.
        model_config: Of its model, from `find_model_config`.
        steps: Of the whole run, from `count_steps`.
        cluster: Its devices, one process each.
        calibration: Of the devices; None: nothing is said of time.
        tokenizer_kind: As `interoperability.tokenizer_kind` finds it.

    Raises:
        UserError: The recipe cannot run there.
    """
    rows = run.train.micro_batch_size
    setup = memory.set_up(run, model_config, cluster.gpu.device(), cluster.devices)
    traces = memory.trace_model(setup, rows)
    parts = _parts(cluster, setup, traces, rows)
    fits = _fits(cluster, parts)
    step = timing.step_of(setup, traces, rows)
    trained = sum(
        weight.elements(1) for weights in (*traces.layer_weights, traces.root_weights) for weight in weights
        if weight.trained
    )  # fmt: skip
    return Plan(
        cluster=cluster,
        setup=setup,
        parts=parts,
        kept=memory.kept_by_layers(setup, rows),
        device_memory=cluster.gpu.memory,
        largest_micro_batch=_largest_micro_batch(setup, traces, cluster),
        smallest_shard_degree=_smallest_shard_degree(setup, traces, cluster),
        changes=[] if fits else _changes(setup, traces, cluster),
        step=timing.step_time(setup, step, cluster, calibration) if calibration else None,
        tokens_per_step=run.train.global_batch_size * run.data.sequence_length,
        model_flops=traces.flops_of_row * run.train.global_batch_size,
        steps=steps,
        checkpoint_bytes=trained * 3 * setup.master_dtype.itemsize,
        calibration=calibration,
        servers=interoperability.servers(model_config, tokenizer_kind),
    )


def _parts(cluster: Cluster, setup: memory.Setup, traces: memory.Traces, micro_batch: int) -> dict[str, int]:
    parts, held = memory.peak_and_held(setup, traces, micro_batch)
    return parts | {"margin": memory.margin(setup, parts, held) + cluster.gpu.withheld}


def _fits(cluster: Cluster, parts: dict[str, int]) -> bool:
    return cluster.gpu.memory is None or sum(parts.values()) <= cluster.gpu.memory


def _largest_micro_batch(setup: memory.Setup, traces: memory.Traces, cluster: Cluster) -> int:
    """The largest that fits, up to what a step has for each process (or the recipe's own, where that is more).

    What the model keeps and needs grows evenly with the rows; two traces tell how.
    """
    rows = setup.run.train.micro_batch_size
    most = max(rows, setup.run.train.global_batch_size // setup.processes)

    if cluster.gpu.memory is None:
        return most

    def needs(size: int, second: memory.Traces, other: int) -> bool:
        line = memory.between(traces, rows, second, other, size)
        return _fits(cluster, _parts(cluster, memory.with_micro_batch(setup, size), line, size))

    other, low = 2 * rows, 0
    for _ in range(2):  # once from afar, then from where the answer seems to be
        second = memory.trace_model(memory.with_micro_batch(setup, other), other, (traces, rows))
        low, high = 0, most  # the largest that fits lies between them
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if needs(middle, second, other) else (low, middle - 1)
        if low in (0, rows, other):
            break
        other = low
    return low


def _smallest_shard_degree(setup: memory.Setup, traces: memory.Traces, cluster: Cluster) -> int | None:
    if setup.parallel.fsdp is False:
        return None
    rows = setup.run.train.micro_batch_size
    for degree in (d for d in range(1, setup.processes + 1) if setup.processes % d == 0):
        if _fits(cluster, _parts(cluster, memory.with_shard_degree(setup, degree), traces, rows)):
            return degree
    return None


def _changes(setup: memory.Setup, traces: memory.Traces, cluster: Cluster) -> list[Change]:
    """What would save memory, the cheapest in speed first, each predicted as the recipe itself is."""
    found: list[Change] = []
    rows, parallel = setup.run.train.micro_batch_size, setup.run.parallel

    def tried(setting: str, changed: memory.Setup, its_traces: memory.Traces, cost: str) -> None:
        parts = _parts(cluster, changed, its_traces, changed.run.train.micro_batch_size)
        found.append(Change(setting, sum(parts.values()), _fits(cluster, parts), cost))

    if setup.processes > 1 and setup.degrees["shard"] < setup.processes:
        sharded = memory.with_shard_degree(setup, setup.processes)
        tried(f"parallel.shard_degree {setup.processes}", sharded, traces, "more communication")
    decided = setup.parallel
    if decided.fsdp and not decided.sync_each_micro_batch and setup.micro_batches(rows) > 1:
        exchanged = dataclasses.replace(setup, parallel=dataclasses.replace(decided, sync_each_micro_batch=True))
        cost = "gradients are exchanged in every micro batch"
        tried("parallel.sync_each_micro_batch true", exchanged, memory.trace_model(exchanged, rows), cost)
    if decided.fsdp and decided.reshard_after_forward == "never" and setup.degrees["shard"] > 1:
        dropped = dataclasses.replace(setup, parallel=dataclasses.replace(decided, reshard_after_forward="always"))
        tried("parallel.reshard_after_forward always", dropped, traces, "weights are gathered twice a micro batch")
    if rows > 1:
        for size in dict.fromkeys((rows // 2, 1)):
            changed = memory.with_micro_batch(setup, size)
            its_traces = memory.trace_model(changed, size, (traces, rows))
            tried(f"train.micro_batch_size {size}", changed, its_traces, "more, smaller matrix products")
    if parallel.activation_checkpointing == "none" and not parallel.offload_activations:
        changed = memory.with_parallel(setup, activation_checkpointing="selective")
        cost = "what lies between matrix products is done twice"
        tried("parallel.activation_checkpointing selective", changed, memory.trace_model(changed, rows), cost)
    if parallel.activation_checkpointing != "full":
        changed = memory.with_parallel(setup, activation_checkpointing="full")
        full, cost = memory.trace_model(changed, rows), "a second forward: about a third more work"
        tried("parallel.activation_checkpointing full", changed, full, cost)
        if rows > 1:
            changed = memory.with_micro_batch(changed, 1)
            its_traces = memory.trace_model(changed, 1, (full, rows))
            tried("both, full and train.micro_batch_size 1", changed, its_traces, "the cost of both")
    if not parallel.offload_optimizer:
        changed = memory.with_parallel(setup, offload_optimizer=True, fsdp=True)
        its_traces = memory.trace_model(changed, rows)
        tried("parallel.offload_optimizer true", changed, its_traces, "the optimizer's step is taken on the host")
    return found


def find_model_config(run: TrainingRun, vocab_size: int | None) -> PretrainedConfig:
    """The configuration of the model of a recipe, as its run will have it.

    Args:
        run: The recipe. Where its store is there, that says the size of the vocabulary.
        vocab_size: Of the tokenizer, where it is not.

    Raises:
        UserError: The model cannot be found, or its vocabulary is not known.
    """
    model = run.model
    tokenizer = Path(run.data.entries[0].path) / "tokenizer"
    if model.preset is not None:
        if (tokenizer / "contract.json").exists() and vocab_size is None:
            return preset_config(model.preset, read_contract(tokenizer))
        own = PRESETS[model.preset].vocabulary if model.preset in PRESETS else None
        if own is None and vocab_size is None and model.preset in PRESETS:
            raise UserError(
                f"model.preset {model.preset} takes its vocabulary from the tokenizer, and there is no {tokenizer}",
                "give --vocab-size N",
            )
        return sized_config(model.preset, max(own or 0, vocab_size or 0))
    if model.config is not None or model.pretrained is not None:
        return build.read_config(model.config or model.pretrained or "")
    start = Path(run.train.start_from or "")
    folder = start.with_name(start.name.partition("@")[0]) / "model"
    if not folder.exists():
        raise UserError(
            f"the run of train.start_from {start} is not here",
            "train it first, or plan with --train.start_from null and the --model.preset or --model.config that it has",
        )
    return build.read_config(str(folder))


def count_steps(run: TrainingRun, tokens: int | None) -> int:
    """The steps that a run takes: of one that goes on where another stopped, those that are left.

    Args:
        run: Its stores are asked where they must be, and are there.
        tokens: Of the training data, where a recipe counts epochs and its store is not there.

    Raises:
        UserError: They cannot be known.
    """
    steps = _all_steps(run, tokens)
    if run.train.start_state == "weights":
        return steps
    from tsumugu.training.checkpoint import resolve

    return max(0, steps - resolve(run.train.start_from or "")[1])


def _all_steps(run: TrainingRun, tokens: int | None) -> int:
    train, length = run.train, run.data.sequence_length
    if train.max_steps is not None:
        return train.max_steps
    if train.max_tokens is not None:
        if run.data.packing != "concatenate":
            raise UserError(
                f"train.max_tokens counts full rows, data.packing {run.data.packing} has shorter ones",
                "set train.max_epochs or train.max_steps",
            )
        return math.ceil(train.max_tokens / (train.global_batch_size * length))
    assert train.max_epochs is not None
    if tokens is not None:
        if run.data.packing in ("pad_left", "pad_right"):
            raise UserError(
                f"--tokens does not tell the rows of data.packing {run.data.packing}, each of which is an example",
                "plan where the store is, or give --train.max_epochs null --train.max_steps N",
            )
        return math.ceil(train.max_epochs * tokens / (train.global_batch_size * length))
    if not all((Path(entry.path) / "manifest.json").exists() for entry in run.data.entries):
        missing = ", ".join(entry.path for entry in run.data.entries)
        raise UserError(f"train.max_epochs counts passes over {missing}, which is not here", "give --tokens N")
    from tsumugu.training.trainer import planned_steps

    return planned_steps(run)

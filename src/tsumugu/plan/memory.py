"""The most memory of a device that a step of training takes, by parts.

A step is walked through as the trainer takes it, layer by layer, forward and backward: what is there for good (weights,
masters, sums of gradients, moments), what FSDP2 gathers and reduces, what layers keep (see `trace`), and what each of
them needs while it is computed. The greatest sum is the peak. What FSDP2 holds when is read from torch's own code
(`torch/distributed/fsdp/_fully_shard`), and compared with it by the tests.
"""

import dataclasses
import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from importlib import resources
from typing import Any, get_args

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from tsumugu.config import ParallelConfig, TrainingRun
from tsumugu.distributed import mesh, paths
from tsumugu.distributed.parallelize import is_recomputed
from tsumugu.errors import UserError
from tsumugu.kernels import masters
from tsumugu.kernels.linear import Sum, sum_in_products
from tsumugu.model import attention, build, head, lora, nf4
from tsumugu.model.flops import flops
from tsumugu.plan import trace

PARTS = ("weights", "masters", "gradients", "moments", "activations", "logits", "gathered", "workspace")
MIB = 2**20

# cuBLAS's own workspace, which torch allocates once for each thread that multiplies matrices (forward and backward), by
# compute capability: ATen/cuda/CUDABlas.cpp, `getChosenWorkspaceSize`
_CUBLAS_WORKSPACE = {9: 32 * MIB, 10: 32 * MIB}
_OTHER_CUBLAS_WORKSPACE = 2 * 4096 * 1024 + 8 * 16 * 1024


@dataclass(frozen=True)
class Setup:
    """A run on certain devices, with nothing left to decide.

    Attributes:
        run: The configuration.
        model_config: Of its model.
        device: Of which all are.
        processes: Of the whole run, one a device.
        parallel: run.parallel as `paths.decide` leaves it.
        dtype: Of the computation.
        degrees: Of the mesh.
    """

    run: TrainingRun
    model_config: PretrainedConfig
    device: paths.Device
    processes: int
    parallel: ParallelConfig
    dtype: torch.dtype
    degrees: dict[str, int]

    @property
    def on_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def master_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def has_split_masters(self) -> bool:
        """Whether weights are in 16 bits, with the rest of their masters beside them."""
        return self.parallel.fsdp is False and self.dtype != self.master_dtype

    def micro_batches(self, micro_batch: int) -> int:
        """Of a step, on each process."""
        return -(-self.run.train.global_batch_size // (micro_batch * self.processes))


def set_up(run: TrainingRun, model_config: PretrainedConfig, device: paths.Device, processes: int) -> Setup:
    """Decides what `paths` decides when the run starts.

    Raises:
        UserError: The configuration cannot run on so many processes, or on such a device.
    """
    for key, is_set in (("tensor_degree", run.parallel.tensor_degree > 1), ("fp8", bool(run.parallel.fp8))):
        if is_set:
            raise UserError(f"plan does not know parallel.{key}", "leave it out to plan without it")
    degrees = mesh.degrees(run.parallel, processes)
    dtype = paths.compute_dtype(run.train.dtype, device)
    weight_bytes = build.weight_bytes(model_config, build.DTYPES[dtype], run.model.lora.quantize)
    parallel = paths.decide(run.parallel, device, degrees["shard"], weight_bytes, processes=processes, dtype=dtype)
    return Setup(run, model_config, device, processes, parallel, build.DTYPES[dtype], degrees)


@dataclass(frozen=True)
class Weight:
    """A parameter: its shape as it is stored, bytes of an element in the computation, and whether it is trained."""

    shape: tuple[int, ...]
    itemsize: int
    trained: bool

    def elements(self, shards: int) -> int:
        """That a process holds of it, the padding of FSDP2's even shards included."""
        if not self.shape:
            return 1
        rows, *rest = self.shape
        size = -(-rows // shards)
        for extent in rest:
            size *= extent
        return size


@dataclass(frozen=True)
class Traces:
    """What a model keeps and needs for one micro batch of a size.

    Attributes:
        root: What lies around the layers.
        layers: Every decoder layer.
        root_weights: Parameters outside of the layers.
        layer_weights: Of every layer.
        buffers: Bytes of the model's buffers.
        chunked: Whether head and loss go in chunks.
        flops_of_row: Of a row in forward and backward, by the design's convention (see `model.flops`).
    """

    root: trace.Root
    layers: list[trace.Layer]
    root_weights: list[Weight]
    layer_weights: list[list[Weight]]
    buffers: int
    chunked: bool
    flops_of_row: int


_traced: dict[str, Traces] = {}


def trace_model(setup: Setup, micro_batch: int, like: tuple[Traces, int] | None = None) -> Traces:
    """Traces the model of a run for micro batches of a size. Layers that are alike are traced once.

    Args:
        setup: The run; what makes no difference to the traces, such as the number of devices, may be another one.
        micro_batch: Rows.
        like: Traces of the same run with another micro batch, whose compiled layers need not be compiled again. What
            comes of it tells memory, not time.
    """
    keeps = _keeps_gradients(setup, micro_batch)
    same: dict[str, Any] = {"shard_degree": None, "replicate_degree": None, "reshard_after_forward": "auto"}
    same |= {"sync_each_micro_batch": None, "prefetch": 1, "offload_activations": False, "offload_optimizer": False}
    parallel = dataclasses.replace(setup.parallel, **same)
    what = (setup.model_config.to_json_string(), setup.run.model.lora, setup.run.data, parallel, setup.dtype)
    key = repr((*what, setup.on_cuda, setup.device.capability >= (8, 0), keeps, setup.has_split_masters, micro_batch))
    if like and key not in _traced:
        key = f"of another: {key}"
    if key not in _traced:
        _traced[key] = _trace_model(setup, micro_batch, keeps, like)
    return _traced[key]


def _keeps_gradients(setup: Setup, micro_batch: int) -> bool:
    """Whether the gradients of weights are held by themselves after a micro batch."""
    if setup.parallel.fsdp is not False:  # sums in another dtype are FSDP2's, those in the same are autograd's
        once = not setup.parallel.sync_each_micro_batch and setup.micro_batches(micro_batch) > 1
        return not (once and setup.dtype == setup.master_dtype)
    return not setup.has_split_masters and setup.micro_batches(micro_batch) == 1


def _trace_model(setup: Setup, micro_batch: int, keeps: bool, like: tuple[Traces, int] | None) -> Traces:
    run, parallel = setup.run, setup.parallel
    model = build.meta_model(setup.model_config, setup.dtype)
    layers = build.decoder_layers(model)
    if run.model.lora.rank is not None:
        _adapt(model, layers, run, setup.dtype)
    likeness = [(is_recomputed(index, parallel), *_likeness(layer)) for index, layer in enumerate(layers)]
    first = {key: index for index, key in reversed(list(enumerate(likeness)))}
    untraced = {
        module for index, key in enumerate(likeness) if first[key] != index for module in layers[index].modules()
    }
    with trace.fake():
        for module in model.modules():
            if module not in untraced:  # which stay on the meta device
                module.to_empty(device="cpu", recurse=False)
        with lora.unwrapped(model):
            model.tie_weights()
        model.train()
        if setup.has_split_masters:
            for (again, *_), index in first.items():
                if not again:
                    sums: dict[torch.Tensor, Sum] = {
                        parameter: Sum(torch.empty_like(parameter, dtype=torch.float32), torch.tensor(False))
                        for parameter in layers[index].parameters()
                        if parameter.requires_grad
                    }
                    sum_in_products(layers[index], sums)
        inputs = _inputs(model, setup, micro_batch)
        labels = torch.zeros(micro_batch, run.data.sequence_length, dtype=torch.int64)
        chunked = parallel.chunked_loss is not False and head.is_last(model, setup.dtype)
        root, call = trace.trace_root(
            model, layers, inputs, labels, chunked=chunked, keeps_gradients=keeps, on_cuda=setup.on_cuda
        )
        known: dict[Any, trace.Layer] = {}
        traced = []
        for index, (key, layer) in enumerate(zip(likeness, layers, strict=True)):
            graphs = like[0].layers[index].graphs if like else None
            if key not in known and graphs and like:
                known[key] = graphs.at(Fraction(micro_batch, like[1]))
            elif key not in known:
                known[key] = trace.trace_layer(
                    layer, call, parallel, again=key[0], keeps_gradients=keeps, on_cuda=setup.on_cuda
                )
            traced.append(known[key])
    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    return Traces(
        root=root,
        layers=traced,
        root_weights=[_weight(p) for p in model.parameters() if id(p) not in inside],
        layer_weights=[[_weight(p) for p in layer.parameters()] for layer in layers],
        buffers=sum(buffer.nbytes for buffer in model.buffers()),
        chunked=chunked,
        flops_of_row=flops(model, run.data.sequence_length, run.data.sequence_length**2),
    )


def _weight(parameter: nn.Parameter) -> Weight:
    return Weight(tuple(parameter.shape), parameter.element_size(), parameter.requires_grad)


def _likeness(layer: nn.Module) -> tuple:
    """What two layers have in common that keep and need the same."""
    return (
        type(layer),
        tuple((name, p.shape, p.dtype, p.requires_grad) for name, p in layer.named_parameters()),
        *(str(getattr(module, name, None)) for name in ("attention_type", "layer_type", "sliding_window", "is_sliding")
          for module in layer.modules()),
    )  # fmt: skip


def _adapt(model: PreTrainedModel, layers: Sequence[nn.Module], run: TrainingRun, dtype: torch.dtype) -> None:
    lora.check_installed()
    wanted = run.model.lora
    assert wanted.rank is not None
    lora.add_adapters(
        model,
        lora.Adapters(
            rank=wanted.rank, alpha=wanted.alpha or 2 * wanted.rank, dropout=wanted.dropout,
            targets=lora.find_targets(layers, wanted.targets), new_rows=[], base="", base_sha256="",
            quantize=wanted.quantize,
        ),
        dtype,
    )  # fmt: skip
    if wanted.quantize:
        nf4.replace(layers, dtype)


def _inputs(model: PreTrainedModel, setup: Setup, micro_batch: int) -> dict[str, Any]:
    """As the trainer makes them; where transformers would build a mask from them, that mask."""
    data, length = setup.run.data, setup.run.data.sequence_length
    inputs: dict[str, Any] = {"input_ids": torch.zeros(micro_batch, length, dtype=torch.int64), "use_cache": False}
    if build.takes_positions(model):
        inputs["position_ids"] = torch.zeros(micro_batch, length, dtype=torch.int64)
    if (
        data.documents_apart
        and setup.on_cuda
        and not attention.no_varlen(model, setup.dtype, "cuda", setup.device.capability)
    ):
        model.set_attn_implementation(attention.VARLEN)
        ends = torch.zeros(micro_batch + 1, dtype=torch.int32)
        return inputs | {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": length, "max_length_k": length}
    if data.packing != "concatenate" or data.documents_apart:
        inputs["attention_mask"] = torch.zeros(micro_batch, 1, length, length, dtype=torch.bool)
    elif build.attention_implementation(model) == "sdpa":
        model.set_attn_implementation(attention.CAUSAL)
    return inputs


# FSDP2 allocates these on streams of its own, and what is free of one stream's memory is of no use to another one
_STREAMS = {"reduced": "gradients", "buffers": "gathered"}


@dataclass
class _Walk:
    """What is there now, by parts, what was there at the peak, and the most of each stream."""

    now: dict[str, int]
    peak: dict[str, int] = field(default_factory=dict)
    streams: dict[str, int] = field(default_factory=dict)

    def see(self, **more: int) -> None:
        """Something that is there for a moment, beside what is there now."""
        both = {part: self.now.get(part, 0) + more.get(part, 0) for part in (*PARTS, *_STREAMS)}
        if sum(both.values()) > sum(self.peak.values()):
            self.peak = both
        for stream in ("", *_STREAMS):
            size = both[stream] if stream else sum(both[part] for part in PARTS)
            self.streams[stream] = max(size, self.streams.get(stream, 0))

    def add(self, part: str, size: int) -> None:
        self.now[part] += size


def peak(setup: Setup, traces: Traces, micro_batch: int) -> dict[str, int]:
    """Bytes at the peak of a step that is not the first, by PARTS."""
    return peak_and_held(setup, traces, micro_batch)[0]


def peak_and_held(setup: Setup, traces: Traces, micro_batch: int) -> tuple[dict[str, int], int]:
    """`peak`, and the bytes that torch's allocator holds then: what each stream took at its own peak."""
    walk = _Walk(_lasting(setup, traces, micro_batch))
    if setup.parallel.fsdp is not False:
        _walk_sharded(walk, setup, traces, micro_batch)
    else:
        _walk_whole(walk, setup, traces, micro_batch)
    parts = {part: walk.peak[part] for part in PARTS}
    for stream, part in _STREAMS.items():
        parts[part] += walk.peak[stream]
    return parts, sum(walk.streams.values())


def _lasting(setup: Setup, traces: Traces, micro_batch: int) -> dict[str, int]:
    """What is there all the time."""
    fsdp, several = setup.parallel.fsdp is not False, setup.micro_batches(micro_batch) > 1
    if fsdp and not setup.parallel.sync_each_micro_batch:
        several = False  # until the last micro batch there are sums alone
    shards = setup.degrees["shard"] if fsdp else 1
    weights = [*traces.root_weights, *(weight for each in traces.layer_weights for weight in each)]
    trained = sum(weight.elements(shards) for weight in weights if weight.trained)
    frozen = sum(weight.elements(shards) * weight.itemsize for weight in weights if not weight.trained)
    wide = setup.master_dtype.itemsize
    parts: dict[str, int] = dict.fromkeys((*PARTS, *_STREAMS), 0)
    if setup.has_split_masters:
        half = setup.dtype.itemsize
        parts |= {"weights": frozen + trained * half, "masters": trained * half, "gradients": trained * wide}
    else:
        parts |= {"weights": frozen, "masters": trained * wide}
        parts["reduced" if fsdp else "gradients"] = trained * wide if several else 0
    parts["moments"] = 2 * trained * wide
    if setup.parallel.offload_optimizer and setup.on_cuda:
        parts |= dict.fromkeys(("weights", "masters", "gradients", "reduced", "moments"), 0)
    parts["workspace"] = traces.buffers + setup.model_config.get_text_config().vocab_size * 8  # bytes of every token
    if setup.on_cuda:
        parts["workspace"] += 2 * _CUBLAS_WORKSPACE.get(setup.device.capability[0], _OTHER_CUBLAS_WORKSPACE)
    return parts


def _walk_whole(walk: _Walk, setup: Setup, traces: Traces, micro_batch: int) -> None:
    """A step on one device, which holds all."""
    root, layers = traces.root, traces.layers
    keeps = not setup.has_split_masters and setup.micro_batches(micro_batch) == 1
    walk.add("activations", root.entered - root.hidden)
    for layer in layers:
        walk.see(activations=root.hidden, workspace=layer.forward - root.hidden)
        walk.add("activations", _stays(setup, layer))
    walk.see(activations=root.hidden, logits=root.loss - root.entered)
    walk.see(logits=root.head_backward - root.entered + root.hidden)
    left = root.left - root.hidden - (root.entered - root.hidden)
    walk.add("gradients" if keeps else "logits", max(0, left))
    for index in range(len(layers) - 1, -1, -1):
        layer = layers[index]
        walk.add("activations", -_stays(setup, layer))
        walk.see(activations=layer.saved, workspace=layer.backward - layer.saved + _fetched(setup, layers, index))
        if keeps:
            walk.add("gradients", layer.gradients)
    walk.see(workspace=root.embedding_backward - root.entered + root.hidden - max(0, left))
    if keeps:
        walk.now["gradients"] = walk.now["masters"]
    walk.now["activations"] = walk.now["logits"] = 0
    walk.see(workspace=_of_optimizer(setup, traces))


def kept_by_layers(setup: Setup, micro_batch: int) -> dict[str, int | None]:
    """Bytes that all decoder layers keep on the device from forward to backward, by every kind of
    parallel.activation_checkpointing; None where the rest of the configuration does not go with it."""
    found: dict[str, int | None] = {}
    for kind in get_args(ParallelConfig.__annotations__["activation_checkpointing"]):
        try:
            parallel = dataclasses.replace(setup.parallel, activation_checkpointing=kind)
        except UserError:
            found[kind] = None
            continue
        changed = dataclasses.replace(setup, parallel=parallel)
        found[kind] = sum(_stays(changed, layer) for layer in trace_model(changed, micro_batch).layers)
    return found


def _stays(setup: Setup, layer: trace.Layer) -> int:
    """What a layer keeps on the device."""
    offloads = setup.parallel.offload_activations and setup.on_cuda
    return layer.saved - (layer.offloadable if offloads else 0)


def _fetched(setup: Setup, layers: Sequence[trace.Layer], index: int) -> int:
    """What comes back from the host while a layer's backward pass is computed: that of the layer before."""
    if not (setup.parallel.offload_activations and setup.on_cuda) or index == 0:
        return 0
    return layers[index - 1].offloadable


def _of_optimizer(setup: Setup, traces: Traces) -> int:
    """What AdamW needs beside what it updates: nothing, but where masters are put together by torch's operations."""
    if not setup.has_split_masters or setup.on_cuda:
        return 0
    every = [*traces.root_weights, *(weight for each in traces.layer_weights for weight in each)]
    elements = max((weight.elements(1) for weight in every if weight.trained), default=0)
    with trace.fake():
        weight, low = torch.empty(elements, dtype=torch.bfloat16), torch.empty(elements, dtype=torch.int16)
        total, first, second = (torch.empty(elements) for _ in range(3))
        one = torch.ones(())
        tracker = trace.Tracker(False, False)
        with tracker:
            scalars = masters.Scalars(one, one, one, (0.9, 0.95))
            masters.adamw(weight, low, total, (first, second), scalars, 1e-3, 0.1, 1e-8)
        return tracker.peak


@dataclass(frozen=True)
class _Group:
    """Bytes of one of FSDP2's groups on a device: of a layer's weights, or of the root's.

    Attributes:
        whole: Gathered weights.
        buffer: What they travel through: with more than one shard as much, which goes once the next ones are there.
        gradients: As backward hands them on, in the dtype of the computation.
        sums: Of gradients over micro batches, before they are exchanged, in the masters' dtype.
        largest: Of `gradients`, those of one weight.
        reduce: The buffer that is reduced, in the masters' dtype.
        shard: What comes of it.
    """

    whole: int
    buffer: int
    gradients: int
    sums: int
    largest: int
    reduce: int
    shard: int


def _group(setup: Setup, weights: Sequence[Weight], gradients: int) -> _Group:
    shards, wide = setup.degrees["shard"], setup.master_dtype.itemsize
    trained = [weight for weight in weights if weight.trained]
    whole = sum(weight.elements(shards) * shards * weight.itemsize for weight in weights)
    shard = sum(weight.elements(shards) for weight in trained) * wide
    return _Group(
        whole=whole,
        buffer=whole if shards > 1 else 0,
        gradients=gradients,
        sums=sum(weight.elements(1) for weight in trained) * wide,
        largest=max((weight.elements(1) * weight.itemsize for weight in trained), default=0),
        reduce=shard * shards,
        shard=shard,
    )


@dataclass(frozen=True)
class Pass:
    """A micro batch of a step, as far as FSDP2 cares which of them it is.

    Attributes:
        times: Micro batches of a step that are like it.
        gathers: Whether weights are not there yet.
        drops: Whether they go after backward.
        sums: Whether gradients are summed up before they are exchanged, and no sums are there yet.
        adds: Whether they are, and sums are there.
        reduces: Whether gradients, or their sums, are exchanged.
    """

    times: int
    gathers: bool
    drops: bool
    sums: bool
    adds: bool
    reduces: bool


def passes(setup: Setup, micro_batch: int) -> list[Pass]:
    """The micro batches of a step that differ under FSDP2, in their order."""
    count = setup.micro_batches(micro_batch)
    if setup.parallel.sync_each_micro_batch or count == 1:
        return [Pass(count, gathers=True, drops=True, sums=False, adds=False, reduces=True)]
    stay = setup.parallel.reshard_after_forward == "never"
    first = Pass(1, gathers=True, drops=not stay, sums=True, adds=False, reduces=False)
    between = Pass(count - 2, gathers=not stay, drops=not stay, sums=False, adds=True, reduces=False)
    last = dataclasses.replace(between, times=1, drops=True, reduces=True)
    return [first, *([between] if count > 2 else []), last]


def _walk_sharded(walk: _Walk, setup: Setup, traces: Traces, micro_batch: int) -> None:
    """A step under FSDP2: every layer is a group of its own, embedding, norm and head are the root's."""
    groups = [
        _group(setup, weights, layer.gradients)
        for weights, layer in zip(traces.layer_weights, traces.layers, strict=True)
    ]
    root = _group(setup, traces.root_weights, traces.root.gradients)
    lasting = walk.now["reduced"]
    for each in passes(setup, micro_batch):
        _forward_sharded(walk, setup, traces, groups, root, each)
        _backward_sharded(walk, setup, traces, groups, root, each)
    if lasting or (setup.parallel.offload_optimizer and setup.on_cuda):
        walk.now["reduced"] = lasting  # what the last pass made is added to it, or goes to the host
    walk.see()


def _forward_sharded(
    walk: _Walk, setup: Setup, traces: Traces, groups: Sequence[_Group], of_root: _Group, each: Pass
) -> None:
    root, shards = traces.root, setup.degrees["shard"]
    ahead = setup.parallel.prefetch if setup.parallel.prefetch > 1 else 0
    buffers, before = [group.buffer if each.gathers else 0 for group in groups], 0
    if each.gathers:
        before = of_root.buffer
        walk.see(gathered=of_root.whole, buffers=before + before // shards)
        walk.add("gathered", of_root.whole)
    walk.add("activations", root.entered - root.hidden)
    for index, (layer, group, buffer) in enumerate(zip(traces.layers, groups, buffers, strict=True)):
        walk.see(activations=root.hidden, buffers=before + buffer + buffer // shards)
        walk.add("gathered", group.whole if each.gathers else 0)
        walk.see(
            activations=root.hidden,
            buffers=buffer + sum(buffers[index + 1 : index + 1 + ahead]),
            workspace=layer.forward - root.hidden,
        )
        walk.add("activations", _stays(setup, layer))
        if setup.parallel.reshard_after_forward != "never":
            walk.add("gathered", -group.whole)
        before = buffer
    walk.see(activations=root.hidden, logits=root.loss - root.entered, buffers=before if traces.chunked else 0)


def _backward_sharded(
    walk: _Walk, setup: Setup, traces: Traces, groups: Sequence[_Group], of_root: _Group, each: Pass
) -> None:
    root, again = traces.root, setup.parallel.reshard_after_forward != "never"
    buffers = [group.buffer if again else 0 for group in groups]
    walk.see(logits=root.head_backward - root.entered + root.hidden, buffers=buffers[-1])
    left = max(0, root.left - root.entered)
    walk.add("gathered", left)  # the gradients of the head
    reducing = 0
    for index in range(len(groups) - 1, -1, -1):
        layer, group = traces.layers[index], groups[index]
        coming = sum(buffers[max(0, index - setup.parallel.prefetch) : index])
        walk.add("activations", -_stays(setup, layer))
        walk.add("gathered", group.whole if again else 0)
        walk.see(
            activations=layer.saved,
            gathered=reducing,
            buffers=coming,
            workspace=layer.backward - layer.saved + _fetched(setup, traces.layers, index),
        )
        walk.add("gathered", -group.whole if each.drops else 0)
        reducing = _hand_on(walk, setup, group, each, buffers=coming, workspace=root.hidden)
    walk.see(workspace=root.embedding_backward - root.entered + root.hidden - left, gathered=reducing)
    walk.add("gathered", -left - (of_root.whole if each.drops else 0))
    walk.now["activations"] = 0
    _hand_on(walk, setup, of_root, each)


def _hand_on(walk: _Walk, setup: Setup, group: _Group, each: Pass, **more: int) -> int:
    """What FSDP2 does with the gradients of a group once backward has made them; the bytes of the buffer that is still
    being reduced when the next group's come.

    What comes of reducing stays until the end of the backward pass, also where it is added to what is there.
    """
    made = 0 if each.adds else group.gradients
    if each.sums:
        if setup.dtype != setup.master_dtype:  # they are cast one by one
            walk.see(gradients=group.sums, gathered=group.largest, **more)
        walk.add("gradients", group.sums)
    if not each.reduces:
        return 0
    walk.see(gathered=made + group.reduce, **more)
    walk.add("gradients", -group.sums if each.adds else 0)
    walk.add("reduced", group.shard)
    walk.see(gathered=group.reduce, **more)
    return group.reduce


def margin(setup: Setup, parts: dict[str, int], held: int) -> int:
    """What must be free beside the peak: what torch's allocator holds for streams that do not need it at that time, or
    in pieces that nothing fits into, and what CUDA and NCCL take beside it (see data/margins.json for where the shares
    were measured, and for what was not).

    Args:
        setup: The run.
        parts: Of its peak.
        held: By the allocator (see `peak_and_held`).
    """
    if not setup.on_cuda:
        return 0
    shares = _margins()
    comes_and_goes = parts["activations"] + parts["logits"] + parts["gathered"] + parts["workspace"]
    beside = shares["cuda_mib"] + (shares["nccl_mib"] if setup.processes > 1 else 0)
    return held - sum(parts.values()) + round(comes_and_goes * shares["fragments"]) + beside * MIB


@functools.cache
def _margins() -> dict[str, Any]:
    return json.loads(resources.files("tsumugu.plan").joinpath("data/margins.json").read_text(encoding="utf-8"))


def with_micro_batch(setup: Setup, micro_batch: int) -> Setup:
    """The same run with another micro batch."""
    train = dataclasses.replace(setup.run.train, micro_batch_size=micro_batch)
    return dataclasses.replace(setup, run=dataclasses.replace(setup.run, train=train))


def with_shard_degree(setup: Setup, degree: int) -> Setup:
    """The same run with its parameters over so many devices."""
    degrees = {"replicate": setup.processes // degree, "shard": degree}
    return dataclasses.replace(setup, degrees=degrees)


def with_parallel(setup: Setup, **changes: Any) -> Setup:
    """The same run with another section `parallel`."""
    parallel = dataclasses.replace(setup.run.parallel, **changes)
    run = dataclasses.replace(setup.run, parallel=parallel)
    return set_up(run, setup.model_config, setup.device, setup.processes)


def between(first: Traces, at: int, second: Traces, other: int, to: int) -> Traces:
    """What lies on the line through the traces of two micro batches."""

    def both(one: Any, two: Any) -> Any:
        values = {
            name: value + (getattr(two, name) - value) * (to - at) // (other - at)
            for name, value in vars(one).items()
            if isinstance(value, int)
        }
        return dataclasses.replace(one, **values)

    layers = [both(one, two) for one, two in zip(first.layers, second.layers, strict=True)]
    return dataclasses.replace(first, root=both(first.root, second.root), layers=layers)

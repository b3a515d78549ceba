"""What a decoder layer, and what lies around the layers, keeps and needs: traced from the model's own code.

Nothing is allocated: tensors are torch's fake ones. Eager code is run, with every storage counted from its birth to its
death. Compiled layers go through what torch.compile puts them through up to the point where it writes kernels (Dynamo,
AOTAutograd, the min-cut partitioner with recomputation and memory budget); of the two graphs that come out, those
values are counted that will lie in memory: what the partitioner keeps for backward, what operators that are not fused
read and make (matrix products, attention), and what is returned. All else stays inside fused kernels.

Traces are made on fake CPU tensors, since torch without CUDA has no others; where CUDA's operators need memory of their
own, or tsumugu's kernels need none, that is known here by name.
"""

import contextlib
import logging
import math
import operator
import warnings
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import torch
import torch._functorch.config as functorch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry
from transformers import PreTrainedModel

from tsumugu.config import ParallelConfig
from tsumugu.distributed.parallelize import SMALLEST_OFFLOADED, recomputed
from tsumugu.kernels import cross_entropy
from tsumugu.kernels.linear import SummedLinear
from tsumugu.model import attention, nf4  # noqa: F401 (they register what models call)
from tsumugu.training.loss import summed_loss

_BLOCK = 512  # bytes: torch's allocator for CUDA rounds every request up to a multiple


Work = tuple[tuple[str, int, float], ...]
"""Kernels: what they are (matrix, attention, varlen: attention within documents, memory: written by the compiler,
eager: torch's own, sum: what a product does to the sum that it is added to), FLOPs, and bytes that they read and
write."""


@dataclass(frozen=True)
class Layer:
    """Bytes of one decoder layer for one micro batch.

    Attributes:
        forward: The most while it is computed, its input included, gathered weights not.
        saved: What it keeps from forward to backward, its input included where backward reads it.
        offloadable: Of `saved`, tensors large enough to be sent to the host.
        backward: The most while backward is computed: what is saved and the gradient of its output included, and the
            gradients of its weights as far as they are there.
        gradients: Of its weights, as backward hands them on.
        output: Of its hidden states.
        forward_work: The kernels of forward.
        backward_work: Those of backward, with what is computed again.
        graphs: Of a compiled layer.
    """

    forward: int
    saved: int
    offloadable: int
    backward: int
    gradients: int
    output: int
    forward_work: Work
    backward_work: Work
    graphs: "Graphs | None" = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Root:
    """Bytes of what lies around the layers, with the layers left out (a hidden state goes through them untouched).

    Attributes:
        entered: When the first layer begins: the hidden states, positions, masks.
        hidden: Of those, the hidden states.
        loss: The most while final norm, head and loss are computed.
        head_backward: The most in their backward pass.
        left: When backward reaches the last layer: the gradient of the hidden states and, where they stay, the
            gradients of the head.
        embedding_backward: The most after the layers' backward pass.
        gradients: Of its weights, as backward hands them on.
        forward_work: As of a layer.
        backward_work: As of a layer.
    """

    entered: int
    hidden: int
    loss: int
    head_backward: int
    left: int
    embedding_backward: int
    gradients: int
    forward_work: Work
    backward_work: Work


_MOVES_NOTHING = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view"}


class Tracker(TorchDispatchMode):
    """Counts the bytes of storages that are born inside, from birth to death, and what operators read, write and do.

    Args:
        rounded: Whether sizes are rounded up as CUDA's allocator does.
        on_cuda: Whether the memory that CUDA's operators need for themselves is counted.
    """

    def __init__(self, rounded: bool, on_cuda: bool):
        super().__init__()
        self.live, self.peak = 0, 0
        self.work: list[tuple[str, int, float]] = []
        self._rounded, self._on_cuda = rounded, on_cuda
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        outputs = func(*args, **kwargs)
        values = [value for value in tree_leaves(outputs) if isinstance(value, torch.Tensor)]
        read = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        there = {id(value.untyped_storage()) for value in read}
        for value in values:
            if id(value.untyped_storage()) not in there:  # else it is a view, or was written to
                self._see(value.untyped_storage())
        extra = workspace(func, args, self._on_cuda)
        self.peak = max(self.peak, self.live + extra)
        name = func._overloadpacket.__name__
        if values and not _is_view(func) and name not in _MOVES_NOTHING:
            moved = sum(value.nbytes for value in (*read, *values))
            if name == "embedding":  # of the weight it reads some rows alone
                moved = 2 * values[0].nbytes
            kind, flops = kind_and_flops(func, args, kwargs, outputs)
            self.work.append(("eager" if kind == "memory" else kind, flops, moved))
            self.work += sum_read_and_written(func, args)
        return outputs

    def reset(self) -> tuple[int, Work]:
        """The peak and the kernels since the last call."""
        result = self.peak, tuple(self.work)
        self.peak, self.work = self.live, []
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._known:
            return
        size = -(-size // _BLOCK) * _BLOCK if self._rounded else size

        def died(_: Any) -> None:
            self.live -= size
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, died)
        self.live += size


def workspace(operation: Any, args: Sequence[Any], on_cuda: bool) -> int:
    """Bytes that an operator allocates and frees again, as far as torch does not see them.

    On CUDA, the backward pass of flash attention sums the gradient of the queries in float32 (flash attention 2,
    `dq_accum`, with sequence and head size rounded up to 128 and 32), and keeps a row sum a query; of NF4, the
    weight is multiplied out.
    """
    name = operation.name() if hasattr(operation, "name") else str(operation)
    if "tsumugu::linear_backward" in name or "tsumugu::add_to_sum" in name:
        return 0 if on_cuda else 4 * sum(_value(value).numel() for value in args[:2])  # in float32, which adds exactly
    if not on_cuda:
        return 0
    if "nf4_product" in name or "nf4_gradient" in name:
        values, codes = args[0], args[1]
        return 2 * _size(codes) * _value(values).element_size()
    if "attention" in name and name.partition(".")[0].endswith("backward"):
        *batch, tokens, size = _value(args[1]).shape
        rows = math.prod(batch) * (-(-tokens // 128) * 128)
        return rows * (-(-size // 32) * 32 + 1) * 4
    if "_varlen_attn_backward" in name:
        tokens, heads, size = _value(args[1]).shape
        return (tokens + 128) * heads * (-(-size // 32) * 32 + 1) * 4
    return 0


def kind_and_flops(operation: Any, args: Sequence[Any], kwargs: dict[str, Any], outputs: Any) -> tuple[str, int]:
    """What an operator is, and its floating-point operations: those of matrix products, and of attention without what
    a causal mask leaves out."""
    name = operation.name() if hasattr(operation, "name") else str(operation)
    base = name.partition("::")[2].partition(".")[0]
    if "attention" in base or "_varlen_attn" in base:
        backward, varlen = "backward" in base, "varlen" in base
        query, key = (_value(args[index]) for index in ((1, 2) if backward else (0, 1)))
        tokens, keys = (value.shape[0 if varlen else -2] for value in (query, key))
        if varlen:  # of which no document is longer than this, the first number among the arguments
            tokens = keys = next(int(item) for item in args if isinstance(item, (int, torch.SymInt)))
        causal = 0.5 if tokens == keys else 1.0
        # two products forward; backward five, as flash attention computes the first one again
        return "varlen" if varlen else "attention", int(4 * query.numel() * keys * causal * (2.5 if backward else 1))
    if base == "wide_product_":
        return "matrix", 2 * args[0].numel() * args[2].shape[0]
    if base in ("linear_backward", "add_to_sum"):
        products = 2 if base == "linear_backward" else 1
        return "matrix", products * 2 * args[0].numel() * args[1].shape[-1]
    if base == "nf4_product":
        return "matrix", 2 * args[0].numel() * args[1].shape[0]
    if base == "nf4_gradient":
        return "matrix", 2 * outputs.numel() * args[0].shape[-1]
    if count := flop_registry.get(getattr(operation, "_overloadpacket", None)):
        return "matrix", count(*args, **kwargs, out_val=outputs)
    return "memory", 0


def sum_read_and_written(operation: Any, args: Sequence[Any]) -> Work:
    """What a product does to the sum that it is added to. It comes at the end of its tiles, with nothing left to do for
    the matrix units (products that sum ran at 703 TFLOP/s on an H200, the same ones without at 763)."""
    name = operation.name() if hasattr(operation, "name") else str(operation)
    for base, place in (("wide_product_", 0), ("linear_backward", 3), ("add_to_sum", 2)):
        if f"tsumugu::{base}" in name:
            return (("sum", 0, 2 * _size(args[place])),)
    return ()


def _value(item: Any) -> torch.Tensor:
    return item.meta["val"] if isinstance(item, fx.Node) else item


def _size(item: Any) -> int:
    value = _value(item)
    return value.numel() * value.element_size()


@contextlib.contextmanager
def fake() -> Iterator[None]:
    """Inside, tensors have shapes and no memory; torch's warnings are left to the run itself."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def kernels_of_cuda() -> Iterator[None]:
    """Inside, the chunked loss takes the memory that it takes with tsumugu's kernels in Triton."""

    def differentiated(logits: torch.Tensor, labels: torch.Tensor, wanted: bool) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.empty(len(labels), dtype=torch.float32, device=logits.device), logits

    def add_product(total: torch.Tensor, gradient: torch.Tensor, rows: torch.Tensor) -> None:
        if total.dtype == rows.dtype:
            total.addmm_(gradient.T, rows)
        else:  # no copies: cuBLAS sums in float32
            torch.ops.tsumugu.wide_product_(total, gradient, rows)

    own = cross_entropy._differentiated, cross_entropy.add_product
    cross_entropy._differentiated, cross_entropy.add_product = differentiated, add_product
    try:
        yield
    finally:
        cross_entropy._differentiated, cross_entropy.add_product = own


@torch.library.custom_op("tsumugu::wide_product_", mutates_args=("total",))
def _wide_product(total: torch.Tensor, gradient: torch.Tensor, rows: torch.Tensor) -> None:
    torch.addmm(total, gradient.T, rows, out_dtype=total.dtype, out=total)


@_wide_product.register_fake
def _(total: torch.Tensor, gradient: torch.Tensor, rows: torch.Tensor) -> None: ...


class _Source(torch.autograd.Function):
    """Hidden states that come from nowhere, and whose gradient goes nowhere."""

    @staticmethod
    def forward(ctx: Any, leaf: torch.Tensor, like: tuple[tuple[int, ...], torch.dtype]) -> torch.Tensor:
        shape, dtype = like
        return torch.empty(shape, dtype=dtype)

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> tuple[None, None]:  # type: ignore[override]
        return None, None


class _Sink(torch.autograd.Function):
    """A number made of hidden states, which does not keep them, and whose backward pass makes their gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor) -> torch.Tensor:
        ctx.like = hidden.shape, hidden.dtype
        return hidden.new_empty(())

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        shape, dtype = ctx.like
        return torch.empty(shape, dtype=dtype)


class _Mark(torch.autograd.Function):
    """The hidden states as they are; calls a function when backward comes by."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, call: Callable[[], None]) -> torch.Tensor:
        ctx.call = call
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor):  # type: ignore[override]
        ctx.call()
        return gradients[0], None


@dataclass
class Call:
    """How a model calls its first layer: the hidden states apart, as shape and dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, forward: Callable[..., Any], hidden: torch.Tensor) -> torch.Tensor:
        output = forward(hidden, *self.args, **self.kwargs)
        return output[0] if isinstance(output, tuple) else output


def trace_root(
    model: PreTrainedModel,
    layers: Sequence[nn.Module],
    inputs: dict[str, Any],
    labels: torch.Tensor,
    *,
    chunked: bool,
    keeps_gradients: bool,
    on_cuda: bool,
) -> tuple[Root, Call]:
    """Runs a model without its layers, forward and backward.

    Args:
        model: Of fake tensors, in the dtype of the computation.
        layers: Its decoder layers.
        inputs: Of its forward pass.
        labels: (batch, tokens).
        chunked: Whether head and loss go in chunks.
        keeps_gradients: Whether the gradients of weights stay; else they are gone once they are made.
        on_cuda: Whether it will run on CUDA.
    """
    tracker = Tracker(on_cuda, on_cuda)
    found: dict[str, Any] = {}
    own = [layer.forward for layer in layers]

    def entered(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        found["call"] = Call(tuple(hidden.shape), hidden.dtype, args, kwargs)
        found["entered"], found["hidden"] = tracker.live, hidden.untyped_storage().nbytes()
        with torch.no_grad(), _hidden_from(tracker):
            like = own[0](hidden.detach(), *args, **kwargs)
        found["tuple"] = like[1:] if isinstance(like, tuple) else None
        found["before"] = tracker.reset()
        return passed(hidden)

    def passed(hidden: torch.Tensor, *_: Any, **__: Any) -> Any:
        rest = found["tuple"]
        return hidden if rest is None else (hidden, *rest)

    def last(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if len(layers) == 1:
            entered(hidden, *args, **kwargs)
        return passed(_Mark.apply(hidden, came_back))

    def came_back() -> None:
        found["head_backward"] = tracker.reset()
        found["left"] = tracker.live

    parameters = [p for p in dict.fromkeys(model.parameters()) if p.requires_grad]
    inside = {id(p) for layer in layers for p in layer.parameters()}
    try:
        for layer in layers:
            layer.forward = passed
        layers[0].forward, layers[-1].forward = entered, last
        if len(layers) == 1:
            layers[0].forward = last
        with (
            tracker,
            kernels_of_cuda() if on_cuda else contextlib.nullcontext(),
            gradients_go(parameters, keeps_gradients),
        ):
            if chunked:
                head: Any = model.get_output_embeddings()
                hidden = model.base_model(**inputs).last_hidden_state.flatten(0, 1)
                loss = cross_entropy.summed_cross_entropy(hidden, head.weight, head.bias, labels.flatten())
                del hidden
            else:
                loss = summed_loss(model(**inputs).logits, labels)
            loss = loss / labels.numel()
            found["loss"] = tracker.reset()
            if loss.requires_grad:
                loss.backward()
            found.setdefault("head_backward", found["loss"])
            found.setdefault("left", tracker.live)
            found["end"] = tracker.reset()
    finally:
        for layer, forward in zip(layers, own, strict=True):
            layer.forward = forward
        for parameter in parameters:
            parameter.grad = None
    outside = [p for p in parameters if id(p) not in inside]
    phases: list[tuple[int, Work]] = [found[name] for name in ("before", "loss", "head_backward", "end")]
    peak, work = [size for size, _ in phases], [kernels for _, kernels in phases]
    root = Root(
        entered=found["entered"],
        hidden=found["hidden"],
        loss=peak[1],
        head_backward=peak[2],
        left=found["left"],
        embedding_backward=peak[3],
        gradients=sum(p.nbytes for p in outside),
        forward_work=work[0] + work[1],
        backward_work=work[2] + work[3],
    )
    return root, found["call"]


@contextlib.contextmanager
def _hidden_from(tracker: Tracker) -> Iterator[None]:
    """Inside, a tracker sees nothing."""
    kept = tracker._see
    peak, work = tracker.peak, tracker.work
    tracker.work = []
    tracker._see = lambda storage: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        tracker._see = kept
        tracker.peak, tracker.work = peak, work


@contextlib.contextmanager
def gradients_go(parameters: Sequence[nn.Parameter], stay: bool) -> Iterator[None]:
    """Inside, gradients go once they are accumulated, unless they `stay`; then they may be wider than their weights."""

    def drop(parameter: torch.Tensor) -> None:
        parameter.grad = None

    hooks = []
    if not stay:
        for parameter in parameters:
            parameter.grad_dtype = None
            hooks.append(parameter.register_post_accumulate_grad_hook(drop))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def trace_layer(
    layer: nn.Module, call: Call, config: ParallelConfig, *, again: bool, keeps_gradients: bool, on_cuda: bool
) -> Layer:
    """Runs or compiles a decoder layer, forward and backward.

    Args:
        layer: Of fake tensors, in the dtype of the computation.
        call: From `trace_root`.
        config: With nothing left to decide.
        again: Whether parallel.activation_checkpointing holds for this layer.
        keeps_gradients: As for `trace_root`.
        on_cuda: Whether it will run on CUDA.
    """
    forward: Callable[..., Any] = layer.forward
    if again:
        forward = recomputed(forward, config.activation_checkpointing == "selective")
    run = _trace_compiled if config.compile else _trace_eager
    return run(layer, forward, call, config, keeps_gradients, on_cuda)


def _trace_eager(
    layer: nn.Module, forward: Callable, call: Call, config: ParallelConfig, keeps_gradients: bool, on_cuda: bool
) -> Layer:
    tracker, parameters = Tracker(on_cuda, on_cuda), [p for p in layer.parameters() if p.requires_grad]
    offloaded: dict[int, int] = {}
    sums = [module.weight_sum.total for module in layer.modules() if isinstance(module, SummedLinear)]
    weights = {id(tensor.untyped_storage()) for tensor in [*layer.parameters(), *sums]}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if tensor.nbytes >= SMALLEST_OFFLOADED and id(storage) not in weights:
            offloaded[id(storage)] = storage.nbytes()
        return tensor

    with tracker, gradients_go(parameters, keeps_gradients):
        leaf = torch.empty(0, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = call(forward, _Source.apply(leaf, (call.shape, call.dtype)))
        size = output.untyped_storage().nbytes()
        saved = tracker.live - size
        forward_peak, forward_work = tracker.reset()
        number = _Sink.apply(output)
        del output
        number.backward()
        backward_peak, backward_work = tracker.reset()
    for parameter in parameters:
        parameter.grad = None
    return Layer(
        forward=forward_peak,
        saved=saved,
        offloadable=min(sum(offloaded.values()), saved),
        backward=backward_peak,
        gradients=sum(p.nbytes for p in parameters),
        output=size,
        forward_work=forward_work,
        backward_work=backward_work,
    )


def _trace_compiled(
    layer: nn.Module, forward: Callable, call: Call, config: ParallelConfig, keeps_gradients: bool, on_cuda: bool
) -> Layer:
    parameters = [p for p in layer.parameters() if p.requires_grad]
    first, second = _graphs(forward, call, config.activation_memory_budget)
    for parameter in parameters:
        parameter.grad = None
    return _of_graphs(Graphs(first, second, call, sum(p.nbytes for p in parameters), on_cuda, Fraction(1)))


def _graphs(forward: Callable, call: Call, budget: float | None) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The graphs of forward and backward, from which torch.compile would write kernels."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func
    from torch._inductor.compile_fx import partition_fn
    from torch._inductor.decomposition import select_decomp_table

    found: list[fx.GraphModule] = []

    def capture(graph: fx.GraphModule, _: Any) -> Any:
        found.append(graph)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(
        fw_compiler=capture, bw_compiler=capture, partition_fn=partition_fn, decompositions=select_decomp_table()
    )
    with functorch.patch(activation_memory_budget=1.0 if budget is None else budget):
        torch.compiler.reset()
        compiled = torch.compile(forward, backend=backend)
        leaf = torch.empty(0, requires_grad=True)
        _Sink.apply(call(compiled, _Source.apply(leaf, (call.shape, call.dtype)))).backward()
    assert len(found) == 2, f"a decoder layer compiles to {len(found)} graphs"
    return found[0], found[1]


@dataclass(frozen=True)
class Graphs:
    """A compiled layer's graphs of forward and backward.

    Attributes:
        first: Of forward: it returns the hidden states, then what backward needs.
        second: Of backward: of all that, and of the gradient of the hidden states.
        call: Of the layer.
        gradients: Bytes of its weights' gradients.
        on_cuda: As for `trace_layer`.
        scale: Of the micro batch that is meant, relative to that of the graphs.
    """

    first: fx.GraphModule
    second: fx.GraphModule
    call: Call
    gradients: int
    on_cuda: bool
    scale: Fraction

    def at(self, scale: Fraction) -> "Layer":
        """The bytes of the layer for micro batches so many times as large; all but weights and their gradients grows
        with them. Its kernels stay those of the graphs: time is told from a trace of its own."""
        return _of_graphs(replace(self, scale=self.scale * scale))


def _of_graphs(graphs: Graphs) -> Layer:
    """Bytes and kernels of a compiled layer."""
    call = graphs.call
    forward, backward = (_Graph(each, graphs.on_cuda, graphs.scale) for each in (graphs.first, graphs.second))
    backward.fixed = {backward.buffer(node) for node in backward.outputs if not _is_hidden(node, call)}
    by_name = {node.name: node for node in graphs.first.graph.nodes}
    hidden = [node for node in forward.placeholders if _is_hidden(node, call)]
    there = {node for node in forward.placeholders if node not in hidden}
    saved: dict[fx.Node, int] = {}
    held: dict[fx.Node, tuple[Any, int]] = {}
    for node in backward.placeholders:
        size = backward.bytes(node)
        if node.name not in by_name:  # gradients of what forward returned
            held[node] = (node, size)
            continue
        buffer = forward.buffer(by_name[node.name])
        if buffer not in there:
            saved[buffer] = forward.bytes(buffer)
            held[node] = (buffer, saved[buffer])
    return Layer(
        forward=forward.peak({node: (node, forward.bytes(node)) for node in hidden}, frees=False),
        saved=sum(saved.values()),
        offloadable=sum(size for size in saved.values() if size >= SMALLEST_OFFLOADED),
        backward=backward.peak(held, frees=True),
        gradients=graphs.gradients,
        output=forward.bytes(forward.buffer(forward.outputs[0])),
        forward_work=forward.work(),
        backward_work=backward.work(),
        graphs=graphs,
    )


def _is_hidden(node: fx.Node, call: Call) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and tuple(value.shape) == call.shape and value.dtype == call.dtype


class _Graph:
    """A graph of forward or backward, seen as the kernels that inductor makes of it: buffers, and who reads them."""

    fixed: Collection[fx.Node] = ()
    """Buffers that do not grow with the micro batch."""

    def __init__(self, module: fx.GraphModule, on_cuda: bool, scale: Fraction):
        nodes = list(module.graph.nodes)
        self._on_cuda, self._scale = on_cuda, scale
        self.placeholders = [node for node in nodes if node.op == "placeholder"]
        self.outputs = [node for node in tree_leaves(nodes[-1].args) if isinstance(node, fx.Node)]
        calls = [node for node in nodes if node.op == "call_function"]
        kernels = [node for node in calls if not _is_alias(node) and not _fuses(node)]
        in_memory = {self.buffer(node) for node in self.outputs}
        for kernel in kernels:
            in_memory |= {self.buffer(node) for node in kernel.all_input_nodes}
        in_memory |= {node for node in calls if _reduces(node)}
        # in the order of the graph: what is executed, and the buffers that it makes
        self._executed: list[fx.Node] = []
        self._made: dict[fx.Node, list[fx.Node]] = {}
        for node in calls:
            if node in kernels or (node in in_memory and self.buffer(node) is node and not _is_item(node)):
                self._executed.append(node)
                self._made[node] = _items(node)
        self._in_memory = in_memory | {made for each in self._made.values() for made in each} | set(self.placeholders)
        self._sources: dict[fx.Node, frozenset[fx.Node]] = {}
        self._reads = {
            node: frozenset().union(*(self._read_through(each) for each in node.all_input_nodes))
            for node in self._executed
        }

    def buffer(self, node: fx.Node) -> fx.Node:
        """The node whose memory a node's value lies in."""
        while _is_alias(node):
            node = node.all_input_nodes[0]
        return node

    def bytes(self, node: fx.Node) -> int:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            return 0
        size = int(value.numel() * value.element_size())
        if node not in self.fixed:
            size = int(size * self._scale)
        return -(-size // _BLOCK) * _BLOCK if self._on_cuda else size

    def _read_through(self, node: fx.Node) -> frozenset[fx.Node]:
        """The buffers that a kernel reads in which a node's value is used, which may be computed inside it."""
        base = self.buffer(node)
        if base in self._in_memory:
            return frozenset({base})
        if base not in self._sources:
            self._sources[base] = frozenset().union(*(self._read_through(each) for each in base.all_input_nodes))
        return self._sources[base]

    def peak(self, held: dict[fx.Node, tuple[Any, int]], frees: bool) -> int:
        """The most bytes at a time, of what is `held` at the start and of what is made.

        Args:
            held: For placeholders the memory that they lie in, by any key, and its size; others do not count.
            frees: Whether that memory goes with its last use.
        """
        keys = {node: key for node, (key, _) in held.items()}
        live: dict[Any, int] = dict(held.values())
        stays = {keys.get(buffer, buffer) for buffer in map(self.buffer, self.outputs)}
        if not frees:
            stays |= set(live)
        last: dict[Any, int] = {}
        for index, node in enumerate(self._executed):
            last |= {keys.get(buffer, buffer): index for buffer in self._reads[node]}
        for key in [key for key in live if key not in last and key not in stays]:
            del live[key]
        most = sum(live.values())
        for index, node in enumerate(self._executed):
            made = {buffer: self.bytes(buffer) for buffer in self._made[node]}
            read = {keys.get(buffer, buffer) for buffer in self._reads[node]}
            dying = {key: live[key] for key in read if key in live and last[key] == index and key not in stays}
            reused = 0
            if _fuses(node):  # such a kernel may write over what it is the last to read
                reused = sum(size for size in made.values() if size in dying.values())
            extra = int(workspace(*_operation(node), self._on_cuda) * self._scale)
            most = max(most, sum(live.values()) + sum(made.values()) - reused + extra)
            live |= made
            for key in [*dying, *(b for b in made if b not in last and b not in stays)]:
                live.pop(key, None)
        return most

    def work(self) -> Work:
        """The kernels."""
        found = []
        for node in self._executed:
            moved = sum(map(self.bytes, (*self._reads[node], *self._made[node])))
            operation, args = _operation(node)
            kind = kind_and_flops(operation, _values(args), _values(node.kwargs), node.meta.get("val"))
            found.append((*kind, moved))
            found += sum_read_and_written(operation, args)
        return tuple(found)


def _values(arguments: Any) -> Any:
    return tree_map(lambda item: item.meta.get("val") if isinstance(item, fx.Node) else item, arguments)


def _operation(node: fx.Node) -> tuple[Any, tuple[Any, ...]]:
    """The operator that a node calls, and its arguments, also where a wrapper keeps or sets the state of the random
    numbers for it."""
    name = str(node.target)
    if name == "run_and_save_rng_state":
        return node.args[0], node.args[1:]
    if name == "run_with_rng_state":
        return node.args[1], node.args[2:]
    return node.target, node.args


def _items(node: fx.Node) -> list[fx.Node]:
    """The nodes that stand for the tensors which a node returns."""
    if isinstance(node.meta.get("val"), torch.Tensor):
        return [node]
    return [item for user in node.users if _is_item(user) for item in _items(user)]


def _is_item(node: fx.Node) -> bool:
    return node.target is operator.getitem


def _is_view(target: Any) -> bool:
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return any(r.alias_info is not None and not r.alias_info.is_write for r in target._schema.returns)


def _is_alias(node: fx.Node) -> bool:
    """Whether a node's value lies in the memory of the value that it is made of."""
    if node.op != "call_function":
        return False
    if _is_item(node):
        return _is_view(node.all_input_nodes[0].target)
    return _is_view(node.target)


_FUSED = {  # beside what torch tags as pointwise
    *("sum", "mean", "var", "var_mean", "amax", "amin", "any", "all", "prod", "cat", "slice_scatter", "select_scatter"),
    *("full", "full_like", "zeros", "zeros_like", "ones", "ones_like", "empty", "empty_like", "new_zeros", "arange"),
    *("scalar_tensor", "clone", "copy", "constant_pad_nd", "index", "gather", "embedding", "native_dropout", "tril"),
    *("lift_fresh_copy", "repeat", "expand", "sym_size", "flip", "argmax", "argmin", "where", "bernoulli"),
}
_REDUCTIONS = {"sum", "mean", "var", "var_mean", "amax", "amin", "any", "all", "prod"}


def _name(node: fx.Node) -> str:
    target = node.target
    return target._overloadpacket.__name__ if isinstance(target, torch._ops.OpOverload) else str(target)


def _fuses(node: fx.Node) -> bool:
    """Whether inductor computes an operator inside of kernels that it writes itself."""
    target = node.target
    if isinstance(target, torch._ops.HigherOrderOperator):
        return False
    if not isinstance(target, torch._ops.OpOverload):
        return True  # of sizes and tuples
    return torch.Tag.pointwise in target.tags or target.namespace == "prims" or _name(node) in _FUSED


def _reduces(node: fx.Node) -> bool:
    return _name(node) in _REDUCTIONS

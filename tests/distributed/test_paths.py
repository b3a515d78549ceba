"""What a run takes on the devices that people rent, and what it says about it; properties are those of data sheets."""

import pytest

from tsumugu.config import ParallelConfig, TrainingRun, load
from tsumugu.distributed import paths
from tsumugu.distributed.paths import Device
from tsumugu.errors import UserError

GIB = 2**30
DEVICES = {
    "T4": Device(type="cuda", name="Tesla T4", memory=15 * GIB, capability=(7, 5)),
    "A10G": Device(type="cuda", name="NVIDIA A10G", memory=22 * GIB, capability=(8, 6)),
    "A100": Device(type="cuda", name="NVIDIA A100-SXM4-40GB", memory=39 * GIB, capability=(8, 0)),
    "L40S": Device(type="cuda", name="NVIDIA L40S", memory=44 * GIB, capability=(8, 9)),
    "H100": Device(type="cuda", name="NVIDIA H100 80GB HBM3", memory=79 * GIB, capability=(9, 0)),
    "CPU": Device(type="cpu", name="CPU"),
}
WEIGHTS = 3 * GIB  # a tenth of 30 GiB


def decide(config: ParallelConfig, device: Device, shard: int = 4, processes: int = 8, dtype: str = "bfloat16"):
    return paths.decide(config, device, shard, WEIGHTS, processes=processes, dtype=dtype)


def said(
    device: Device, dtype: str | None = None, shard: int = 4, processes: int = 8, whole: str | None = None, **options
) -> dict[str, str]:
    asked = ParallelConfig(**options)
    decided = decide(asked, device, shard, processes, paths.compute_dtype(dtype, device))
    lines = paths.describe(
        asked=asked,
        asked_dtype=dtype,
        decided=decided,
        dtype=paths.compute_dtype(dtype, device),
        device=device,
        attention="sdpa",
        mesh={"replicate": 2, "shard": shard},
        weight_bytes=WEIGHTS,
        whole_logits=whole,
    )
    return dict(line.split(": ", 1) for line in lines)


@pytest.mark.parametrize("name", ["A10G", "A100", "L40S", "H100"])
def test_gpus_since_ampere_compute_in_bfloat16_with_flash_attention_compiled(name: str):
    lines = said(DEVICES[name])
    assert lines["device"].startswith(DEVICES[name].name)
    assert lines["dtype"] == "bfloat16 (a GPU of compute capability 8.0 or more)"
    assert "fused attention where no row is padded" in lines["attention"]
    assert lines["compile"] == "every decoder layer (a GPU of compute capability 7.0 or more)"
    assert lines["optimizer"] == "fused AdamW, on the GPU"
    assert (lines["recomputation"], lines["offloading"]) == ("none", "none")


@pytest.mark.parametrize(("name", "kept"), [("A10G", False), ("A100", True), ("L40S", True), ("H100", True)])
def test_layers_stay_gathered_where_all_weights_take_less_than_a_tenth_of_the_memory(name: str, kept: bool):
    decided = decide(ParallelConfig(), DEVICES[name])
    assert decided.reshard_after_forward == ("never" if kept else "always")
    than = "3 GiB, less than 10% of" if kept else "3 GiB, not less than 10% of 22 GiB"
    assert than in said(DEVICES[name])["sharding"]
    assert said(DEVICES[name])["sharding"].startswith("replicate 2 × shard 4; ")
    for wanted in ("always", "never"):
        assert decide(ParallelConfig(reshard_after_forward=wanted), DEVICES[name]) == ParallelConfig(
            reshard_after_forward=wanted, compile=True, fsdp=True, sync_each_micro_batch=name == "A10G"
        )


@pytest.mark.parametrize(("name", "once"), [("A10G", False), ("A100", True), ("L40S", True), ("H100", True)])
def test_gradients_are_exchanged_once_a_step_where_their_sums_take_less_than_a_fifth_of_the_memory(
    name: str, once: bool
):
    assert decide(ParallelConfig(), DEVICES[name]).sync_each_micro_batch is not once
    assert ("exchanged once a step (their sums take 6 GiB, less than 20% of" in said(DEVICES[name])["sharding"]) is once
    for wanted, words in ((True, "every micro batch"), (False, "once a step")):
        line = said(DEVICES[name], sync_each_micro_batch=wanted)["sharding"]
        assert line.endswith(f"gradients are exchanged {words} (parallel.sync_each_micro_batch)")
    # in float32 the sums are as large as the weights
    assert decide(ParallelConfig(), DEVICES["A10G"], dtype="float32").sync_each_micro_batch is False


def test_one_device_that_holds_all_is_not_sharded_over():
    lines = said(DEVICES["H100"], shard=1, processes=1)
    assert lines["sharding"] == "none (one device holds all)"
    assert lines["optimizer"].startswith("AdamW, on the GPU, by ")
    assert "16 bits beside them" in lines["optimizer"]
    assert said(DEVICES["H100"], "float32", 1, 1)["optimizer"] == "fused AdamW, on the GPU"
    for options in ({"fsdp": True}, {"offload_optimizer": True}):
        assert said(DEVICES["H100"], None, 1, 1, **options)["sharding"].startswith("replicate 2 × shard 1")
    assert said(DEVICES["H100"], "float16", 1, 1)["sharding"].startswith("replicate 2 × shard 1")
    with pytest.raises(UserError, match=r"parallel\.fsdp is false, but there are 8 processes"):
        said(DEVICES["H100"], fsdp=False)


def test_whether_logits_are_whole_is_said():
    assert said(DEVICES["H100"])["loss"] == "in chunks of tokens"
    assert said(DEVICES["H100"], whole="a cap")["loss"] == "of whole logits (a cap)"


def test_a_memory_budget_is_for_compiled_layers():
    assert "exceeds 60%" in said(DEVICES["H100"], activation_memory_budget=0.6)["recomputation"]
    with pytest.raises(UserError, match="they are not compiled"):
        said(DEVICES["CPU"], activation_memory_budget=0.6)


def test_a_cpu_computes_in_float32_uncompiled_and_has_nothing_to_offload_to():
    lines = said(DEVICES["CPU"], shard=1, offload_activations=True)
    assert lines["dtype"] == "float32 (a CPU)"
    assert lines["compile"] == "no (a CPU)"
    assert lines["optimizer"] == "fused AdamW, on the host"
    assert "stay gathered" in lines["sharding"]
    assert lines["offloading"].startswith("no effect: parallel.offload_activations on a CPU")
    assert "are gathered twice" in said(DEVICES["CPU"], shard=2)["sharding"]


def test_a_gpu_before_ampere_falls_back_to_float32_and_says_so_where_it_is_asked_for_bfloat16():
    lines = said(DEVICES["T4"])
    assert lines["dtype"] == "float32 (bfloat16 needs compute capability 8.0)"
    assert lines["attention"] == "sdpa (no fused attention: float32 on compute capability 7.5)"
    assert "emulated" in said(DEVICES["T4"], "bfloat16")["dtype"]
    assert said(DEVICES["T4"], "float16")["dtype"] == "float16 (train.dtype; with a dynamic loss scale)"


def test_what_cannot_be_compiled_is_not_by_default_and_refused_on_request():
    bare = Device(type="cuda", name="NVIDIA H100", memory=79 * GIB, capability=(9, 0), no_compiler="there is no gcc")
    old = Device(type="cuda", name="Tesla P100", memory=16 * GIB, capability=(6, 0))
    assert said(bare)["compile"] == "no (there is no gcc)"
    assert said(old)["compile"] == "no (Triton needs compute capability 7.0, Tesla P100 has 6.0)"
    with pytest.raises(UserError, match=r"parallel\.compile is true, but there is no gcc"):
        said(bare, compile=True)
    assert said(DEVICES["H100"], compile=False)["compile"] == "no (parallel.compile)"
    assert said(DEVICES["CPU"], compile=True)["compile"] == "every decoder layer (parallel.compile)"


def test_recomputation_and_offloading_are_named():
    lines = said(
        DEVICES["A10G"],
        activation_checkpointing="full",
        checkpoint_every_nth_layer=2,
        offload_activations=True,
        offload_optimizer=True,
    )
    assert lines["recomputation"] == "all but the layers' inputs, of every layer whose number is a multiple of 2"
    assert lines["offloading"] == "parallel.offload_activations and parallel.offload_optimizer"
    assert lines["optimizer"] == "fused AdamW, on the host"


def test_what_a_selectively_recomputed_layer_keeps_cannot_be_offloaded():
    with pytest.raises(UserError, match="cannot move what activation_checkpointing selective keeps"):
        ParallelConfig(offload_activations=True, activation_checkpointing="selective")


def test_layers_split_by_tensor_parallelism_are_compiled_where_torch_can(monkeypatch):
    monkeypatch.setattr("torch.__version__", "2.13.0+cu130")
    assert said(DEVICES["H100"], tensor_degree=2)["compile"].startswith("no (torch 2.13.0+cu130 does not compile")
    with pytest.raises(UserError, match=r"compile is true, but torch 2\.13\.0\+cu130 does not"):
        decide(ParallelConfig(tensor_degree=2, compile=True), DEVICES["H100"])
    monkeypatch.setattr("torch.__version__", "2.11.0+cu130")
    assert said(DEVICES["H100"], tensor_degree=2)["compile"].startswith("every decoder layer")


def test_fp8_is_for_gpus_that_know_it_in_bfloat16_compiled(monkeypatch):
    with pytest.raises(UserError, match=r"parallel\.fp8 is rowwise, but it needs a GPU of compute capability 8\.9"):
        said(DEVICES["A100"], fp8="rowwise")
    monkeypatch.setattr(paths.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="torchao is not installed"):
        said(DEVICES["H100"], fp8="rowwise")
    monkeypatch.setattr(paths.importlib.util, "find_spec", lambda name: object())
    assert said(DEVICES["H100"], fp8="rowwise")["dtype"].endswith(
        "; layers' matrix products in fp8, scaled rowwise (parallel.fp8)"
    )
    with pytest.raises(UserError, match=r"train\.dtype is float16"):
        said(DEVICES["L40S"], "float16", fp8="tensorwise")
    with pytest.raises(UserError, match="layers are not compiled"):
        said(DEVICES["L40S"], fp8="tensorwise", compile=False)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data.packing": "pad_left"}, "needs rows of one length, which data.packing pad_left does not make"),
        ({"data.sequence_length": 24}, "a multiple of 16"),
        ({"model.preset": None, "model.pretrained": "x", "model.lora.rank": 4}, r"beside model\.lora"),
        ({"parallel.tensor_degree": 2}, r"does not know layers split by parallel\.tensor_degree"),
    ],
)
def test_fp8_is_refused_beside_what_it_cannot_serve(tmp_path, changes: dict, said: str):
    base = {"model.preset": "tiny", "data.store": "store", "data.sequence_length": 32, "data.packing": "concatenate"}
    base |= {"train.max_steps": 1, "train.global_batch_size": 1, "parallel.fp8": "rowwise"}
    flags = [f"--{key}={value}" for key, value in (base | changes).items() if value is not None]
    with pytest.raises(UserError, match=said):
        load(TrainingRun, [], flags)

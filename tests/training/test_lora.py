"""LoRA: however it is sharded, packed, recomputed and compiled, a run takes the steps of a plain loop with peft.

The reference is peft on stock transformers in float64, one document at a time, and torch's AdamW in its plainest form.
What is exported is that model too, merged or as peft loads it.
"""

import json
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from support.models import VOCABULARY, exact_models, stock_model, tiny_config
from support.ranks import run_ranks
from support.runs import StopAfter, figures, run_config, whole
from support.stores import store_with_new_ids, write_store
from transformers import AutoModelForCausalLM, PreTrainedModel

from tsumugu.config import LoraConfig
from tsumugu.distributed.environment import process_group
from tsumugu.distributed.parallelize import recomputed as with_recomputation
from tsumugu.errors import UserError
from tsumugu.export import CertificateError, export
from tsumugu.model import lora, masters, nf4
from tsumugu.training import checkpoint
from tsumugu.training.signals import StopRequest
from tsumugu.training.trainer import Outcome, Trainer, train

peft = pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

MODELS = {"gpt_neox": False, "gpt2": True, "llama": False, "qwen3": True}  # tied
LINEAR = {
    "gpt_neox": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
LINEAR["qwen3"] = LINEAR["llama"]
EMBEDDING = {"gpt_neox": "gpt_neox.embed_in", "gpt2": "transformer.wte", "llama": "model.embed_tokens"}
EMBEDDING["qwen3"] = EMBEDDING["llama"]
NEW = {131: [5, 9], 132: [], 133: [5, 9]}  # the last stands for the first
MESHES = {"1": (1, 1), "shard 2": (2, 1), "replicate 2": (1, 2), "2 × 2": (2, 2), "shard 4": (4, 1)}
STEPS, WIDTH, LEARNING_RATE, DECAY, CLIP, SEED, RANK, ALPHA = 5, 24, 1e-2, 0.1, 0.3, 7, 3, 12.0


class Case(NamedTuple):
    """One way to take the steps."""

    model: str
    store: str
    packing: str
    mesh: str = "1"
    recomputed: str = "none"
    compiled: bool = False
    targets: tuple[str, ...] | None = None
    quantize: str | None = None

    @property
    def base(self) -> str:
        """The folder of its model."""
        return f"{self.model} of 64" if self.quantize else self.model


CASES = [
    Case("gpt_neox", "plain", "best_fit"),
    Case("gpt_neox", "extended", "pad_left", recomputed="selective"),
    Case("gpt_neox", "plain", "best_fit", "shard 2"),
    Case("gpt_neox", "extended", "best_fit", "shard 2", "full"),
    Case("gpt_neox", "extended", "best_fit", "replicate 2"),
    Case("gpt2", "extended", "pad_left", "shard 2"),
    Case("llama", "plain", "best_fit", "replicate 2", targets=("q_proj", "v_proj")),
    Case("qwen3", "extended", "best_fit"),
    Case("qwen3", "extended", "best_fit", "shard 2", "selective"),
    Case("gpt_neox", "plain", "best_fit", recomputed="full", compiled=True, quantize="nf4"),
    Case("gpt_neox", "extended", "best_fit", "shard 2", quantize="nf4"),
    Case("gpt_neox", "extended", "best_fit", "2 × 2"),
    Case("gpt_neox", "extended", "best_fit", "shard 4", quantize="nf4"),
    Case("llama", "extended", "best_fit", "replicate 2", "selective", targets=("q_proj",), quantize="nf4"),
]


def documents(new: bool) -> tuple[list[list[int]], list[list[int]]]:
    """Sixteen documents that fill eight rows of WIDTH in pairs, and their masks."""
    generator = np.random.default_rng(1)
    lengths = [1 + inputs for shorter in range(5, 13) for inputs in (shorter, WIDTH - shorter)]
    ids = [generator.integers(4, VOCABULARY, length).tolist() for length in lengths]
    if new:
        for index, document in enumerate(ids):
            document[index % 3 + 1] = VOCABULARY + index % 3
    return ids, [[int(position >= 1 + index % 4) for position in range(len(d))] for index, d in enumerate(ids)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, a store, and a store of an extension of its tokenizer."""
    folder = tmp_path_factory.mktemp("lora")
    for name, tied in MODELS.items():
        stock_model(tiny_config(name, tied)).save_pretrained(folder / name)
    for name in ("gpt_neox", "llama"):  # as NF4 needs it
        wide = tiny_config(name, MODELS[name], hidden_size=64, intermediate_size=128)
        stock_model(wide).save_pretrained(folder / f"{name} of 64")
    for name, new in (("plain", False), ("made", True)):
        ids, masks = documents(new)
        write_store(folder / name, ids, ids[:3], masks=masks)
    store_with_new_ids(folder / "made", folder / "extended")
    return folder


def config_of(folder: Path, model: str, store: str, lora: dict[str, Any] | None = None, **changes: Any):
    defaults = {
        "model.pretrained": str(folder / model),
        "model.lora": LoraConfig(**{"rank": RANK, "alpha": ALPHA} | (lora or {})),
        "tokenizer.path": str(folder / "plain" / "tokenizer"),
        "data.packing": "best_fit",
        "data.sequence_length": WIDTH,
        "train.max_steps": STEPS,
        "train.global_batch_size": 8,
        "train.micro_batch_size": 4,
        "train.seed": SEED,
        "train.dtype": "float32",
        "optimizer.learning_rate": LEARNING_RATE,
        "optimizer.weight_decay": DECAY,
        "optimizer.max_grad_norm": CLIP,
        "schedule.kind": "constant",
        "schedule.warmup_steps": 0,
    }
    return run_config(folder / store, defaults | changes)


@dataclass
class Result:
    """What was trained, before the first step and after the last, losses and gradient norms."""

    start: dict[str, torch.Tensor]
    losses: list[float]
    norms: list[float]
    weights: dict[str, torch.Tensor]


def trained(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: whole(parameter) for name, parameter in model.named_parameters() if parameter.requires_grad}


def train_all(folder: Path, run_dir: Path, cases: list[Case]) -> dict[Case, Result]:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(run_dir / "inductor")
    results = {}
    with process_group() as environment, exact_models():
        for case in cases:
            shard, replicate = MESHES[case.mesh]
            changes = {
                "data.packing": case.packing,
                "train.global_batch_size": 8 if case.packing == "best_fit" else 16,
                "train.micro_batch_size": min(4, 8 // environment.world_size),
                "train.dtype": "float64",
                "parallel.shard_degree": shard,
                "parallel.replicate_degree": replicate,
                "parallel.activation_checkpointing": case.recomputed,
                "parallel.compile": case.compiled,
            }
            lora = {"targets": list(case.targets) if case.targets else None, "quantize": case.quantize}
            config = config_of(folder, case.base, case.store, lora, **changes)
            trainer = Trainer(config, run_dir, environment)
            start, steps = trained(trainer.model), []
            for _ in range(STEPS):
                steps.append(trainer.train_step(StopRequest()).figures())
                trainer.step += 1
            losses, norms = [step.loss for step in steps], [step.grad_norm for step in steps]
            results[case] = Result(start, losses, norms, trained(trainer.model))
            if case.compiled:
                torch.compiler.reset()
    return results


def cases_of(processes: int) -> list[Case]:
    return [case for case in CASES if math.prod(MESHES[case.mesh]) == processes]


@pytest.fixture(scope="module")
def results(folder: Path, pair: "Pair", tmp_path_factory: pytest.TempPathFactory) -> dict[Case, Result]:
    run_dir = tmp_path_factory.mktemp("runs")
    found = train_all(folder, run_dir, cases_of(1))
    return found | pair.results | run_ranks(train_all, 4, folder, run_dir, cases_of(4))[0]


def base_model(folder: Path, name: str, store: str, dtype: torch.dtype) -> PreTrainedModel:
    """The stock model, where the tokenizer was extended with the new rows that the documentation promises."""
    model = AutoModelForCausalLM.from_pretrained(folder / name, dtype=dtype)
    if store == "extended":
        model.resize_token_embeddings(VOCABULARY + 3, mean_resizing=False)
        with torch.no_grad():
            for end in (model.get_input_embeddings(), model.get_output_embeddings()):
                for row, ids in NEW.items():
                    end.weight[row] = end.weight[ids or slice(0, VOCABULARY)].mean(0)
    return model


def through_nf4(weight: torch.Tensor) -> torch.Tensor:
    """What bitsandbytes itself makes of a weight."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    held, state = quantize_4bit(weight.float(), blocksize=64, quant_type="nf4")
    return dequantize_4bit(held, state).to(weight.dtype)


def with_peft(folder: Path, case: Case) -> torch.nn.Module:
    model = base_model(folder, case.base, case.store, torch.float64)
    if case.quantize:
        for name, parameter in model.named_parameters():
            if name.endswith(tuple(f"{part}.weight" for part in LINEAR[case.model])):
                parameter.data = through_nf4(parameter.data)
    new = None
    if case.store == "extended":
        new = {EMBEDDING[case.model]: list(NEW)} | ({} if MODELS[case.model] else {"lm_head": list(NEW)})
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, target_modules=list(case.targets or LINEAR[case.model]),
        fan_in_fan_out=case.model == "gpt2", trainable_token_indices=new,
    )  # fmt: skip
    return peft.get_peft_model(model, config, autocast_adapter_dtype=False)


def reference(folder: Path, case: Case, start: dict[str, torch.Tensor]) -> Result:
    """A plain loop in float64 from the adapters `start`."""
    model = with_peft(folder, case)
    prefix = "base_model.model."
    parameters = {n.removeprefix(prefix): p for n, p in model.named_parameters() if p.requires_grad}
    assert parameters.keys() == start.keys()
    for name, parameter in parameters.items():
        if "token_adapter" in name:
            torch.testing.assert_close(parameter, start[name], rtol=0, atol=1e-7)  # means are taken in float32
        parameter.data.copy_(start[name])
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=LEARNING_RATE, betas=(0.9, 0.95), eps=1e-8, weight_decay=DECAY, foreach=False
    )
    losses, norms = [], []
    for _ in range(STEPS):
        total, count = torch.zeros((), dtype=torch.float64), 0
        for ids, mask in zip(*documents(case.store == "extended"), strict=True):
            labels = torch.tensor([id if kept else -100 for id, kept in zip(ids[1:], mask[1:], strict=True)])
            logits = model(torch.tensor([ids[:-1]])).logits[0]
            total = total + F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
            count += int((labels != -100).sum())
        optimizer.zero_grad()
        (total / count).backward()
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in parameters.values()))
        for parameter in parameters.values():
            parameter.grad *= min(1.0, CLIP / (norm + 1e-6))
        optimizer.step()
        losses.append(total.item() / count)
        norms.append(norm)
    return Result(start, losses, norms, {name: p.detach() for name, p in parameters.items()})


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_case_trains_as_a_plain_loop_with_peft_does(case: Case, folder: Path, results: dict[Case, Result]):
    found = results[case]
    with exact_models():
        expected = reference(folder, case, found.start)
    assert max(expected.norms) > CLIP
    np.testing.assert_allclose(found.losses, expected.losses, rtol=0, atol=1e-10)
    np.testing.assert_allclose(found.norms, expected.norms, rtol=0, atol=1e-10)
    for name, weight in expected.weights.items():
        torch.testing.assert_close(found.weights[name], weight, rtol=0, atol=1e-10)
        assert not torch.equal(weight, found.start[name])


def test_adapters_start_as_those_of_peft_and_alike_on_every_mesh(results: dict[Case, Result]):
    first = {}
    for case, result in results.items():
        for name, weight in result.start.items():
            if "lora_B" in name:
                assert not weight.any()
            elif "lora_A" in name:  # uniform within 1 / √inputs
                bound = 1 / math.sqrt(weight.shape[1])
                assert 0.8 * bound < weight.abs().max() <= bound
                assert abs(weight.std() * math.sqrt(3) / bound - 1) < 0.2
            if case.targets is None:
                torch.testing.assert_close(weight, first.setdefault((case.base, name), weight), rtol=0, atol=0)
    drawn = [w for (model, name), w in first.items() if model == "gpt_neox" and "lora_A" in name]
    assert not any(torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i] if a.shape == b.shape)


def test_frozen_weights_have_the_dtype_of_the_computation_and_no_moments(folder: Path, tmp_path: Path):
    with process_group() as environment:
        config = config_of(folder, "gpt_neox", "plain", **{"train.dtype": "bfloat16", "train.log_norms": True})
        trainer = Trainer(config, tmp_path / "run", environment)
        trainer.train(StopAfter(None))
        dtypes = {parameter.requires_grad: set() for parameter in trainer.model.parameters()}
        for parameter in trainer.model.parameters():
            dtypes[parameter.requires_grad].add(parameter.dtype)
        stock = AutoModelForCausalLM.from_pretrained(folder / "gpt_neox", dtype=torch.bfloat16).state_dict()
        for name, parameter in trainer.model.named_parameters():
            if not parameter.requires_grad:
                assert torch.equal(whole(parameter), stock[name.replace(".base_layer", "")])
        assert dtypes == {False: {torch.bfloat16}, True: {torch.bfloat16}}
        whole_masters = [m.whole() for p in trainer.model.parameters() if p.requires_grad and (m := masters.of(p))]
        assert {master.dtype for master in whole_masters} == {torch.float32}
        assert len(trainer.optimizer.state) == len(trained(trainer.model)) == 2 * 4 * 2
        norms = sum(master.square().sum().item() for master in whole_masters)
    steps = [line for line in figures(tmp_path / "run") if "loss" in line]
    losses = [line["loss"] for line in steps]
    assert losses == sorted(losses, reverse=True)
    for line in steps:  # of what is trained
        parts = {name.partition("/")[2] for name in line if name.startswith("parameter_norm/")}
        assert parts == {"layer.0", "layer.1"}
        both = math.hypot(line["grad_norm/layer.0"], line["grad_norm/layer.1"])
        assert both == pytest.approx(line["grad_norm"], rel=1e-5)
    assert steps[-1]["parameter_norm"] == pytest.approx(math.sqrt(norms), rel=0.1)  # a step earlier
    held = checkpoint.read_metadata(checkpoint.folder(tmp_path / "run", STEPS)).state_dict_metadata
    weights = [name for name in held if name.startswith("model.")]
    assert len(weights) == 2 * 4 * 2
    assert all(".lora_" in name for name in held if ".exp_avg" in name or name in weights)


def nf4_in_bfloat16(folder: Path, run_dir: Path) -> tuple[dict[str, torch.Tensor], int]:
    """After some steps the frozen weights as they are used, by transformers' names; and the bytes of all layers."""
    config = config_of(folder, "llama of 64", "plain", {"quantize": "nf4"}, **{"train.dtype": "bfloat16"})
    with process_group() as environment:
        trainer = Trainer(config, run_dir, environment)
        trainer.train_step(StopRequest())
        used = {}
        for name, parameter in trainer.model.named_parameters():
            if name.endswith("codes"):
                scales = whole(trainer.model.get_parameter(name.removesuffix("codes") + "scales"))
                codes, scales = whole(parameter).view(torch.uint8), scales.view(torch.float32)
                used[name.replace(".base_layer.codes", ".weight")] = nf4.dequantize(codes, scales, torch.bfloat16)
            elif not parameter.requires_grad and "scales" not in name:
                used[name] = whole(parameter)
        layers = [p for n, p in trainer.model.named_parameters() if "layers" in n and not p.requires_grad]
        return used, sum(whole(parameter).nbytes for parameter in layers)


def test_nf4_in_bfloat16_holds_four_and_a_half_bits_a_weight_and_none_is_rounded_on_its_way(
    folder: Path, pair: "Pair", tmp_path: Path
):
    stock = AutoModelForCausalLM.from_pretrained(folder / "llama of 64").state_dict()
    for used, size in (nf4_in_bfloat16(folder, tmp_path), pair.nf4):
        assert used.keys() == stock.keys()
        for name, weight in stock.items():
            linear = name.endswith(tuple(f"{part}.weight" for part in LINEAR["llama"]))
            expected = through_nf4(weight) if linear else weight
            assert torch.equal(used[name], expected.bfloat16())
        weights = sum(w.numel() for name, w in stock.items() if name.endswith("proj.weight"))
        assert size == weights * (4 + 32 / 64) / 8 + 2 * 2 * 64 * 2  # and two norms a layer


def test_nf4_is_refused_where_it_cannot_be(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UserError, match=r"needs layers with a multiple of 64 inputs; attention\S+ has 32"):
        train(config_of(folder, "gpt_neox", "plain", {"quantize": "nf4"}), tmp_path / "run")
    with pytest.raises(UserError, match=r"knows linear layers alone, and attn\.c_attn is a Conv1D"):
        train(config_of(folder, "gpt2", "plain", {"quantize": "nf4"}), tmp_path / "run")
    with pytest.raises(UserError, match=r"model\.lora has no rank"):
        LoraConfig(quantize="nf4")
    config = config_of(folder, "llama of 64", "plain", {"quantize": "nf4"})
    monkeypatch.setattr(nf4, "dequantize", lambda codes, scales, dtype: torch.zeros(len(codes), 2 * codes.shape[1]))
    with pytest.raises(UserError, match="bitsandbytes computes other weights on cpu"):
        train(config, tmp_path / "run")
    monkeypatch.setattr(nf4.importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else True)
    with pytest.raises(UserError, match=r"needs the bitsandbytes package .pip install"):
        train(config, tmp_path / "run")


def run_and_resume(folder: Path, output: Path) -> None:
    lora, changes = {"dropout": 0.1}, {"train.dtype": "bfloat16", "checkpoint.every": 2, "checkpoint.keep": 9}
    config = config_of(folder, "gpt_neox", "extended", lora, **changes)
    assert train(config, output / "whole") == Outcome(STEPS, STEPS)
    with process_group() as environment:
        trainer = Trainer(config, output / "stopped", environment)
        assert trainer.train(StopAfter(3)) == Outcome(3, STEPS, interrupted=True)
        assert train(config, output / "stopped") == Outcome(STEPS, STEPS)
    assert figures(output / "stopped") == figures(output / "whole")


def adapter_of(run: Path | str, output: Path) -> dict[str, torch.Tensor]:
    export(str(run), output, adapter=True)
    return load_file(output / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with new ids, dropout and bfloat16; and beside it one that was stopped and went on."""
    output = tmp_path_factory.mktemp("run")
    run_and_resume(folder, output)
    return output / "whole"


class Pair(NamedTuple):
    """What two processes found, and the folder of their runs."""

    results: dict[Case, Result]
    nf4: tuple[dict[str, torch.Tensor], int]
    output: Path


def as_a_pair(folder: Path, output: Path) -> Pair:
    run_and_resume(folder, output)
    return Pair(train_all(folder, output / "cases", cases_of(2)), nf4_in_bfloat16(folder, output / "nf4"), output)


@pytest.fixture(scope="module")
def pair(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return run_ranks(as_a_pair, 2, folder, tmp_path_factory.mktemp("pair"))[0]


def test_a_run_that_goes_on_is_the_run_that_was_not_stopped(run: Path, pair: Pair, tmp_path: Path):
    for place in (run.parent, pair.output):
        for step in (4, STEPS):
            expected = adapter_of(f"{place}/whole@{step}", tmp_path / f"{place.name} {step}")
            found = adapter_of(f"{place}/stopped@{step}", tmp_path / f"{place.name} {step} stopped")
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_going_back_after_a_spike_takes_the_adapters_of_the_checkpoint(folder: Path, run: Path, tmp_path: Path):
    shutil.copytree(run, tmp_path / "run")
    config = config_of(folder, "gpt_neox", "extended", {"dropout": 0.1}, **{"train.dtype": "bfloat16"})
    with process_group() as environment:
        trainer = Trainer(config, tmp_path / "run", environment)
        at_the_end = trained(trainer.model)
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                if parameter.requires_grad:
                    parameter.add_(1.0)
        newest = trainer._newest()
        assert newest
        trainer._rewind(newest, STEPS + 1)
        found = trained(trainer.model)
    assert all(torch.equal(found[name], at_the_end[name]) for name in at_the_end)


def test_a_run_with_adapters_is_extended_by_another(folder: Path, tmp_path: Path):
    train(config_of(folder, "gpt_neox", "extended"), tmp_path / "whole")
    train(config_of(folder, "gpt_neox", "extended", **{"train.max_steps": 2}), tmp_path / "short")
    changes = {"model.pretrained": None, "tokenizer.path": None, "train.start_from": str(tmp_path / "short")}
    further = config_of(folder, "gpt_neox", "extended", **changes, **{"train.start_state": "full"})
    assert train(further, tmp_path / "further") == Outcome(STEPS, STEPS)
    expected = adapter_of(tmp_path / "whole", tmp_path / "a")
    for name, weight in adapter_of(tmp_path / "further", tmp_path / "b").items():
        assert torch.equal(weight, expected[name])
    other = config_of(folder, "gpt_neox", "extended", {"rank": 2}, **changes)
    with pytest.raises(UserError, match=r"has other adapters: model\.lora\.rank was 3, now 2"):
        train(other, tmp_path / "other")
    full = config_of(folder, "gpt_neox", "extended", {"rank": None, "alpha": None}, **changes)
    with pytest.raises(UserError, match=r"was trained with model\.lora, and this run is not .`tsumugu export"):
        train(full, tmp_path / "full")


def test_another_base_model_is_refused_and_the_same_elsewhere_is_not(folder: Path, run: Path, tmp_path: Path):
    shutil.copytree(run, tmp_path / "run")
    config = json.loads((run / "checkpoints" / f"step-{STEPS:08d}" / "state.json").read_text())["lora"]
    assert config["base"] == str(folder / "gpt_neox")
    shutil.copytree(folder / "gpt_neox", tmp_path / "moved")
    changes = {"train.dtype": "bfloat16", "model.pretrained": str(tmp_path / "moved")}
    resumed = config_of(folder, "", "extended", {"dropout": 0.1}, **changes)
    assert train(resumed, tmp_path / "run").already_done
    other = stock_model(tiny_config("gpt_neox", False), seed=1)
    other.save_pretrained(tmp_path / "moved")
    with pytest.raises(UserError, match="another run: the base model's sha256 was"):
        train(resumed, tmp_path / "run")
    other.save_pretrained(folder / "soon another")
    state = config | {"base": str(folder / "soon another")}
    file = tmp_path / "run" / "checkpoints" / f"step-{STEPS:08d}" / "state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora": state}))
    marker = file.with_name("COMPLETE")
    files = json.loads(marker.read_text())
    files["state.json"] = {"size": file.stat().st_size, "sha256": checkpoint.sha256(file)}
    marker.write_text(json.dumps(files))
    with pytest.raises(UserError, match="soon another is not the model beside which the adapters"):
        export(str(tmp_path / "run"), tmp_path / "export")
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [("rank", 2), ("alpha", 6.0), ("dropout", 0.2), ("targets", ["dense"]), ("quantize", "nf4")],
)
def test_other_adapters_are_not_resumed(key: str, value: Any, folder: Path, run: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(nf4, "check", lambda layers, device: None)  # whose layers are too narrow
    config = config_of(folder, "gpt_neox", "extended", {"dropout": 0.1, key: value}, **{"train.dtype": "bfloat16"})
    with pytest.raises(UserError, match=rf"another run: model\.lora\.{key} was"):
        train(config, run)


def train_and_export(folder: Path, model: str, store: str, output: Path, quantize: str | None = None) -> torch.Tensor:
    """The logits of the trained model, which is exported in every form."""
    config = config_of(folder, model, store, {"quantize": quantize})
    with process_group() as environment:
        trainer = Trainer(config, output / "run", environment)
        trainer.train(StopAfter(None))
        trainer.model.eval()
        with torch.no_grad():
            logits = trainer.model(torch.tensor(documents(store == "extended")[0][:1])).logits
    for dtype in ("float32", "bfloat16"):
        export(str(output / "run"), output / dtype, dtype=dtype)
    assert export(str(output / "run"), output / "adapter", adapter=True)
    assert not export(str(output / "run"), output / "adapter", adapter=True)
    return logits


def an_adapter_forgotten(name: str, weight: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    return base if name == "gpt_neox.layers.1.attention.dense.weight" else weight


def an_adapter_twice(name: str, weight: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    return 2 * weight - base if name == "gpt_neox.layers.0.mlp.dense_4h_to_h.weight" else weight


def a_new_row_lost(name: str, weight: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    return weight.index_fill(0, torch.tensor([132]), 0.0) if name == "lm_head.weight" else weight


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (an_adapter_forgotten, "merged, the adapters give logits that differ by up to"),
        (an_adapter_twice, "merged, the adapters give logits that differ by up to"),
        (a_new_row_lost, "tensor embed_out.weight has other values"),
    ],
)
def test_a_wrong_merge_is_found(
    fault, message: str, folder: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    merged = lora.merged

    def wrongly(model, dtype, quantized=()):
        with lora.unwrapped(model):
            base = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
        read = merged(model, dtype, quantized)
        return lambda name: fault(name, read(name), base[name])

    monkeypatch.setattr(lora, "merged", wrongly)
    with pytest.raises(CertificateError, match=message):
        export(str(run), tmp_path / "model")


@pytest.mark.parametrize(("model", "store"), [*((m, "extended") for m in MODELS), ("gpt_neox", "plain")])
def test_the_merged_model_is_the_adapter_loaded_by_peft(model: str, store: str, folder: Path, tmp_path: Path):
    expected = train_and_export(folder, model, store, tmp_path)
    inputs = torch.tensor(documents(store == "extended")[0][:1])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "float32").eval()
    base = AutoModelForCausalLM.from_pretrained(folder / model)
    if store == "extended":
        base.resize_token_embeddings(VOCABULARY + 3)  # as the adapter's README says
        assert "resize_token_embeddings(134)" in (tmp_path / "adapter" / "README.md").read_text()
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(inputs).logits, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(loaded(inputs).logits, expected, rtol=0, atol=1e-5)
        assert (base_model(folder, model, store, torch.float32)(inputs).logits - expected).abs().max() > 0.1
    described = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == model
    assert json.loads((tmp_path / "adapter" / "tsumugu.json").read_text())["base"] == model
    for file in (file for made in ("adapter", "float32") for file in (tmp_path / made).iterdir()):
        content = file.read_bytes()
        assert not [place for place in (folder, tmp_path, Path.home()) if f"{place}/".encode() in content], file
    assert set(described["target_modules"]) == set(LINEAR[model])
    halved = AutoModelForCausalLM.from_pretrained(tmp_path / "bfloat16", dtype="auto").state_dict()
    for name, weight in merged.state_dict().items():  # rounded once, after the sum
        assert torch.equal(halved[name], weight.bfloat16())


def test_the_merged_model_is_the_adapter_loaded_by_peft_beside_what_bitsandbytes_holds_in_nf4(
    folder: Path, tmp_path: Path
):
    expected = train_and_export(folder, "llama of 64", "plain", tmp_path, "nf4")
    inputs = torch.tensor(documents(False)[0][:1])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "float32").eval()
    readme = (tmp_path / "adapter" / "README.md").read_text()
    (held,) = [line for line in readme.splitlines() if line.startswith("held = ")]
    names: dict[str, Any] = {}
    exec(f"import torch\nfrom transformers import BitsAndBytesConfig\n{held}", names)
    base = AutoModelForCausalLM.from_pretrained(
        folder / "llama of 64", quantization_config=names["held"], dtype=torch.float32, device_map="cpu"
    )
    # as in training: else bitsandbytes has a faster kernel on some processors, which rounds
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").train()
    exact = AutoModelForCausalLM.from_pretrained(folder / "llama of 64").eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(inputs).logits, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(loaded(inputs).logits, expected, rtol=0, atol=1e-5)
        beside = peft.PeftModel.from_pretrained(exact, tmp_path / "adapter").eval()
        assert (beside(inputs).logits - expected).abs().max() > 0.01


def test_what_cannot_be_adapted_is_refused(folder: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"targets names q_proj.* .it has: query_key_value, dense, dense_h_to_4h"):
        train(config_of(folder, "gpt_neox", "plain", {"targets": ["dense", "q_proj"]}), tmp_path)
    with pytest.raises(UserError, match=r"model\.lora is set beside model\.preset"):
        config_of(folder, "gpt_neox", "plain", **{"model.pretrained": None, "model.preset": "tiny"})
    with pytest.raises(UserError, match=r"model\.lora has no rank"):
        LoraConfig(alpha=8.0)
    full = config_of(folder, "gpt_neox", "plain", {"rank": None, "alpha": None}, **{"train.max_steps": 1})
    train(full, tmp_path / "full")
    with pytest.raises(UserError, match=r"was trained without model\.lora, and has no adapters"):
        export(str(tmp_path / "full"), tmp_path / "adapter", adapter=True)
    changes = {"model.pretrained": None, "train.start_from": str(tmp_path / "full")}
    with pytest.raises(UserError, match=r"was trained without model\.lora, and this run"):
        train(config_of(folder, "gpt_neox", "plain", **changes), tmp_path / "new")
    with pytest.raises(UserError, match=r"another run: one without model\.lora"):
        train(config_of(folder, "gpt_neox", "plain", **{"train.max_steps": 1}), tmp_path / "full")


@pytest.mark.parametrize("recomputed", ["none", "full", "selective"])
def test_no_weight_that_nf4_multiplies_out_is_kept_for_backward_where_layers_are_compiled(recomputed: str):
    """The compiler would keep those of forward for backward, which multiplies out the same."""
    linear = nf4.Linear(torch.nn.Linear(128, 512, bias=False), torch.float32)
    weight = torch.randn(512, 128)
    codes, scales = nf4.quantize(weight)
    linear.codes.data.copy_(codes.contiguous().view(torch.float32))
    linear.scales.data.copy_(scales.contiguous().view(torch.float32))
    forward = linear.forward if recomputed == "none" else with_recomputation(linear.forward, recomputed == "selective")
    torch.compiler.reset()
    hidden = torch.randn(4, 128, requires_grad=True)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        output = torch.compile(forward)(hidden)
    output.square().sum().backward()
    assert 0 < sum(tensor.nbytes for tensor in kept) < weight.nbytes / 2
    expected = hidden.detach().requires_grad_()
    (expected @ nf4.dequantize(codes, scales, torch.float32).T).square().sum().backward()
    torch.testing.assert_close(hidden.grad, expected.grad)

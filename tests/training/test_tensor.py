"""A model split by tensor parallelism is the same model: it starts, counts, saves and loads as a whole one does.

That its steps are those of a plain loop is shown by test_equivalence.
"""

import re
from pathlib import Path

import pytest
import torch
from support.models import VOCABULARY, stock_model, tiny_config
from support.ranks import run_ranks
from support.runs import StopAfter, figures, run_config, whole
from support.stores import random_documents, write_store
from transformers import AutoConfig, PretrainedConfig

from tsumugu.config import LoraConfig, MixedStore, ParallelConfig
from tsumugu.distributed.environment import Environment, process_group
from tsumugu.distributed.mesh import build_mesh
from tsumugu.distributed.tensor import check_plan
from tsumugu.errors import UserError
from tsumugu.model import build
from tsumugu.training import checkpoint
from tsumugu.training.trainer import Trainer

SPLIT = {"parallel.shard_degree": 2, "parallel.tensor_degree": 2}
COMMON = {
    "train.global_batch_size": 4,
    "train.micro_batch_size": 1,
    "train.max_steps": 4,
    "train.log_norms": True,
    "train.dtype": "float32",
    "evaluate.every": 2,
    "optimizer.learning_rate": 1e-2,
}
KINDS = ("llama", "gpt_neox")  # on a mixture, and on rows whose documents are kept apart
SMALL = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1}
NEW_ROWS = [(VOCABULARY - 1, [5, 6]), (VOCABULARY, [])]

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stores, and the configurations and weights of models whose vocabulary is even."""
    folder = tmp_path_factory.mktemp("tensor")
    train, validation = random_documents(30, seed=1), random_documents(9, seed=2)
    masks = [[int(position >= 1 + index % 4) for position in range(len(ids))] for index, ids in enumerate(train)]
    write_store(folder / "text", train, validation)
    write_store(folder / "other", random_documents(30, seed=3), validation)
    write_store(folder / "instructions", train, validation, masks)
    olmo = AutoConfig.for_model("olmo", vocab_size=VOCABULARY + 1, intermediate_size=64, pad_token_id=3, **SMALL)
    olmo.save_pretrained(folder / "olmo")  # its norms have no weights
    for name in KINDS:
        tiny_config(name, tied=False, vocab_size=VOCABULARY + 1).save_pretrained(folder / name)
    stock_model(tiny_config("qwen3", tied=True, vocab_size=VOCABULARY - 1)).save_pretrained(folder / "pretrained")
    return folder


def trainer_of(folder: Path, kind: str, run_dir: Path, environment: Environment, changes: dict) -> Trainer:
    data = {"data.store": str(folder / "instructions"), "data.packing": "best_fit"}
    if kind != "gpt_neox":
        stores = [
            MixedStore(name=name, path=str(folder / name), weight=w) for name, w in (("text", 0.7), ("other", 0.3))
        ]
        data = {"data.store": None, "data.stores": stores}
    config = run_config(folder / "text", {**COMMON, **data, "model.config": str(folder / kind), **changes})
    return Trainer(config, run_dir, environment)


def held(trainer: Trainer) -> Tensors:
    """Weights and moments, whole."""
    tensors = {}
    for name, parameter in trainer.model.named_parameters():
        tensors[name] = whole(parameter)
        tensors |= {f"{name} {key}": whole(value) for key, value in trainer.optimizer.state.get(parameter, {}).items()}
    return tensors


def extended(folder: Path, world_size: int, changes: dict[str, int]) -> Tensors:
    """A pretrained model with two new rows of the vocabulary."""
    config = build.read_config(str(folder / "pretrained"))
    config.vocab_size = VOCABULARY + 1
    mesh = build_mesh(ParallelConfig(**changes), world_size, "cpu")
    fill = build.pretrained(folder / "pretrained", NEW_ROWS)
    model = build.build_model(config, mesh, torch.device("cpu"), torch.float32, torch.float32, fill)
    return {name: whole(parameter) for name, parameter in model.named_parameters()}


def on_four(folder: Path, runs: Path) -> dict:
    """Everything that needs four processes."""
    found: dict = {}
    with process_group() as environment:
        for kind in KINDS:
            trainer = trainer_of(folder, kind, runs / kind, environment, SPLIT)
            found[kind, "start"] = held(trainer)
            trainer.train(StopAfter(None))
            found[kind, "paths"] = trainer.paths
            found[kind, "split"] = held(trainer)
            sharded = trainer_of(folder, kind, runs / kind, environment, {"parallel.shard_degree": 4})
            found[kind, "split, loaded whole"] = held(sharded)
        whole_run = trainer_of(folder, "llama", runs / "whole", environment, {"parallel.shard_degree": 4})
        whole_run.train(StopAfter(2))
        found["whole"] = held(whole_run)
        split = trainer_of(folder, "llama", runs / "whole", environment, SPLIT)
        found["whole, loaded split"] = held(split)
        split.train(StopAfter(None))
        found["extended"] = extended(folder, 4, {"shard_degree": 2, "tensor_degree": 2})
        trainer = trainer_of(folder, "olmo", runs / "not finite", environment, SPLIT)
        with torch.no_grad():
            next(trainer.model.parameters()).fill_(torch.nan)
        before = held(trainer)
        with pytest.raises(UserError) as refused:
            trainer.train(StopAfter(None))
        found["refused"] = str(refused.value)
        found["untouched"] = all(
            torch.equal(whole(p), before[n]) for n, p in list(trainer.model.named_parameters())[1:]
        )
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def everywhere(folder: Path, runs: Path) -> list[dict]:
    return run_ranks(on_four, 4, folder, runs)


def assert_equal(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_split_model_starts_and_counts_as_one_process_does(
    kind: str, folder: Path, runs: Path, everywhere: list[dict], tmp_path: Path
):
    with process_group() as environment:
        alone = trainer_of(folder, kind, tmp_path, environment, {})
        start = held(alone)
        alone.train(StopAfter(None))
    for found in everywhere:
        assert_equal(found[kind, "start"], start)
    for found, expected in zip(figures(runs / kind), figures(tmp_path), strict=True):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert found[key] == (value if isinstance(value, int) else pytest.approx(value, rel=1e-4)), key


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_split_run_saves_is_loaded_whole_bit_for_bit(kind: str, everywhere: list[dict]):
    for found in everywhere:
        assert any(name.endswith(" exp_avg_sq") for name in found[kind, "split"])
        assert_equal(found[kind, "split"], everywhere[0][kind, "split"])
        assert_equal(found[kind, "split, loaded whole"], found[kind, "split"])


def test_what_a_whole_run_saves_is_loaded_split_bit_for_bit_and_goes_on(everywhere: list[dict], runs: Path):
    for found in everywhere:
        assert_equal(found["whole, loaded split"], found["whole"])
    losses = [[line["loss"] for line in figures(runs / run) if "loss" in line] for run in ("whole", "llama")]
    assert len(losses[0]) == COMMON["train.max_steps"]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_new_rows_of_a_pretrained_model_are_the_same_on_every_mesh(everywhere: list[dict], folder: Path):
    with process_group():
        expected = extended(folder, 1, {})
    for found in everywhere:
        assert_equal(found["extended"], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_one_process_reads_what_a_split_run_has_saved_as_an_export_does(kind: str, everywhere: list[dict], runs: Path):
    split = {name: tensor for name, tensor in everywhere[0][kind, "split"].items() if " " not in name}
    read = {name: torch.empty_like(tensor) for name, tensor in split.items()}
    checkpoint.load({"model": read}, checkpoint.folder(runs / kind, COMMON["train.max_steps"]))
    assert_equal(read, split)


def test_the_mesh_and_the_rows_of_a_fault_are_named_and_its_step_is_not_taken(everywhere: list[dict]):
    for found in everywhere:
        assert found["untouched"]
        assert any("replicate 1 × shard 2 × tensor 2;" in line for line in found["llama", "paths"])
        rows = re.findall(r"rank \d, rows ([^;)]+)", found["refused"])
        assert len(rows) == 4
        assert (rows[0], rows[2]) == (rows[1], rows[3])
        assert rows[0] != rows[2]


@pytest.mark.parametrize(
    ("config", "degree", "message"),
    [
        (tiny_config("gpt2", tied=True), 2, "no plan for tensor parallelism of a gpt2 model"),
        (tiny_config("bloom", tied=True), 2, "no plan for tensor parallelism of a bloom model"),
        (AutoConfig.for_model("gpt_oss", **SMALL), 2, "no plan for tensor parallelism of a gpt_oss model"),
        (AutoConfig.for_model("mixtral", **SMALL), 2, "mixtral model has moe_tp_experts, packed_colwise"),
        (tiny_config("gpt_neox", False, vocab_size=132), 3, "3 does not divide the model's num_attention_heads 4"),
        (tiny_config("llama", False, vocab_size=132), 4, "4 does not divide the model's num_key_value_heads 2"),
        (tiny_config("llama", False, intermediate_size=65), 2, "2 does not divide the model's intermediate_size 65"),
        (tiny_config("llama", False), 2, "2 does not divide the model's vocab_size 131"),
        (tiny_config("llama", False, vocab_size=132, attention_dropout=0.1), 2, "attention_dropout is 0.1"),
        (tiny_config("gpt_neox", False, vocab_size=132, hidden_dropout=0.1), 2, "hidden_dropout is 0.1"),
    ],
)
def test_what_cannot_be_split_exactly_is_refused(config: PretrainedConfig, degree: int, message: str):
    with pytest.raises(UserError, match=message):
        check_plan(build.meta_model(config, torch.float32), degree)


def test_a_plan_that_leaves_out_what_stands_beside_split_heads_is_refused():
    model = build.meta_model(tiny_config("qwen3", False, vocab_size=132), torch.float32)
    check_plan(model, 2)
    model._tp_plan = {name: style for name, style in model._tp_plan.items() if not name.endswith("k_norm")}
    with pytest.raises(UserError, match=r"lacks model\.layers\.0\.self_attn\.k_norm\.weight"):
        check_plan(model, 2)


def test_degrees_and_options_that_do_not_go_together_are_refused():
    with pytest.raises(UserError, match=r"shard_degree 1 × .*replicate_degree 1 × .*tensor_degree 3 is not the world"):
        build_mesh(ParallelConfig(tensor_degree=3), 4, "cpu")
    with pytest.raises(UserError, match="offload_activations cannot move"):
        ParallelConfig(tensor_degree=2, offload_activations=True)
    with pytest.raises(UserError, match=r"model\.lora does not go with parallel\.tensor_degree"):
        run_config(Path("store"), {**COMMON, "model.pretrained": "model", "model.lora": LoraConfig(rank=2), **SPLIT})

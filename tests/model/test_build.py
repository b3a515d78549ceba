"""Initial weights and weights of Hugging Face folders, on 1, 2 and 2 × 2 processes, against stock transformers."""

import itertools
import json
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import ARCHITECTURES, VOCABULARY, stock_model, tiny_config
from support.ranks import run_ranks
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from tsumugu.config import ParallelConfig
from tsumugu.distributed.environment import process_group
from tsumugu.distributed.mesh import build_mesh
from tsumugu.errors import UserError
from tsumugu.model import build

CASES = [(architecture, tied) for architecture in ARCHITECTURES for tied in (False, True)]
PAD = 3


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    with process_group():
        yield


def build_with(config: PretrainedConfig, fill, shard_degree: int = 1) -> PreTrainedModel:
    world_size = torch.distributed.get_world_size()
    mesh = build_mesh(ParallelConfig(shard_degree=shard_degree), world_size, "cpu")
    return build.build_model(config, mesh, torch.device("cpu"), torch.float32, torch.float32, fill).eval()


def whole(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    parameters = {name: p.detach() for name, p in model.named_parameters(remove_duplicate=False)}
    return {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in parameters.items()}


def shards(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: p.to_local().detach() for name, p in model.named_parameters() if isinstance(p, DTensor)}


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(24).reshape(2, 12) + 4).logits


def initial_weights(shard_degree: int) -> list[tuple[dict, dict]]:
    """Whole weights and this process's shards of every case."""
    models = [build_with(tiny_config(*case), build.initialised(7), shard_degree) for case in CASES]
    return [(whole(model), shards(model)) for model in models]


def difference_from_stock(folder: str, shard_degree: int) -> float:
    """Largest difference between the logits of our model and of stock transformers', both read from a folder."""
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours = build_with(build.read_config(folder), build.pretrained(Path(folder)), shard_degree)
    return (logits(ours) - logits(stock)).abs().max().item()


def refusal(folder: str, shard_degree: int) -> str:
    """What the user is told about a folder."""
    try:
        build_with(build.read_config(folder), build.pretrained(Path(folder)), shard_degree)
    except UserError as error:
        return error.message
    return ""


NEW_ROWS = [(VOCABULARY, [5, 9]), (VOCABULARY + 1, []), (VOCABULARY + 2, [VOCABULARY, 7])]
SPARE_ROWS = [(VOCABULARY - 2, [5, 9]), (VOCABULARY - 1, [VOCABULARY - 2])]


def grown(folder: str, shard_degree: int, rows: list, size: int) -> dict[str, torch.Tensor]:
    """Embedding and head of a folder's model that gets new rows."""
    config = build.read_config(folder)
    config.vocab_size = size
    model = build_with(config, build.pretrained(Path(folder), rows), shard_degree)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach()
        for name, p in (("embedding", embedding), ("head", head))
    }


def with_means(weight: torch.Tensor, rows: list, size: int) -> torch.Tensor:
    """The same by hand."""
    result = torch.zeros(size, weight.shape[1])
    result[: len(weight)] = weight
    for row, pieces in rows:
        result[row] = torch.stack([result[piece] for piece in pieces or range(rows[0][0])]).mean(0)
    return result


def all_grown(folders: list[str], shard_degree: int) -> list[tuple[dict, dict]]:
    return [
        (grown(folder, shard_degree, NEW_ROWS, VOCABULARY + 3), grown(folder, shard_degree, SPARE_ROWS, VOCABULARY))
        for folder in folders
    ]


def on_two_ranks(
    folders: list[str], faulty: list[str]
) -> tuple[list[tuple[dict, dict]], list[float], list[str], list[tuple[dict, dict]]]:
    return (
        initial_weights(shard_degree=2),
        [difference_from_stock(folder, 2) for folder in folders],
        [refusal(folder, 2) for folder in faulty],
        all_grown(folders, 2),
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Hugging Face folders by what is particular about them."""
    root = tmp_path_factory.mktemp("models")
    made = {}
    for architecture, tied in CASES:
        name = f"{architecture}-{'tied' if tied else 'untied'}"
        stock_model(tiny_config(architecture, tied)).save_pretrained(root / name)
        made[name] = str(root / name)
    stock_model(tiny_config("qwen3", False)).save_pretrained(root / "several-files", max_shard_size="40KB")
    assert len(list((root / "several-files").glob("*.safetensors"))) > 2

    old = root / "old-neox"  # as transformers 4.20 wrote GPT-NeoX: buffers beside the weights
    stock_model(tiny_config("gpt_neox", False)).save_pretrained(old)
    weights = load_file(old / "model.safetensors")
    assert "embed_out.weight" in weights
    for layer in range(2):
        prefix = f"gpt_neox.layers.{layer}.attention"
        weights[f"{prefix}.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool)
        weights[f"{prefix}.masked_bias"] = torch.tensor(-1e9)
        weights[f"{prefix}.rotary_emb.inv_freq"] = torch.ones(2)
    save_file(weights, old / "model.safetensors", {"format": "pt"})

    for name, zipped in (("bin", True), ("bin-before-torch-1.6", False)):
        folder = root / name
        stock_model(tiny_config("gpt_neox", False)).config.save_pretrained(folder)
        torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    stock_model(tiny_config("llama", False)).to(torch.bfloat16).save_pretrained(root / "bfloat16")
    names = ("several-files", "old-neox", "bin", "bin-before-torch-1.6", "bfloat16")
    made |= {name: str(root / name) for name in names}
    return made


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders whose weights are not those of their configuration, by fault."""
    root = tmp_path_factory.mktemp("faulty")
    stock_model(tiny_config("llama", True)).save_pretrained(root / "whole")
    weights = load_file(root / "whole" / "model.safetensors")
    norm, embedding = "model.norm.weight", "model.embed_tokens.weight"
    faults = {
        "missing": {name: tensor for name, tensor in weights.items() if name != norm},
        "unexpected": {**weights, "model.layers.2.input_layernorm.weight": torch.ones(32)},
        # one row more: of two processes, only the second sees another shape
        "shape": {**weights, embedding: torch.zeros(VOCABULARY + 1, 32)},
        "tied": {**weights, "lm_head.weight": weights[embedding] + 1},
    }
    for fault, tensors in faults.items():
        tiny_config("llama", True).save_pretrained(root / fault)
        save_file(tensors, root / fault / "model.safetensors", {"format": "pt"})
    return {fault: str(root / fault) for fault in faults}


@pytest.fixture(scope="module")
def two_ranks(folders: dict[str, str], faulty: dict[str, str]) -> list[Any]:
    return run_ranks(on_two_ranks, 2, list(folders.values()), list(faulty.values()))


@pytest.fixture(scope="module")
def one_rank() -> list[tuple[dict, dict]]:
    with process_group():
        return initial_weights(shard_degree=1)


def test_initial_weights_are_the_same_bit_for_bit_on_every_mesh(one_rank: list, two_ranks: list):
    four_ranks = run_ranks(initial_weights, 4, 2)
    for meshed in [rank[0] for rank in two_ranks] + four_ranks:
        for (alone, _), (sharded, _) in zip(one_rank, meshed, strict=True):
            assert alone.keys() == sharded.keys()
            assert all(torch.equal(alone[name], sharded[name]) for name in alone)


def test_no_two_shards_of_a_random_matrix_are_equal(one_rank: list, two_ranks: list):
    compared = 0
    for case in range(len(CASES)):
        first, second = (rank[0][case][1] for rank in two_ranks)
        for name in first:
            rows = min(len(first[name]), len(second[name]))
            if one_rank[case][0][name].std() > 0:
                compared += 1
                assert not torch.equal(first[name][:rows], second[name][:rows]), name
    assert compared > 8 * len(CASES)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_initial_weights_are_distributed_as_transformers_own(case: tuple[str, bool], one_rank: list):
    ours = one_rank[CASES.index(case)][0]
    torch.manual_seed(1)
    stock = dict(AutoModelForCausalLM.from_config(tiny_config(*case)).named_parameters(remove_duplicate=False))
    assert ours.keys() == stock.keys()
    for name, theirs in stock.items():
        if theirs.std() == 0:
            assert torch.equal(ours[name], theirs), name
        else:
            assert ours[name].std().item() == pytest.approx(theirs.std().item(), rel=0.12), name
            assert abs(ours[name].mean().item()) < 5 * theirs.std().item() / theirs.numel() ** 0.5, name


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_the_padding_row_alone_is_zero(architecture: str, one_rank: list):
    for tied in (False, True):
        embedding = one_rank[CASES.index((architecture, tied))][0]["model.embed_tokens.weight"]
        assert embedding.abs().sum(1).eq(0).nonzero().flatten().tolist() == [PAD]


def test_initial_weights_depend_on_the_seed_and_leave_the_global_generator_alone():
    config = tiny_config("gpt_neox", True)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    first, same, other = (whole(build_with(config, build.initialised(seed))) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    name = "gpt_neox.embed_in.weight"
    assert torch.equal(first[name], same[name])
    assert not torch.equal(first[name], other[name])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_buffers_that_no_checkpoint_holds_equal_a_stock_models(case: tuple[str, bool], folders: dict[str, str]):
    expected = dict(AutoModelForCausalLM.from_config(tiny_config(*case)).named_buffers())
    folder = Path(folders[f"{case[0]}-{'tied' if case[1] else 'untied'}"])
    for fill in (build.initialised(1), build.pretrained(folder)):
        found = dict(build_with(tiny_config(*case), fill).named_buffers())
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_rotary_frequencies_follow_the_configuration():
    config = tiny_config("gpt_neox", False, rotary_pct=0.25, rotary_emb_base=20000)
    expected = dict(AutoModelForCausalLM.from_config(config).named_buffers())["gpt_neox.rotary_emb.inv_freq"]
    found = dict(build_with(config, build.initialised(1)).named_buffers())["gpt_neox.rotary_emb.inv_freq"]
    assert torch.equal(found, expected)
    assert len(found) == 1  # a quarter of a head of 8, in pairs


def test_logits_of_a_folder_equal_stock_transformers_exactly(folders: dict[str, str]):
    differences = {name: difference_from_stock(folder, 1) for name, folder in folders.items()}
    assert differences == dict.fromkeys(folders, 0.0)


def test_logits_of_a_folder_equal_stock_transformers_exactly_on_two_ranks(folders: dict[str, str], two_ranks: list):
    for rank in two_ranks:
        assert dict(zip(folders, rank[1], strict=True)) == dict.fromkeys(folders, 0.0)


FAULTS = {
    "missing": "missing: model.norm.weight",
    "unexpected": "unexpected: model.layers.2.input_layernorm.weight",
    "shape": "of another shape: model.embed_tokens.weight",
    "tied": "yet of other values: lm_head.weight",
}


def test_new_rows_are_the_means_of_the_rows_they_stand_for_on_every_mesh(folders: dict[str, str], two_ranks: list):
    here = all_grown(list(folders.values()), 1)
    for place, folder in enumerate(folders.values()):
        stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        modules = {"embedding": stock.get_input_embeddings(), "head": stock.get_output_embeddings()}
        for everywhere in (here[place], *(rank[3][place] for rank in two_ranks)):
            for made, rows, size in zip(everywhere, (NEW_ROWS, SPARE_ROWS), (VOCABULARY + 3, VOCABULARY), strict=True):
                for name, module in modules.items():
                    torch.testing.assert_close(made[name], with_means(module.weight.detach(), rows, size))
                    assert torch.equal(made[name], here[place][rows is SPARE_ROWS][name])


@pytest.mark.parametrize("fault", FAULTS)
def test_weights_that_are_not_the_configurations_are_named(fault: str, faulty: dict[str, str], two_ranks: list):
    position = list(faulty).index(fault)
    for message in [refusal(faulty[fault], 1), *(rank[2][position] for rank in two_ranks)]:
        assert FAULTS[fault] in message


class Code:
    """Unpickled, it would make a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_a_pickle_is_refused_and_not_run(tmp_path: Path):
    tiny_config("gpt2", True).save_pretrained(tmp_path)
    torch.save({"wte.weight": Code(tmp_path / "made")}, tmp_path / "pytorch_model.bin")
    assert "holds no plain weights" in refusal(str(tmp_path), 1)
    with open(tmp_path / "pytorch_model.bin", "wb") as file:
        pickle.dump(Code(tmp_path / "made"), file, protocol=2)
    assert "holds no plain weights" in refusal(str(tmp_path), 1)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("content", [[torch.ones(1)], torch.ones(2), {"a": 3}, {1: torch.ones(1)}, {"a": [1]}, "text"])
def test_a_pickle_that_is_not_tensors_by_name_is_refused(content, tmp_path: Path):
    tiny_config("gpt2", True).save_pretrained(tmp_path)
    for zipped in (True, False):
        torch.save(content, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        assert "pytorch_model.bin holds no plain weights: not tensors by name" in refusal(str(tmp_path), 1)


def test_files_that_cannot_be_read_are_named(tmp_path: Path):
    tiny_config("gpt2", True).save_pretrained(tmp_path)
    assert refusal(str(tmp_path), 1) == f"{tmp_path} holds no weights"
    index = tmp_path / "model.safetensors.index.json"
    for content in ("{", "[]", "{}", '{"weight_map": 3}'):
        index.write_text(content)
        assert refusal(str(tmp_path), 1) == f"{index} is no index of weights"
    save_file({"a": torch.ones(1)}, tmp_path.parent / "outside.safetensors")
    for name in ("absent.safetensors", "../outside.safetensors", str(tmp_path.parent / "outside.safetensors")):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        assert refusal(str(tmp_path), 1) == f"{index} names files that are not in the folder: {name}"
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 100)
    assert f"{tmp_path / 'model.safetensors'} holds no plain weights" in refusal(str(tmp_path), 1)


def test_of_a_hub_model_only_weights_that_are_read_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fetched: list = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda _, allow_patterns: fetched.append(allow_patterns) or str(tmp_path)
    )
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    assert build.find_pretrained("someone/model") == tmp_path
    assert not [pattern for patterns in fetched for pattern in patterns if "bin" in pattern or "py" in pattern]
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    build.find_pretrained("someone/model")
    assert fetched[-1] == "pytorch_model*.bin"


def test_a_model_that_is_nowhere_is_the_users_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_, **__):
        raise OSError("404 for that repository\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(UserError, match="no such folder, nor on the hub: 404 for that repository"):
        build.find_pretrained(str(tmp_path / "absent"))


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"hidden_size": 3}',
        '{"model_type": "no-such-model"}',
        '{"model_type": "gpt_neox", "hidden_size": "large"}',
        '{"model_type": "gpt2", "n_embd": 30, "n_head": 4}',
        '{"model_type": "t5"}',
        '{"model_type": "llama", "vocab_size": 10, "pad_token_id": 20}',
        '{"model_type": "x", "auto_map": {"AutoConfig": "configuration_x.X"}}',
    ],
)
def test_a_configuration_that_cannot_be_used_is_the_users_error(content: str, tmp_path: Path):
    (tmp_path / "config.json").write_text(content)
    (tmp_path / "configuration_x.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(UserError, match=r"no model configuration|no causal language model"):
        build.meta_model(build.read_config(str(tmp_path)), torch.float32)
    assert not (tmp_path / "ran").exists()


def test_a_meta_model_takes_no_memory_and_knows_its_layers():
    for case in CASES:
        model = build.meta_model(tiny_config(*case), torch.bfloat16)
        assert {t.device.type for t in itertools.chain(model.parameters(), model.buffers())} == {"meta"}
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert len(build.decoder_layers(model)) == 2

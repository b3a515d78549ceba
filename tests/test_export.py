"""What export writes is the trained model: for stock transformers 5 and 4.57, in processes without tsumugu."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support.models import ARCHITECTURES, tiny_config
from support.ranks import run_ranks
from support.runs import run_config, whole
from support.stores import random_documents, write_store
from support.transformers4 import transformers4
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, MixtralConfig, PretrainedConfig

from tsumugu import export as export_module
from tsumugu.data.instructions import TEMPLATES, Message
from tsumugu.distributed.environment import process_group
from tsumugu.errors import UserError
from tsumugu.export import export
from tsumugu.model import build
from tsumugu.tokenizer.contract import read_contract
from tsumugu.training import checkpoint
from tsumugu.training.signals import StopRequest
from tsumugu.training.trainer import Trainer

MODEL_VOCABULARY = 160  # more than the tokenizer has
CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    f"{architecture}-{'tied' if tied else 'untied'}": lambda architecture=architecture, tied=tied: tiny_config(
        architecture, tied, vocab_size=MODEL_VOCABULARY
    )
    for architecture in ARCHITECTURES
    for tied in (False, True)
}
CONFIGS |= {
    "gpt_neox-quarter-rotary": lambda: tiny_config(
        "gpt_neox", False, hidden_size=64, rotary_pct=0.25, rotary_emb_base=20000, use_parallel_residual=False
    ),
    "llama-scaled-rope": lambda: tiny_config(
        "llama",
        False,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0},
    ),
    # experts are one tensor in memory and many on disk
    "mixtral": lambda: MixtralConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        vocab_size=MODEL_VOCABULARY,
    ),
}


def train(
    config: PretrainedConfig, store: Path, run_dir: Path, further: dict[str, Any] | None = None
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Two steps; the whole weights afterwards, and the trained model's logits."""
    config.save_pretrained(run_dir.parent / f"{run_dir.name}-config")
    changes = {
        "model.config": str(run_dir.parent / f"{run_dir.name}-config"),
        "train.max_steps": 2,
        "train.global_batch_size": 2,
        "optimizer.learning_rate": 0.01,
        "data.packing": "pad_left" if json.loads((store / "manifest.json").read_text())["template"] else "concatenate",
        **(further or {}),
    }
    with process_group() as environment:
        trainer = Trainer(run_config(store, changes), run_dir, environment)
        trainer.train(StopRequest())
        model = trainer.model.eval()
        with torch.no_grad():
            logits = model(input_ids=inputs()).logits
        weights = {name: whole(p) for name, p in model.named_parameters(remove_duplicate=False)}
        weights |= {name: whole(b) for name, b in model.named_buffers() if name in model.state_dict()}
    return weights, logits


def inputs() -> torch.Tensor:
    return torch.arange(24).reshape(2, 12) + 4


# Run by an interpreter that need not have tsumugu: the folders in, logits and ids out.
READER = """
import json, sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

result = {}
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        result[folder] = {"logits": model(input_ids=torch.arange(24).reshape(2, 12) + 4).logits, "ids": []}
    if (Path(folder) / "tokenizer.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        golden = json.loads((Path(folder) / "contract.json").read_text(encoding="utf-8"))["golden"]
        result[folder]["ids"] = [tokenizer(pair["text"], add_special_tokens=False)["input_ids"] for pair in golden]
assert not [name for name in sys.modules if name.startswith("tsumugu")]
torch.save(result, sys.argv[1])
"""


def read_by(python: str, folders: list[Path], output: Path) -> dict[str, Any]:
    """What stock transformers in another process makes of the folders, by their names."""
    command = [python, "-c", READER, str(output), *map(str, folders)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=output.parent)
    assert done.returncode == 0, done.stderr
    return {Path(folder).name: found for folder, found in torch.load(output).items()}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("export")


@pytest.fixture(scope="module")
def store(root: Path) -> Path:
    return write_store(root / "store", random_documents(12, seed=1))


@pytest.fixture(scope="module")
def instruct_store(root: Path, tokenizer_folder: Path) -> Path:
    """An instruction store whose tokenizer is a real one."""
    documents = random_documents(8, seed=2)
    fingerprint = read_contract(tokenizer_folder).fingerprint
    path = write_store(
        root / "instruct-store", documents, masks=[[1] * len(ids) for ids in documents], fingerprint=fingerprint
    )
    shutil.copytree(tokenizer_folder, path / "tokenizer", dirs_exist_ok=True)
    return path


@pytest.fixture(scope="module")
def trained(root: Path, store: Path, instruct_store: Path, tokenizer_folder: Path) -> dict[str, tuple]:
    """Weights and logits of a run of every configuration, which is exported in float32 beside it."""
    runs = {}
    for name, config in CONFIGS.items():
        runs[name] = train(config(), store, root / f"run-{name}")
    vocab_size = read_contract(tokenizer_folder).vocab_size + 28
    runs["instruct"] = train(
        tiny_config("gpt_neox", False, vocab_size=vocab_size), instruct_store, root / "run-instruct"
    )
    for name in runs:
        assert export(str(root / f"run-{name}"), root / name, dtype="float32")
    return runs


def test_a_fresh_process_without_tsumugu_computes_the_trained_models_logits_exactly(root: Path, trained: dict):
    read = read_by(sys.executable, [root / name for name in trained], root / "read-by-5.pt")
    differences = {name: (read[name]["logits"] - logits).abs().max().item() for name, (_, logits) in trained.items()}
    assert differences == dict.fromkeys(trained, 0.0)
    assert read["instruct"]["ids"] == golden_ids(root / "instruct")


def test_transformers_4_reads_the_same_model_and_the_same_ids(root: Path, trained: dict):
    read = read_by(transformers4(), [root / name for name in trained], root / "read-by-4.pt")
    differences = {name: (read[name]["logits"] - logits).abs().max().item() for name, (_, logits) in trained.items()}
    assert {name: difference for name, difference in differences.items() if difference > 1e-5} == {}
    assert read["instruct"]["ids"] == golden_ids(root / "instruct")


def golden_ids(folder: Path) -> list[list[int]]:
    return [list(ids) for _, ids in read_contract(folder).golden]


def on_disk(folder: Path) -> dict[str, tuple[list[int], str]]:
    """Shape and dtype of every tensor in a folder's files."""
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                assert name not in found
                found[name] = (opened.get_slice(name).get_shape(), opened.get_slice(name).get_dtype())
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_names_and_shapes_on_disk_are_those_that_save_pretrained_writes(
    name: str, trained: dict, root: Path, tmp_path: Path
):
    AutoModelForCausalLM.from_config(CONFIGS[name]()).save_pretrained(tmp_path)
    assert on_disk(root / name) == on_disk(tmp_path)


def test_the_tied_matrix_is_written_once_and_gpt_neoxs_head_is_embed_out(trained: dict, root: Path):
    assert on_disk(root / "gpt_neox-untied").keys() - on_disk(root / "gpt_neox-tied").keys() == {"embed_out.weight"}


@pytest.mark.parametrize("name", ["gpt_neox-untied", "llama-tied", "mixtral"])
def test_large_models_come_in_several_files_with_an_index(
    name: str, trained: dict, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(export_module, "MAX_FILE_BYTES", 30_000)
    export(str(root / f"run-{name}"), tmp_path / "model", dtype="float32")
    files = sorted((tmp_path / "model").glob("*.safetensors"))
    assert len(files) > 1
    assert [file.name for file in files] == [
        f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)
    ]
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {key: file.name for file in files for key in load_file(file)}
    assert index["metadata"]["total_size"] == sum(t.nbytes for file in files for t in load_file(file).values())
    assert on_disk(tmp_path / "model") == on_disk(root / name)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        assert torch.equal(stock(input_ids=inputs()).logits, trained[name][1])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_smaller_dtype_is_the_weights_rounded(dtype: str, trained: dict, root: Path, tmp_path: Path):
    export(str(root / "run-llama-untied"), tmp_path / "model", dtype=dtype)
    weights, found = trained["llama-untied"][0], load_file(tmp_path / "model" / "model.safetensors")
    assert weights.keys() == found.keys()
    assert all(torch.equal(found[name], weights[name].to(getattr(torch, dtype))) for name in weights)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").dtype == getattr(torch, dtype)


def test_values_that_float16_cannot_hold_are_refused(tmp_path: Path, store: Path):
    train(
        tiny_config("llama", True),
        store,
        tmp_path / "run",
        {"optimizer.learning_rate": 1e5, "schedule.kind": "constant", "train.max_steps": 1},
    )
    with pytest.raises(UserError, match=r"embed_tokens.weight has values that float16 cannot hold"):
        export(str(tmp_path / "run"), tmp_path / "model", dtype="float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run-config"]


def train_on_rank(store: str, run_dir: str) -> dict[str, torch.Tensor]:
    return train(tiny_config("llama", True), Path(store), Path(run_dir))[0]


def test_a_run_of_two_processes_is_exported_whole(store: Path, tmp_path: Path):
    weights, _ = run_ranks(train_on_rank, 2, str(store), str(tmp_path / "run"))
    export(str(tmp_path / "run"), tmp_path / "model", dtype="float32")
    found = load_file(tmp_path / "model" / "model.safetensors")
    assert found.keys() == weights.keys() - {"lm_head.weight"}
    assert all(torch.equal(found[name], weights[name]) for name in found)


def test_export_holds_one_file_and_never_the_model(
    trained: dict, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Every tensor that is loaded belongs to one group, and the model itself stays on the meta device."""
    loaded: list[int] = []
    load, models = checkpoint.load, []
    monkeypatch.setattr(export_module, "MAX_FILE_BYTES", 40_000)
    monkeypatch.setattr(
        checkpoint,
        "load",
        lambda state, path: (loaded.append(sum(t.nbytes for t in state["model"].values())), load(state, path)),
    )
    make = build.meta_model
    monkeypatch.setattr(build, "meta_model", lambda *arguments: models.append(make(*arguments)) or models[-1])
    export(str(root / "run-qwen3-untied"), tmp_path / "model", dtype="float32")
    assert len(loaded) > 2
    assert max(loaded) <= 40_000
    assert {p.device.type for model in models for p in model.parameters()} == {"meta"}


def test_reserved_and_padding_ids_are_suppressed_and_eos_stops(trained: dict, root: Path):
    contract = read_contract(root / "instruct")
    generation = GenerationConfig.from_pretrained(root / "instruct")
    model_size = contract.vocab_size + 28
    reserved = [id for id in range(contract.vocab_size) if contract.token_bytes[id] == 0 and id != contract.eos_id]
    assert len(reserved) == 7  # unknown, bos, pad, and four that are spare
    assert generation.suppress_tokens == [*reserved, *range(contract.vocab_size, model_size)]
    assert generation.eos_token_id == [contract.eos_id]
    assert (generation.bos_token_id, generation.pad_token_id) == (contract.bos_id, contract.pad_id)


@pytest.mark.parametrize("sample", [False, True])
def test_ids_without_text_are_not_generated_even_where_the_weights_prefer_them(sample: bool, trained: dict, root: Path):
    model = AutoModelForCausalLM.from_pretrained(root / "instruct").eval()
    contract = read_contract(root / "instruct")
    suppressed = GenerationConfig.from_pretrained(root / "instruct").suppress_tokens
    torch.manual_seed(0)
    with torch.no_grad():
        last = model(input_ids=inputs()[:1], output_hidden_states=True).hidden_states[-1][0, -1]
        model.get_output_embeddings().weight[suppressed] = 100 * last
        assert model(input_ids=inputs()[:1]).logits[0, -1].argmax() in suppressed
        output = model.generate(inputs()[:1], max_new_tokens=20, do_sample=sample)[0, 12:].tolist()
    assert output
    assert all(id == contract.eos_id or contract.token_bytes[id] > 0 for id in output)


def test_further_stop_ids_of_the_model_are_kept_and_ordinary_ids_are_not(
    root: Path, instruct_store: Path, tmp_path: Path
):
    contract = read_contract(instruct_store / "tokenizer")
    reserved = contract.token_bytes.index(0, 4)
    ordinary = next(id for id, size in enumerate(contract.token_bytes) if size > 1)
    config = tiny_config("qwen3", True, vocab_size=contract.vocab_size)
    config.eos_token_id = [ordinary, reserved]
    config.bos_token_id = ordinary
    train(config, instruct_store, tmp_path / "run")
    export(str(tmp_path / "run"), tmp_path / "model")
    generation = GenerationConfig.from_pretrained(tmp_path / "model")
    assert generation.eos_token_id == [contract.eos_id, reserved]
    assert not {contract.eos_id, reserved} & set(generation.suppress_tokens)
    written = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (written["eos_token_id"], written["bos_token_id"]) == ([contract.eos_id, reserved], contract.bos_id)


@pytest.mark.parametrize("add_bos", [False, True])
def test_the_chat_template_gives_the_ids_of_the_prompt_in_training(
    add_bos: bool, root: Path, instruct_store: Path, tmp_path: Path
):
    shutil.copytree(instruct_store, tmp_path / "store")
    manifest = json.loads((tmp_path / "store" / "manifest.json").read_text())
    (tmp_path / "store" / "manifest.json").write_text(json.dumps({**manifest, "add_bos": add_bos}))
    contract = read_contract(instruct_store / "tokenizer")
    train(tiny_config("llama", True, vocab_size=contract.vocab_size), tmp_path / "store", tmp_path / "run")
    export(str(tmp_path / "run"), tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    for question in ("日本の首都は？", "{braces} '引用' \"符\"\n二行目 {{ x }}", " 空白 "):
        messages = [{"role": "user", "content": question}]
        prompt = "".join(segment.text for segment in TEMPLATES["alpaca-ja"].segments([Message("user", question)]))
        expected = [contract.bos_id] * add_bos + tokenizer.encode(prompt, add_special_tokens=False)
        assert tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"] == expected
        whole_text = tokenizer.apply_chat_template(
            [*messages, {"role": "assistant", "content": "東京"}], tokenize=False
        )
        assert whole_text == "<s>" * add_bos + prompt + "東京</s>"


def test_the_folder_holds_the_tokenizer_a_card_and_no_traces(trained: dict, root: Path):
    names = {path.name for path in (root / "instruct").iterdir()}
    assert names == {
        *(
            "model.safetensors",
            "config.json",
            "generation_config.json",
            "README.md",
            "tsumugu.json",
            "certificate.json",
        ),
        *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "contract.json", "chat_template.jinja"),
    }
    config = json.loads((root / "instruct" / "config.json").read_text())
    assert config["architectures"] == ["GPTNeoXForCausalLM"]
    assert config["dtype"] == config["torch_dtype"] == "float32"
    assert not [value for value in config.values() if str(root) in str(value)]
    assert (
        json.loads((root / "instruct" / "tokenizer_config.json").read_text())["tokenizer_class"]
        == "PreTrainedTokenizerFast"
    )
    assert (
        f"{sum(w.numel() for w in trained['instruct'][0].values()):,}" in (root / "instruct" / "README.md").read_text()
    )


def test_exporting_again_is_already_done_and_never_overwrites(trained: dict, root: Path, tmp_path: Path):
    run = str(root / "run-llama-tied")
    assert export(run, tmp_path / "model") is True
    assert export(run, tmp_path / "model") is False
    assert export(f"{run}@2", tmp_path / "model") is False
    assert export(run, tmp_path / "model", step=2) is False
    with pytest.raises(UserError, match="exists already"):
        export(run, tmp_path / "model", dtype="float32")
    with pytest.raises(UserError, match="exists already"):
        export(str(root / "run-llama-untied"), tmp_path / "model")


def test_runs_and_steps_that_are_not_there_are_refused(trained: dict, root: Path, tmp_path: Path):
    for run in (str(tmp_path), str(root / "run-llama-tied") + "@7", str(root / "run-llama-tied") + "@x"):
        with pytest.raises(UserError, match="no complete checkpoint"):
            export(run, tmp_path / "model")


def test_a_damaged_checkpoint_is_refused_and_leaves_nothing(trained: dict, root: Path, tmp_path: Path):
    shutil.copytree(root / "run-llama-tied", tmp_path / "run")
    weights = next((tmp_path / "run" / "checkpoints").glob("*/*.distcp"))
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match="is damaged"):
        export(str(tmp_path / "run"), tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_checkpoint_of_another_configuration_is_refused(trained: dict, root: Path, tmp_path: Path):
    shutil.copytree(root / "run-llama-untied", tmp_path / "run")
    for config in (tiny_config("llama", True), tiny_config("llama", False, num_hidden_layers=3)):
        config.save_pretrained(tmp_path / "run" / "model")
        with pytest.raises(UserError, match="not those of its configuration"):
            export(str(tmp_path / "run"), tmp_path / "model")


def test_no_warning_reaches_the_user(trained: dict, root: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder):
    export(str(root / "run-llama-tied"), tmp_path / "model")
    assert [str(warning.message) for warning in recwarn] == []


def test_a_full_disk_is_one_line_and_leaves_nothing(
    trained: dict, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_module, "save_file", full)
    with pytest.raises(UserError, match="no space left"):
        export(str(root / "run-llama-tied"), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []

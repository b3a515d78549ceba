"""Recipes that name models and data of the hub run on stand-ins of the same form: columns, template, architecture."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from support.models import stock_model, tiny_config
from transformers import AutoTokenizer

from tsumugu.cli import main
from tsumugu.tokenizer.contract import read_contract

RECIPES = Path(__file__).parents[1] / "recipes"
SHORT = ["--data.sequence_length=256", "--train.max_epochs=null", "--train.max_steps=2", "--schedule.warmup_steps=0"]


@pytest.fixture
def model(tmp_path: Path, tokenizer_folder: Path) -> Path:
    """A GPT-NeoX of the tokenizer's size, as open-calm and rinna's models are GPT-NeoX."""
    size = read_contract(tokenizer_folder).vocab_size
    stock_model(tiny_config("gpt_neox", False, vocab_size=size)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def dolly(path: Path) -> Path:
    """Rows with the columns of kunishou/databricks-dolly-15k-ja."""
    records = [
        {
            "input": f"文章その{n}。" if n % 3 else "",
            "output": f"答えは{n}です。",
            "index": str(n),
            "category": "closed_qa",
            "instruction": f"{n}番目の質問に答えてください。",
        }
        for n in range(60)
    ]
    pq.write_table(pa.Table.from_pylist(records), path)
    return path


def check_markers(model: Path, extended: Path, original: Path, merged: Path, adapter: Path):
    """The ids that `tokenizer extend` made are trained, alone of all rows, and in both exports with their tokens."""
    size, new = read_contract(original).vocab_size, read_contract(extended).vocab_size
    assert new > size
    before = load_file(model / "model.safetensors")
    after = load_file(merged / "model.safetensors")
    held = load_file(adapter / "adapter_model.safetensors")
    for name, end in (("gpt_neox.embed_in", "gpt_neox.embed_in"), ("embed_out", "lm_head")):
        rows = held[f"base_model.model.{end}.token_adapter.trainable_tokens_delta"]
        assert torch.equal(after[f"{name}.weight"], torch.cat([before[f"{name}.weight"], rows]).bfloat16())
    rows = held["base_model.model.gpt_neox.embed_in.token_adapter.trainable_tokens_delta"]
    extension = json.loads((extended / "extension.json").read_text())
    for row, learned in zip(extension["rows"], rows, strict=True):  # of the model's own, as the reference promises
        mean = before["gpt_neox.embed_in.weight"][row["pieces"] or slice(0, size)].mean(0)
        assert 0 < (learned - mean).abs().max() < 0.01
    for folder in (merged, adapter):
        tokens = AutoTokenizer.from_pretrained(folder)
        assert len(tokens) == new
        assert AutoTokenizer.from_pretrained(extended).get_vocab() == tokens.get_vocab()


@pytest.mark.parametrize(
    ("name", "way"), [("rinna-3.6b", "instruct"), ("opencalm-7b", "instruct"), ("rinna-3.6b", "lora")]
)
def test_instruction_tuning_on_dolly(name: str, way: str, model: Path, tokenizer_folder: Path, tmp_path: Path, capsys):
    if way == "lora":
        pytest.importorskip("peft")
    source = {"name": "dolly-ja", "kind": "instructions", "path": str(dolly(tmp_path / "0000.parquet"))}
    tokenizer = tokenizer_folder
    if name == "rinna-3.6b":
        extend = ["tokenizer", "extend", str(tokenizer), "--template", "rinna", "--output", str(tmp_path / "rinna")]
        assert main(extend) == 0
        tokenizer = tmp_path / "rinna"
    prepare = ["prepare", "--config", str(RECIPES / f"{name}-prepare-dolly.yaml"), "--output", str(tmp_path / "store")]
    settings = [f"--prepare.tokenizer={tokenizer}", f"--prepare.sources={json.dumps([source])}"]
    assert main([*prepare, *settings]) == 0
    assert main(["audit", str(tmp_path / "store"), "--rows", "0"]) == 0
    assert "error" not in capsys.readouterr().out
    places = [f"--model.pretrained={model}", f"--data.store={tmp_path / 'store'}"]
    places.append(f"--tokenizer.path={tokenizer_folder}")  # the one that the model was made with
    train = ["train", "--config", str(RECIPES / f"{name}-{way}.yaml"), "--run-dir", str(tmp_path / "run")]
    assert main([*train, *places, *SHORT, "--train.global_batch_size=2"]) == 0
    assert main(["export", str(tmp_path / "run"), "--output", str(tmp_path / "export")]) == 0
    if way == "lora":
        adapter = str(tmp_path / "adapter")
        assert main(["export", str(tmp_path / "run"), "--adapter", "--output", adapter]) == 0
        check_markers(tmp_path / "model", tokenizer, tokenizer_folder, tmp_path / "export", tmp_path / "adapter")
    capsys.readouterr()
    ask = ["generate", str(tmp_path / "export"), "--prompt", "3番目の質問に答えてください。"]
    assert main([*ask, "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out


def test_continued_pretraining_with_replay(model: Path, tokenizer_folder: Path, tmp_path: Path):
    for name in ("own", "replay"):
        lines = [json.dumps({"text": f"{name}の文章、その{n}。" * 20}, ensure_ascii=False) for n in range(40)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
        sources = json.dumps([{"name": name, "path": str(tmp_path / f"{name}.jsonl")}])
        recipe = str(RECIPES / "wikipedia-prepare.yaml")
        settings = [f"--prepare.tokenizer={tokenizer_folder}", f"--prepare.sources={sources}"]
        assert main(["prepare", "--config", recipe, "--output", str(tmp_path / name), *settings]) == 0
    stores = [
        {"name": "own", "path": str(tmp_path / "own"), "weight": 0.8},
        {"name": "replay", "path": str(tmp_path / "replay"), "weight": 0.2},
    ]
    places = [f"--model.pretrained={model}", f"--tokenizer.path={tokenizer_folder}"]
    train = ["train", "--config", str(RECIPES / "finetune-text.yaml"), "--run-dir", str(tmp_path / "run")]
    short = [*SHORT[:1], "--train.max_steps=2", "--schedule.warmup_steps=0", "--schedule.decay_steps=1"]
    flags = [*places, f"--data.stores={json.dumps(stores)}", *short, "--train.global_batch_size=2"]
    assert main([*train, *flags]) == 0
    mixture = json.loads((tmp_path / "run" / "mixture.json").read_text())
    assert [store["planned_share"] for store in mixture["stores"].values()] == [0.75, 0.25]

"""A base model gets chat markers, learns to answer and to stop, and is exported with its chat template."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from support.models import stock_model, tiny_config
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tsumugu.cli import main
from tsumugu.data.instructions import TEMPLATES, find_template
from tsumugu.data.store import open_store
from tsumugu.generate import Generator
from tsumugu.tokenizer.contract import read_contract

ANSWERS = {"空の色は？": "青です。", "雪の色は？": "白です。", "山は？": "高い。"}
RECORDS = [
    {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
    for question, answer in ANSWERS.items()
]


def config_file(path: Path, content: dict) -> str:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")  # JSON is YAML
    return str(path)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """A pretrained model that has no chat markers."""
    folder = tmp_path_factory.mktemp("base") / "model"
    shutil.copytree(tokenizer_folder, folder)
    config = tiny_config("llama", True, vocab_size=read_contract(folder).vocab_size, max_position_embeddings=256)
    stock_model(config).save_pretrained(folder)
    return folder


def prepared(folder: Path, tokenizer: Path, template: str, records: list[dict] = RECORDS) -> Path:
    (folder / "records.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
    source = {"name": "chat", "path": str(folder / "records.jsonl"), "kind": "instructions"}
    settings = {"tokenizer": str(tokenizer), "template": template, "validation_share": 0, "workers": 1}
    content = {"prepare": {"sources": [source], "output": str(folder / "store"), **settings}}
    assert main(["prepare", "--config", config_file(folder / "prepare.yaml", content)]) == 0
    return folder / "store"


def trained(folder: Path, base: Path, steps: int) -> Path:
    content = {
        "model": {"pretrained": str(base)},
        "data": {"store": str(folder / "store"), "sequence_length": 128, "packing": "pad_left"},
        "train": {"max_steps": steps, "global_batch_size": 3, "micro_batch_size": 3, "dtype": "float32", "log_to": []},
        "optimizer": {"learning_rate": 0.02, "weight_decay": 0.0},
        "schedule": {"warmup_steps": 0, "kind": "constant"},
    }
    run = str(folder / "run")
    assert main(["train", "--config", config_file(folder / "train.yaml", content), "--run-dir", run]) == 0
    assert main(["export", run, "--output", str(folder / "model"), "--dtype", "float32"]) == 0
    return folder / "model"


@pytest.mark.parametrize("name", ["chatml", "gemma"])
def test_a_base_model_learns_its_markers_and_to_stop_at_them(
    name: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    with pytest.raises(AssertionError):
        prepared(tmp_path, base, name)
    refusal = capsys.readouterr().err
    assert f"`tsumugu tokenizer extend {base} --template {name} --output DIR`" in refusal
    assert main(["tokenizer", "extend", str(base), "--template", name, "--output", str(tmp_path / "tokenizer")]) == 0
    store = prepared(tmp_path, tmp_path / "tokenizer", name)
    model = trained(tmp_path, base, steps=80)
    stop = read_id(model, TEMPLATES[name].stop)
    contract = read_contract(model)
    assert GenerationConfig.from_pretrained(model).eos_token_id == [stop, contract.eos_id]
    generator = Generator(model)
    assert {question: generator.generate(question) for question in ANSWERS} == {
        question: (answer, True) for question, answer in ANSWERS.items()
    }

    stock, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "雪の色は？"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    reply = stock.generate(**ids, max_new_tokens=40, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert reply[-1].item() == stop
    assert tokenizer.decode(reply, skip_special_tokens=True) == "白です。"

    before, after = (AutoModelForCausalLM.from_pretrained(f).get_input_embeddings().weight for f in (base, model))
    assert after.shape[0] == before.shape[0] + len(TEMPLATES[name].special_tokens)
    assert not torch.equal(after[stop], before.mean(dim=0))
    written = (store / "tokenizer" / "chat_template.jinja").read_text()
    assert written == (model / "chat_template.jinja").read_text()
    whole = [{"role": "user", "content": "山は？"}, {"role": "assistant", "content": "高い。"}]
    encoded = tokenizer.apply_chat_template(whole, return_dict=True, return_assistant_tokens_mask=True)
    stored = [open_store(store).train.document(index) for index in range(3)]
    assert (encoded["input_ids"], encoded["assistant_masks"]) in [(i.tolist(), m.tolist()) for i, m in stored]


def read_id(folder: Path, token: str) -> int:
    return AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(token)


OWN = """
without_input: "Q: {instruction}\\n"
with_input: "Q: {instruction} / {input}\\n"
assistant: "A: "
"""
JINJA = (
    "{% for m in messages %}{{ 'Q: ' + m.content + '\\nA: ' if m.role == 'user' else m.content + eos_token }}"
    "{% endfor %}"
)


def test_a_template_of_ones_own_goes_all_the_way_without_its_file(base: Path, tmp_path: Path):
    (tmp_path / "own.yaml").write_text(OWN)
    prepared(tmp_path, base, str(tmp_path / "own.yaml"))
    (tmp_path / "own.yaml").unlink()
    model = trained(tmp_path, base, steps=1)
    tokenizer = AutoTokenizer.from_pretrained(model)
    generator = Generator(model)
    expected = tokenizer.apply_chat_template([{"role": "user", "content": "空は？"}], add_generation_prompt=True)
    assert generator._encode("空は？") == expected["input_ids"]
    text = "Q: 訳して / cat\nA: "
    assert generator._encode("訳して", "cat") == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_the_tokenizers_chat_template_goes_all_the_way(base: Path, tmp_path: Path):
    shutil.copytree(base, tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text(JINJA)
    prepared(tmp_path, tmp_path / "tokenizer", "chat")
    model = trained(tmp_path, base, steps=1)
    assert (model / "chat_template.jinja").read_text() == JINJA
    expected = AutoTokenizer.from_pretrained(model).apply_chat_template([{"role": "user", "content": "空は？"}])
    assert Generator(model)._encode("空は？") == expected["input_ids"]
    assert find_template("chat", model).stop == "</s>"


def test_changing_the_file_of_a_template_changes_the_settings_of_a_store(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    (tmp_path / "own.yaml").write_text(OWN)
    prepared(tmp_path, base, str(tmp_path / "own.yaml"))
    again = ["prepare", "--config", str(tmp_path / "prepare.yaml")]
    assert main(again) == 0
    (tmp_path / "own.yaml").write_text(OWN.replace("A: ", "B: "))
    assert main(again) == 2
    assert "other settings: prepare.template" in capsys.readouterr().err


def test_a_special_token_in_a_message_drops_it_where_the_tokenizers_template_is_used(base: Path, tmp_path: Path):
    shutil.copytree(base, tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text(JINJA)
    spelt = [{"role": "user", "content": "空</s>"}, {"role": "assistant", "content": "青"}]
    records = [*RECORDS, {"messages": spelt}]
    store = open_store(prepared(tmp_path, tmp_path / "tokenizer", "chat", records))
    assert store.manifest["sources"]["chat"]["dropped: a message spells a special token"] == 1
    assert store.train.documents == len(RECORDS)
    (tmp_path / "text").mkdir()
    as_text = open_store(prepared(tmp_path / "text", base, "alpaca-ja", records))
    assert as_text.train.documents == len(records)

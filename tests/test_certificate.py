"""A certificate finds what is wrong with an exported folder, and names it."""

import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.hub import TOKEN, Hub, serving
from support.models import stock_model, tiny_config
from support.runs import StopAfter, run_config
from support.stores import random_documents, write_store
from support.transformers4 import transformers4
from transformers import AutoModelForCausalLM, AutoTokenizer

from tsumugu import certificate, cli
from tsumugu import export as export_module
from tsumugu.distributed.environment import process_group
from tsumugu.errors import UserError
from tsumugu.export import CertificateError, export, export_state_dict
from tsumugu.tokenizer.contract import read_contract
from tsumugu.tokenizer.train import train_byte_level
from tsumugu.training.trainer import Trainer


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("certificate")


@pytest.fixture(scope="module")
def runs(root: Path, tokenizer_folder: Path) -> Path:
    """Runs of an untied GPT-NeoX and a tied Llama, of an instruction store with a real tokenizer."""
    fingerprint = read_contract(tokenizer_folder).fingerprint
    vocab_size = read_contract(tokenizer_folder).vocab_size
    documents = random_documents(8, seed=2)
    masks = [[1] * len(ids) for ids in documents]
    store = write_store(root / "store", documents, documents[:3], masks, fingerprint)
    shutil.copytree(tokenizer_folder, store / "tokenizer", dirs_exist_ok=True)
    for architecture, tied, stop in (("gpt_neox", False, None), ("llama", True, 0)):
        config = tiny_config(architecture, tied, vocab_size=vocab_size)
        config.save_pretrained(root / f"{architecture}-config")
        changes = {
            "model.config": str(root / f"{architecture}-config"),
            "train.max_steps": 3,
            "data.packing": "pad_left",
        }
        changes |= {"train.global_batch_size": 2, "optimizer.learning_rate": 0.01}
        with process_group() as environment:
            trainer = Trainer(run_config(store, changes), root / architecture, environment)
            trainer.train(StopAfter(stop))
    return root


def content_of(folder: Path) -> dict:
    return json.loads((folder / "certificate.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def exported(runs: Path) -> Path:
    for architecture in ("gpt_neox", "llama"):
        export(str(runs / architecture), runs / f"{architecture}-model")
    return runs


@pytest.fixture
def fresh_process(reloaded_here: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certificate, "_run", reloaded_here)


def test_a_sound_export_passes_in_fresh_processes_of_transformers_5_and_4(
    runs: Path, tmp_path: Path, fresh_process: None, capsys
):
    model = tmp_path / "model"
    arguments = ["export", str(runs / "gpt_neox"), "--output", str(model), "--verify-with", transformers4()]
    assert cli.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "logits differ by 0 at most" in shown
    assert "llama.cpp" in shown
    content = content_of(model)
    assert content["failures"] == []
    assert [found["transformers"].split(".")[0] for found in content["verified"]] == ["5", "4"]
    assert all(found["logit_difference"] <= 1e-6 for found in content["verified"])
    assert len(content["expected"]["rows"]) > 15
    assert len(content["expected"]["prompts"]) == 2
    state = json.loads((runs / "gpt_neox" / "checkpoints" / "step-00000003" / "state.json").read_text())
    assert content["origin"]["data"] == {"data.store": state["identity"]["data.store"]}
    with safe_open(model / "model.safetensors", framework="pt") as opened:
        names = set(opened.keys())
    assert content["tensors"].keys() == names
    assert {entry["dtype"] for entry in content["tensors"].values()} == {"bfloat16"}
    origin, run = content["origin"], runs / "gpt_neox"
    assert (origin["step"], origin["dtype"]) == (3, "bfloat16")
    assert origin["configuration"] == hashlib.sha256((run / "config.yaml").read_bytes()).hexdigest()
    assert origin["tokenizer"] == read_contract(run / "tokenizer").fingerprint
    checkpoint = run / "checkpoints" / "step-00000003"
    for name, sha256 in origin["checkpoint"].items():
        assert hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() == sha256
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in model.iterdir()}
    assert content["files"] == {name: sha256 for name, sha256 in files.items() if name != "certificate.json"}
    assert content["expected"]["tied"] is False
    for found in content["verified"]:
        assert found["perplexity"] == pytest.approx(found["perplexity_of_checkpoint"], rel=0.01)
        assert found["greedy_agreement_with_checkpoint"] > 0.95
    assert cli.main(["export", "--verify", str(model)]) == 0
    assert f"{model}: verified" in capsys.readouterr().out
    assert cli.main(arguments) == 0
    assert "already done" in capsys.readouterr().out


def test_the_figures_are_those_of_the_stock_model(exported: Path):
    """Perplexity and losses by a plain loop over the folder's weights in float32; validation rows count."""
    content = content_of(exported / "gpt_neox-model")
    model = AutoModelForCausalLM.from_pretrained(exported / "gpt_neox-model", dtype=torch.float32).eval()
    published = content["expected"]["rows"]
    losses = []
    for row in [*published, *random_documents(8, seed=2)[:3]]:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row])).logits[0]
        losses.append((-logits[:-1].double().log_softmax(-1)[range(len(row) - 1), row[1:]]).tolist())
    for own, expected in zip(losses, content["expected"]["losses"], strict=False):
        assert own == pytest.approx(expected, abs=1e-5)

    def perplexity(rows: list[list[float]]) -> float:
        return torch.tensor(list(itertools.chain(*rows)), dtype=torch.float64).mean().exp().item()

    assert content["verified"][0]["perplexity"] == pytest.approx(perplexity(losses), rel=1e-5)
    _, figures = certificate.verify(exported / "gpt_neox-model")
    assert figures[0]["perplexity"] == pytest.approx(perplexity(losses[: len(published)]), rel=1e-5)


def test_a_certificate_holds_the_tie_and_the_rotary_frequencies(exported: Path):
    expected = content_of(exported / "llama-model")["expected"]
    assert expected["tied"] is True
    (frequencies,) = expected["buffers"].values()
    assert frequencies == pytest.approx([10000 ** (-2 * place / 8) for place in range(4)])  # heads of 8


def change_json(name: str, **changes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        (folder / name).write_text(json.dumps(content | changes, ensure_ascii=False), encoding="utf-8")

    return change


def change_tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        changed = change(tensors.pop(name))
        tensors |= {} if changed is None else {name: changed.contiguous()}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return apply


def one_bit(tensor: torch.Tensor) -> torch.Tensor:
    values = tensor.clone()
    values.view(torch.uint8).view(-1)[2] ^= 1
    return values


def heads_swapped(tensor: torch.Tensor) -> torch.Tensor:
    """The first two of four heads of GPT-NeoX's query_key_value (heads · 3 · 8, hidden)."""
    heads = tensor.view(4, -1, tensor.shape[1])
    return heads[[1, 0, 2, 3]].view(tensor.shape)


def rope(**changes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        parameters = content["rope_parameters"] | changes
        change_json("config.json", rope_parameters=parameters, **changes)(folder)

    return change


def merges_changed(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["vocab"][300], content["model"]["vocab"][301] = (
        content["model"]["vocab"][301],
        content["model"]["vocab"][300],
    )
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def all_as(dtype: torch.dtype) -> Callable[[Path], None]:
    def cast(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        save_file({name: t.to(dtype) for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})

    return cast


def template_changed(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text(encoding="utf-8").replace("### 応答", "### 答え"), encoding="utf-8")


QKV = "gpt_neox.layers.1.attention.query_key_value.weight"
PLANTED = {
    "a flipped bit": ("gpt_neox", change_tensor(QKV, one_bit), rf"tensor {QKV} has other values"),
    "swapped heads": ("gpt_neox", change_tensor(QKV, heads_swapped), rf"tensor {QKV} has other values"),
    "a lost tensor": ("gpt_neox", change_tensor(QKV, lambda _: None), rf"tensor {QKV} is missing"),
    "rotary base": ("gpt_neox", rope(rope_theta=20000.0), "config rope_parameters is .*20000"),
    "rotary fraction": ("gpt_neox", rope(partial_rotary_factor=0.5), "config rope_parameters is .*0.5"),
    "residual": ("gpt_neox", change_json("config.json", use_parallel_residual=False), "config use_parallel_residual"),
    "a missing tie": ("llama", change_json("config.json", tie_word_embeddings=False), "config tie_word_embeddings"),
    "a tie too many": ("gpt_neox", change_json("config.json", tie_word_embeddings=True), "config tie_word_embeddings"),
    "epsilon": ("llama", change_json("config.json", rms_norm_eps=1e-3), "config rms_norm_eps is 0.001"),
    "float16 in place of bfloat16": ("llama", all_as(torch.float16), r"tensor \S+ is float16, not bfloat16"),
    "dtype of the configuration": ("llama", change_json("config.json", dtype="float32"), "config dtype"),
    "tokenizer": ("llama", merges_changed, "tokenizer: "),
    "chat template": ("llama", template_changed, "chat template: "),
    "stop": ("llama", change_json("generation_config.json", eos_token_id=5), "does not end at token 2"),
    "a stop too many": ("llama", change_json("generation_config.json", eos_token_id=[2, 5]), r"also ends at \[5\]"),
    "eos": ("llama", change_json("tokenizer_config.json", eos_token="<pad>"), "eos_token has id 3, in training .* 2"),
    "bos": ("llama", change_json("tokenizer_config.json", bos_token="</s>"), "bos_token has id 2, in training .* 1"),
    "pad": ("llama", change_json("tokenizer_config.json", pad_token="<unk>"), "pad_token has id 0, in training .* 3"),
    "unknown": ("llama", change_json("tokenizer_config.json", unk_token="<s>"), "unk_token has id 1, in training .* 0"),
    "ids without text": (
        "llama",
        change_json("generation_config.json", suppress_tokens=None),
        r"generation_config suppress_tokens is None, exported was \[0, ",
    ),
    "a penalty": (
        "llama",
        change_json("generation_config.json", repetition_penalty=1.3),
        "generation_config repetition_penalty is 1.3, exported was None",
    ),
    "n-grams": (
        "gpt_neox",
        change_json("generation_config.json", no_repeat_ngram_size=3),
        "generation_config no_repeat_ngram_size is 3, exported was None",
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_found_before_the_folder_appears(
    name: str, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    architecture, plant, expected = PLANTED[name]
    certify = certificate.certify

    def planted(folder: Path, *arguments):
        plant(folder)
        return certify(folder, *arguments)

    monkeypatch.setattr(certificate, "certify", planted)
    assert cli.main(["export", str(runs / architecture), "--output", str(tmp_path / "model")]) == 1
    found = capsys.readouterr().err
    assert re.search(expected, found), found
    assert [path.name for path in tmp_path.iterdir()] == ["model.failed"]
    assert content_of(tmp_path / "model.failed")["failures"]


@pytest.mark.parametrize("name", ["a flipped bit", "rotary base", "a missing tie", "tokenizer", "stop"])
def test_a_planted_fault_is_found_later(name: str, exported: Path, tmp_path: Path, capsys):
    architecture, plant, expected = PLANTED[name]
    shutil.copytree(exported / f"{architecture}-model", tmp_path / "model")
    plant(tmp_path / "model")
    assert cli.main(["export", "--verify", str(tmp_path / "model")]) == 1
    found = capsys.readouterr().err
    assert re.search(expected, found), found
    assert "is not the one that was exported" in found


def test_files_that_are_lost_or_new_are_named(exported: Path, tmp_path: Path):
    shutil.copytree(exported / "llama-model", tmp_path / "model")
    (tmp_path / "model" / "README.md").unlink()
    (tmp_path / "model" / "new.bin").write_bytes(b"1")
    failures, figures = certificate.verify(tmp_path / "model")
    assert failures == ["file README.md is missing", "file new.bin was not exported"]
    assert figures[0]["loss_difference"] == 0


def test_what_cannot_be_verified_is_refused(exported: Path, tmp_path: Path, fresh_process: None):
    with pytest.raises(UserError, match=r"holds no certificate.json"):
        certificate.verify(tmp_path)
    with pytest.raises(UserError, match=r"cannot be run: No such file"):
        certificate.verify(exported / "llama-model", str(tmp_path / "python"))
    shutil.copytree(exported / "llama-model", tmp_path / "model")
    change_json("config.json", hidden_size=48)(tmp_path / "model")
    failures, _ = certificate.verify(tmp_path / "model")
    assert any("cannot be reloaded with" in failure for failure in failures)
    empty = content_of(exported / "llama-model") | {"expected": {}}
    for content in ("{", '{"version": 1}', '{"version": 2}', "[]", '{"version": 2, "failures": {}}', json.dumps(empty)):
        (tmp_path / "model" / "certificate.json").write_text(content)
        with pytest.raises(UserError, match=r"damaged or of another version"):
            certificate.verify(tmp_path / "model")
    for content in ("{", "[]"):
        (tmp_path / "model" / "tsumugu.json").write_text(content)
        with pytest.raises(UserError, match=r"tsumugu.json is damaged"):
            export(str(exported / "llama"), tmp_path / "model")


def test_a_run_that_never_trained_is_said_to_be_so(exported: Path, runs: Path, capsys):
    assert cli.main(["export", str(runs / "llama"), "--output", str(exported / "llama-model")]) == 0
    assert "has taken no step: this model is not trained" in capsys.readouterr().err
    assert "has taken no training step" in (exported / "llama-model" / "README.md").read_text(encoding="utf-8")
    assert "has taken no training step" not in (exported / "gpt_neox-model" / "README.md").read_text(encoding="utf-8")


def written_wrongly(monkeypatch: pytest.MonkeyPatch, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """A mistake of the export itself, which what it has written agrees with."""
    write = export_module._write_weights

    def wrongly(model, read, output):
        return write(model, lambda asked: change(read(asked)) if asked == name else read(asked), output)

    monkeypatch.setattr(export_module, "_write_weights", wrongly)


def test_a_tensor_that_was_written_wrongly_is_named(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    written_wrongly(monkeypatch, QKV, heads_swapped)
    with pytest.raises(CertificateError) as caught:
        export(str(runs / "gpt_neox"), tmp_path / "model")
    assert caught.value.failures[0].startswith(f"tensor {QKV} has other values")
    assert re.search(r"losses differ by up to \d", caught.value.failures[1])  # stock transformers finds it too


def test_a_row_of_the_embedding_that_no_test_row_reads_is_compared_too(
    runs: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    rows = [*content_of(exported / "gpt_neox-model")["expected"]["rows"], *random_documents(8, seed=2)[:3]]
    unread = max(set(range(read_contract(runs / "gpt_neox" / "tokenizer").vocab_size)) - set(itertools.chain(*rows)))
    name = "gpt_neox.embed_in.weight"
    written_wrongly(monkeypatch, name, lambda tensor: tensor.index_fill(0, torch.tensor([unread]), 9.0))
    with pytest.raises(CertificateError) as caught:
        export(str(runs / "gpt_neox"), tmp_path / "model")
    (failure,) = caught.value.failures  # nothing else shows it
    assert failure.startswith(f"tensor {name} has other values")


def test_a_certificate_holds_no_text_of_the_data(exported: Path):
    """Of the validation rows it has their number and a hash, and the figures in which they take part."""
    content = content_of(exported / "gpt_neox-model")
    rows = random_documents(8, seed=2)[:3]
    assert not [row for row in rows if row in content["expected"]["rows"]]
    assert len(content["expected"]["losses"]) == len(content["expected"]["rows"])
    hashed = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    assert content["sample"] == {
        **{"rows": 3, "split": "validation", "stores": {"store": 3}, "missing": []},
        "sha256": hashed,
    }
    written = (exported / "gpt_neox-model" / "certificate.json").read_text(encoding="utf-8")
    assert not [row for row in rows if json.dumps(row)[1:-1] in re.sub(r"\s+", " ", written)]


def with_stores(run: Path, output: Path, *paths: Path) -> Path:
    """A copy of a run that says it has read these stores."""
    shutil.copytree(run, output)
    content = yaml.safe_load((output / "config.yaml").read_text(encoding="utf-8"))
    content["data"] |= {
        "store": None,
        "stores": [{"name": path.name, "path": str(path), "weight": 1} for path in paths],
    }
    (output / "config.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return output


def test_rows_of_every_store_are_compared_and_those_that_are_gone_are_named(runs: Path, tmp_path: Path, capsys):
    fingerprint, documents = read_contract(runs / "llama" / "tokenizer").fingerprint, random_documents(6, seed=4)
    write_store(tmp_path / "news", documents, documents[:5], fingerprint=fingerprint)
    write_store(tmp_path / "wiki", documents, documents[:1], fingerprint=fingerprint)
    write_store(tmp_path / "code", documents, [], fingerprint=fingerprint)
    write_store(tmp_path / "other", documents, documents)
    stores = [tmp_path / name for name in ("gone", "other", "code", "news", "wiki")]
    run = with_stores(runs / "llama", tmp_path / "run", *stores)
    assert cli.main(["export", str(run), "--output", str(tmp_path / "model")]) == 0
    shown = capsys.readouterr()
    assert "compared on golden strings and 4 rows of validation data: 3 of news, 1 of wiki" in shown.out
    assert "no rows were compared: the store gone cannot be opened where the run has read it" in shown.err
    assert "no rows were compared: the store other is made with another tokenizer" in shown.err
    assert "no rows were compared: the store code has no validation document" in shown.err
    assert content_of(tmp_path / "model")["sample"]["stores"] == {"code": 0, "news": 3, "wiki": 1}
    run = with_stores(runs / "llama", tmp_path / "alone", tmp_path / "gone", tmp_path / "other")
    assert cli.main(["export", str(run), "--output", str(tmp_path / "without")]) == 0
    assert "compared on golden strings alone" in capsys.readouterr().out
    sample = content_of(tmp_path / "without")["sample"]
    assert (sample["rows"], len(sample["missing"])) == (0, 2)


def test_what_a_killed_export_left_is_said(runs: Path, exported: Path, tmp_path: Path, capsys):
    (tmp_path / ".model-ab12_xyz").mkdir()
    (tmp_path / ".model-ab12_xyz" / "tsumugu.json").write_text("{}")
    shutil.copytree(exported / "llama-model", tmp_path / ".model-anothers")  # a finished one, so named
    (tmp_path / ".model-folder__").mkdir()  # somebody's
    (tmp_path / ".certificate-ab12_xyz").mkdir()
    (tmp_path / ".certificate-ab12_xyz" / "asked.json").write_text("{}")
    (tmp_path / ".certificate-folder__").mkdir()
    assert cli.main(["export", str(runs / "llama"), "--output", str(tmp_path / "model")]) == 0
    said = [line.split()[2] for line in capsys.readouterr().err.splitlines() if "was killed" in line]
    assert said == [str(tmp_path / ".model-ab12_xyz"), str(tmp_path / ".certificate-ab12_xyz")]
    assert len(list(tmp_path.iterdir())) == 6


def test_a_dtype_that_costs_too_much_is_refused(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(certificate, "_PERPLEXITY", 1e-9)
    with pytest.raises(CertificateError, match=r"as bfloat16 the perplexity is .*export with --dtype float32"):
        export(str(runs / "gpt_neox"), tmp_path / "model")


def old_state_dict(model) -> dict[str, torch.Tensor]:
    """As transformers 4.21 saved a GPT-NeoX: names on disk, and the buffers that were no weights."""
    tensors = {name.replace("lm_head", "embed_out"): tensor for name, tensor in model.state_dict().items()}
    for layer in range(model.config.num_hidden_layers):
        attention = f"gpt_neox.layers.{layer}.attention."
        tensors[attention + "bias"] = torch.ones(1, 1, 8, 8, dtype=torch.uint8)
        tensors[attention + "masked_bias"] = torch.tensor(-1e9)
        tensors[attention + "rotary_emb.inv_freq"] = torch.ones(4)
    return tensors


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_samples_full_checkpoint_becomes_a_folder(wrapped: bool, tokenizer_folder: Path, tmp_path: Path):
    contract = read_contract(tokenizer_folder)
    config = tiny_config("gpt_neox", False, vocab_size=contract.vocab_size + 6)
    model = stock_model(config)
    tensors = old_state_dict(model)
    config.save_pretrained(tmp_path / "config")
    torch.save(
        {"model": {f"module.{name}": t for name, t in tensors.items()}} if wrapped else tensors,
        tmp_path / "fullmodel.pt",
    )
    arguments = ["export", "--from-state-dict", str(tmp_path / "fullmodel.pt"), "--dtype", "float32"]
    arguments += ["--model-config", str(tmp_path / "config" / "config.json"), "--output", str(tmp_path / "model")]
    assert cli.main([*arguments, "--tokenizer", str(tokenizer_folder)]) == 0
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    ids = torch.arange(24).reshape(2, 12)
    assert torch.equal(found(input_ids=ids).logits, model(input_ids=ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "model")("日本")["input_ids"]
    assert content_of(tmp_path / "model")["verified"][0]["logit_difference"] == 0
    assert cli.main([*arguments, "--tokenizer", str(tokenizer_folder)]) == 0
    assert cli.main(arguments) == 2  # without the tokenizer it is another export


def test_special_tokens_that_a_golden_string_spells_are_no_fault(tmp_path: Path):
    train_byte_level(lambda: ["reserved_0 の文章を読む。" * 20], tmp_path / "bytes", vocab_size=280, reserved=2)
    vocab_size = read_contract(tmp_path / "bytes").vocab_size
    config = tiny_config("gpt2", True, vocab_size=vocab_size)
    config.save_pretrained(tmp_path / "config")
    torch.save(stock_model(config).state_dict(), tmp_path / "model.pt")
    export_state_dict(tmp_path / "model.pt", str(tmp_path / "config"), tmp_path / "out", "float32", tmp_path / "bytes")
    assert content_of(tmp_path / "out")["failures"] == []


def test_a_tied_state_dict_may_name_the_matrix_by_either_end(tmp_path: Path):
    config = tiny_config("llama", True)
    config.save_pretrained(tmp_path)
    model = stock_model(config)
    tensors = {name: t for name, t in model.state_dict().items() if name != "model.embed_tokens.weight"}
    torch.save(tensors, tmp_path / "model.pt")
    assert export_state_dict(tmp_path / "model.pt", str(tmp_path), tmp_path / "out", "float32")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(written["model.embed_tokens.weight"], model.lm_head.weight)


def test_state_dicts_that_are_not_those_of_the_configuration_are_refused(tmp_path: Path):
    config = tiny_config("gpt_neox", False)
    config.save_pretrained(tmp_path)
    tensors = old_state_dict(stock_model(config))
    tied = tiny_config("gpt_neox", True)
    (tmp_path / "tied").mkdir()
    tied.save_pretrained(tmp_path / "tied")

    def refusal(content, config: Path = tmp_path) -> str:
        torch.save(content, tmp_path / "model.pt")
        with pytest.raises(UserError) as caught:
            export_state_dict(tmp_path / "model.pt", str(config), tmp_path / "out", "float32")
        return str(caught.value)

    norm = "gpt_neox.final_layer_norm.bias"
    assert f"lacks {norm}" in refusal({name: t for name, t in tensors.items() if name != norm})
    assert "has, unlike the model of that configuration, extra" in refusal({**tensors, "extra": torch.ones(1)})
    assert f"in another shape than the configuration's {norm}" in refusal({**tensors, norm: torch.ones(3)})
    assert "which the configuration ties: lm_head.weight" in refusal(tensors, tmp_path / "tied")
    for content in ({"epoch": 3}, [torch.ones(1)], torch.ones(2), {1: torch.ones(1)}, {}, {"model": [1]}):
        assert "not all in it are tensors by name" in refusal(content)
    assert "is no state dict of torch" in refusal({"a": UserError("code")})
    with pytest.raises(UserError, match="does not exist"):
        export_state_dict(tmp_path / "none.pt", str(tmp_path), tmp_path / "out", "float32")
    assert not (tmp_path / "out").exists()


def test_the_card_names_the_base_model_its_licence_and_its_terms(exported: Path, tmp_path: Path):
    base, run = tmp_path / "Some-Llama", tmp_path / "run"
    shutil.copytree(exported / "llama-model", base)
    (base / "README.md").write_text("---\nlicense: llama3.1\n---\n# Base\n", encoding="utf-8")
    config = run_config(
        exported / "store",
        {"model.pretrained": str(base), "train.max_steps": 1, "data.packing": "pad_left", "train.global_batch_size": 2},
    )
    with process_group() as environment:
        Trainer(config, run, environment).train(StopAfter(None))
    export(str(run), tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert "license: llama3.1" in card
    assert '- Some-Llama\n- License / ライセンス: llama3.1\n- The name must begin with "Llama"' in card
    assert "| store | 1 |" in card
    assert "| training loss / 学習損失 |" in card
    assert "## Certificate / 証明書" in card
    verified = content_of(tmp_path / "model")["verified"][0]
    assert f"| {verified['transformers']} | {verified['torch']} |" in card
    assert str(tmp_path) not in card
    assert "None: trained from random weights" in (exported / "gpt_neox-model" / "README.md").read_text(
        encoding="utf-8"
    )


# Run in a process of its own, since huggingface_hub reads its address when it is imported.
PUSH = "import sys; from tsumugu.cli import main; sys.exit(main(sys.argv[1:]))"


def push(hub: Hub, folder: Path, run: Path, *arguments: str, token: str = TOKEN) -> subprocess.CompletedProcess:
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", PUSH, "export", str(run), "--output", str(folder), "--push-to-hub", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_a_folder_is_pushed_privately_and_whole_or_not_at_all(exported: Path, runs: Path, tmp_path: Path):
    folder, run = tmp_path / "model", runs / "gpt_neox"
    shutil.copytree(exported / "gpt_neox-model", folder)
    with serving() as hub:
        done = push(hub, folder, run, "lab/ours")
        assert done.returncode == 0, done.stderr
        assert f"{hub.url}/lab/ours" in done.stdout
        assert hub.repositories == {"lab/ours": True}
        assert hub.files["lab/ours"] == {path.name: path.read_bytes() for path in folder.iterdir()}
        hub.repositories["lab/ours"] = False
        refused = push(hub, folder, run, "lab/ours")
        assert (refused.returncode, "exists on the hub and is public" in refused.stderr) == (2, True)
        (folder / "README.md").write_text("# Other")
        refused = push(hub, folder, run, "lab/other", "--public")
        assert (refused.returncode, "README.md is not the one that was exported" in refused.stderr) == (1, True)
        assert hub.repositories == {"lab/ours": False}
        refused = push(hub, exported / "gpt_neox-model", run, "lab/other", token="hf_" + "b" * 34)
        assert (refused.returncode, "the hub refuses lab/other" in refused.stderr) == (2, True)
        assert "hf_b" not in refused.stderr + refused.stdout

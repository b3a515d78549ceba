"""Text from a folder: stock transformers' own greedy continuation of the prompt as it was trained."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from support.encoding import BulkEncoder
from support.models import stock_model, tiny_config
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tsumugu.data.instructions import TEMPLATES, Message
from tsumugu.errors import UserError
from tsumugu.generate import Generator
from tsumugu.tokenizer.contract import read_contract

PROMPT = "朝早く起きて、"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """A random model as an exported folder, with no origin of its own."""
    folder = tmp_path_factory.mktemp("generate") / "model"
    shutil.copytree(tokenizer_folder, folder)
    contract = read_contract(folder)
    stock_model(
        tiny_config("gpt_neox", False, vocab_size=contract.vocab_size, max_position_embeddings=256)
    ).save_pretrained(folder)
    GenerationConfig(eos_token_id=[contract.eos_id], pad_token_id=contract.pad_id).save_pretrained(folder)
    return folder


def trained_with(folder: Path, output: Path, **origin) -> Path:
    shutil.copytree(folder, output)
    (output / "tsumugu.json").write_text(json.dumps(origin))
    return output


def text_of(template: str, prompt: str, input: str = "") -> str:
    return "".join(segment.text for segment in TEMPLATES[template].segments([Message("user", prompt, input=input)]))


def greedy(folder: Path, ids: list[int], tokens: int) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    for _ in range(tokens):  # by hand: every next id is the most likely one
        with torch.no_grad():
            ids = [*ids, int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())]
    return ids


@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize("template", [None, "alpaca-ja"])
def test_the_continuation_is_the_greedy_one_of_the_prompt_in_training(
    add_bos: bool, template: str | None, model_folder: Path, tmp_path: Path
):
    folder = trained_with(model_folder, tmp_path / "model", add_bos=add_bos, template=template)
    text = text_of(template, PROMPT, "入力") if template else PROMPT
    ids = [1] * add_bos + BulkEncoder(folder)([text])[0]
    reply = greedy(folder, ids, 16)[len(ids) :]
    expected = AutoTokenizer.from_pretrained(folder).decode(reply, skip_special_tokens=True)
    assert 2 not in reply
    assert Generator(folder).generate(PROMPT, "入力" if template else "", max_new_tokens=16) == (expected, False)


def test_a_special_token_spelt_in_the_prompt_is_text_as_in_training(model_folder: Path, tmp_path: Path):
    folder = trained_with(model_folder, tmp_path / "model", add_bos=False, template=None)
    generator = Generator(folder)
    for text in ("</s>雨", "<s><pad> <unk>"):
        ids = generator._encode(text, "")
        assert ids == BulkEncoder(folder)([text])[0]
        assert not {0, 1, 2, 3} & set(ids)


def test_a_tokenizer_that_adds_eos_by_itself_does_not_end_the_prompt(model_folder: Path, tmp_path: Path):
    folder = trained_with(model_folder, tmp_path / "model", add_bos=False, template=None)
    layout = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    layout["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"</s>": {"id": "</s>", "ids": [2], "tokens": ["</s>"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(layout), encoding="utf-8")
    assert AutoTokenizer.from_pretrained(folder)(PROMPT)["input_ids"][-1] == 2
    assert Generator(folder)._encode(PROMPT, "")[-1] != 2


def test_it_stops_by_itself_at_eos(model_folder: Path, tmp_path: Path):
    folder = trained_with(model_folder, tmp_path / "model", add_bos=False, template=None)
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = BulkEncoder(folder)([PROMPT])[0]
    with torch.no_grad():
        hidden = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0, -1]
        model.get_output_embeddings().weight[2] = 100 * hidden
    model.save_pretrained(folder)
    assert Generator(folder).generate(PROMPT, max_new_tokens=16) == ("", True)


def test_another_template_can_be_named_and_none_at_all(model_folder: Path, tmp_path: Path):
    folder = trained_with(model_folder, tmp_path / "model", add_bos=False, template="alpaca-ja")
    encode = BulkEncoder(folder)
    assert Generator(folder, "none")._encode("雨", "") == encode(["雨"])[0]
    assert Generator(folder, "alpaca-en")._encode("雨", "") == encode([text_of("alpaca-en", "雨")])[0]
    with pytest.raises(UserError, match="no template x"):
        Generator(folder, "x")


def test_a_folder_of_others_is_prompted_as_its_tokenizer_does(model_folder: Path):
    assert (
        Generator(model_folder)._encode(PROMPT, "") == AutoTokenizer.from_pretrained(model_folder)(PROMPT)["input_ids"]
    )


def test_it_ends_where_the_models_positions_end(model_folder: Path, tmp_path: Path):
    folder = trained_with(model_folder, tmp_path / "model", add_bos=False, template=None)
    stock_model(
        tiny_config("gpt2", False, vocab_size=read_contract(folder).vocab_size, n_positions=24)
    ).save_pretrained(folder)
    generator = Generator(folder)
    _, stopped = generator.generate("雨", max_new_tokens=1000)
    assert not stopped
    with pytest.raises(UserError, match="the model has 24 positions"):
        generator.generate("雨" * 100)


def test_nothing_is_drawn_on_the_terminal(model_folder: Path, capfd: pytest.CaptureFixture):
    Generator(model_folder).generate(PROMPT, max_new_tokens=2)
    assert capfd.readouterr() == ("", "")


def test_what_cannot_be_used_is_the_users_error(model_folder: Path, tmp_path: Path):
    with pytest.raises(UserError, match="holds no model"):
        Generator(tmp_path)
    shutil.copytree(model_folder, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(UserError, match="cannot be loaded"):
        Generator(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot be loaded"):
        Generator(tmp_path / "model")
    generator = Generator(model_folder)
    for arguments, message in {
        ("", "", 5): "the prompt is empty",
        ("雨", "入力", 5): "no prompt template",
        ("雨", "", 0): "--max-new-tokens is 0",
        ("雨\udcff", "", 5): r"the prompt is not valid Unicode: lone surrogate U\+DCFF at character 1",
        ("雨", "\udcff", 5): "the input is not valid Unicode",
    }.items():
        with pytest.raises(UserError, match=message):
            generator.generate(*arguments)

"""Text from a folder or a run: stock transformers' own continuation of the prompt as it was trained."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.encoding import BulkEncoder
from support.models import stock_model, tiny_config
from support.runs import run_config, text_run
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutputWithPast

from tsumugu import generate
from tsumugu.cli import main
from tsumugu.config import LoraConfig
from tsumugu.data.instructions import TEMPLATES, Message
from tsumugu.distributed.environment import process_group
from tsumugu.errors import UserError
from tsumugu.export import export
from tsumugu.generate import Decoding, Generator, answer, converse, find_source, load_model
from tsumugu.tokenizer.contract import read_contract
from tsumugu.tokenizer.train import train_byte_level
from tsumugu.training.signals import StopRequest
from tsumugu.training.trainer import Trainer

PROMPT = "朝早く起きて、"
STOPPING = ("bos_token_id", "eos_token_id", "pad_token_id", "suppress_tokens")


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


# --- streaming, batches, sessions, runs ------------------------------------------------------------------------------


class Forced:
    """A generator whose model says given ids, whatever it is asked."""

    def __init__(self, folder: Path, ids: list[int], template: str | None = None, eos: int = 2):
        self.generator = Generator(folder, template)
        vocabulary = self.generator.model.config.vocab_size
        self.place = 0

        def forward(*args, **kwargs):
            logits = torch.zeros(1, 1, vocabulary)
            logits[0, 0, ([*ids, eos])[self.place]] = 9.0
            self.place += 1
            return CausalLMOutputWithPast(logits=logits)

        self.generator.model.generation_config.suppress_tokens = None
        self.generator.model.forward = forward

    def pieces(self, prompt: str = "雨") -> tuple[list[str], str]:
        said: list[str] = []
        reply = self.generator.reply(self.generator._encode(prompt), Decoding(max_new_tokens=99), said.append)
        return said, reply.text


def test_streamed_pieces_are_whole_characters_and_make_up_the_reply(model_folder: Path):
    encode = BulkEncoder(model_folder)
    text = "朝の𠮷野家で😀を\n見た"  # some of it in bytes
    ids = encode([text])[0]
    tokens = AutoTokenizer.from_pretrained(model_folder).convert_ids_to_tokens(ids)
    assert sum(token.startswith("<0x") for token in tokens) >= 8
    said, reply = Forced(model_folder, ids).pieces()
    assert "".join(said) == reply == text
    assert len(said) > 3
    assert "\ufffd" not in "".join(said)
    spoilt = [*encode(["雨"])[0], *encode(["😀"])[0], encode(["😀"])[0][-2], *encode(["が"])[0]]
    said, reply = Forced(model_folder, spoilt).pieces()
    assert "".join(said) == reply  # also where bytes are no character in the end
    assert "\ufffd" in reply


def test_byte_level_pieces_are_streamed_as_whole_characters(tmp_path: Path):
    train_byte_level(
        lambda: ["朝早く起きて、川沿いの道を歩いた。Good morning."] * 3, tmp_path, vocab_size=300, reserved=4
    )
    contract = read_contract(tmp_path)
    config = tiny_config("gpt_neox", False, vocab_size=contract.vocab_size, eos_token_id=contract.eos_id)
    stock_model(config).save_pretrained(tmp_path)
    ids = BulkEncoder(tmp_path)(["鮭と😀、 and a walk"])[0]
    said, reply = Forced(tmp_path, ids, eos=contract.eos_id).pieces()
    assert "".join(said) == reply == "鮭と😀、 and a walk"
    assert not any("\ufffd" in piece for piece in said)


def test_a_continuation_keeps_the_space_that_the_tokenizer_writes_in_front_of_a_text(
    model_folder: Path, tmp_path: Path
):
    folder = trained_with(model_folder, tmp_path / "model", add_bos=False, template=None)
    vocabulary = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("<pad>", 0.0)]
    vocabulary += [(piece, -1.0) for piece in ("▁The", "▁river", "▁was", "calm", "▁", "<", "NL", ">")]
    tokenizer = Tokenizer(models.Unigram(vocabulary, 0, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first", False)
    tokenizer.decoder = decoders.Metaspace("▁", "first", False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    fast.save_pretrained(folder)
    said, reply = Forced(folder, [5, 6, 7]).pieces("The")
    assert reply == "".join(said) == " river wascalm"
    assert fast.decode([5, 6, 7]) == "river wascalm"  # what follows nothing has no such space


def test_what_stands_for_a_newline_is_shown_as_one_and_never_in_part(model_folder: Path, tmp_path: Path):
    folder = trained_with(model_folder, tmp_path / "model", add_bos=False, template=None)
    template = tmp_path / "template.yaml"
    template.write_text('without_input: "{instruction}"\nnewline: "<NL>"\n', encoding="utf-8")
    ids = BulkEncoder(folder)(["雨<NL>空<N"])[0]
    said, reply = Forced(folder, ids, str(template)).pieces()
    assert reply == "".join(said) == "雨\n空<N"
    assert all("<" not in piece for piece in said[:-1])


@pytest.mark.parametrize("architecture", ["gpt_neox", "gpt2", "bloom", "llama"])
def test_a_batch_gives_what_each_prompt_gives_alone(architecture: str, model_folder: Path, tmp_path: Path):
    folder = trained_with(model_folder, tmp_path / "model", add_bos=False, template=None)
    size = {"n_positions": 64} if architecture == "gpt2" else {"max_position_embeddings": 64}
    config = tiny_config(architecture, False, vocab_size=read_contract(folder).vocab_size, **size)
    stock_model(config).save_pretrained(folder)
    generator = Generator(folder)
    texts = ["雨", PROMPT * 3, "図書館は午前九時に", "a", "祖父の時計は、", "雨が" * 25]
    prompts = [generator._encode(text) for text in texts]
    generator.stop_ids = [2, greedy(folder, prompts[0], 3)[-1]]  # so that some stop early
    for decoding in (Decoding(max_new_tokens=12), Decoding(max_new_tokens=12, repetition_penalty=1.7, num_beams=2)):
        alone = [generator.reply(ids, decoding) for ids in prompts]
        assert list(generator.replies(prompts, decoding, batch_size=4)) == alone
        assert any(reply.stopped for reply in alone) or decoding.num_beams


def test_sampling_is_that_of_transformers(model_folder: Path, tmp_path: Path):
    folder = trained_with(model_folder, tmp_path / "model", add_bos=False, template=None)
    settings = dict(do_sample=True, temperature=0.7, top_p=0.9, top_k=20, repetition_penalty=1.2)
    ids = torch.tensor([BulkEncoder(folder)([PROMPT])[0]])
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_pretrained(folder)
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, **settings)
    generator = Generator(folder)
    torch.manual_seed(5)
    reply = generator.reply(ids[0].tolist(), Decoding(max_new_tokens=9, **settings))
    assert reply.text == generator.tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)
    assert reply.text != generator.generate(PROMPT, max_new_tokens=9)[0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": 0.5}, "--temperature has no effect on greedy decoding"),
        ({"do_sample": True, "temperature": 0.0}, "--temperature is 0.0"),
        ({"do_sample": True, "top_p": 1.5}, "--top-p is 1.5"),
        ({"num_beams": 0}, "--num-beams is 0"),
        ({"repetition_penalty": float("nan")}, "--repetition-penalty is nan"),
    ],
)
def test_settings_that_cannot_be_or_have_no_effect_are_refused(values: dict, message: str):
    with pytest.raises(UserError, match=message):
        Decoding(**values)


def test_a_file_of_prompts_becomes_json_lines(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    folder = trained_with(model_folder, tmp_path / "model", add_bos=False, template="chat")
    records = [
        {"instruction": "雨は？", "input": "空", "output": "降る。", "id": 7},
        {"messages": [{"role": "user", "content": "朝は？"}, {"role": "assistant", "content": "早い。"}]},
        {"system": "短く", "prompt": "夜は\u2028？"},
    ]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n\n")
    template = tmp_path / "template.yaml"
    template.write_text('system: "{content}\\n"\nwithout_input: "問{instruction}答"\n', encoding="utf-8")
    command = ["generate", str(folder), "--template", str(template), "--max-new-tokens", "6"]
    assert main([*command, "--prompts", str(prompts)]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.strip().split("\n")]
    generator = Generator(folder, str(template))
    expected = [
        generator.generate(*asked)
        for asked in (("雨は？", "空", 6), ("朝は？", "", 6), ("夜は\u2028？", "", 6, "短く"))
    ]
    assert [line["prompt"] for line in lines] == records
    assert [(line["reply"], line["stopped"]) for line in lines] == expected
    text = tmp_path / "prompts.txt"
    text.write_text("朝は？\n\n雨は？\n", encoding="utf-8")
    assert [line["prompt"] for line in answer(generator, text, Decoding(max_new_tokens=1), 2)] == ["朝は？", "雨は？"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "雨"}\n{"prompt"', "prompts.jsonl:2: not JSON"),
        ('{"text": "雨"}', "prompts.jsonl:1: no prompt"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}', "do not alternate"),
        ("[]", "prompts.jsonl:1: no object"),
        ("\n", "holds no prompt"),
        ('{"prompt": "雨"}\n{"prompt": ""}', "prompt 2: the prompt is empty"),
        (
            '{"prompt": "雨"}\n{"instruction": "雨", "input": "空"}',
            "prompt 2: an input is given, but no prompt template",
        ),
    ],
)
def test_a_line_that_is_no_prompt_is_refused_by_its_place_before_anything_is_generated(
    content: str, message: str, model_folder: Path, tmp_path: Path
):
    (tmp_path / "prompts.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=re.escape(message)):
        next(answer(Generator(model_folder), tmp_path / "prompts.jsonl", Decoding(), 8))


def session(generator: Generator, lines: list[str], system: str = "") -> tuple[str, list[list[Message]]]:
    """What is shown, and the conversations that were asked about."""
    shown, asked = [], []
    encode = generator.encode

    def noted(messages):
        asked.append(list(messages))
        return encode(messages)

    def read() -> str:
        if not lines:
            raise EOFError
        return lines.pop(0)

    generator.encode = noted  # type: ignore[method-assign]
    converse(generator, Decoding(max_new_tokens=4), read, shown.append, system)
    return "".join(shown), asked


def test_a_session_keeps_what_was_said_until_it_is_reset(model_folder: Path, tmp_path: Path):
    template = tmp_path / "template.yaml"
    template.write_text('system: "{content}\\n"\nwithout_input: "問{instruction}答"\n', encoding="utf-8")
    generator = Generator(model_folder, str(template))
    lines = ["朝は？", "", "雨\udcff", "夜は？", "/reset", "空は？", "/exit", "never"]
    shown, asked = session(generator, lines, "短く")
    system = Message("system", "短く")
    first = [system, Message("user", "朝は？")]
    reply = generator.generate("朝は？", "", 4, "短く")[0]
    assert reply in shown
    assert asked[0] == first
    assert asked[2] == [*first, Message("assistant", reply), Message("user", "夜は？")]
    assert asked[3] == [system, Message("user", "空は？")]
    assert "not valid Unicode" in shown
    assert lines == ["never"]


def test_a_session_without_a_form_for_several_turns_says_so_and_forgets(model_folder: Path):
    shown, asked = session(Generator(model_folder), ["雨", "空"])
    assert "Every line stands for itself" in shown
    assert asked == [[Message("user", "雨")], [Message("user", "空")]]


def test_a_prompt_too_many_in_a_session_is_said_and_not_kept(model_folder: Path, tmp_path: Path):
    template = tmp_path / "template.yaml"
    template.write_text('without_input: "問{instruction}答"\n', encoding="utf-8")
    generator = Generator(model_folder, str(template))
    shown, asked = session(generator, ["雨", "雨" * 300, "空"])
    assert "the model has 256 positions" in shown
    assert "/reset begins anew" in shown
    assert [message.content for message in asked[-1]][::2] == ["雨", "空"]


def test_ctrl_c_ends_a_reply_and_not_the_session(model_folder: Path, monkeypatch: pytest.MonkeyPatch):
    generator = Generator(model_folder)
    monkeypatch.setattr(generator, "reply", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    lines = ["雨", "空"]
    _, asked = session(generator, lines)
    assert len(asked) == 2


def test_without_a_terminal_a_prompt_must_be_given(model_folder: Path, capsys: pytest.CaptureFixture):
    for flags, message in {
        (): "no prompt is given, and there is no terminal",
        ("--prompt", "雨", "--prompts", "x"): "not allowed with",
        ("--prompt", "雨", "--seed", "1"): "--seed has no effect",
        ("--prompts", "x", "--input", "空"): "--input goes with --prompt",
        ("--prompts", "nowhere.txt"): "nowhere.txt",
    }.items():
        assert main(["generate", str(model_folder), *flags]) == 2
        assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    return text_run(tmp_path_factory.mktemp("generate-run"), tokenizer_folder)


@pytest.fixture(scope="module")
def exported(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generate-export") / "model"
    export(str(run_folder), folder, dtype="float32")
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(24).reshape(2, 12) + 4).logits


def test_a_run_says_what_its_export_says(run_folder: Path, exported: Path):
    generator = Generator(run_folder)
    model, tokenizer, origin = generator.model, generator.tokenizer, generator.source.origin
    stock = AutoModelForCausalLM.from_pretrained(exported)
    assert torch.equal(logits(model), logits(stock))
    assert origin["step"] == 4
    assert Path(tokenizer.name_or_path) == run_folder / "tokenizer"
    own, others = (m.generation_config.to_diff_dict() for m in (model, stock))
    assert [own.get(key) for key in STOPPING] == [others.get(key) for key in STOPPING]
    assert Generator(run_folder).generate(PROMPT, "", 8) == Generator(exported).generate(PROMPT, "", 8)
    assert load_model(find_source(str(run_folder)), "bfloat16").dtype == torch.bfloat16


def test_an_earlier_checkpoint_can_be_asked(run_folder: Path):
    earlier = find_source(f"{run_folder}@2")
    assert earlier.origin["step"] == 2
    assert not torch.equal(logits(load_model(earlier)), logits(load_model(find_source(str(run_folder)))))


@pytest.fixture(scope="module")
def adapted(run_folder: Path, exported: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A run with adapters beside `exported`, and the logits of its model."""
    pytest.importorskip("peft")
    run = tmp_path_factory.mktemp("generate-lora") / "run"
    changes = {"model.pretrained": str(exported), "model.lora": LoraConfig(rank=2), "train.max_steps": 2}
    changes |= {"train.global_batch_size": 2, "train.micro_batch_size": 2, "optimizer.learning_rate": 0.05}
    with process_group() as environment:
        trainer = Trainer(run_config(run_folder.parent / "store", changes), run, environment)
        trainer.train(StopRequest())
        return run, logits(trainer.model.eval())


def test_adapters_of_a_run_are_added_to_their_base_model(adapted: tuple[Path, torch.Tensor], exported: Path):
    run, expected = adapted
    found = logits(load_model(find_source(str(run))))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(found, logits(AutoModelForCausalLM.from_pretrained(exported)), atol=1e-3)


def test_a_folder_of_adapters_is_that_model_too_where_its_base_model_is_beside_it(
    adapted: tuple[Path, torch.Tensor], exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    run, expected = adapted
    folder = tmp_path / "adapter"
    export(str(run), folder, adapter=True)
    assert main(["generate", str(folder), "--prompt", "雨"]) == 2
    assert f"which is neither here nor beside that folder (put or link it to {tmp_path / 'model'})" in (
        capsys.readouterr().err
    )
    (tmp_path / "model").symlink_to(exported)
    generator = Generator(folder)
    torch.testing.assert_close(logits(generator.model), expected, rtol=0, atol=1e-5)
    assert generator.generate(PROMPT, "", 8) == Generator(run).generate(PROMPT, "", 8)
    of_adapter, of_run = (one.model.generation_config for one in (generator, Generator(run)))
    assert [getattr(of_adapter, key) for key in STOPPING] == [getattr(of_run, key) for key in STOPPING]
    assert main(["export", "--verify", str(folder)]) == 0
    (tmp_path / "model").unlink()
    stock_model(AutoModelForCausalLM.from_pretrained(exported).config, seed=5).save_pretrained(tmp_path / "model")
    for command in (["generate", str(folder), "--prompt", "雨"], ["export", "--verify", str(folder)]):
        assert main(command) == 2
        assert "is not the model beside which the adapters were trained" in capsys.readouterr().err


def test_damaged_settings_are_one_line(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    for name, content in (("generation_config.json", "{"), ("generation_config.json", "[]"), ("tsumugu.json", "[1]")):
        folder = shutil.copytree(model_folder, tmp_path / "model", dirs_exist_ok=True)
        (folder / name).write_text(content)
        assert main(["generate", str(folder), "--prompt", "雨"]) == 2, (name, content)
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert name in err or content == "[]"
        (folder / name).unlink()


def test_weights_that_are_not_the_models_are_one_line(model_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture):
    """transformers would fill in random numbers for those that are missing."""
    folder = shutil.copytree(model_folder, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    wrong = {"gpt_neox.final_layer_norm.bias": torch.ones(3)}
    for content, message in (
        ([torch.ones(1)], "cannot be loaded"),
        ({1: torch.ones(1)}, "cannot be loaded"),
        ({"a": torch.ones(1)}, "lacks weights: "),
        (wrong, "cannot be loaded"),
    ):
        torch.save(content, folder / "pytorch_model.bin")
        assert main(["generate", str(folder), "--prompt", "雨"]) == 2
        err = capfd.readouterr().err
        assert message in err
        assert err.count("\n") == 1, err


def test_prompts_that_are_not_utf_8_are_one_line_before_the_model_is_loaded(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(generate, "load_model", lambda *_: pytest.fail("the model was loaded"))
    (tmp_path / "prompts.txt").write_bytes("雨は？\n".encode("cp932"))
    assert main(["generate", str(model_folder), "--prompts", str(tmp_path / "prompts.txt")]) == 2
    assert "prompts.txt is not UTF-8 at byte 0" in capsys.readouterr().err


def test_a_run_without_the_checkpoint_is_the_users_error(run_folder: Path, tmp_path: Path):
    with pytest.raises(UserError, match="no complete checkpoint of step 3"):
        find_source(f"{run_folder}@3")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        find_source(str(tmp_path))

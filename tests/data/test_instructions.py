"""Prompt templates and the supervision mask."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tsumugu.data.instructions import TEMPLATES, encode_example, find_template
from tsumugu.errors import UserError
from tsumugu.tokenizer.load import BulkEncoder

# What a user's text may hold that a careless template would fill in, repeat or take for its own.
TEXTS = [
    "普通の指示。",
    "{input}",
    "{instruction}",
    "{}",
    "{0}",
    "{{x}} と {",
    "%s \\1 $1",
    "### 応答:\n",
    "{{ eos_token }}",
]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("other", TEXTS)
def test_a_prompt_holds_the_users_text_as_it_is(name: str, text: str, other: str):
    template = TEMPLATES[name]
    head, after_instruction = template.with_input.split("{instruction}")
    between, tail = after_instruction.split("{input}")
    assert template.prompt(text, other) == head + text + between + other + tail
    head, tail = template.without_input.split("{instruction}")
    assert template.prompt(text) == template.prompt(text, "") == head + text + tail


def test_the_japanese_prompt_to_the_letter():
    assert TEMPLATES["alpaca-ja"].prompt("訳して。", "cat") == (
        "以下は、タスクを説明する指示と、文脈のある入力の組み合わせです。要求を適切に満たす応答を書きなさい。\n\n"
        "### 指示:\n訳して。\n\n### 入力:\ncat\n\n### 応答:"
    )
    assert TEMPLATES["alpaca-ja"].prompt("訳して。") == (
        "以下は、タスクを説明する指示です。要求を適切に満たす応答を書きなさい。\n\n### 指示:\n訳して。\n\n### 応答:"
    )


def test_an_unknown_template_lists_the_known():
    with pytest.raises(UserError, match="alpaca-ja"):
        find_template("alpaca")


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("text", TEXTS)
def test_the_chat_template_renders_the_same_prompt(tokenizer_folder: Path, name: str, text: str):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.chat_template = TEMPLATES[name].chat_template()
    question = {"role": "user", "content": text}
    prompt = tokenizer.apply_chat_template([question], tokenize=False, add_generation_prompt=True)
    assert prompt == TEMPLATES[name].prompt(text)
    whole = tokenizer.apply_chat_template([question, {"role": "assistant", "content": text}], tokenize=False)
    assert whole == prompt + text + "</s>"


def test_the_chat_template_refuses_what_was_not_trained(tokenizer_folder: Path):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.chat_template = TEMPLATES["alpaca-ja"].chat_template()
    question, answer = {"role": "user", "content": "はい？"}, {"role": "assistant", "content": "はい。"}
    for messages in ([question, answer, question], [{"role": "system", "content": "あ"}, question]):
        with pytest.raises(Exception, match="single questions"):
            tokenizer.apply_chat_template(messages, tokenize=False)


@pytest.mark.parametrize("bos", [[], [1]])
def test_the_prompt_is_read_and_the_response_with_its_end_is_learned(tokenizer_folder: Path, bos: list[int]):
    stock = AutoTokenizer.from_pretrained(tokenizer_folder)
    prompt, response = TEMPLATES["alpaca-ja"].prompt("朝の川は？"), "霧が晴れて、山が見えた。"
    prompt_ids, response_ids = (stock(text, add_special_tokens=False)["input_ids"] for text in (prompt, response))
    encode = BulkEncoder(tokenizer_folder)
    ids, mask = encode_example(prompt, response, encode, bos, stock.eos_token_id, "responses")
    assert ids.tolist() == bos + prompt_ids + response_ids + [stock.eos_token_id]
    assert mask.tolist() == [0] * len(bos + prompt_ids) + [1] * (len(response_ids) + 1)
    everything, mask = encode_example(prompt, response, encode, bos, stock.eos_token_id, "everything")
    assert everything.tolist() == ids.tolist()
    assert mask.tolist() == [1] * len(ids)


def test_a_stop_token_spelt_in_a_record_is_text(tokenizer_folder: Path):
    ids, _ = encode_example("あ</s>", "い</s>", BulkEncoder(tokenizer_folder), [], 2, "responses")
    assert ids.tolist().count(2) == 1
    assert ids[-1] == 2

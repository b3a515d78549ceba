"""Records of every form become conversations; conversations become prompts, ids and a supervision mask."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from support.encoding import BulkEncoder
from transformers import AutoTokenizer

from tsumugu.data import corpus
from tsumugu.data.instructions import (
    FIELDS,
    TEMPLATES,
    Message,
    columns_for,
    encode_conversations,
    find_template,
    from_json,
    messages_of,
    question_key,
    to_json,
)
from tsumugu.errors import UserError

ALPACA = ("alpaca-en", "alpaca-ja")

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


def prompt(name: str, text: str, input: str = "") -> str:
    """The prompt of a question, as text."""
    return "".join(segment.text for segment in TEMPLATES[name].segments([Message("user", text, input=input)]))


@pytest.mark.parametrize("name", ALPACA)
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("other", TEXTS)
def test_a_prompt_holds_the_users_text_as_it_is(name: str, text: str, other: str):
    template = TEMPLATES[name]
    head, after_instruction = template.with_input.split("{instruction}")
    between, tail = after_instruction.split("{input}")
    assert prompt(name, text, other) == head + text + between + other + tail
    head, tail = template.without_input.split("{instruction}")
    assert prompt(name, text) == prompt(name, text, "") == head + text + tail


def test_the_japanese_prompt_to_the_letter():
    assert prompt("alpaca-ja", "訳して。", "cat") == (
        "以下は、タスクを説明する指示と、文脈のある入力の組み合わせです。要求を適切に満たす応答を書きなさい。\n\n"
        "### 指示:\n訳して。\n\n### 入力:\ncat\n\n### 応答:"
    )
    assert prompt("alpaca-ja", "訳して。") == (
        "以下は、タスクを説明する指示です。要求を適切に満たす応答を書きなさい。\n\n### 指示:\n訳して。\n\n### 応答:"
    )


def test_an_unknown_template_lists_the_known():
    with pytest.raises(UserError, match="alpaca-ja"):
        find_template("alpaca")


@pytest.mark.parametrize("name", ALPACA)
@pytest.mark.parametrize("text", TEXTS)
def test_the_chat_template_renders_the_same_prompt(tokenizer_folder: Path, name: str, text: str):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.chat_template = TEMPLATES[name].chat_template()
    question = {"role": "user", "content": text}
    rendered = tokenizer.apply_chat_template([question], tokenize=False, add_generation_prompt=True)
    assert rendered == prompt(name, text)
    whole = tokenizer.apply_chat_template([question, {"role": "assistant", "content": text}], tokenize=False)
    assert whole == rendered + text + "</s>"


def test_the_chat_template_refuses_what_was_not_trained(tokenizer_folder: Path):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.chat_template = TEMPLATES["alpaca-ja"].chat_template()
    question, answer = {"role": "user", "content": "はい？"}, {"role": "assistant", "content": "はい。"}
    for messages in ([question, answer, question], [{"role": "system", "content": "あ"}, question]):
        with pytest.raises(Exception, match="single questions"):
            tokenizer.apply_chat_template(messages, tokenize=False)


# --- records ---------------------------------------------------------------------------------------------------------

QUESTION, REPLY = Message("user", "空の色は？"), Message("assistant", "青です。")
CHAT = [QUESTION, REPLY, Message("user", "海は？"), Message("assistant", "それも青です。")]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"instruction": "空の色は？", "input": "", "output": "青です。"}, [QUESTION, REPLY]),
        ({"instruction": "空の色は？", "input": None, "output": "青です。"}, [QUESTION, REPLY]),
        ({"instruction": "空の色は？", "output": "青です。", "category": "qa"}, [QUESTION, REPLY]),
        (
            {"instruction": "訳して。", "input": "cat", "output": "猫"},
            [Message("user", "訳して。", input="cat"), Message("assistant", "猫")],
        ),
        ({"prompt": "空の色は？", "response": "青です。"}, [QUESTION, REPLY]),
        (
            {
                "messages": [
                    {"role": "user", "content": "空の色は？"},
                    {"role": "assistant", "content": "青です。", "train": None},
                    {"role": "user", "content": "海は？", "name": "太郎"},
                    {"role": "assistant", "content": "それも青です。", "train": True},
                ]
            },
            CHAT,
        ),
        (
            {
                "id": "x_1",
                "conversations": [
                    {"from": "human", "value": "空の色は？"},
                    {"from": "gpt", "value": "青です。"},
                    {"from": "human", "value": "海は？"},
                    {"from": "gpt", "value": "それも青です。"},
                ],
            },
            CHAT,
        ),
        (
            {
                "conversations": [
                    {"from": "system", "value": "短く答える。"},
                    {"from": "user", "value": "空の色は？"},
                    {"from": "chatgpt", "value": "青です。", "train": False},
                ]
            },
            [Message("system", "短く答える。"), QUESTION, Message("assistant", "青です。", train=False)],
        ),
        (
            {
                "messages": [
                    {"role": "system", "content": ""},
                    {"role": "user", "content": "空の色は？"},
                    {"role": "assistant", "content": "青です。"},
                ]
            },
            [QUESTION, REPLY],
        ),
        (
            {"system": "短く答える。", "instruction": "空の色は？", "output": "青です。"},
            [Message("system", "短く答える。"), QUESTION, REPLY],
        ),
        ({"system": "", "prompt": "空の色は？", "response": "青です。"}, [QUESTION, REPLY]),
        (
            {
                "system": "短く答える。",
                "conversations": [{"from": "human", "value": "空の色は？"}, {"from": "gpt", "value": "青です。"}],
            },
            [Message("system", "短く答える。"), QUESTION, REPLY],
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "空の色は？"},
                    {"role": "assistant", "content": "青です。", "weight": 0},
                    {"role": "user", "content": "海は？", "weight": None},
                    {"role": "assistant", "content": "それも青です。", "weight": 1},
                ]
            },
            [QUESTION, Message("assistant", "青です。", train=False), *CHAT[2:]],
        ),
    ],
)
def test_every_form_of_record_becomes_a_conversation(record: dict, expected: list[Message]):
    assert messages_of(record, {}) == expected
    assert from_json(to_json(expected)) == expected


def test_the_same_from_parquet_and_json_lines(tmp_path: Path):
    turns = [{"role": m.role, "content": m.content, "train": m.role == "user" or i == 3} for i, m in enumerate(CHAT)]
    records = [
        {"messages": turns, "instruction": None, "output": None, "n": 1},
        {"messages": None, "instruction": "空の色は？", "output": "青です。", "n": 2},  # another source's form
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for name in ("a.parquet", "a.jsonl"):
        read = corpus.records(corpus.plan([str(tmp_path / name)]), columns_for({}))
        first, second = (messages_of(record.values, {}) for record in read)
        assert [(m.role, m.content, m.train) for m in first] == [tuple(turn.values()) for turn in turns]
        assert second == [QUESTION, REPLY]


def test_fields_name_the_columns_and_choose_the_form():
    record = {"q": "空の色は？", "context": None, "answer": "青です。", "messages": [{"role": "user", "content": "別"}]}
    fields = {"instruction": "q", "input": "context", "output": "answer"}
    assert columns_for(fields) == ["q", "context", "answer", *FIELDS[3:]]
    assert messages_of(
        {"q": "空の色は？", "p": "短く。", "a": "青です。"}, {"system": "p", "prompt": "q", "response": "a"}
    ) == [
        Message("system", "短く。"),
        QUESTION,
        REPLY,
    ]
    assert messages_of(record, fields) == [QUESTION, REPLY]
    assert messages_of(record, {"prompt": "q", "response": "answer"}) == [QUESTION, REPLY]
    chat = [{"role": "user", "content": "空の色は？"}, {"role": "assistant", "content": "青です。"}]
    assert messages_of({"prompt": "空の色は？", "messages": chat}, {}) == [QUESTION, REPLY]
    assert messages_of({"chat": chat, "messages": "?"}, {"messages": "chat"}) == [QUESTION, REPLY]
    two = {"instruction": "a", "output": "b", "messages": chat}
    with pytest.raises(UserError, match="both messages and instruction/output"):
        messages_of(two, {})
    assert messages_of(two, {"messages": "messages"}) == [QUESTION, REPLY]


def _chat(*turns: tuple[Any, Any]) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


@pytest.mark.parametrize(
    ("record", "fields", "message"),
    [
        ({"text": "a", "n": 1}, {}, "no instruction record.*it has: text, n"),
        ({"instruction": "a", "response": "b"}, {}, "no instruction record.*it has: instruction, response"),
        ({"instruction": "a", "output": "b"}, {"output": "answer"}, "no column answer.*it has: instruction, output"),
        ({"instruction": "a", "output": "b"}, {"input": "context"}, "no column context.*it has: instruction, output"),
        ({"instruction": "a", "output": ""}, {}, "^empty reply$"),
        ({"instruction": "a", "output": None}, {}, "^empty reply$"),
        ({"instruction": "", "input": "b", "output": "c"}, {}, "^empty question$"),
        ({"prompt": [{"role": "user"}], "response": "b"}, {}, "prompt holds list, not text"),
        ({"instruction": "a", "output": "b\ud83d"}, {}, "output is not valid Unicode"),
        ({"messages": "a"}, {}, "messages is no list of turns"),
        ({"messages": ["a"]}, {}, "messages is no list of turns"),
        ({"messages": []}, {}, "no turns"),
        ({"messages": None}, {}, "no turns"),
        (_chat(("system", "a")), {}, "no turns"),
        (_chat(("user", "a")), {}, "the last turn is not the assistant's"),
        (_chat(("user", "a"), ("assistant", "b"), ("user", "c")), {}, "the last turn is not the assistant's"),
        (_chat(("assistant", "b")), {}, "the turns do not alternate"),
        (_chat(("user", "a"), ("user", "a"), ("assistant", "b")), {}, "the turns do not alternate"),
        (_chat(("user", "a"), ("system", "a"), ("assistant", "b")), {}, "the turns do not alternate"),
        (_chat(("system", "s"), ("system", "s"), ("user", "a"), ("assistant", "b")), {}, "the turns do not alternate"),
        (_chat(("user", "a"), ("assistant", ""), ("user", "c"), ("assistant", "d")), {}, "^empty reply$"),
        (_chat(("user", "a"), ("assistant", [{"text": "b"}])), {}, "messages, turn 2: content holds list"),
        (_chat(("user", "a"), ("tool", "b"), ("assistant", "c")), {}, "messages, turn 2: unknown role 'tool'.*human"),
        (_chat((None, "a"), ("assistant", "c")), {}, "messages, turn 1: unknown role None"),
        ({"messages": [{"from": "human", "value": "a"}]}, {}, "messages, turn 1: no role.*it has: from, value"),
        ({"conversations": [{"from": "human", "text": "a"}]}, {}, "conversations, turn 1: no value.*from, text"),
        ({"messages": [{"role": "user", "content": "a", "train": 1}]}, {}, "messages, turn 1: train is 1"),
        ({"messages": [{"role": "user", "content": "a", "weight": 0.5}]}, {}, "messages, turn 1: weight is 0.5"),
        ({"system": "s", **_chat(("system", "t"), ("user", "a"), ("assistant", "b"))}, {}, "both system and the first"),
        ({"instruction": "a", "output": "b"}, {"instruction": "instruction", "system": "who"}, "no column who"),
        ({"prompt": "a", "response": "<think>\n考え\n</think>\n\n"}, {}, "^empty reply$"),
        ({"prompt": "a", "response": " <think>考え中"}, {}, "^unclosed <think>"),
        ({"prompt": "a", "response": "<think>一</think><think>二"}, {}, "^unclosed <think>"),
    ],
)
def test_a_record_that_is_no_conversation_says_why(record: dict, fields: dict, message: str):
    with pytest.raises(UserError, match=message):
        messages_of(record, fields)


def test_the_question_is_what_stands_before_the_first_reply():
    other = Message("assistant", "赤です。")
    assert question_key([QUESTION, REPLY]) == question_key([QUESTION, other]) == '["空の色は？", ""]'
    assert question_key([Message("user", "訳して。", input="cat"), REPLY]) == '["訳して。", "cat"]'
    assert question_key(CHAT) == question_key([*CHAT[:3], other])  # and so is what goes on from it
    assert question_key(CHAT) == question_key(CHAT[:2]) == question_key([CHAT[0], other, *CHAT[2:]])
    others = [[QUESTION, REPLY], [Message("user", "海の色は？"), REPLY], [Message("system", "s"), QUESTION, REPLY]]
    assert len({question_key(messages) for messages in others}) == len(others)


# --- ids and mask ----------------------------------------------------------------------------------------------------


def test_a_further_question_has_no_preamble():
    (first, _, stop, second, reply, _) = TEMPLATES["alpaca-ja"].segments(CHAT)
    assert first.text == prompt("alpaca-ja", "空の色は？")
    assert (stop.text, stop.reply, stop.special) == ("eos", True, True)
    assert (second.text, second.reply) == ("\n\n### 指示:\n海は？\n\n### 応答:", False)
    assert (reply.text, reply.reply) == ("それも青です。", True)
    *_, second, _reply, _stop = TEMPLATES["alpaca-en"].segments(
        [QUESTION, REPLY, Message("user", "Translate.", input="猫"), Message("assistant", "cat")]
    )
    assert second.text == "\n\n### Instruction:\nTranslate.\n\n### Input:\n猫\n\n### Response:"


def test_a_system_message_is_refused():
    with pytest.raises(UserError, match="no place for a system message"):
        TEMPLATES["alpaca-ja"].segments([Message("system", "短く。"), QUESTION, REPLY])


@pytest.mark.parametrize("bos", [[], [1]])
def test_the_prompt_is_read_and_the_response_with_its_end_is_learned(tokenizer_folder: Path, bos: list[int]):
    stock = AutoTokenizer.from_pretrained(tokenizer_folder)
    messages = [Message("user", "朝の川は？"), Message("assistant", "霧が晴れて、山が見えた。")]
    texts = prompt("alpaca-ja", "朝の川は？"), "霧が晴れて、山が見えた。"
    prompt_ids, response_ids = (stock(text, add_special_tokens=False)["input_ids"] for text in texts)
    encode = BulkEncoder(tokenizer_folder)
    for train_on in ("responses", "last_response"):
        ((ids, mask),) = encode_conversations(
            [messages], TEMPLATES["alpaca-ja"], encode, bos, stock.eos_token_id, train_on
        )
        assert ids.tolist() == bos + prompt_ids + response_ids + [stock.eos_token_id]
        assert mask.tolist() == [0] * len(bos + prompt_ids) + [1] * (len(response_ids) + 1)
    ((everything, mask),) = encode_conversations(
        [messages], TEMPLATES["alpaca-ja"], encode, bos, stock.eos_token_id, "everything"
    )
    assert everything.tolist() == ids.tolist()
    assert mask.tolist() == [1] * len(ids)
    assert (ids.dtype, mask.dtype) == (np.int64, np.uint8)


def _characters(texts: list[str]) -> list[list[int]]:
    return [[ord(character) for character in text] for text in texts]


@pytest.mark.parametrize(
    ("train_on", "untrained", "supervised"),
    [
        ("responses", (), ["青です。■", "それも青です。■"]),
        ("responses", (1,), ["それも青です。■"]),
        ("responses", (0, 2), ["青です。■", "それも青です。■"]),  # prompts are not supervised anyway
        ("responses", (1, 3), []),
        ("last_response", (), ["それも青です。■"]),
        ("last_response", (3,), []),
        ("everything", (), ["□以下は", "空の色は？", "応答:青です。■\n\n### 指示:\n海は？", "応答:それも青です。■"]),
        ("everything", (1, 2), ["□以下は", "空の色は？", "応答:|", "それも青です。■"]),
    ],
)
def test_what_is_supervised_of_a_conversation(train_on: str, untrained: tuple[int, ...], supervised: list[str]):
    messages = [Message(m.role, m.content, train=index not in untrained) for index, m in enumerate(CHAT)]
    bos, eos = ord("□"), ord("■")
    ((ids, mask),) = encode_conversations([messages], TEMPLATES["alpaca-ja"], _characters, [bos], eos, train_on)
    preamble = "以下は、タスクを説明する指示です。要求を適切に満たす応答を書きなさい。"
    assert "".join(map(chr, ids)) == (
        f"□{preamble}\n\n### 指示:\n空の色は？\n\n### 応答:青です。■\n\n### 指示:\n海は？\n\n### 応答:それも青です。■"
    )
    shown = "".join(chr(id) if flag else "|" for id, flag in zip(ids, mask, strict=True))
    at = 0
    for text in supervised:
        at = shown.index(text, at) + len(text)
    if train_on != "everything":
        assert shown.replace("|", "") == "".join(supervised)
    else:
        hidden = (
            sum(len(segment) for segment in ("青です。■", "\n\n### 指示:\n海は？\n\n### 応答:")) if untrained else 0
        )
        assert shown.count("|") == hidden


def test_many_conversations_are_encoded_by_one_call_each_as_if_alone(tokenizer_folder: Path):
    conversations = [CHAT, [QUESTION, REPLY], [Message("user", "訳して。", input="cat"), Message("assistant", "猫")]]
    bulk, calls = BulkEncoder(tokenizer_folder), []

    def encode(texts: list[str]) -> list[list[int]]:
        calls.append(len(texts))
        return bulk(texts)

    arguments = (TEMPLATES["alpaca-ja"], encode, [1], 2, "responses")
    together = encode_conversations(conversations, *arguments)
    assert calls == [8]
    alone = [encode_conversations([messages], *arguments)[0] for messages in conversations]
    for (ids, mask), (own_ids, own_mask) in zip(together, alone, strict=True):
        np.testing.assert_array_equal(ids, own_ids)
        np.testing.assert_array_equal(mask, own_mask)
    stock = AutoTokenizer.from_pretrained(tokenizer_folder)
    for (ids, mask), messages in zip(together, conversations, strict=True):
        replies = [message.content + "</s>" for message in messages if message.role == "assistant"]
        assert stock.decode(ids[mask == 1]) == "".join(replies)
    assert encode_conversations([], *arguments) == []


def test_a_stop_token_spelt_in_a_record_is_text(tokenizer_folder: Path):
    messages = [Message("user", "あ</s>"), Message("assistant", "い</s>")]
    encode = BulkEncoder(tokenizer_folder)
    ((ids, _),) = encode_conversations([messages], TEMPLATES["alpaca-ja"], encode, [], 2, "responses")
    assert ids.tolist().count(2) == 1
    assert ids[-1] == 2

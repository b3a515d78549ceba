"""Every template: its published form to the letter, stock transformers' ids and mask of it, its tokens."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from support.encoding import BulkEncoder
from transformers import AutoTokenizer

from tsumugu.data.instructions import (
    TEMPLATES,
    Message,
    UnusableError,
    check_template,
    definition,
    encode_conversations,
    find_template,
    jinja_of,
    messages_of,
    prompt_ids,
)
from tsumugu.data.instructions.encode import missing_tokens, special_ids
from tsumugu.data.instructions.templates import EOS, Template
from tsumugu.errors import UserError
from tsumugu.tokenizer.contract import read_contract
from tsumugu.tokenizer.extend import Token, add_tokens
from tsumugu.tokenizer.importer import import_tokenizer

SYSTEM = Message("system", "短く答える。")
QUESTION, REPLY = Message("user", "空の色は？"), Message("assistant", "青です。")
CHAT = [QUESTION, REPLY, Message("user", "海は？\n広い？"), Message("assistant", "それも青です。\n広い。")]
THOUGHTS = [
    QUESTION,
    Message("assistant", "<think>\n空は…\n</think>\n\n青です。"),
    Message("user", "海は？"),
    Message("assistant", "<think>\n水は…\n</think>\n\nそれも青。"),
]
CONVERSATIONS = {
    "one": [QUESTION, REPLY],
    "several": CHAT,
    "system": [SYSTEM, QUESTION, REPLY],
    "system, several": [SYSTEM, *CHAT],
    "white space": [Message("system", " 短く。\n"), Message("user", " 空は？ "), Message("assistant", "青。")],
    "braces": [Message("user", "{instruction} {system} {{ x }} '\"\\n %s"), Message("assistant", "{content} {% if %}")],
    "thoughts": THOUGHTS,
}
NO_SYSTEM = ("alpaca-en", "alpaca-ja", "plain", "rinna")
ONE_QUESTION = ("alpaca-en", "alpaca-ja", "plain")


def fits(name: str, messages: list[Message]) -> bool:
    system = messages[0].role == "system"
    return not (system and name in NO_SYSTEM) and not (len(messages) - system > 2 and name in ONE_QUESTION)


def extended(name: str, source: Path, output: Path) -> Path:
    """The tokenizer with the markers of a template."""
    template = TEMPLATES[name]
    missing = missing_tokens(template, source)
    if not missing:
        return source
    add_tokens(source, output, [Token(token, token in template.special_tokens) for token in missing])
    return output


@pytest.fixture(scope="module", params=TEMPLATES)
def named(request: pytest.FixtureRequest, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory):
    """The name of a template, and a tokenizer that has its markers."""
    return request.param, extended(request.param, tokenizer_folder, tmp_path_factory.mktemp(request.param) / "t")


def as_dicts(messages: list[Message]) -> list[dict]:
    return [{"role": message.role, "content": message.content} for message in messages]


def ours(name: str, folder: Path, messages: list[Message], train_on: str = "responses", bos: bool = False):
    contract = read_contract(folder)
    (result,) = encode_conversations(
        [messages],
        find_template(name, folder),
        BulkEncoder(folder),
        [contract.bos_id] * bos,  # type: ignore[list-item]
        contract.eos_id,
        train_on,
        special_ids(folder),
    )
    return result


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_ids_and_mask_are_those_that_stock_transformers_makes_of_the_chat_template(
    named: tuple[str, Path], conversation: str, bos: bool
):
    name, folder = named
    messages = CONVERSATIONS[conversation]
    stock = AutoTokenizer.from_pretrained(folder)
    stock.chat_template = jinja_of(TEMPLATES[name], bos)
    if not fits(name, messages):
        with pytest.raises(Exception, match=r"single questions|without a system message"):
            stock.apply_chat_template(as_dicts(messages))
        return
    expected = stock.apply_chat_template(as_dicts(messages), return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = ours(name, folder, messages, bos=bos)
    assert ids.tolist() == expected["input_ids"]
    assert mask.tolist() == expected["assistant_masks"]
    assert mask.any()


@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_the_prompt_of_generation_is_that_of_stock_transformers_and_of_training(
    named: tuple[str, Path], conversation: str
):
    name, folder = named
    messages = CONVERSATIONS[conversation]
    if not fits(name, messages):
        return
    stock = AutoTokenizer.from_pretrained(folder)
    stock.chat_template = jinja_of(TEMPLATES[name], False)
    specials = {EOS: stock.eos_token_id, **special_ids(folder)}
    # as everything between questions is history, only prompts after a single question are stock's for these two
    prompt = prompt_ids(messages[:-1], TEMPLATES[name], BulkEncoder(folder), [], specials)
    if len(messages) < 4 or name not in ONE_QUESTION:
        text = {"tokenize": True, "add_generation_prompt": True}
        assert stock.apply_chat_template(as_dicts(messages[:-1]), **text)["input_ids"] == prompt
    ids, mask = ours(name, folder, messages, "last_response")
    assert ids[: len(prompt)].tolist() == prompt
    assert int(np.flatnonzero(mask)[0]) == len(prompt)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("plain", "空の色は？[青です。</s>]"),
        (
            "rinna",
            "ユーザー: 空の色は？<NL>システム: 青です。<NL>ユーザー: 海は？<NL>広い？<NL>"
            "システム: [それも青です。<NL>広い。</s>]",
        ),
        (
            "llm-jp",
            "短く答える。\n\n### 指示:\n空の色は？\n\n### 応答:\n[青です。</s>]"
            "\n\n### 指示:\n海は？\n広い？\n\n### 応答:\n[それも青です。\n広い。</s>]",
        ),
        (
            "chatml",
            "<|im_start|>system\n短く答える。<|im_end|>\n<|im_start|>user\n空の色は？<|im_end|>\n"
            "<|im_start|>assistant\n[青です。<|im_end|>]\n<|im_start|>user\n海は？\n広い？<|im_end|>\n"
            "<|im_start|>assistant\n[それも青です。\n広い。<|im_end|>]\n",
        ),
        (
            "qwen3",
            "<|im_start|>system\n短く答える。<|im_end|>\n<|im_start|>user\n空の色は？<|im_end|>\n"
            "<|im_start|>assistant\n青です。<|im_end|>\n<|im_start|>user\n海は？\n広い？<|im_end|>\n"
            "<|im_start|>assistant\n[<think>\n\n</think>\n\nそれも青です。\n広い。<|im_end|>]\n",
        ),
        (
            "llama3",
            "<|start_header_id|>system<|end_header_id|>\n\n短く答える。<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\n空の色は？<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n[青です。<|eot_id|>]"
            "<|start_header_id|>user<|end_header_id|>\n\n海は？\n広い？<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n[それも青です。\n広い。<|eot_id|>]",
        ),
        (
            "gemma",
            "<start_of_turn>user\n短く答える。\n\n空の色は？<end_of_turn>\n<start_of_turn>model\n[青です。<end_of_turn>]\n"
            "<start_of_turn>user\n海は？\n広い？<end_of_turn>\n<start_of_turn>model\n[それも青です。\n広い。<end_of_turn>]\n",
        ),
    ],
)
def test_the_published_form_to_the_letter(name: str, text: str):
    messages = [*([] if name in NO_SYSTEM else [SYSTEM]), *(CHAT if name not in ONE_QUESTION else CHAT[:2])]
    shown, inside = "", False
    for segment in TEMPLATES[name].segments(messages):
        if segment.reply != inside:
            shown, inside = shown + ("[" if segment.reply else "]"), segment.reply
        shown += "</s>" if segment.text == EOS else segment.text
    assert shown + "]" * inside == text


def test_llm_jp_shows_its_system_text_where_none_is_given():
    text = "".join(segment.text for segment in TEMPLATES["llm-jp"].segments([QUESTION]))
    assert text == (
        "以下は、タスクを説明する指示です。要求を適切に満たす応答を書きなさい。\n\n### 指示:\n空の色は？\n\n### 応答:\n"
    )


def test_thoughts_stay_in_the_last_reply_and_leave_earlier_ones():
    segments = TEMPLATES["qwen3"].segments(THOUGHTS)
    assert "".join(segment.text for segment in segments if segment.reply) == (
        "<think>\n水は…\n</think>\n\nそれも青。<|im_end|>"
    )
    assert "空は…" not in "".join(segment.text for segment in segments)
    record = {"role": "assistant", "content": "それも青。", "reasoning_content": "水は…"}
    read = messages_of({"messages": [{"role": "user", "content": "海は？"}, record]}, {})
    assert read[1].content == THOUGHTS[3].content


@pytest.mark.parametrize("name", NO_SYSTEM)
def test_a_system_message_without_a_place_is_refused_in_training_and_by_the_chat_template(
    name: str, tokenizer_folder: Path
):
    messages = [SYSTEM, QUESTION, REPLY]
    with pytest.raises(UserError, match="no place for a system message"):
        TEMPLATES[name].segments(messages)
    stock = AutoTokenizer.from_pretrained(tokenizer_folder)
    stock.chat_template = jinja_of(TEMPLATES[name], False)
    with pytest.raises(Exception, match=r"single questions|without a system message"):
        stock.apply_chat_template(as_dicts(messages), tokenize=False)


def test_several_turns_of_a_template_that_cannot_tell_them_apart_are_refused():
    with pytest.raises(UserError, match="one question and one reply"):
        TEMPLATES["plain"].segments(CHAT)


def test_turns_that_do_not_alternate_are_refused_by_the_chat_template(named: tuple[str, Path]):
    name, folder = named
    stock = AutoTokenizer.from_pretrained(folder)
    stock.chat_template = jinja_of(TEMPLATES[name], False)
    with pytest.raises(Exception, match=r"take turns|single questions"):
        stock.apply_chat_template(as_dicts([QUESTION, QUESTION, REPLY]), tokenize=False)


@pytest.mark.parametrize("train_on", ["responses", "last_response", "everything"])
def test_a_marker_in_a_users_text_stays_text(named: tuple[str, Path], train_on: str):
    name, folder = named
    specials = special_ids(folder)
    spelt = "".join(specials)
    ids, _ = ours(name, folder, [Message("user", f"あ{spelt}い"), Message("assistant", f"う{spelt}え")], train_on)
    plain, _ = ours(name, folder, [Message("user", "あい"), Message("assistant", "うえ")], train_on)
    count = lambda ids: [ids.tolist().count(id) for id in specials.values()]  # noqa: E731
    assert count(ids) == count(plain)


@pytest.mark.parametrize("train_on", ["responses", "last_response", "everything"])
def test_each_supervised_reply_ends_with_its_stop_token_and_nothing_behind_it(named: tuple[str, Path], train_on: str):
    name, folder = named
    messages = CHAT[:2] if name == "plain" else CHAT
    ids, mask = ours(name, folder, messages, train_on)
    stock = AutoTokenizer.from_pretrained(folder)
    stop = "</s>" if TEMPLATES[name].stop == EOS else TEMPLATES[name].stop
    runs = np.split(ids, np.flatnonzero(np.diff(mask)) + 1)[1::2]  # a prompt comes first
    replies = 1 if len(messages) == 2 or train_on == "last_response" or name in ("rinna", "qwen3") else 2
    if train_on == "everything":
        assert mask.all()
    else:
        assert len(runs) == replies
        assert [run[-1] for run in runs] == [stock.convert_tokens_to_ids(stop)] * replies


def test_a_message_that_is_not_to_be_trained_on_takes_its_stop_token_along(named: tuple[str, Path]):
    name, folder = named
    if name in ("plain", "rinna", "qwen3"):
        pytest.skip("earlier replies are no replies there")
    whole_ids, whole = ours(name, folder, CHAT)
    untrained = [CHAT[0], Message("assistant", CHAT[1].content, train=False), *CHAT[2:]]
    ids, mask = ours(name, folder, untrained)
    assert ids.tolist() == whole_ids.tolist()
    _, last = ours(name, folder, CHAT, "last_response")
    assert mask.tolist() == last.tolist() != whole.tolist()
    _, mask = ours(name, folder, untrained, "everything")
    assert not mask.all()
    assert mask[last == 1].all()


@pytest.fixture
def real(tmp_path: Path) -> Path:
    """A real tokenizer, which puts a space in front of every text."""
    model = Path(__file__).parents[3] / "shared" / "data" / "tokenizers" / "llm-jp-v2.2-48k.model"
    if not model.exists():
        pytest.skip("no shared/data/tokenizers")
    import_tokenizer(str(model), tmp_path / "t", [])
    return tmp_path / "t"


def test_a_space_in_front_of_every_text_is_not_put_in_front_of_replies(real: Path):
    name, folder = "llm-jp", real
    stock = AutoTokenizer.from_pretrained(folder)
    stock.chat_template = jinja_of(TEMPLATES[name], False)
    messages = [SYSTEM, *CHAT]
    expected = stock.apply_chat_template(as_dicts(messages), return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = ours(name, folder, messages)
    assert (ids.tolist(), mask.tolist()) == (expected["input_ids"], expected["assistant_masks"])
    specials = {EOS: stock.eos_token_id, **special_ids(folder)}
    prompt = prompt_ids(messages[:-1], TEMPLATES[name], BulkEncoder(folder), [], specials)
    text = {"tokenize": True, "add_generation_prompt": True}
    assert prompt == stock.apply_chat_template(as_dicts(messages[:-1]), **text)["input_ids"]


def test_the_exported_alpaca_template_gives_the_prompt_of_training_whose_reply_is_encoded_for_itself(real: Path):
    stock = AutoTokenizer.from_pretrained(real)
    stock.chat_template = jinja_of(TEMPLATES["alpaca-ja"], False)
    text = {"tokenize": True, "add_generation_prompt": True}
    prompt = stock.apply_chat_template(as_dicts([QUESTION]), **text)["input_ids"]
    ids, mask = ours("alpaca-ja", real, [QUESTION, REPLY])
    assert ids[mask == 0].tolist() == prompt
    assert ids[mask == 1].tolist() == [*stock(REPLY.content, add_special_tokens=False)["input_ids"], stock.eos_token_id]
    assert stock.apply_chat_template(as_dicts([QUESTION, REPLY]))["input_ids"] != ids.tolist()


# --- tokens ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["chatml", "qwen3", "llama3", "gemma", "rinna"])
def test_markers_that_are_no_single_tokens_are_refused_with_the_way_to_add_them(
    name: str, tokenizer_folder: Path, tmp_path: Path
):
    contract = read_contract(tokenizer_folder)
    with pytest.raises(UserError, match=f"tokenizer extend .* --template {name} --output DIR"):
        check_template(TEMPLATES[name], name, tokenizer_folder, contract)
    output = extended(name, tokenizer_folder, tmp_path / "t")
    check_template(TEMPLATES[name], name, output, read_contract(output))


@pytest.mark.parametrize("name", ["alpaca-en", "alpaca-ja", "plain", "llm-jp"])
def test_templates_of_words_alone_need_no_tokens(name: str, tokenizer_folder: Path):
    check_template(TEMPLATES[name], name, tokenizer_folder, read_contract(tokenizer_folder))


# --- one's own -------------------------------------------------------------------------------------------------------

OWN = """
system: "[{content}]\\n"
without_input: "Q: {instruction}\\n"
with_input: "Q: {instruction} ({input})\\n"
assistant: "A: "
stop: eos
after_stop: "\\n"
"""


def test_a_template_of_ones_own(tokenizer_folder: Path, tmp_path: Path):
    (tmp_path / "own.yaml").write_text(OWN)
    template = find_template(str(tmp_path / "own.yaml"))
    assert isinstance(template, Template)
    messages = [SYSTEM, Message("user", "訳して", input="cat"), REPLY]
    texts = [segment.text for segment in template.segments(messages)]
    assert "".join(texts) == "[短く答える。]\nQ: 訳して (cat)\nA: 青です。eos\n"
    kept = definition(str(tmp_path / "own.yaml"), template)
    assert find_template(kept) == template
    stock = AutoTokenizer.from_pretrained(tokenizer_folder)
    stock.chat_template = jinja_of(template, False)
    messages = [SYSTEM, *CHAT]
    expected = stock.apply_chat_template(as_dicts(messages), return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = ours(str(tmp_path / "own.yaml"), tokenizer_folder, messages)
    assert (ids.tolist(), mask.tolist()) == (expected["input_ids"], expected["assistant_masks"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("with_imput: a", "unknown key with_imput.*did you mean with_input"),
        ("stop: eos", "no without_input"),
        ("without_input: a", r"must have \{instruction\} once"),
        ("without_input: '{instruction}{instruction}'", r"must have \{instruction\} once"),
        ("without_input: '{instruction}'\nwith_input: '{instruction}'", r"with_input must have \{input\} once"),
        ("without_input: '{instruction}'\nsystem: a", r"system must have \{content\} once"),
        ("without_input: '{instruction}'\nstop: </s>", "not in special_tokens"),
        ("without_input: '{instruction}'\nstrip: 1", "strip is 1.*true or false"),
        ("without_input: '{instruction}'\nspecial_tokens: a", "special_tokens is 'a'.*a list"),
        ("without_input: '{instruction}'\nseveral_turns: maybe", "yes or trained or no"),
        ("without_input: '{system}{instruction}'", "there is no system"),
        ("without_input: '{instruction}'\ndefault_system: a", "default_system without system"),
        ("without_input: '{instruction}\\n'", "a backslash and an n.*double quotes"),
        ("without_input: '{instruction}'\nassistant: 'a\\n'", "assistant has a backslash"),
        ("without_input: '{instruction}'\nafter_stop: '\\n'", "after_stop has a backslash"),
        ("without_input: '{instruction}'\nnewline: '\\n'", "newline has a backslash"),
        ("without_input: '{instruction}'\nsystem: '{content}'\ndefault_system: 'a\\n'", "default_system has a back"),
        ("without_input: '{instruction}'\nspecial_tokens: ['<a>\\n']", "special_tokens has a backslash"),
        ("without_input: ''", r"must have \{instruction\} once"),
        ("without_input: '{instruction}{input}'", r"without_input has \{input\}"),
        ("without_input: '{instruction} {question}'", r"without_input has \{question\}.*may have \{instruction\}"),
        ("without_input: '{ instruction }{instruction}'", r"has \{ instruction \}"),
        ("without_input: '{instruction}'\nassistant: '{content}'", r"assistant has \{content\}"),
        ("without_input: '{instruction}'\nsystem: '{content}{instruction}'", r"system has \{instruction\}"),
        ("without_input: '{instruction}'\nsystem: '{content}'\ndefault_system: '{content}'", "default_system has"),
        (
            "without_input: '{instruction}'\nsystem: '{content}'\nnext_without_input: '{system}{instruction}'",
            r"next_without_input has \{system\}",
        ),
        ("without_input: '{system}{system}{instruction}'\nsystem: '{content}'", r"without_input has \{system\}"),
        (
            "without_input: '{system}{instruction}'\nsystem: '{content}'\nwith_input: '{instruction}{input}'",
            r"only one has \{system\}",
        ),
        (
            "without_input: '{instruction}'\nsystem: '{content}'\nwith_input: '{system}{instruction}{input}'",
            r"only one has \{system\}",
        ),
        ("a", "holds no template"),
        ("a: [", "own.yaml:1: not YAML|not YAML"),
    ],
)
def test_a_template_that_cannot_be_read_says_why(text: str, message: str, tmp_path: Path):
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        find_template(str(tmp_path / "own.yaml"))


@pytest.mark.parametrize("name", ["instruction-tuning.md", "instruction-tuning.ja.md"])
def test_every_key_is_in_the_documentation(name: str):
    text = (Path(__file__).parents[2] / "docs" / name).read_text(encoding="utf-8")
    assert [field.name for field in dataclasses.fields(Template) if f"`{field.name}`" not in text] == []


def test_newlines_of_a_system_message_are_spelt_where_it_stands_inside_too(tokenizer_folder: Path, tmp_path: Path):
    form = "without_input: '{system}{instruction}'\nsystem: '{content}/'\nnewline: '<NL>'\ntext_tokens: ['<NL>']\n"
    (tmp_path / "own.yaml").write_text(form)
    template = find_template(str(tmp_path / "own.yaml"))
    messages = [Message("system", "短く\n答える。"), Message("user", "空\nは？"), REPLY]
    assert "".join(segment.text for segment in template.segments(messages)) == "短く<NL>答える。/空<NL>は？青です。eos"
    stock = AutoTokenizer.from_pretrained(tokenizer_folder)
    stock.chat_template = jinja_of(template, False)
    rendered = stock.apply_chat_template(as_dicts(messages), tokenize=False)
    assert rendered == "短く<NL>答える。/空<NL>は？青です。</s>"


def test_a_form_that_spells_an_unlisted_special_token_is_refused(tokenizer_folder: Path, tmp_path: Path):
    (tmp_path / "own.yaml").write_text("without_input: '<s>{instruction}'")
    template = find_template(str(tmp_path / "own.yaml"))
    with pytest.raises(UserError, match=r"spells <s>.*list it in special_tokens"):
        check_template(template, "own.yaml", tokenizer_folder, read_contract(tokenizer_folder))


# --- the tokenizer's own ---------------------------------------------------------------------------------------------

_TURNS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n%s"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN_TURNS = _TURNS.replace("%s", "{{ m.content }}<|im_end|>\n")
MARKED = _TURNS.replace("%s", "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{{ '\\n' }}")
STOP_UNMARKED = _TURNS.replace("%s", "{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>\n")
NEWLINE_MARKED = _TURNS.replace("%s", "{% generation %}{{ m.content }}<|im_end|>\n{% endgeneration %}")


@pytest.fixture(scope="module")
def markers(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return extended("chatml", tokenizer_folder, tmp_path_factory.mktemp("markers") / "t")


def with_chat_template(markers: Path, output: Path, jinja: str) -> Path:
    output.mkdir()
    for file in markers.iterdir():
        (output / file.name).write_bytes(file.read_bytes())
    (output / "chat_template.jinja").write_text(jinja)
    return output


@pytest.mark.parametrize("jinja", [PLAIN_TURNS, MARKED, STOP_UNMARKED, NEWLINE_MARKED])
@pytest.mark.parametrize("conversation", ["one", "several", "system, several"])
def test_the_tokenizers_own_template_with_and_without_markers(
    jinja: str, conversation: str, markers: Path, tmp_path: Path
):
    messages = CONVERSATIONS[conversation]
    folder = with_chat_template(markers, tmp_path / "t", jinja)
    check_template(find_template("chat", folder), "chat", folder, read_contract(folder))
    ids, mask = ours("chat", folder, messages)
    stock = AutoTokenizer.from_pretrained(folder)
    assert ids.tolist() == stock.apply_chat_template(as_dicts(messages))["input_ids"]
    stock.chat_template = MARKED  # where the stop token is marked, and nothing behind it
    marked = stock.apply_chat_template(as_dicts(messages), return_dict=True, return_assistant_tokens_mask=True)
    assert mask.tolist() == marked["assistant_masks"]
    built_in, its_mask = ours("chatml", folder, messages, bos=True)
    assert (ids.tolist(), mask.tolist()) == (built_in.tolist(), its_mask.tolist())
    last = ours("chat", folder, messages, "last_response")[1]
    assert last.tolist() == ours("chatml", folder, messages, "last_response", bos=True)[1].tolist()


HEADER_MARKED = _TURNS.replace(
    "<|im_start|>assistant\n%s", "{% generation %}<|im_start|>assistant\n{{ m.content }}<|im_end|>{% endgeneration %}\n"
)
NO_PROMPT = PLAIN_TURNS.replace("{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}", "")
THOUGHTS_UNMARKED = _TURNS.replace(
    "%s", "<think>\n\n</think>\n\n{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n"
)
# as Llama 2's: nothing stands in front of a reply but the question
HEADLESS = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("jinja", "message"),
    [
        (HEADER_MARKED, "does not begin where its generation prompt ends.*chatml"),
        (NO_PROMPT, r"ignores add_generation_prompt, and begins a reply with '<\|im_start\|>assistant.*chatml"),
        (THOUGHTS_UNMARKED, "does not begin where its generation prompt ends.*qwen3"),
    ],
)
def test_a_chat_template_whose_replies_begin_elsewhere_than_generation_does_is_refused(
    jinja: str, message: str, markers: Path, tmp_path: Path
):
    with pytest.raises(UserError, match=message):
        find_template("chat", with_chat_template(markers, tmp_path / "t", jinja))


def test_a_chat_template_without_anything_in_front_of_a_reply_needs_no_generation_prompt(markers: Path, tmp_path: Path):
    folder = with_chat_template(markers, tmp_path / "t", HEADLESS)
    segments = find_template("chat", folder).segments([QUESTION, REPLY])
    assert "".join(segment.text for segment in segments if segment.reply) == " 青です。 </s>"


QWEN_LIKE = _TURNS.replace("%s", "{% if loop.last %}<think>\n</think>{% endif %}{{ m.content }}<|im_end|>\n")


@pytest.mark.parametrize(
    ("jinja", "message"),
    [
        (QWEN_LIKE, "earlier messages otherwise.*built-in template qwen3"),
        (PLAIN_TURNS.replace("<|im_end|>", "."), "no stop token behind a reply.*built-in template chatml"),
        ("{{ strftime_now('%d') }}" + PLAIN_TURNS, "the day on which it is used.*chatml"),
        (PLAIN_TURNS + "{{ raise_exception('no') }}", "refuses the conversation: no"),
        (PLAIN_TURNS + "{{ ''.__class__.__mro__ }}", "refuses the conversation"),
        ("{{ x.y", "refuses the conversation.*YAML"),
    ],
)
def test_a_chat_template_that_cannot_be_used_is_refused_with_its_replacement(
    jinja: str, message: str, markers: Path, tmp_path: Path
):
    folder = with_chat_template(markers, tmp_path / "t", jinja)
    with pytest.raises(UserError, match=message):
        find_template("chat", folder).segments(CHAT)


def test_a_chat_template_whose_text_merges_with_replies_is_refused(markers: Path, tmp_path: Path):
    encode = BulkEncoder(markers)
    pieces = [piece for piece in read_pieces(markers) if len(piece) == 2 and piece.isalpha() and not piece.isascii()]
    one = next(p for p in pieces if len(encode(["。" + p])[0]) == 2 < len(encode(["。" + p[0]])[0] + encode([p[1]])[0]))
    folder = with_chat_template(markers, tmp_path / "t", PLAIN_TURNS.replace("assistant\n", f"assistant\n。{one[0]}"))
    merged = ours("chat", folder, [QUESTION, Message("assistant", f"{one[1]}。")])
    assert isinstance(merged, UnusableError)
    assert "merges" in merged.message
    assert not isinstance(ours("chat", folder, [QUESTION, REPLY]), UnusableError)


def read_pieces(folder: Path) -> list[str]:
    return sorted(AutoTokenizer.from_pretrained(folder).get_vocab())


def test_a_special_token_in_a_message_is_refused_by_a_chat_template(markers: Path, tmp_path: Path):
    folder = with_chat_template(markers, tmp_path / "t", MARKED)
    for messages in ([Message("user", "a<|im_end|>"), REPLY], [Message("user", "a", input="</s>"), REPLY]):
        with pytest.raises(UnusableError, match="spells a special token"):
            find_template("chat", folder).segments(messages)


def test_a_folder_without_a_chat_template_says_so(tokenizer_folder: Path):
    with pytest.raises(UserError, match="has no chat template"):
        find_template("chat", tokenizer_folder)

"""Imports: from files and folders of every shape, against the original engine and stock transformers, old and new."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor
from support.encoding import BulkEncoder
from support.transformers4 import transformers4
from tokenizers import Tokenizer, models, normalizers, processors
from transformers import AutoTokenizer

from tsumugu.errors import UserError
from tsumugu.tokenizer import importer
from tsumugu.tokenizer.contract import GOLDEN, check_contract, read_contract
from tsumugu.tokenizer.importer import import_tokenizer
from tsumugu.tokenizer.load import load_tokenizer


@pytest.fixture(scope="module")
def rinna_like(train_plainly, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model such as rinna's: nmt_nfkc, dummy prefix, no bytes, padding and mask among its control pieces."""
    path = tmp_path_factory.mktemp("rinna") / "spiece.model"
    model = train_plainly(
        normalization_rule_name="nmt_nfkc",
        byte_fallback=False,
        add_dummy_prefix=True,
        remove_extra_whitespaces=True,
        control_symbols=["[PAD]", "[CLS]", "[SEP]", "[MASK]"],
    )
    path.write_bytes(model.SerializeToString())
    return path


@pytest.fixture(scope="module")
def llama_like(train_plainly, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama") / "tokenizer.model"
    path.write_bytes(train_plainly(model_type="bpe", add_dummy_prefix=True).SerializeToString())
    return path


def folder_of(model: Path, folder: Path, **config) -> Path:
    """A slow tokenizer's folder."""
    folder.mkdir()
    shutil.copy(model, folder)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_a_model_file_is_imported_with_its_contract_and_report(rinna_like: Path, corpus: list[str], tmp_path: Path):
    report = import_tokenizer(str(rinna_like), tmp_path / "out", [*corpus, "髙髙い"])
    contract = check_contract(tmp_path / "out")
    engine = SentencePieceProcessor(model_file=str(rinna_like))
    served = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (contract.unk_id, contract.bos_id, contract.eos_id) == (0, 1, 2)
    assert contract.pad_id == engine.piece_to_id("[PAD]") == served.pad_token_id
    assert served.convert_tokens_to_ids("[MASK]") == engine.piece_to_id("[MASK]")
    assert contract.golden == tuple((text, tuple(engine.encode(text))) for text in GOLDEN)
    assert (report.ids, report.engine, report.golden) == (800, "sentencepiece", len(GOLDEN))
    assert (report.characters, report.newline) == (sum(map(len, corpus)) + 3, "lost")
    assert report.changed["newline"] == ("あ\nい", "あ い")
    assert report.changed["full-width letters"] == ("ＡＢＣ", "ABC")
    assert report.unknown["髙"] == 2
    assert "髙 (U+9AD9) 2" in "\n".join(report.lines())
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == rinna_like.read_bytes()


def test_what_is_decoded_is_what_sentencepiece_decodes(rinna_like: Path, llama_like: Path, texts, tmp_path: Path):
    for path in (rinna_like, llama_like):
        import_tokenizer(str(path), tmp_path / path.stem)
        served, engine = (
            AutoTokenizer.from_pretrained(tmp_path / path.stem),
            SentencePieceProcessor(model_file=str(path)),
        )
        for text in texts[:300]:
            assert served.decode(engine.encode(text)) == engine.decode(engine.encode(text))


@pytest.mark.parametrize(
    ("config", "around"),
    [
        ({"tokenizer_class": "LlamaTokenizer"}, (True, False)),
        ({"tokenizer_class": "LlamaTokenizer", "add_bos_token": False, "add_eos_token": True}, (False, True)),
        ({"tokenizer_class": "T5Tokenizer", "eos_token": {"content": "</s>"}}, (False, True)),
        ({}, (False, False)),
    ],
)
def test_bos_and_eos_are_put_where_the_slow_tokenizer_puts_them(
    llama_like: Path, tmp_path: Path, config: dict, around: tuple[bool, bool]
):
    import_tokenizer(str(folder_of(llama_like, tmp_path / "slow", **config)), tmp_path / "out")
    contract = read_contract(tmp_path / "out")
    assert (contract.adds_bos, contract.adds_eos) == around
    ids = SentencePieceProcessor(model_file=str(llama_like)).encode("猫である")
    served = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert served("猫である").input_ids == [1] * around[0] + ids + [2] * around[1]


def test_the_folders_names_added_tokens_and_chat_template_go_along(llama_like: Path, tmp_path: Path):
    added = {
        "1": {"content": "<s>", "special": True},
        "800": {"content": "<|im_start|>", "special": True},
        "801": {"content": "<think>", "special": False},
    }
    source = folder_of(
        llama_like, tmp_path / "slow", pad_token="<unk>", added_tokens_decoder=added, chat_template="{{ messages }}"
    )
    import_tokenizer(str(source), tmp_path / "out")
    contract, served = check_contract(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (contract.vocab_size, contract.pad_id) == (802, 0)
    assert served("<|im_start|><think>", add_special_tokens=False).input_ids == [800, 801]
    assert served.chat_template == "{{ messages }}"
    [ids] = BulkEncoder(tmp_path / "out")(["<|im_start|>"])
    assert 800 not in ids
    added["800"], added["802"] = added.pop("801"), added["800"]
    source = folder_of(llama_like, tmp_path / "gap", added_tokens_decoder=added)
    with pytest.raises(UserError, match=r"has id 802, which here would be 801"):
        import_tokenizer(str(source), tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def test_of_a_model_and_a_tokenizer_json_the_model_counts(llama_like: Path, tmp_path: Path):
    source = folder_of(llama_like, tmp_path / "both")
    wrong = Tokenizer(models.WordLevel({"<s>": 1, "</s>": 2, "<unk>": 0}, unk_token="<unk>"))
    wrong.add_special_tokens(["<unk>", "<s>", "</s>"])
    wrong.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    wrong.save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>"}))
    import_tokenizer(str(source), tmp_path / "out")
    engine = SentencePieceProcessor(model_file=str(llama_like))
    assert read_contract(tmp_path / "out").golden == tuple((text, tuple(engine.encode(text))) for text in GOLDEN)
    assert read_contract(tmp_path / "out").adds_bos


def test_a_tokenizer_json_is_taken_as_it_is_even_where_transformers_would_build_it_anew(
    byte_level: Path, corpus: list[str], tmp_path: Path
):
    source = Path(shutil.copytree(byte_level, tmp_path / "neox"))
    original = Tokenizer.from_file(str(source / "tokenizer.json"))
    original.normalizer = normalizers.Replace("猫", "犬")
    original.save(str(source / "tokenizer.json"))
    config = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "GPTNeoXTokenizerFast"}))
    (source / "config.json").write_text(json.dumps({"model_type": "gpt_neox"}))
    report = import_tokenizer(str(source), tmp_path / "out", corpus)
    assert (report.engine, report.ties, report.newline) == ("tokenizers", 0, "expressible")
    served = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert served(corpus).input_ids == [encoding.ids for encoding in original.encode_batch(corpus)]
    assert served.eos_token == "<|endoftext|>"


def test_a_tokenizer_of_our_own_stays_as_it_is(folder: Path, corpus: list[str], tmp_path: Path):
    import_tokenizer(str(folder), tmp_path / "out", corpus)
    assert read_contract(tmp_path / "out") == read_contract(folder)
    assert BulkEncoder(tmp_path / "out").engine == "sentencepiece"


def test_lower_casing_of_the_source_is_part_of_the_tokenizer(rinna_like: Path, corpus: list[str], tmp_path: Path):
    source = folder_of(rinna_like, tmp_path / "slow", do_lower_case=True)
    import_tokenizer(str(source), tmp_path / "out", corpus)
    engine, served = SentencePieceProcessor(model_file=str(rinna_like)), AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in ("Hello WORLD", "ＡＢＣ"):
        assert served(text).input_ids == engine.encode(text.lower()) == list(BulkEncoder(tmp_path / "out")([text])[0])
    assert BulkEncoder(tmp_path / "out").engine == "sentencepiece"


def test_newlines_are_mapped_in_both_directions(rinna_like: Path, corpus: list[str], tmp_path: Path):
    report = import_tokenizer(str(rinna_like), tmp_path / "out", corpus, newline="<nl>")
    engine, served = SentencePieceProcessor(model_file=str(rinna_like)), AutoTokenizer.from_pretrained(tmp_path / "out")
    assert report.newline == read_contract(tmp_path / "out").newline == "mapped"
    text = "春は\n\nあけぼの。\r\n白く"
    ids = engine.encode("春は<nl><nl>あけぼの。<nl>白く")
    assert served(text, add_special_tokens=False).input_ids == ids == list(BulkEncoder(tmp_path / "out")([text])[0])
    assert served.decode(ids) == "春は\n\nあけぼの。\n白く"
    assert served.decode(engine.encode("<nl>")) == "\n"  # a literal one comes back as a newline


def test_a_newline_that_cannot_be_expressed_is_refused_where_that_was_asked_for(rinna_like: Path, tmp_path: Path):
    with pytest.raises(UserError, match="cannot express a newline"):
        import_tokenizer(str(rinna_like), tmp_path / "out", newline="refuse")
    with pytest.raises(UserError, match="cannot spell '<改行>'"):
        import_tokenizer(str(rinna_like), tmp_path / "out", newline="<改行>")
    assert list(tmp_path.iterdir()) == []


def test_a_hub_name_is_fetched_without_weights(llama_like: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = folder_of(llama_like, tmp_path / "snapshot")
    asked = {}

    def snapshot_download(name, allow_patterns):
        asked[name] = allow_patterns
        return str(source)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert import_tokenizer("someone/model", tmp_path / "out").ids == 800
    assert not any("safetensors" in pattern or ".bin" in pattern for pattern in asked["someone/model"])

    def fail(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(UserError, match=r"someone/else: no such file or folder, nor on the hub: no network"):
        import_tokenizer("someone/else", tmp_path / "refused")


def test_bytes_of_tokens_count_the_normalised_text(llama_like: Path, texts: list[str], tmp_path: Path):
    import_tokenizer(str(llama_like), tmp_path / "out")
    lengths = read_contract(tmp_path / "out").token_bytes
    for text, ids in zip(texts, BulkEncoder(tmp_path / "out")(texts), strict=True):
        seen = text.replace("▁", " ").encode()
        assert sum(lengths[id] for id in ids) == (len(seen) + 1 if text else 0)  # one for the space in front


def test_a_difference_names_the_string(rinna_like: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    convert = importer.convert.to_fast

    def wrong(*arguments):
        tokenizer = convert(*arguments)
        tokenizer.normalizer = normalizers.NFKC()
        return tokenizer

    monkeypatch.setattr(importer.convert, "to_fast", wrong)
    with pytest.raises(UserError, match="日本語の文章を"):
        import_tokenizer(str(rinna_like), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_transformers_4_gives_the_same_ids(rinna_like: Path, llama_like: Path, tmp_path: Path):
    python = transformers4()
    import_tokenizer(str(rinna_like), tmp_path / "rinna", newline="<nl>")
    import_tokenizer(str(llama_like), tmp_path / "llama")
    code = (
        "import json, sys; from transformers import AutoTokenizer, __version__; assert __version__.startswith('4.');"
        "golden = [pair['text'] for pair in json.load(open(sys.argv[1] + '/contract.json'))['golden']];"
        "print(json.dumps(AutoTokenizer.from_pretrained(sys.argv[1])(golden, add_special_tokens=False).input_ids))"
    )
    for name in ("rinna", "llama"):
        done = subprocess.run([python, "-c", code, str(tmp_path / name)], capture_output=True, text=True, check=True)
        golden = read_contract(tmp_path / name).golden
        assert json.loads(done.stdout) == [list(ids) for _, ids in golden]
        assert load_tokenizer(tmp_path / name).encode(GOLDEN[1]).ids == list(golden[1][1])


def test_what_was_imported_already_is_not_imported_again(llama_like: Path, tmp_path: Path):
    import_tokenizer(str(llama_like), tmp_path / "once")  # its options would be lost
    with pytest.raises(UserError, match="imported or extended already"):
        import_tokenizer(str(tmp_path / "once"), tmp_path / "twice")


def test_a_tokenizer_json_that_is_no_object_is_damaged(tmp_path: Path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "tokenizer.json").write_text("[]")
    with pytest.raises(UserError, match="holds no JSON object"):
        import_tokenizer(str(tmp_path / "source"), tmp_path / "out")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "SOURCE is empty .name a SentencePiece"),
        (" ", "SOURCE is empty"),
        ("./nowhere", r"^\./nowhere: no such file or folder \(check the path\)$"),
        ("nowhere/spiece.model", r"^nowhere/spiece\.model: no such file or folder \(check the path\)$"),
        ("some one/a model", "^some one/a model: no such file or folder, and no name on the hub can be so"),
        ("someone/model", "^someone/model: no such file or folder, and the hub cannot be reached .*name their folder"),
    ],
)
def test_a_source_that_is_none_is_told_in_one_line(
    source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        import_tokenizer(source, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_tokenizer_is_named_by_its_source(tmp_path: Path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "tokenizer.json").write_text('{"model": {}}')
    with pytest.raises(UserError, match=f"^{source}: its tokenizer.json cannot be read") as caught:
        import_tokenizer(str(source), tmp_path / "out")
    assert "partial" not in str(caught.value)

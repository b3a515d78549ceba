"""The contract: bytes add up, the fingerprint follows ids alone, a changed tokenizer is found out."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.encoding import BulkEncoder
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer

from tsumugu.errors import UserError
from tsumugu.tokenizer.contract import GOLDEN, check_contract, copy_tokenizer, read_contract, write_contract


def copy(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target))


def rewrite(folder: Path, change) -> None:
    """Apply `change` to the tokenizer of a folder."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    change(tokenizer)
    tokenizer.save(str(folder / "tokenizer.json"))


def test_a_trained_tokenizer_has_a_contract_that_it_keeps(folder: Path):
    contract = read_contract(folder)
    assert contract == check_contract(folder)
    assert (contract.vocab_size, contract.newline) == (800, "expressible")
    assert (contract.unk_id, contract.bos_id, contract.eos_id, contract.pad_id) == (0, 1, 2, 3)
    assert (contract.adds_bos, contract.adds_eos) == (False, False)


def test_golden_ids_are_those_of_stock_transformers(folder: Path):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    contract = read_contract(folder)
    assert [text for text, _ in contract.golden] == list(GOLDEN)
    for text, ids in contract.golden:
        assert tokenizer(text).input_ids == list(ids)
        assert tokenizer.decode(ids) == text


def test_bytes_of_tokens_add_up_to_the_text(folder: Path, byte_level: Path, texts: list[str], tmp_path: Path):
    for source in (folder, byte_level):
        copied = copy(source, tmp_path / source.name)
        lengths = write_contract(copied).token_bytes
        for text, ids in zip(texts, BulkEncoder(copied)(texts), strict=True):
            assert sum(lengths[id] for id in ids) == len(text.encode())


def test_special_and_reserved_tokens_stand_for_no_text(folder: Path):
    lengths = read_contract(folder).token_bytes
    assert lengths[:104] == (0,) * 104
    assert lengths[104] == 1  # newline
    assert lengths[105:361] == (1,) * 256  # byte pieces
    assert min(lengths[361:]) >= 1


def test_a_byte_level_tokenizer_is_described(byte_level: Path, tmp_path: Path):
    contract = write_contract(copy(byte_level, tmp_path / "copy"))
    tokenizer = AutoTokenizer.from_pretrained(byte_level)
    assert contract.vocab_size == len(tokenizer)
    assert (contract.bos_id, contract.eos_id, contract.pad_id) == (0, 0, None)
    assert contract.newline == "expressible"
    assert contract.golden == tuple((text, tuple(tokenizer(text).input_ids)) for text in GOLDEN)


def test_what_the_tokenizer_adds_is_recorded(folder: Path, tmp_path: Path):
    copied = copy(folder, tmp_path / "copy")
    template = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    rewrite(copied, lambda tokenizer: setattr(tokenizer, "post_processor", template))
    contract = write_contract(copied)
    assert (contract.adds_bos, contract.adds_eos) == (True, True)
    assert contract.golden == read_contract(folder).golden


def test_the_fingerprint_does_not_depend_on_the_files_layout(folder: Path, tmp_path: Path):
    copied = copy(folder, tmp_path / "copy")
    layout = json.loads((copied / "tokenizer.json").read_text())
    (copied / "tokenizer.json").write_text(json.dumps(dict(reversed(layout.items())), indent=1))
    assert write_contract(copied).fingerprint == read_contract(folder).fingerprint


def test_the_fingerprint_is_kept_when_transformers_saves_the_tokenizer(folder: Path, tmp_path: Path):
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    assert write_contract(tmp_path).fingerprint == read_contract(folder).fingerprint


def test_a_changed_tokenizer_breaks_its_contract(folder: Path, tmp_path: Path):
    copied = copy(folder, tmp_path / "copy")
    text = (copied / "tokenizer.json").read_text()
    (copied / "tokenizer.json").write_text(text.replace('"normalizer": null', '"normalizer": {"type": "NFKC"}'))
    with pytest.raises(UserError, match=r"does not keep its contract: .*ＡＢＣ"):
        check_contract(copied)
    assert write_contract(copied).fingerprint != read_contract(folder).fingerprint


def test_another_eos_breaks_the_contract(folder: Path, tmp_path: Path):
    copied = copy(folder, tmp_path / "copy")
    config = (copied / "tokenizer_config.json").read_text()
    (copied / "tokenizer_config.json").write_text(config.replace('"eos_token": "</s>"', '"eos_token": "<s>"'))
    with pytest.raises(UserError, match="does not keep its contract"):
        check_contract(copied)


def test_a_contract_is_read_without_a_tokenizer(folder: Path, tmp_path: Path):
    shutil.copy(folder / "contract.json", tmp_path)
    assert read_contract(tmp_path) == read_contract(folder)


def test_a_copy_holds_the_tokenizer_and_nothing_else(folder: Path, tmp_path: Path):
    source = copy(folder, tmp_path / "source")
    for name in ("model.safetensors", "notes.txt"):
        (source / name).touch()
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "contract.json").chmod(0o444)
    for _ in range(2):  # a copy that was cut short is written over
        copy_tokenizer(source, tmp_path / "deep" / "copy")
    assert check_contract(tmp_path / "deep" / "copy") == read_contract(folder)
    names = {path.name for path in folder.iterdir()} | {"chat_template.jinja"}
    assert {path.name for path in (tmp_path / "deep" / "copy").iterdir()} == names


def test_reading_a_contract_imports_no_tokenizer_library(folder: Path):
    code = (
        "import sys; from pathlib import Path; from tsumugu.tokenizer.contract import read_contract;"
        f"read_contract(Path({str(folder)!r}));"
        "print({'tokenizers', 'sentencepiece', 'transformers', 'torch'} & set(sys.modules))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "set()"


def test_a_missing_or_damaged_contract_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"no contract\.json"):
        read_contract(tmp_path)
    (tmp_path / "contract.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        read_contract(tmp_path)
    for content in ("[]", "3", '{"version": 1}', '{"version": 1, "golden": [3], "token_bytes": []}'):
        (tmp_path / "contract.json").write_text(content)
        with pytest.raises(UserError, match="damaged"):
            read_contract(tmp_path)
    (tmp_path / "contract.json").write_text('{"version": 99}')
    with pytest.raises(UserError, match="version 99"):
        read_contract(tmp_path)


def test_a_changed_tokenizer_json_is_noticed_where_the_contract_is_read(tmp_path: Path, folder: Path):
    copied = tmp_path / "copied"
    shutil.copytree(folder, copied)
    file = copied / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(content), encoding="utf-8")  # laid out otherwise, the same to tokenizers
    assert read_contract(copied) == read_contract(folder)
    content["model"]["vocab"][-1][0] += "違"
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match="does not keep its contract"):
        read_contract(copied)

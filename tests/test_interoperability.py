"""What is said about servers: the right row, and the same in the documentation."""

import json
import shutil
from pathlib import Path

import pytest
from sentencepiece import SentencePieceTrainer
from support.models import ARCHITECTURES, tiny_config

from tsumugu import interoperability
from tsumugu.interoperability import KINDS, NOTES, cells, markdown, servers, tokenizer_kind
from tsumugu.tokenizer.importer import import_tokenizer
from tsumugu.tokenizer.train import train_byte_level

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def folders(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("kinds")
    text = ["山川の道", "山道", "川の道を歩いた", "the river", "the mountain"] * 20
    train_byte_level(lambda: text, root / "byte_level", vocab_size=265, reserved=2)
    for kind in ("unigram", "bpe"):
        options = dict(vocab_size=400, hard_vocab_limit=False, byte_fallback=True, normalization_rule_name="identity")
        options |= dict(required_chars="<>/sunk0x", minloglevel=2)
        prefix = str(root / f"{kind}-source")
        SentencePieceTrainer.train(sentence_iterator=iter(text), model_prefix=prefix, model_type=kind, **options)
        import_tokenizer(f"{prefix}.model", root / f"sentencepiece_{kind}")
    return {kind: tokenizer_folder if kind == "unigram" else root / kind for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_the_kind_of_a_tokenizer_is_found(kind: str, folders: dict[str, Path]):
    assert tokenizer_kind(folders[kind]) == kind


def test_other_kinds_and_folders_without_a_tokenizer_have_none(folders: dict[str, Path], tmp_path: Path):
    assert tokenizer_kind(tmp_path) is None
    shutil.copy(folders["unigram"] / "tokenizer.json", tmp_path)
    layout = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    layout["model"] = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(layout), encoding="utf-8")
    assert tokenizer_kind(tmp_path) is None


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_has_a_row_for_every_kind(architecture: str):
    assert architecture in interoperability.ARCHITECTURES
    for kind in KINDS:
        row = cells(architecture, kind)
        assert all(cell.note in NOTES for cell in row.values() if cell.outcome != "works")
        said = servers(tiny_config(architecture, False), kind)
        assert len(said) == len(row)
        assert all("\n" not in line and len(line) < 230 for line in said)


def llama_cpp(config, kind: str) -> str:
    return next(line for line in servers(config, kind) if line.startswith("llama.cpp"))


def test_shapes_that_a_converter_overlooks_are_said():
    assert "works once mended" in llama_cpp(tiny_config("gpt_neox", False), "byte_level")
    assert "tied" in llama_cpp(tiny_config("gpt_neox", True), "byte_level")
    rope = {"rope_type": "default", "rope_theta": 500.0}
    assert "rotary base" in llama_cpp(tiny_config("gpt_neox", False, rope_parameters=rope), "byte_level")
    assert "works" in llama_cpp(tiny_config("llama", True, rope_parameters=rope), "sentencepiece_bpe")
    assert "works once mended" in llama_cpp(tiny_config("gpt2", True), "byte_level")
    assert "four times" in llama_cpp(tiny_config("gpt2", True, n_inner=48), "byte_level")


def test_what_was_not_tried_at_all_is_said_so():
    (line,) = servers(tiny_config("gpt2", True), None)
    assert "not tried" in line


@pytest.mark.parametrize(("file", "language"), [("interoperability.md", 0), ("interoperability.ja.md", 1)])
def test_the_documentation_shows_the_table(file: str, language: int):
    """To renew it, put what `tsumugu.interoperability.markdown` gives between its marks."""
    text = (DOCS / file).read_text(encoding="utf-8")
    assert text.split("<!-- table -->\n")[1].split("\n<!-- /table -->")[0] == markdown(language)

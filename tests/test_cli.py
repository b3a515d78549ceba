"""The command line: what a user gets wrong is one line that says what, where and how to mend it, and exit code 2."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tsumugu.cli import main

TEXTS = [f"{n}番目の文書です。今日は{n}回、糸を紡いで布を織りました。空は青く、風は静かでした。" for n in range(40)]


def write_jsonl(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path


def write_yaml(path: Path, content: dict) -> Path:
    path.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory, tokenizer_folder) -> Path:
    """A folder with a corpus, a store and a finished run of two steps."""
    folder = tmp_path_factory.mktemp("made")
    corpus = write_jsonl(folder / "corpus.jsonl", [{"text": text} for text in TEXTS])
    prepare = {
        "sources": [{"name": "texts", "path": str(corpus)}],
        "tokenizer": str(tokenizer_folder),
        "output": str(folder / "store"),
        "validation_share": 0.2,
        "add_eos": True,
        "workers": 1,
    }
    write_yaml(folder / "prepare.yaml", {"prepare": prepare})
    train = {
        "model": {"preset": "tiny"},
        "data": {"store": str(folder / "store"), "sequence_length": 32},
        "train": {"max_steps": 2, "global_batch_size": 2, "log_every": 1},
    }
    write_yaml(folder / "train.yaml", train)
    assert main(["prepare", "--config", str(folder / "prepare.yaml")]) == 0
    assert main(["train", "--config", str(folder / "train.yaml"), "--run-dir", str(folder / "run")]) == 0
    return folder


@pytest.fixture
def refused(capsys):
    """Runs a command that must be refused, and returns its one line."""

    def run(*arguments) -> str:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        output = capsys.readouterr()
        lines = [line for line in output.err.splitlines() if line.startswith("tsumugu: ")]
        assert code == 2
        assert len(lines) == 1
        assert "Traceback" not in output.err
        return lines[0]

    return run


def test_help_answers_without_heavy_imports():
    code = "import sys; from tsumugu.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "sys.exit(bool({'torch', 'transformers', 'datatrove', 'jsonargparse'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0


def test_training_imports_the_training_dependencies_alone(made, tmp_path):
    script = (
        "import sys\n"
        "for name in ('datatrove', 'rich', 'pyarrow', 'sentencepiece', 'tensorboard', 'fsspec.implementations.s3'):\n"
        "    sys.modules[name] = None\n"
        "from tsumugu.cli import main\n"
        f"sys.exit(main(['train', '--config', {str(made / 'train.yaml')!r}, '--run-dir', {str(tmp_path / 'run')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_commands_run_again_say_that_they_are_done(made, capsys):
    assert main(["prepare", "--config", str(made / "prepare.yaml")]) == 0
    assert "already done" in capsys.readouterr().out
    assert main(["train", "--config", str(made / "train.yaml"), "--run-dir", str(made / "run")]) == 0
    assert "already done" in capsys.readouterr().out


def test_export_and_generate(made, tmp_path, capsys):
    assert main(["export", str(made / "run"), "--output", str(tmp_path / "model"), "--dtype", "float32"]) == 0
    assert main(["export", str(made / "run"), "--output", str(tmp_path / "model"), "--dtype", "float32"]) == 0
    assert "already done" in capsys.readouterr().out
    assert main(["generate", str(tmp_path / "model"), "--prompt", "今日は", "--max-new-tokens", "4"]) == 0


def test_verify_finds_a_changed_byte(made, tmp_path, tokenizer_folder, refused, capsys):
    config, output = made / "prepare.yaml", tmp_path / "store"
    assert main(["prepare", "--config", str(config), "--output", str(output)]) == 0
    assert main(["prepare", "--config", str(config), "--output", str(output), "--verify"]) == 0
    shard = output / "train" / "00000.bin"
    content = bytearray(shard.read_bytes())
    content[10] ^= 1
    shard.write_bytes(content)
    assert "00000.bin" in refused("prepare", "--config", config, "--output", output, "--verify")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], ["trian", "train"]),
        (["train", "--config", "nowhere.yaml"], ["nowhere.yaml", "no such file"]),
        (["prepare", "--config", "nowhere.yaml"], ["nowhere.yaml", "no such file"]),
        (["tokenizer", "train", "--input", "nowhere.txt", "--output", "x"], ["nowhere.txt", "no such file"]),
        (["export", "nowhere", "--output", "x"], ["nowhere", "no complete checkpoint"]),
        (["generate", "nowhere", "--prompt", "あ"], ["nowhere", "no model"]),
        (["export", "x", "--output", "y", "--stepp", "3"], ["--stepp"]),
        (["tokenizer", "train", "--input", "x", "--output", "y", "--vocab-size", "many"], ["--vocab-size", "many"]),
    ],
)
def test_wrong_arguments(arguments, words, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = refused(*arguments)
    assert all(word in line for word in words)


def test_misspelt_keys_name_the_file_and_the_nearest_key(made, tmp_path, refused):
    config = write_yaml(tmp_path / "typo.yaml", {"train": {"max_step": 3}})
    line = refused("train", "--config", made / "train.yaml", "--config", config)
    assert "typo.yaml" in line
    assert "train.max_step " in line
    assert "train.max_steps" in line
    line = refused("train", "--config", made / "train.yaml", "--train.micro_batchsize", "2")
    assert "--train.micro_batch_size" in line


def test_misspelt_keys_in_lists_are_named_by_index(tmp_path, refused):
    sources = [{"name": "a", "path": "a"}, {"name": "b", "pth": "b"}]
    config = write_yaml(tmp_path / "p.yaml", {"prepare": {"sources": sources, "tokenizer": "t", "output": "o"}})
    assert "prepare.sources[1].pth" in refused("prepare", "--config", config)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--train.global_batch_size=3", "--train.micro_batch_size=2"], ["global_batch_size 3", "micro_batch_size 2"]),
        (["--train.max_steps=0"], ["train.max_steps"]),
        (["--train.max_steps=many"], ["train.max_steps", "many"]),
        (["--train.max_tokens=100"], ["train.max_steps, train.max_tokens"]),
        (["--model.preset=huge"], ["huge", "tiny"]),
        (["--model.preset=null"], ["model.preset"]),
        (["--model.config=nowhere", "--model.preset=null"], ["nowhere"]),
        (["--data.sequence_length=4096"], ["4096", "2048"]),
        (["--data.store=nowhere"], ["nowhere", "tsumugu prepare"]),
        (["--parallel.shard_degree=2"], ["shard_degree 2", "world size 1"]),
        (["--schedule.warmup_steps=5"], ["warmup_steps"]),
        (["--train.start_from=nowhere", "--model.preset=null"], ["nowhere"]),
    ],
)
def test_wrong_training_values(made, tmp_path, refused, flags, words):
    line = refused("train", "--config", made / "train.yaml", "--run-dir", tmp_path / "run", *flags)
    assert all(word in line for word in words)


def test_another_model_or_length_in_the_same_run_folder(made, refused):
    line = refused("train", "--config", made / "train.yaml", "--run-dir", made / "run", "--model.preset=llama-1b")
    assert "checkpoint of another run" in line
    line = refused("train", "--config", made / "train.yaml", "--run-dir", made / "run", "--train.max_steps=5")
    assert "(steps) was 2, now 5" in line


def test_a_store_made_with_another_tokenizer(made, tmp_path, refused, capsys):
    corpus = made / "corpus.jsonl"
    other = tmp_path / "tokenizer"
    arguments = ["tokenizer", "train", "--input", corpus, "--output", other, "--vocab-size", 490]
    assert main([*map(str, arguments)]) == 0
    store = tmp_path / "store"
    config = made / "prepare.yaml"
    assert main(["prepare", f"--config={config}", f"--output={store}", f"--prepare.tokenizer={other}"]) == 0
    flags = [f"--train.start_from={made / 'run'}", "--model.preset=null", f"--data.store={store}"]
    line = refused("train", "--config", made / "train.yaml", "--run-dir", tmp_path / "run", *flags)
    assert "another tokenizer" in line


def test_corpora_that_cannot_be_used(made, tmp_path, refused, tokenizer_folder):
    def prepared(path: Path) -> str:
        source = {"name": "s", "path": str(path)}
        prepare = {"sources": [source], "tokenizer": str(tokenizer_folder), "output": str(tmp_path / path.stem)}
        return refused("prepare", "--config", write_yaml(tmp_path / "p.yaml", {"prepare": prepare}))

    empty = tmp_path / "empty.jsonl"
    empty.touch()
    assert "sources are empty" in prepared(empty)
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes(b'{"text": "ok"}\n{"text": "caf\xe9"}\n')
    assert "latin.jsonl, line 2: not UTF-8" in prepared(latin)
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "ok"}\n{"text": "cut\n', encoding="utf-8")
    assert "broken.jsonl, line 2: not JSON" in prepared(broken)
    line = prepared(write_jsonl(tmp_path / "column.jsonl", [{"body": "a", "title": "b"}]))
    assert "no column text" in line
    assert "body, title" in line


def test_vocabularies_that_the_corpus_does_not_allow(made, tmp_path, refused):
    arguments = ["tokenizer", "train", "--input", made / "corpus.jsonl", "--output", tmp_path / "t", "--vocab-size"]
    assert "100000" in refused(*arguments, 100000)
    assert "300" in refused(*arguments, 300)
    empty = write_jsonl(tmp_path / "empty.jsonl", [{"text": ""}])
    assert "tsumugu: " in refused("tokenizer", "train", "--input", empty, "--output", tmp_path / "t")


def test_one_process_of_torchrun_or_none(made, tmp_path):
    """`launch local` hands on the exit code and the line of the training processes."""
    command = [sys.executable, "-m", "tsumugu", "launch", "local", "--processes", "2", "--config", made / "train.yaml"]
    done = subprocess.run(
        [*map(str, command), "--run-dir", str(tmp_path / "run"), "--data.store=nowhere"],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if line.startswith("tsumugu: ")] == [
        "tsumugu: nowhere holds no token store (make one with `tsumugu prepare`)"
    ]
    assert "Traceback" not in done.stderr


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if sys.platform != "linux" or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("a small disk can only be made by root on Linux")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(made, small_disk, tmp_path, refused):
    train = ("train", "--config", made / "train.yaml", "--run-dir", small_disk / "run")
    assert "no space left" in refused(*train).lower()
    large = write_jsonl(tmp_path / "large.jsonl", [{"text": f"{n} " + "糸を紡ぐ。" * 200} for n in range(2000)])
    for workers in (1, 2):
        flags = [f"--prepare.sources=[{{name: large, path: {large}}}]", f"--prepare.workers={workers}"]
        output = small_disk / f"store-{workers}"
        line = refused("prepare", "--config", made / "prepare.yaml", "--output", output, *flags)
        assert "no space left" in line.lower()
    output = small_disk / "tokenizer"
    command = ("tokenizer", "train", "--input", made / "corpus.jsonl", "--output", output, "--vocab-size", 490)
    (small_disk / "filler").write_bytes(b"")
    with open(small_disk / "filler", "wb") as filler:
        filler.write(bytes(shutil.disk_usage(small_disk).free // 4096 * 4096))
    assert "no space left" in refused(*command).lower()

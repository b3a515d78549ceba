"""The command line: what a user gets wrong is one line that says what, where and how to mend it, and exit code 2."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer

from tsumugu import config
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
        *(
            (["tokenizer", "train", "--input", "x", "--output", "y", flag, value], [flag, f"{value} is not a whole"])
            for flag, value in [
                *(("--sample-bytes", "nan"), ("--sample-bytes", "inf"), ("--sample-bytes", "0")),
                *(("--vocab-size", "99999999999"), ("--vocab-size", "0"), ("--vocab-size", "-1")),
                *(("--reserved", "-3"), ("--reserved", "2e9")),
            ]
        ),
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


SOURCES = [{"name": "texts", "path": "corpus.jsonl"}]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("schedule: [cosine]", ["wrong.yaml: schedule holds no keys but [cosine]"]),
        ("schedule: cosine", ["wrong.yaml: schedule holds no keys but cosine"]),
        ("checkpoint: off", ["wrong.yaml: checkpoint holds no keys but false"]),
        ("optimizer: null", ["wrong.yaml: optimizer holds no keys but null"]),
        ("train: {seed: 2024-13-45}", ["wrong.yaml: not YAML: month must be in 1..12"]),
        ("data: [1]", ["wrong.yaml: data holds no keys but [1]"]),
        ("train: {seed: 1.5}", ["wrong.yaml: train.seed: expected int, got 1.5"]),
        (
            "train: {log_to: [comet]}",
            ["wrong.yaml: train.log_to: expected 'tensorboard', 'mlflow', 'wandb', got comet"],
        ),
        ("train:\n  seed: 1\n  log_every: 2\n  seed: 3\n", ["wrong.yaml:4:", "the key seed is given twice"]),
        ("train: {seed: 1}\ndata: {}\ntrain: {seed: 1}\n", ["wrong.yaml:3:", "the key train is given twice"]),
    ],
)
def test_files_of_another_form_than_a_configuration(made, tmp_path, refused, content, words):
    (tmp_path / "wrong.yaml").write_text(content)
    line = refused("train", "--config", made / "train.yaml", "--config", tmp_path / "wrong.yaml")
    assert all(word in line for word in words)
    assert "<class" not in line


@pytest.mark.parametrize("value", ["probe.Thing", {"class_path": "probe.Thing"}, {"class_path": "probe.Thing", "x": 1}])
def test_a_configuration_imports_no_code(made, tmp_path, refused, monkeypatch, value):
    (tmp_path / "probe.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w')\nclass Thing: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    train, prepare = made / "train.yaml", made / "prepare.yaml"
    text = json.dumps(value)

    def of(section: str, content) -> Path:
        return write_yaml(tmp_path / "code.yaml", {section: content})

    assert "code.yaml: " in refused("train", "--config", train, "--config", of("model", value))
    assert "model.preset" in refused("train", "--config", train, "--config", of("model", {"preset": {"a": value}}))
    for sources, place in ((value, "prepare.sources"), ([value], "prepare.sources[0]"), ([*SOURCES, value], "[1]")):
        line = refused("prepare", "--config", prepare, "--config", of("prepare", {"sources": sources}))
        assert "code.yaml: " in line
        assert place in line
    fields = [{**SOURCES[0], "kind": "instructions", "fields": value if isinstance(value, str) else {"a": value}}]
    refused("prepare", "--config", prepare, "--config", of("prepare", {"sources": fields}))
    for flags in ([f"--model={text}"], ["--model", text], [f"--model.preset={json.dumps({'a': value})}"]):
        refused("train", "--config", train, *flags)
    for flag in ("--prepare.sources", "--prepare.sources+"):
        for written in (text, f"[{text}]"):
            assert flag in refused("prepare", "--config", prepare, f"{flag}={written}")
            assert flag in refused("prepare", "--config", prepare, flag, written)
    assert not (tmp_path / "imported").exists()


def test_lists_given_as_flags_are_checked_like_those_in_files(made, refused):
    prepare = ("prepare", "--config", made / "prepare.yaml")
    line = refused(*prepare, "--prepare.sources", "[{name: a, path: b}, {name: c, pth: d}]")
    assert "--prepare.sources: unknown key prepare.sources[1].pth (did you mean prepare.sources[1].path?)" in line
    assert "prepare.sources[0].pth" in refused(*prepare, "--prepare.sources+={name: c, pth: d}")
    assert "--prepare.sources: not YAML" in refused(*prepare, "--prepare.sources=[{name: a")
    assert "has the same name twice" in refused(*prepare, "--prepare.sources+={name: texts, path: b}")


def test_settings_that_would_do_nothing(made, refused):
    prepare = ("prepare", "--config", made / "prepare.yaml")
    assert "prepare.max_length is set for text" in refused(*prepare, "--prepare.max_length=5")
    sources = "[{name: a, path: b, fields: {input: c}}]"
    assert "prepare.sources[0].fields is set for text" in refused(*prepare, f"--prepare.sources={sources}")


def test_files_where_folders_should_be(made, tmp_path, refused):
    file = tmp_path / "afile"
    file.write_text("x")
    corpus = made / "corpus.jsonl"
    train = ("train", "--config", made / "train.yaml")
    for command in (
        ("tokenizer", "train", "--input", corpus, "--output", file),
        ("tokenizer", "train", "--input", corpus, "--output", file / "y", "--vocab-size", 490),
        (*train, "--run-dir", file),
        (*train, "--run-dir", file / "y"),
        ("prepare", "--config", made / "prepare.yaml", "--output", file / "y"),
        ("prepare", "--config", made / "prepare.yaml", "--output", tmp_path / ("y" * 300)),
        ("export", made / "run", "--output", file / "y"),
    ):
        assert str(tmp_path) in refused(*command)
    line = refused("prepare", "--config", made / "prepare.yaml", f"--prepare.tokenizer={corpus}")
    assert "corpus.jsonl holds no contract.json" in line
    assert "x.yaml: no such file" in refused("train", "--config", file / "x.yaml")


def test_a_prompt_that_is_no_text(made, tmp_path, refused):
    assert main(["export", str(made / "run"), "--output", str(tmp_path / "model")]) == 0
    for flags in (("--prompt", "\udcff"), ("--prompt", "雨", "--template", "alpaca-ja", "--input", "\udcff")):
        assert "lone surrogate U+DCFF" in refused("generate", tmp_path / "model", *flags)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--train.global_batch_size=3", "--train.micro_batch_size=2"], ["global_batch_size 3", "micro_batch_size 2"]),
        (["--train.max_steps=0"], ["train.max_steps"]),
        (["--train.max_steps=many"], ["tsumugu: train.max_steps: expected int or null, got many"]),
        (["--schedule.kind", "cos"], ["schedule.kind: expected 'constant', 'linear'", "got cos"]),
        (["--model", "nested.yaml"], ["unknown flag --model", "--model.preset"]),
        (["--train.max_tokens=100"], ["train.max_steps and train.max_tokens are set", "--train.max_tokens null"]),
        (["--train.max_steps=null", "--train.max_epochs=.inf"], ["train.max_epochs is inf"]),
        (["--optimizer.weight_decay=.nan"], ["optimizer.weight_decay is nan"]),
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


def test_the_tokenizer_that_the_user_names_is_compared_with_the_store(made, tmp_path, refused, tokenizer_folder):
    other = tmp_path / "other"
    arguments = ["tokenizer", "train", "--input", made / "corpus.jsonl", "--output", other, "--vocab-size", 490]
    assert main([*map(str, arguments)]) == 0
    train = ("train", "--config", made / "train.yaml", "--run-dir", tmp_path / "run")
    assert "another tokenizer than tokenizer.path" in refused(*train, f"--tokenizer.path={other}")
    assert "tokenizer.path nowhere: no contract" in refused(*train, "--tokenizer.path=nowhere")

    model = tmp_path / "model"
    assert main(["export", str(made / "run"), "--output", str(model)]) == 0
    pretrained = (*train, "--model.preset=null", f"--model.pretrained={model}")
    assert "tokenizer.path" in refused(*pretrained, f"--tokenizer.path={other}")
    for name in ("contract.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(other / name, model)  # the model's own contract counts too
    line = refused(*pretrained, f"--tokenizer.path={tokenizer_folder}")
    assert "another tokenizer than model.pretrained" in line
    (model / "contract.json").unlink()
    assert "no contract of its tokenizer" in refused(*pretrained)
    assert main([*map(str, pretrained), f"--tokenizer.path={tokenizer_folder}"]) == 0


def test_a_tokenizer_taken_from_an_export_brings_its_chat_template_along_and_no_weights(made, tmp_path, refused):
    assert main(["export", str(made / "run"), "--output", str(tmp_path / "model")]) == 0
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ messages }}")
    prepare = ["--config", str(made / "prepare.yaml"), f"--prepare.tokenizer={tmp_path / 'model'}"]
    assert main(["prepare", *prepare, "--output", str(tmp_path / "store")]) == 0
    train = ["--config", str(made / "train.yaml"), f"--data.store={tmp_path / 'store'}"]
    assert main(["train", *train, "--run-dir", str(tmp_path / "run")]) == 0
    assert main(["export", str(tmp_path / "run"), "--output", str(tmp_path / "next")]) == 0
    names = {"tokenizer.json", "tokenizer_config.json", "tokenizer.model", "contract.json", "chat_template.jinja"}
    for folder in ("store", "run"):
        assert {path.name for path in (tmp_path / folder / "tokenizer").iterdir()} == names
    assert AutoTokenizer.from_pretrained(tmp_path / "next").chat_template == "{{ messages }}"

    (tmp_path / "store" / "tokenizer" / "chat_template.jinja").write_text("{{ changed! }}")
    verify = ("prepare", *prepare, "--output", tmp_path / "store", "--verify")
    assert "tokenizer/chat_template.jinja is not what was written" in refused(*verify)


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
    line = prepared(write_jsonl(tmp_path / "column.jsonl", [{"one": "a", "two": "b"}]))
    assert "which column holds the text" in line
    assert "one, two" in line


def test_vocabularies_that_the_corpus_does_not_allow(made, tmp_path, refused):
    arguments = ["tokenizer", "train", "--input", made / "corpus.jsonl", "--output", tmp_path / "t", "--vocab-size"]
    assert "100000" in refused(*arguments, 100000)
    assert "300" in refused(*arguments, 300)
    empty = write_jsonl(tmp_path / "empty.jsonl", [{"text": ""}])
    assert "tsumugu: " in refused("tokenizer", "train", "--input", empty, "--output", tmp_path / "t")


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--data.store=nowhere", "nowhere holds no token store (make one with `tsumugu prepare`)"),  # before the start
        ("--model.preset=huge", "model.preset: no shape huge (known: "),  # in both processes
    ],
)
def test_several_processes_say_it_once(made, tmp_path, flag, message):
    """`launch local` hands on the exit code and the line of the training processes."""
    command = [sys.executable, "-m", "tsumugu", "launch", "local", "--processes", "2", "--config", made / "train.yaml"]
    command += ["--run-dir", tmp_path / "run", flag]
    done = subprocess.run([*map(str, command)], check=False, capture_output=True, text=True)
    assert done.returncode == 2
    [line] = [line for line in done.stderr.splitlines() if line.startswith("tsumugu: ")]
    assert line.startswith(f"tsumugu: {message}")
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


def test_files_that_the_system_does_not_let_grow(made, tmp_path):
    """Like a full disk, but for everybody: a limit on the size of files."""
    large = write_jsonl(tmp_path / "large.jsonl", [{"text": f"{n} " + "糸を紡ぐ。" * 200} for n in range(200)])
    script = (
        "import resource, sys\n"
        "from tsumugu.cli import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))\n"
        "sys.exit(main(sys.argv[2:]))"
    )
    prepare = ["prepare", "--config", made / "prepare.yaml", f"--prepare.sources=[{{name: large, path: {large}}}]"]
    commands = {
        "store": (20_000, [*prepare, "--output"]),
        "run": (200_000, ["train", "--config", made / "train.yaml", "--run-dir"]),
        "model": (200_000, ["export", made / "run", "--output"]),
        "tokenizer": (
            20_000,
            ["tokenizer", "train", "--input", made / "corpus.jsonl", "--vocab-size", 490, "--output"],
        ),
    }
    for name, (limit, command) in commands.items():
        arguments = [str(argument) for argument in (limit, *command, tmp_path / name)]
        done = subprocess.run([sys.executable, "-c", script, *arguments], check=False, capture_output=True, text=True)
        lines = [line for line in done.stderr.splitlines() if line.startswith("tsumugu: ")]
        assert (done.returncode, len(lines)) == (2, 1), (name, done.stderr)
        assert "no space left" in lines[0] or "File too large" in lines[0]
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "model").exists()
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_an_imported_and_extended_tokenizer_goes_the_whole_way(made, tmp_path, tokenizer_folder, capsys):
    corpus = made / "corpus.jsonl"

    def run(*arguments) -> str:
        assert main([str(argument) for argument in arguments]) == 0
        return capsys.readouterr().out

    def prepared(tokenizer: Path, store: Path) -> Path:
        run("prepare", "--config", made / "prepare.yaml", f"--output={store}", f"--prepare.tokenizer={tokenizer}")
        return store

    told = run(
        *("tokenizer", "import", tokenizer_folder / "tokenizer.model", "--output", tmp_path / "imported"),
        *("--input", corpus, "--newline", "refuse"),
    )
    assert "give the ids of sentencepiece; 0 segmentation ties" in told
    assert "newline: expressible" in told
    store = prepared(tmp_path / "imported", tmp_path / "store")
    train = ["train", "--config", made / "train.yaml"]
    run(*train, f"--data.store={store}", "--run-dir", tmp_path / "run")
    run("export", tmp_path / "run", "--output", tmp_path / "model", "--dtype", "float32")

    (tmp_path / "tokens.txt").write_text("<|im_start|>\n<|im_end|>\n番目の\ttext\n", encoding="utf-8")
    told = run(
        *("tokenizer", "extend", tmp_path / "model", "--output", tmp_path / "extended"),
        *("--tokens", tmp_path / "tokens.txt", "--input", corpus),
    )
    old = len(json.loads((tmp_path / "model" / "contract.json").read_text())["token_bytes"])
    assert f"3 ids after {old}; " in told
    store = prepared(tmp_path / "extended", tmp_path / "extended-store")
    # the model brings a row more than its tokenizer has ids, which is taken first, or none
    pretrained = ["--model.preset=null", f"--model.pretrained={tmp_path / 'model'}", f"--data.store={store}"]
    run(*train, *pretrained, "--run-dir", tmp_path / "longer")
    run(*train, *pretrained, "--run-dir", tmp_path / "longer")  # resumes: already done
    run("export", tmp_path / "longer", "--output", tmp_path / "grown", "--dtype", "float32")
    assert json.loads((tmp_path / "grown" / "config.json").read_text())["vocab_size"] >= old + 3
    assert AutoTokenizer.from_pretrained(tmp_path / "grown")("<|im_end|>").input_ids == [old + 1]
    assert (tmp_path / "grown" / "extension.json").exists()
    run("generate", tmp_path / "grown", "--prompt", "今日は", "--max-new-tokens", 4)


def test_the_tokenizer_commands_refuse_in_one_line(made, tmp_path, refused, tokenizer_folder):
    output = ("--output", tmp_path / "x")
    assert "no/such-tokenizer: no such file" in refused("tokenizer", "import", "no/such-tokenizer", *output)
    assert "not empty" in refused("tokenizer", "import", tokenizer_folder, "--output", made)
    assert "holds no tokenizer.json" in refused("tokenizer", "import", made, *output)
    assert "--tokens --template --train is required" in refused("tokenizer", "extend", tokenizer_folder, *output)
    extend = ("tokenizer", "extend", tokenizer_folder, *output)
    assert "goes with --train" in refused(*extend, "--tokens", "t", "--vocab-size", 900)
    assert "goes with --train" in refused(*extend, "--train", made / "corpus.jsonl")
    assert "t cannot be read" in refused(*extend, "--tokens", "t")
    assert "the tokenizer's own chat template" in refused(*extend, "--template", "chat")
    assert not (tmp_path / "x").exists()


def test_a_byte_level_tokenizer_from_the_command_line(made, tmp_path, capsys):
    arguments = ["tokenizer", "train", "--kind", "bpe", "--input", made / "corpus.jsonl", "--output", tmp_path / "bpe"]
    assert main([*map(str, arguments), "--vocab-size", "360", "--reserved", "4"]) == 0
    assert "360 ids" in capsys.readouterr().out
    assert AutoTokenizer.from_pretrained(tmp_path / "bpe").eos_token == "<|endoftext|>"


def test_a_task_of_slurm_that_is_asked_to_stop_before_it_trains_says_that_it_can_go_on(tmp_path, monkeypatch):
    """SIGTERM while it imports or reads, whose default would look like a crash to the job's script."""

    def leave(code: int):
        raise SystemExit(code)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(config, "load", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    try:
        with pytest.raises(SystemExit) as ended:
            main(["train", "--config", "any.yaml", "--run-dir", str(tmp_path / "run")])
        assert ended.value.code == 3
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not (tmp_path / "run").exists()

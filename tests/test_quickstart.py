"""`tsumugu quickstart` as a user runs it, with shortened recipes: done once, done again, killed in the middle."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib import resources
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from tsumugu import quickstart
from tsumugu.errors import UserError
from tsumugu.tokenizer.train import VocabularyTooLargeError


def shorten_recipes(work_dir: Path, warmup: int = 1) -> None:
    """Lays edited recipes into the work folder, which quickstart then uses as they are."""
    (work_dir / "recipes").mkdir(parents=True, exist_ok=True)
    for name, steps in {"pretrain": 6, "instruct": 4}.items():
        text = (resources.files("tsumugu") / "sample" / f"quickstart-{name}.yaml").read_text(encoding="utf-8")
        recipe = json.loads(json.dumps(yaml.safe_load(text)).replace("quickstart/", f"{work_dir}/"))
        del recipe["train"]["max_epochs"]
        recipe["train"]["max_steps"] = steps
        recipe["schedule"]["warmup_steps"] = warmup
        recipe["checkpoint"]["every"] = recipe["evaluate"]["every"] = 2
        (work_dir / "recipes" / f"{name}.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")


def start(work_dir: Path, *flags: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "tsumugu", "quickstart", "--work-dir", str(work_dir), *flags]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True,
        start_new_session=True, env=os.environ | {"COLUMNS": "200"},
    )  # fmt: skip


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> tuple[Path, str]:
    work_dir = tmp_path_factory.mktemp("done") / "quickstart"
    shorten_recipes(work_dir)
    return work_dir, finish(start(work_dir))


def test_it_makes_a_model_and_says_so(done):
    work_dir, output = done
    assert (work_dir / "model-instruct" / "model.safetensors").exists()
    for name in ("model-base", "model-instruct"):
        certificate = json.loads((work_dir / name / "certificate.json").read_text(encoding="utf-8"))
        assert (certificate["failures"], certificate["sample"]["rows"]) == ([], 4)
        assert certificate["verified"][0]["logit_difference"] == 0
    for words in ("validation bits per byte", "What was made", "Next:", "[instruct]"):
        assert words in output


def test_run_again_everything_is_done_already(done):
    work_dir, _ = done
    before = {file: file.stat().st_mtime_ns for file in work_dir.rglob("*.safetensors")}
    output = finish(start(work_dir))
    assert output.count("already done") >= 5
    assert {file: file.stat().st_mtime_ns for file in work_dir.rglob("*.safetensors")} == before


def test_killed_in_the_middle_it_goes_on_to_the_same_model(done, tmp_path):
    work_dir = tmp_path / "quickstart"
    shorten_recipes(work_dir)
    process = start(work_dir)
    marker = work_dir / "pretrain" / "checkpoints" / "step-00000004" / "COMPLETE"
    deadline = time.monotonic() + 300
    while not marker.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert marker.exists()
    finish(start(work_dir))
    for name in ("model-base", "model-instruct"):
        expected = load_file(done[0] / name / "model.safetensors")
        found = load_file(work_dir / name / "model.safetensors")
        assert all(found[key].equal(tensor) for key, tensor in expected.items())


def test_ones_own_text_that_is_not_japanese_and_has_odd_names(tmp_path):
    """English text makes a tokenizer to which the built-in instructions are long; too small for the default sizes."""
    texts = (resources.files("tsumugu") / "sample" / "english.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "my-quickstart").mkdir()
    own = tmp_path / "my-quickstart" / "own.jsonl"
    own.write_text("".join(json.dumps({"yes": json.loads(t)["text"]}) + "\n" for t in texts), encoding="utf-8")
    work_dir = tmp_path / "run #1"
    flags = ("--input", str(own), "--text", "yes")
    process = start(work_dir, *flags)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 2
    assert "--yes" in output

    recipe = work_dir / "recipes" / "prepare.yaml"
    assert str(own) in recipe.read_text(encoding="utf-8")
    shorten_recipes(work_dir, warmup=0)
    output = finish(start(work_dir, *flags, "--yes"))
    assert "s a step: 6 steps will take about" in output
    assert "longer than prepare.max_length" in output
    assert (work_dir / "model-instruct" / "config.json").exists()

    process = start(work_dir, "--input", str(tmp_path))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 2
    assert "another corpus" in output


def test_a_smaller_vocabulary_is_tried_only_where_the_corpus_is_too_small_for_a_larger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked, errors = [], {900: VocabularyTooLargeError("too large"), 800: UserError("full of lone surrogates")}

    def train_tokenizer(documents, output, *, vocab_size, sample_bytes):
        asked.append(vocab_size)
        raise errors[vocab_size]

    monkeypatch.setattr(quickstart, "train_tokenizer", train_tokenizer)
    with pytest.raises(UserError, match="lone surrogates"):
        quickstart._train_fitting(lambda: iter(["あ"]), tmp_path / "out", [900, 800, 700])
    assert asked == [900, 800]

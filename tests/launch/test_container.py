"""The container's side: what it reads, and what is said of failures. (test_sagemaker.py has whole runs.)"""

import subprocess
import sys
from collections import deque
from pathlib import Path

import pytest
import yaml
from support.containers import HOSTS, lay_out, write_data

from tsumugu import config
from tsumugu.errors import UserError
from tsumugu.launch.sagemaker import container


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tokenizer_folder) -> Path:
    return write_data(tmp_path_factory.mktemp("sagemaker") / "made", tokenizer_folder)


def with_changes(recipe: Path, folder: Path, **sections: dict) -> Path:
    """The recipe with other values in a folder of its own, beside the same data."""
    folder.mkdir()
    (folder / "data").symlink_to(recipe.parent / "data")
    content = yaml.safe_load(recipe.read_text())
    changed = {name: content.get(name, {}) | values for name, values in sections.items()}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content | changed))
    return folder / "recipe.yaml"


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({"train": {"max_stps": 3}}, "recipe.yaml: unknown key train.max_stps"),
        ({"data": {"store": "channel:dta/store"}}, "channel:dta/store, and no channel has that name; there is: data"),
    ],
)
def test_the_reason_of_a_failure_is_one_line_where_sagemaker_looks_for_it(
    sections, reason, recipe, tmp_path, monkeypatch, capfd
):
    root = lay_out(tmp_path / HOSTS[0], HOSTS[0], HOSTS[:1], with_changes(recipe, tmp_path / "changed", **sections))
    monkeypatch.setenv(container.ROOT, str(root))
    monkeypatch.setenv(config.CHANNELS, "")
    assert container.main() == 2
    failure = (root / "output" / "failure").read_text()
    assert reason in failure
    assert "\n" not in failure
    assert f"tsumugu: {failure}\n" in capfd.readouterr().err


def test_so_is_what_a_worker_says(recipe, tmp_path, monkeypatch, capfd):
    """A worker in whose place a process says what a worker does."""
    root = lay_out(tmp_path / HOSTS[0], HOSTS[0], HOSTS[:1], recipe)
    monkeypatch.setenv(container.ROOT, str(root))
    monkeypatch.setenv(config.CHANNELS, "")
    said = "tsumugu: no space left (free some)"

    def run_workers(*_: object) -> tuple[int, int]:
        script = f"import sys; print({said!r}, file=sys.stderr); print('after', file=sys.stderr); sys.exit(2)"
        return subprocess.run([sys.executable, "-c", script], check=False).returncode, 1

    monkeypatch.setattr(container, "run_workers", run_workers)
    assert container.main() == 2
    assert (root / "output" / "failure").read_text() == "no space left (free some)"
    assert f"{said}\nafter\n" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("lines", "line"),
    [
        (["tsumugu: no space (free some)", "tsumugu: rank 1 ended first, with 2", "after"], "no space (free some)"),
        (
            ["Traceback (most recent call last):", "torch.OutOfMemoryError: CUDA out of memory", "  more"],
            "torch.OutOfMemoryError: CUDA out of memory",
        ),
        (["[rank3]: ValueError: no", "terminated"], "[rank3]: ValueError: no"),
        (["tsumugu: warning: old", "Segmentation fault", ""], "Segmentation fault"),
        ([], ""),
    ],
)
def test_the_line_that_says_what_is_wrong_is_found(lines, line):
    assert container._error_line(deque(lines)) == line


def test_a_failure_shows_no_credential(tmp_path):
    container.write_failure(tmp_path, "GET https://user:word@host/x failed\n" + "x" * 2000)
    text = (tmp_path / "output" / "failure").read_text()
    assert "word" not in text
    assert len(text) == 1024


def test_what_is_no_job_of_ours_is_refused(recipe, tmp_path):
    with pytest.raises(UserError, match=r"resourceconfig.json is not there"):
        container.read_container(tmp_path)
    root = lay_out(tmp_path / "a", HOSTS[0], HOSTS, recipe)
    (root / "input/config/hyperparameters.json").write_text('{"sagemaker_program": "train.py"}')
    with pytest.raises(UserError, match="no recipe"):
        container.read_container(root)

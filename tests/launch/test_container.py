"""The container's side on two hosts that have no disk in common: the run, the model, and what is said of failures."""

import json
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from support.containers import HOSTS, free_ports, lay_out, start, write_data
from support.runs import figures

from tsumugu import config
from tsumugu.errors import UserError
from tsumugu.export import export
from tsumugu.launch.sagemaker import container
from tsumugu.training.checkpoint import complete_steps


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tokenizer_folder) -> Path:
    return write_data(tmp_path_factory.mktemp("sagemaker") / "made", tokenizer_folder)


@pytest.fixture(scope="module")
def local(recipe) -> Path:
    """The same recipe by `launch local`, and its export."""
    run = recipe.parent / "local"
    command = [sys.executable, "-m", "tsumugu", "launch", "local", "--processes=2", f"--config={recipe}"]
    command += [f"--run-dir={run}", f"--channel=data={recipe.parent / 'data'}"]
    subprocess.run(command, check=True, capture_output=True)
    export(str(run), recipe.parent / "exported")
    return run


def with_changes(recipe: Path, folder: Path, **sections: dict) -> Path:
    """The recipe with other values in a folder of its own, beside the same data."""
    folder.mkdir()
    (folder / "data").symlink_to(recipe.parent / "data")
    content = yaml.safe_load(recipe.read_text())
    changed = {name: content.get(name, {}) | values for name, values in sections.items()}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content | changed))
    return folder / "recipe.yaml"


def test_two_hosts_train_as_one_machine_does_and_the_first_exports(recipe, local, tmp_path):
    roots, port = [lay_out(tmp_path / host, host, HOSTS, recipe) for host in HOSTS], free_ports()
    hosts = [start(root, port) for root in roots]
    codes = [host.wait(timeout=200) for host in hosts]
    logs = [root.with_suffix(".log").read_text() for root in roots]
    assert codes == [0, 0], logs
    assert figures(roots[0] / "checkpoints") == figures(local)
    ours, theirs = (
        load_file(roots[0] / "model" / "model.safetensors"),
        load_file(recipe.parent / "exported/model.safetensors"),
    )
    assert all(ours[name].equal(theirs[name]) for name in ours.keys() | theirs.keys())
    certificate = json.loads((roots[0] / "model" / "certificate.json").read_text())
    assert certificate["verified"]
    assert list((roots[1] / "model").iterdir()) == []
    assert not any((root / "output" / "failure").exists() for root in roots)
    saved = [complete_steps(root / "checkpoints") for root in roots]
    assert saved[0][-1:] == [60]
    assert 60 not in saved[1]  # it never had the other host's half


def test_sigterm_reaches_the_workers_and_the_job_goes_on(recipe, local, tmp_path):
    root = lay_out(
        tmp_path / HOSTS[0], HOSTS[0], HOSTS[:1], with_changes(recipe, tmp_path / "long", train={"max_steps": 4000})
    )
    host = start(root, free_ports())
    while not complete_steps(root / "checkpoints") and host.poll() is None:
        time.sleep(0.02)
    host.send_signal(signal.SIGTERM)
    assert host.wait(timeout=100) == 128 + signal.SIGTERM
    [*_, step] = complete_steps(root / "checkpoints")
    log = root.with_suffix(".log").read_text()
    assert f"interrupted, checkpoint saved at step {step}" in log
    assert "Traceback" not in log
    assert list((root / "model").iterdir()) == []


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


def test_so_is_what_a_worker_says(recipe, tmp_path):
    sections = {"data": {"store": "channel:data/nothing", "sequence_length": 32}}
    root = lay_out(tmp_path / HOSTS[0], HOSTS[0], HOSTS[:1], with_changes(recipe, tmp_path / "changed", **sections))
    assert start(root, free_ports()).wait(timeout=100) == 2
    failure = (root / "output" / "failure").read_text()
    assert failure.startswith(f"{root}/input/data/data/nothing")
    assert "\n" not in failure


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

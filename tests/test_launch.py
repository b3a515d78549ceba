"""`tsumugu launch local` from outside: exit codes, and a run that is asked to stop and goes on."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.models import tiny_config
from support.runs import run_config
from support.stores import random_documents, write_store

from tsumugu import config
from tsumugu.errors import UserError
from tsumugu.launch.local import launch
from tsumugu.training.checkpoint import complete_steps
from tsumugu.training.metrics import read_metrics


@pytest.fixture
def recipe(tmp_path) -> Path:
    """A run so long that it is interrupted, and saves only then."""
    write_store(tmp_path / "store", random_documents(200, seed=3))
    tiny_config("gpt_neox", tied=False).save_pretrained(tmp_path / "model")
    changes = {"model.config": str(tmp_path / "model"), "train.max_steps": 100000, "train.global_batch_size": 4}
    config.write(run_config(tmp_path / "store", changes), tmp_path / "recipe.yaml")
    return tmp_path / "recipe.yaml"


def start(recipe: Path, *flags: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "tsumugu", "launch", "local", "--config", str(recipe), "--processes", "2"]
    command += ["--run-dir", str(recipe.parent / "run"), *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def steps_done(run_dir: Path) -> int:
    return max((line["step"] for line in read_metrics(run_dir)), default=0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_saves_exits_with_3_and_goes_on(recipe, number):
    run_dir = recipe.parent / "run"
    process = start(recipe)
    deadline = time.monotonic() + 200
    while steps_done(run_dir) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 3, output
    assert "interrupted, checkpoint saved at step" in output
    assert "Traceback" not in output
    [step] = complete_steps(run_dir)
    assert step == steps_done(run_dir)


def test_stopped_before_there_is_a_checkpoint_it_does_not_say_3(recipe):
    process = start(recipe)
    time.sleep(4)  # its children are starting
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=200)
    saved = bool(complete_steps(recipe.parent / "run"))
    assert (process.returncode == 3) == saved, output


@pytest.mark.parametrize("processes", [0, -1, 4096])
def test_as_many_processes_as_the_machine_has_room_for(processes, tmp_path):
    with pytest.raises(UserError, match=f"--processes {processes}"):
        launch([], tmp_path, processes)

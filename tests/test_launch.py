"""`tsumugu launch local` from outside: exit codes, and a run that is asked to stop and goes on."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.models import tiny_config
from support.runs import run_config
from support.stores import random_documents, write_store
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from tsumugu import config
from tsumugu.errors import UserError
from tsumugu.launch import local
from tsumugu.launch.local import launch
from tsumugu.launch.proof import _descendants
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


def start(recipe: Path, *flags: str, environment: dict[str, str] | None = None) -> subprocess.Popen:
    command = [sys.executable, "-m", "tsumugu", "launch", "local", "--config", str(recipe), "--processes", "2"]
    command += ["--run-dir", str(recipe.parent / "run"), *flags]
    variables = os.environ | (environment or {})
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=variables)


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


def test_a_process_that_is_killed_makes_all_start_again_and_every_start_keeps_what_its_ranks_say(recipe):
    """From the newest checkpoint; what one rank alone says is neither lost nor mixed with what others say."""
    (recipe.parent / "faulty").mkdir()
    (recipe.parent / "faulty" / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if os.environ.get('RANK') == '1':\n"
        "    print('said by one rank', flush=True); print('warned by one rank', file=sys.stderr)\n"
    )
    run_dir = recipe.parent / "run"
    flags = ("--max-restarts", "1", "--checkpoint.every", "10", "--train.max_steps", "80")
    path = f"{recipe.parent / 'faulty'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    process = start(recipe, *flags, environment={"PYTHONPATH": path})
    deadline = time.monotonic() + 200
    while not complete_steps(run_dir) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(_descendants(process.pid)[-1], signal.SIGKILL)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    assert re.search(r"rank [01] ended with signal 9: restart 1 of 1, from step [1-7]0\n", output)
    assert "done, 80 steps" in output
    assert [line["step"] for line in read_metrics(run_dir) if "loss" in line] == [*range(1, 81)]
    assert output.count("[rank 1] said by one rank\n") == 2
    assert output.count("[rank 1] warned by one rank\n") == 2
    assert "[rank 0]" not in output
    starts = list((run_dir / "logs").glob("*/attempt_0/1"))
    assert [(logs / "stdout.log").read_text() for logs in starts] == ["said by one rank\n"] * 2
    assert all("warned by one rank\n" in (logs / "stderr.log").read_text() for logs in starts)


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_no_process_trains_on_when_the_launcher_is_killed(recipe):
    run_dir = recipe.parent / "run"
    process = start(recipe, "--checkpoint.every", "10", "--train.max_steps", "100000")
    deadline = time.monotonic() + 200
    while not complete_steps(run_dir) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(_descendants(process.pid)) == 2
    process.kill()
    process.communicate(timeout=60)  # ends when the last one has let go of the output


def ends(*codes: int):
    """elastic_launch, of whose starts rank 1 ends with these codes, one after another; negative: by a signal."""
    left = list(codes)

    def run(*_):
        code = left.pop(0)
        if code:
            failures = {rank: ProcessFailure(rank, 1, code if rank else 1, "no file") for rank in (0, 1)}
            failures[0].timestamp = failures[1].timestamp + (0 if code in (2, 3) else 1)
            raise ChildFailedError("train", failures)

    return lambda *_: run, left


@pytest.mark.parametrize(
    ("codes", "restarts", "code", "left"),
    [
        ([2, 0], 3, 2, 1),  # the input is wrong
        ([3, 0], 3, 3, 1),  # asked to stop
        ([1, -9, 4, 0], 3, 0, 0),
        ([1, -9, 0], 1, 128 + 9, 1),
        ([-11, 0], 0, 128 + 11, 1),
    ],
)
def test_what_is_started_again_and_how_often(codes, restarts, code, left, tmp_path, monkeypatch):
    launched, remaining = ends(*codes)
    monkeypatch.setattr(local, "elastic_launch", launched)
    assert launch([], tmp_path, 1, restarts) == code
    assert len(remaining) == left


@pytest.mark.parametrize("processes", [0, -1, 4096])
def test_as_many_processes_as_the_machine_has_room_for(processes, tmp_path):
    with pytest.raises(UserError, match=f"--processes {processes}"):
        launch([], tmp_path, processes)

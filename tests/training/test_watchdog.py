"""A run that hangs: every process says where it stands, and all end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.runs import run_config

from tsumugu import config as configuration
from tsumugu.training.trainer import Outcome, train
from tsumugu.training.watchdog import EXIT_CODE, Watchdog

_RANK = """
import sys, time
from pathlib import Path
import torch, torch.distributed as dist
from tsumugu import config
from tsumugu.training import trainer
from tsumugu.training.metrics import read_metrics
rank, folder = int(sys.argv[1]), Path(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
read = trainer.training_batches
def a_file_system_that_does_not_answer(rows, mixture, step, share):
    if rank == 1 and step == 3:
        time.sleep(300)
    return read(rows, mixture, step, share)
trainer.training_batches = a_file_system_that_does_not_answer
trainer.train(config.load(config.TrainingRun, [str(folder / "config.yaml")]), folder / "run")
"""


def test_every_process_says_where_it_hangs_and_ends(made: Path, tmp_path: Path):
    changes = {"model.config": str(made / "gpt_neox"), "train.max_steps": 9, "train.hang_timeout": 3}
    configuration.write(run_config(made / "text", changes | {"train.global_batch_size": 2}), tmp_path / "config.yaml")
    ranks = [
        subprocess.Popen([sys.executable, "-c", _RANK, str(rank), str(tmp_path)], stderr=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    waiting, reading = (process.communicate(timeout=120)[1] for process in ranks)
    assert [process.returncode for process in ranks] == [EXIT_CODE, EXIT_CODE]
    assert "rank 0: no progress for" in waiting
    assert "while exchanging counts with the other processes (after 3 steps)" in waiting
    assert "in all_reduce" in waiting
    assert "rank 1: no progress for" in reading
    assert "while reading data (after 3 steps)" in reading
    assert "in a_file_system_that_does_not_answer" in reading
    assert "in train_step" in reading
    assert "no sign of life" not in waiting + reading


def test_a_process_that_cannot_speak_is_named_by_the_others(made: Path, tmp_path: Path):
    changes = {"model.config": str(made / "gpt_neox"), "train.max_steps": 9, "train.hang_timeout": 4}
    configuration.write(run_config(made / "text", changes | {"train.global_batch_size": 2}), tmp_path / "config.yaml")
    script = _RANK.replace("time.sleep(300)", "Path(folder, 'there').touch(); time.sleep(300)")
    command = [sys.executable, "-c", script]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path)], stderr=subprocess.PIPE, text=True) for rank in (0, 1)
    ]
    while not (tmp_path / "there").exists():
        assert ranks[1].poll() is None
        time.sleep(0.05)
    time.sleep(2)  # a sign of life or more
    os.kill(ranks[1].pid, signal.SIGSTOP)
    try:
        said = ranks[0].communicate(timeout=120)[1]
    finally:
        ranks[1].kill()
        ranks[1].communicate()
    assert ranks[0].returncode == EXIT_CODE
    assert "rank 0: rank 1 gives no sign of life; the last: reading data (after 3 steps)" in said


def test_a_store_that_gives_no_answer_holds_nobody():
    script = """
import sys, time
from datetime import timedelta
import torch.distributed as dist
from tsumugu.training.watchdog import Watchdog
rank, port = int(sys.argv[1]), int(sys.argv[2])
store = dist.TCPStore("127.0.0.1", port, is_master=rank == 0, timeout=timedelta(seconds=30), wait_for_workers=False)
if rank == 0:
    print(store.port, flush=True)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
with Watchdog(2.0, rank, 2).watching():
    print("watches", flush=True)
    time.sleep(300)
"""

    def started(rank: int, port: str) -> subprocess.Popen:
        command = [sys.executable, "-c", script, str(rank), port]
        return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def line(process: subprocess.Popen) -> str:
        assert process.stdout
        return process.stdout.readline().strip()

    first = started(0, "0")
    second = started(1, line(first))
    try:
        assert [line(process) for process in (first, second)] == ["watches"] * 2
        os.kill(first.pid, signal.SIGSTOP)
        said = second.communicate(timeout=60)[1]
    finally:
        for process in (first, second):
            process.kill()
            process.communicate()
    assert second.returncode == EXIT_CODE
    assert "rank 1: the store of the process group gives no answer" in said


def test_code_that_holds_the_interpreter_is_ended_too():
    script = """
import re, time
from tsumugu.training import watchdog
watchdog.LINGER_SECONDS = 1.0
with (dog := watchdog.Watchdog(1.0, 0)).watching():
    dog.mark("counting")
    time.sleep(0.5)
    re.fullmatch("(a*)*b", "a" * 60)
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert "Timeout" in ended.stderr
    assert "re/__init__.py" in ended.stderr


def test_progress_and_patience_are_no_hang():
    with (watchdog := Watchdog(0.4, 0)).watching():
        for _ in range(6):
            watchdog.mark("stepping")
            time.sleep(0.1)
        watchdog.mark("saving", patience=4)
        time.sleep(0.9)


@pytest.mark.parametrize("hang_timeout", [None, 60.0])
def test_a_run_that_goes_on_is_left_alone(hang_timeout, made: Path, tmp_path: Path):
    changes = {"model.config": str(made / "gpt_neox"), "train.max_steps": 2, "train.hang_timeout": hang_timeout}
    assert train(run_config(made / "text", changes), tmp_path) == Outcome(2, 2)

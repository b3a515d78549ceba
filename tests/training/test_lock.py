"""A run folder is trained into by one run at a time, and no lock outlives the process that held it."""

import contextlib
import errno
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch.distributed as dist
from support.models import tiny_config
from support.ranks import run_ranks
from support.runs import run_config
from support.stores import random_documents, write_store

from tsumugu import config
from tsumugu.cli import main
from tsumugu.distributed.environment import process_group
from tsumugu.errors import UserError
from tsumugu.training import lock
from tsumugu.training.checkpoint import complete_steps
from tsumugu.training.metrics import read_metrics

_HOLDER = """import fcntl, sys, time
file = open(sys.argv[1], "a+")
fcntl.lockf(file, fcntl.LOCK_EX)
file.write(sys.argv[2])
file.flush()
print("held", flush=True)
time.sleep(300)
"""

_WAITER = """import sys
from pathlib import Path
from tsumugu.distributed.environment import process_group
from tsumugu.training import lock
run_dir = Path(sys.argv[1])
with process_group(), lock.locked(run_dir):
    print((run_dir / lock.LOCK).read_text().split()[1])
"""


@contextlib.contextmanager
def held_by_another(run_dir: Path, says: str = "elsewhere 7") -> Iterator[subprocess.Popen]:
    run_dir.mkdir(parents=True)
    command = [sys.executable, "-c", _HOLDER, str(run_dir / lock.LOCK), says]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def enter(folders: list[Path]) -> str:
    """One process of a run whose processes see these folders by their ranks."""
    lock._PATIENCE_ELSEWHERE = 0.1
    try:
        with process_group(), lock.locked(folders[dist.get_rank()]):
            return "entered"
    except UserError as error:
        return str(error)


def test_a_second_run_is_refused_until_the_first_one_has_died(tmp_path, monkeypatch, capsys):
    write_store(tmp_path / "store", random_documents(200, seed=3))
    tiny_config("gpt_neox", tied=False).save_pretrained(tmp_path / "model")
    changes = {"model.config": str(tmp_path / "model"), "train.max_steps": 10**6, "train.global_batch_size": 4}
    config.write(run_config(tmp_path / "store", changes | {"checkpoint.every": 10}), tmp_path / "recipe.yaml")
    run_dir = tmp_path / "run"
    arguments = ["train", "--config", str(tmp_path / "recipe.yaml"), "--run-dir", str(run_dir)]
    first = subprocess.Popen([sys.executable, "-m", "tsumugu", *arguments], stdout=subprocess.DEVNULL)
    try:
        wait_for(lambda: complete_steps(run_dir), first)
        monkeypatch.setattr(lock, "_PATIENCE_HERE", 0.1)
        assert main(arguments) == 2
        [said] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tsumugu: ")]
        assert said.startswith(f"tsumugu: process {first.pid} on {os.uname().nodename} trains into {run_dir} (")
        steps = len(read_metrics(run_dir))
        wait_for(lambda: len(read_metrics(run_dir)) > steps, first)
    finally:
        first.kill()
        first.wait()
    assert main([*arguments, "--train.stop_after=1"]) == 3
    assert f"{run_dir}: interrupted, checkpoint saved at step" in capsys.readouterr().out


def wait_for(happens: Callable[[], object], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 200
    while not happens():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_it_waits_for_a_holder_that_is_about_to_end(tmp_path, monkeypatch, capsys):
    with held_by_another(tmp_path / "run") as holder, process_group():
        monkeypatch.setattr(lock.time, "sleep", lambda _: holder.kill())
        with lock.locked(tmp_path / "run"):
            assert (tmp_path / "run" / lock.LOCK).read_text() == f"{os.uname().nodename} {os.getpid()}"
    assert "process 7 on elsewhere trains into it; waiting 240 s for its end" in capsys.readouterr().out


def test_a_folder_that_was_made_for_nothing_goes_again(tmp_path):
    """As of a recipe that is refused; whoever has waited for it meanwhile makes it again."""
    run_dir = tmp_path / "runs" / "new"
    with process_group():
        with lock.locked(run_dir):
            assert (run_dir / lock.LOCK).exists()
        assert not run_dir.exists()
        run_dir.mkdir()
        with lock.locked(run_dir):
            pass
        assert run_dir.exists()
    with process_group(), lock.locked(tmp_path / "other"):
        waiting = subprocess.Popen([sys.executable, "-c", _WAITER, str(tmp_path / "other")], stdout=subprocess.PIPE)
        assert waiting.stdout
        assert b"trains into it; waiting" in waiting.stdout.readline()
    assert waiting.communicate(timeout=60) == (f"{waiting.pid}\n".encode(), None)


def test_a_folder_that_goes_while_its_lock_is_made_is_made_again(tmp_path, monkeypatch):
    real = Path.mkdir

    def mkdir(folder: Path, **how: bool) -> None:
        real(folder, **how)
        monkeypatch.undo()
        folder.rmdir()

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with lock._lock(tmp_path / "run" / lock.LOCK):
        assert Path.mkdir is real
        assert (tmp_path / "run" / lock.LOCK).exists()


def test_where_every_node_has_a_disk_of_its_own_each_is_held(tmp_path):
    with held_by_another(tmp_path / "second"):
        said = run_ranks(enter, 2, [tmp_path / "first", tmp_path / "second"])
    hint = "wait until it ends, or choose another --run-dir; if elsewhere has died, remove"
    assert said == [f"process 7 on elsewhere trains into {tmp_path}/second ({hint} {tmp_path}/second/.lock)"] * 2
    with held_by_another(tmp_path / "third"):
        (tmp_path / "third" / lock.LOCK).unlink()
        assert run_ranks(enter, 1, [tmp_path / "third"]) == ["entered"]
    assert run_ranks(enter, 2, [tmp_path / "second"] * 2) == ["entered", "entered"]


def test_a_file_system_without_locks_is_said_so_and_used(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "lockf", refuse)
    with process_group(), lock.locked(tmp_path / "run"):
        pass
    assert f"{tmp_path}/run: nothing keeps a second run out of it: No locks available" in capsys.readouterr().out

"""Stages run in order, on processes and on Slurm; a worker that dies, fails or loses its parent is no hang."""

import contextlib
import multiprocessing
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from datatrove.pipeline.base import PipelineStep

from tsumugu.config import PrepareConfig, SlurmConfig, Source
from tsumugu.data import executor
from tsumugu.data.executor import Stage, run_local, run_slurm
from tsumugu.errors import UserError


class Write(PipelineStep):
    """Writes a file for its task that says how many files lay there before the stage, and misbehaves where asked to."""

    name = "write"
    type = "TEST"

    def __init__(self, folder: Path, stage: str, kill: int | None = None, error: Exception | None = None):
        super().__init__()
        self.folder, self.stage, self.kill, self.error = folder, stage, kill, error

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Any:
        if rank == self.kill:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.error is not None and rank == 1:
            raise self.error
        earlier = sum(1 for path in self.folder.iterdir() if not path.name.startswith(self.stage))
        (self.folder / f"{self.stage}-{rank}").write_text(f"{earlier} {os.getpid()}")
        yield from ()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "made").mkdir()
    (tmp_path / "work").mkdir()
    return tmp_path


def _stages(folder: Path, **last: Any) -> list[Stage]:
    made = folder / "made"
    return [
        Stage("one", [Write(made, "one")], [f"file {n}" for n in range(5)], [1.0] * 5),
        Stage("two", [Write(made, "two", **last)], [f"part {n}" for n in range(3)], [1.0] * 3),
    ]


def _made(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text().split()[0] for path in (folder / "made").iterdir()}


EVERYTHING = {f"one-{n}": "0" for n in range(5)} | {f"two-{n}": "5" for n in range(3)}


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_a_stage_begins_when_the_one_before_is_done(folder: Path, workers: int):
    run_local(_stages(folder), folder / "work", workers)
    assert _made(folder) == EVERYTHING
    processes = {path.read_text().split()[1] for path in (folder / "made").iterdir()}
    assert (str(os.getpid()) in processes) == (workers == 1)
    assert multiprocessing.active_children() == []


def test_done_tasks_are_left_out(folder: Path):
    run_local(_stages(folder), folder / "work", 1)
    (folder / "work" / "one" / "completions" / "00003").unlink()
    before = {path.name: path.stat().st_mtime_ns for path in (folder / "made").iterdir() if path.name != "one-3"}
    (folder / "made" / "one-3").unlink()
    run_local(_stages(folder), folder / "work", 1)
    assert {p.name: p.stat().st_mtime_ns for p in (folder / "made").iterdir() if p.name != "one-3"} == before
    assert "one-3" in _made(folder)


def test_a_killed_worker_is_an_error_that_names_its_input(folder: Path):
    with pytest.raises(UserError, match=r"the worker process that worked on part 1 was killed.*memory"):
        run_local(_stages(folder, kill=1), folder / "work", 2)
    assert multiprocessing.active_children() == []
    run_local(_stages(folder), folder / "work", 2)
    assert _made(folder) == EVERYTHING


def test_a_worker_that_is_killed_while_it_waits_is_the_same_error(folder: Path, monkeypatch: pytest.MonkeyPatch):
    pool_of = executor._pool

    @contextlib.contextmanager
    def with_a_dead_one(*arguments: Any) -> Iterator[list]:
        with pool_of(*arguments) as pool:
            pool[-1][0].kill()
            pool[-1][0].join()
            yield pool

    monkeypatch.setattr(executor, "_pool", with_a_dead_one)
    with pytest.raises(UserError, match=r"the worker process that worked on file 0 was killed"):
        run_local(_stages(folder), folder / "work", 2)
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("error", [UserError("bad line", "mend it"), OSError(28, "No space left", "x"), KeyError("k")])
def test_an_error_of_a_task_ends_the_run(folder: Path, workers: int, error: Exception):
    kind = RuntimeError if isinstance(error, KeyError) and workers > 1 else type(error)
    with pytest.raises(kind) as caught:
        run_local(_stages(folder, error=error), folder / "work", workers)
    if isinstance(error, UserError):
        assert str(caught.value) == "bad line (mend it)"
    if isinstance(error, OSError):
        assert isinstance(caught.value, OSError)
        assert caught.value.errno == 28
    assert "KeyError" not in str(caught.value) or "Traceback" in str(caught.value)
    assert multiprocessing.active_children() == []


# --- Slurm -----------------------------------------------------------------------------------------------------------

# Runs the tasks of an array one after another and at once; refuses to start before its dependency is done.
_SBATCH = """#!{python}
import os, pathlib, re, subprocess, sys
script = pathlib.Path(sys.argv[-1]).read_text()
state = pathlib.Path(os.environ["FAKE_SLURM"])
for argument in sys.argv[1:-1]:
    if argument.startswith("--dependency=afterok:"):
        assert (state / argument.split(":")[1]).read_text() == "0"
if (state / "refuse").exists():
    sys.exit("sbatch: error: invalid partition")
number = str(1000 + len(list(state.glob("1*"))))
last = int(re.search("--array=0-([0-9]+)", script)[1])
code = 0
for task in range(last + 1):
    environment = dict(os.environ, SLURM_ARRAY_TASK_ID=str(task), SLURM_NODELIST="here", RUN_OFFSET="0")
    code |= subprocess.run(["bash", "-c", script], env=environment, capture_output=True).returncode
(state / number).write_text(str(code))
(state / f"script-{number}").write_text(script)
print("Submitted batch job", number)
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand-ins for sbatch and its like, and the folder of what they did."""
    commands, state = tmp_path / "bin", tmp_path / "slurm"
    commands.mkdir()
    state.mkdir()
    scripts = {
        "sbatch": _SBATCH.replace("{python}", sys.executable),
        "srun": '#!/bin/bash\nwhile [[ $1 == -* ]]; do if [[ $1 == -n ]]; then shift; fi; shift; done; exec "$@"\n',
        "scontrol": "#!/bin/bash\necho here\n",
        "squeue": '#!/bin/bash\ncat "$FAKE_SLURM/queue" 2>/dev/null\n',
        "scancel": '#!/bin/bash\necho "$1" >> "$FAKE_SLURM/cancelled"\n',
    }
    for name, script in scripts.items():
        (commands / name).write_text(script)
        (commands / name).chmod((commands / name).stat().st_mode | stat.S_IEXEC)
    python = str(Path(sys.executable).parent)
    monkeypatch.setenv("PATH", os.pathsep.join([str(commands), python, os.environ["PATH"]]))
    monkeypatch.setenv("FAKE_SLURM", str(state))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # for the steps of this file
    return state


def _config(**settings: Any) -> PrepareConfig:
    source = Source(name="only", path="unused")
    return PrepareConfig(sources=[source], tokenizer="unused", output="unused", slurm=SlurmConfig(**settings))


def test_slurm_runs_the_stages_one_after_another(folder: Path, slurm: Path):
    config = _config(partition="cpu", time="1:00:00", memory_gib=3, options={"account": "group"})
    message = run_slurm(_stages(folder), folder / "work", config)
    assert "1000, 1001" in message
    assert _made(folder) == EVERYTHING
    script = (slurm / "script-1000").read_text()
    for line in ("partition=cpu", "time=1:00:00", "mem-per-cpu=3G", "account=group", "array=0-4", "cpus-per-task=1"):
        assert f"#SBATCH --{line}\n" in script
    assert "mail" not in script


def test_slurm_takes_up_what_failed_and_only_that(folder: Path, slurm: Path):
    with pytest.raises(UserError, match="sbatch refuses stage two"):
        run_slurm(_stages(folder, error=KeyError("k")), folder / "work", _refusing_second(slurm))
    (slurm / "refuse").unlink()
    (slurm / "queue").write_text("77\n")  # somebody else's
    before = (folder / "made" / "one-0").stat().st_mtime_ns
    assert "1001" in run_slurm(_stages(folder), folder / "work", _config())
    assert _made(folder) == EVERYTHING
    assert (folder / "made" / "one-0").stat().st_mtime_ns == before


def _refusing_second(slurm: Path) -> PrepareConfig:
    """A configuration whose setup command makes the second submission fail."""
    return _config(setup=f"touch {slurm}/refuse; export PATH={os.environ['PATH']}")


def test_slurm_jobs_that_still_run_are_left_alone(folder: Path, slurm: Path):
    run_slurm(_stages(folder), folder / "work", _config())
    (slurm / "queue").write_text("1001\n")
    assert "1 jobs of an earlier call still run or wait: 1001" in run_slurm(_stages(folder), folder / "work", _config())
    assert len(list(slurm.glob("script-*"))) == 2


def test_slurm_without_sbatch_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="no sbatch here"):
        run_slurm(_stages(folder), folder / "work", _config())


# --- the parent ------------------------------------------------------------------------------------------------------

_ENDLESS = """
import sys, time
from pathlib import Path
from datatrove.pipeline.base import PipelineStep
from tsumugu.data.executor import Stage, run_local

class Endless(PipelineStep):
    name, type = "endless", "TEST"
    def run(self, data=None, rank=0, world_size=1):
        while True:
            with open(f"{sys.argv[1]}/ticks-{rank}", "a") as file:
                file.write(".")
            time.sleep(0.01)

if __name__ == "__main__":
    run_local([Stage("endless", [Endless()], ["a", "b"], [1.0, 1.0])], Path(sys.argv[1]) / "work", 2)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_no_worker_outlives_its_parent(folder: Path, how: signal.Signals):
    script = folder / "script.py"
    script.write_text(_ENDLESS)
    process = subprocess.Popen(
        [sys.executable, script, folder],
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background ignores it
    )
    ticks = [folder / f"ticks-{rank}" for rank in range(2)]
    while process.poll() is None and not all(path.exists() for path in ticks):
        time.sleep(0.01)
    process.send_signal(how)
    assert process.wait() != 0
    time.sleep(0.3)
    sizes = [path.stat().st_size for path in ticks]
    time.sleep(0.3)
    assert [path.stat().st_size for path in ticks] == sizes

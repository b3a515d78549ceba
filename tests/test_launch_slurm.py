"""`tsumugu launch slurm`: the script, what it does with exit codes, what is refused, and jobs on a real cluster."""

import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from support import slurm as support
from support.models import tiny_config
from support.ranks import run_ranks
from support.runs import figures, run_config
from support.stores import random_documents, write_store
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from tsumugu import config
from tsumugu.cli import main
from tsumugu.config import PrepareConfig, SlurmConfig, SlurmSiteConfig, Source
from tsumugu.data.store import open_store
from tsumugu.errors import UserError
from tsumugu.launch.slurm import for_preparation, job_script
from tsumugu.training import checkpoint
from tsumugu.training.metrics import read_metrics
from tsumugu.training.trainer import train

RECIPES = Path(__file__).parents[1] / "recipes"
STEPS = 24


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    write_store(folder / "store", random_documents(200, seed=3))
    tiny_config("gpt_neox", tied=False).save_pretrained(folder / "model")
    changes = {"model.config": str(folder / "model"), "train.max_steps": 80, "train.global_batch_size": 4}
    config.write(run_config(folder / "store", changes), folder / "recipe.yaml")
    return folder / "recipe.yaml"


@pytest.fixture
def commands(tmp_path, monkeypatch) -> Path:
    """A folder that is first in PATH; stand-ins for Slurm's commands say there what they were called with."""
    folder = tmp_path / "commands"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def stand_in(folder: Path, name: str, does: str) -> None:
    path = folder / name
    path.write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" > {folder}/{name}.called\n{does}\n')
    path.chmod(path.stat().st_mode | stat.S_IEXEC)


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory) -> Path:
    """A folder in which the recipes of the quickstart find its tokenizer and its store."""
    folder = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        corpus = Path("quickstart/corpus/japanese.jsonl")
        corpus.parent.mkdir(parents=True)
        corpus.write_bytes((resources.files("tsumugu") / "sample" / "japanese.jsonl").read_bytes())
        tokenizer = ["--input", str(corpus), "--output", "quickstart/tokenizer", "--vocab-size", "4000"]
        assert main(["tokenizer", "train", *tokenizer]) == 0
        assert main(["prepare", "--config", str(RECIPES / "quickstart-prepare.yaml"), "--prepare.workers=1"]) == 0
    return folder


def pretrain(run_dir: Path, *flags: str) -> int:
    """`launch slurm` of the quickstart's recipe, in fewer and shorter steps."""
    shorter = ["--train.max_epochs=null", f"--train.max_steps={STEPS}", "--data.sequence_length=32"]
    shorter += ["--train.global_batch_size=4", "--train.micro_batch_size=2", "--train.log_every=1"]
    return launch(RECIPES / "quickstart-pretrain.yaml", run_dir, *shorter, *flags)


def launch(recipe: Path, run_dir: Path, *flags: str) -> int:
    """`--nodes 1` with two processes."""
    command = ["launch", "slurm", "--config", str(recipe), "--run-dir", str(run_dir), "--nodes", "1"]
    return main([*command, "--processes-per-node", "2", *flags])


# --- the script ------------------------------------------------------------------------------------------------------


def directives(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]


def test_a_dry_run_prints_the_script_of_flags_and_site(recipe, tmp_path, capsys):
    site = tmp_path / "site.yaml"
    slurm = {"partition": "gpu", "account": "group", "time": "1:00:00", "processes_per_node": 8, "auto_resume": True}
    slurm |= {"setup": "module load cuda\nsource /fsx/venv/bin/activate", "options": {"gres": "gpu:8"}}
    site.write_text(yaml.safe_dump({"slurm": slurm}))
    flags = ["--site", str(site), "--nodes", "4", "--time", "2-00:00:00", "--processes-per-node", "4", "--dry-run"]
    flags += ["--train.global_batch_size", "16"]
    assert launch(recipe, tmp_path / "run", *flags) == 0
    script = capsys.readouterr().out
    assert directives(script) == [
        "--job-name=run",
        "--partition=gpu",
        "--account=group",
        "--nodes=4",
        "--ntasks-per-node=4",
        f"--chdir={Path.cwd()}",
        "--exclusive",
        "--time=2-00:00:00",
        "--signal=TERM@300",
        "--requeue",
        "--open-mode=append",
        f"--output={tmp_path}/run/logs/slurm-%j.log",
        "--gres=gpu:8",
    ]
    assert "\nmodule load cuda\nsource /fsx/venv/bin/activate\n" in script
    assert " --auto-resume=1 " in script
    assert not (tmp_path / "run").exists()


def test_a_time_without_quotes_is_a_time(recipe, tmp_path, capsys):
    """YAML 1.1 takes it for a number of seconds, in base 60."""
    (tmp_path / "site.yaml").write_text("slurm:\n  time: 24:00:00\n  options: {begin: 16:00}\n")
    assert launch(recipe, tmp_path / "run", "--site", str(tmp_path / "site.yaml"), "--dry-run") == 0
    assert {"--time=24:00:00", "--begin=16:00"} <= set(directives(capsys.readouterr().out))


def test_a_credential_is_written_to_no_job_script(recipe, tmp_path, capsys):
    setup = "module load cuda\nexport HF_TOKEN=hf_abcdefghijklmnopqrstuvwxyz"
    (tmp_path / "site.yaml").write_text(yaml.safe_dump({"slurm": {"setup": setup}}))
    assert launch(recipe, tmp_path / "run", "--site", str(tmp_path / "site.yaml")) == 2
    said = capsys.readouterr()
    assert said.err.startswith("tsumugu: slurm.setup holds what looks like a credential, ")
    assert "hf_abc" not in said.out + said.err
    assert not (tmp_path / "run").exists()
    own = PrepareConfig(sources=[Source(name="a", path="a.jsonl")], tokenizer="t", output="o")
    with pytest.raises(UserError, match=r"^prepare\.slurm\.setup holds what looks like a credential"):
        for_preparation(own, SlurmSiteConfig(setup=setup))


def test_set_up_lines_may_name_a_credential(recipe, tmp_path, capsys):
    setup = 'export HF_TOKEN=$(cat ~/.token) A_KEY="${MINE}" WANDB_API_KEY=$MINE HTTPS_PROXY=http://$USER:$WORD@proxy'
    (tmp_path / "site.yaml").write_text(yaml.safe_dump({"slurm": {"setup": setup}}))
    assert launch(recipe, tmp_path / "run", "--site", str(tmp_path / "site.yaml"), "--dry-run") == 0
    assert setup in capsys.readouterr().out


def test_the_container_of_a_site():
    pyxis = SlurmSiteConfig(container="/fsx/t.sqsh", container_mounts=["/fsx:/fsx", "/data:/data"])
    script = job_script(Path("/runs/a"), pyxis, 1, 8, None)
    assert "--container-image=/fsx/t.sqsh --container-mounts=/fsx:/fsx,/data:/data " in script
    assert "    tsumugu train --config=/runs/a/slurm/config.yaml --run-dir=/runs/a\n" in script
    apptainer = SlurmSiteConfig(container="/fsx/t.sif", container_mounts=["/fsx"], container_runtime="apptainer")
    script = job_script(Path("/runs/a"), apptainer, 1, 8, None)
    assert "    apptainer exec --nv --bind=/fsx /fsx/t.sif tsumugu train --config=" in script


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (2, False), (3, True), (137, False)])
def test_what_the_script_does_with_the_exit_code_of_the_step(code, requeued, commands, monkeypatch):
    stand_in(commands, "srun", f"exit {code}")
    stand_in(commands, "scontrol", "")
    stand_in(commands, "sleep", "")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    run_dir = Path("/runs/it's $HOME")
    script = job_script(run_dir, SlurmSiteConfig(setup=""), 1, 8, None)
    assert subprocess.run(["bash", "-c", script], capture_output=True, check=False).returncode == code
    called = (commands / "srun.called").read_text().splitlines()
    assert called[-4:] == ["tsumugu", "train", f"--config={run_dir}/slurm/config.yaml", f"--run-dir={run_dir}"]
    assert f"--output={run_dir}/logs/rank-%t.log" in called
    again = commands / "scontrol.called"
    assert (again.read_text() if again.exists() else "") == ("requeue\n77\n" if requeued else "")


def test_a_run_that_stops_after_a_step_is_not_queued_again_for_ever():
    script = job_script(Path("/runs/a"), SlurmSiteConfig(), 1, 8, None, requeue=False)
    assert "--no-requeue" in directives(script)
    assert "scontrol" not in script


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("30", 1800), ("30:10", 1810), ("2:00:01", 7201), ("1-2", 93600), ("1-2:3", 93780), ("1-2:3:4", 93784)],
)
def test_a_time_limit_must_leave_time_to_train_in(time, seconds):
    """In every form that sbatch(1) has; Slurm may send the signal a minute early."""
    job_script(Path("/runs/a"), SlurmSiteConfig(seconds_to_save=seconds - 61), 1, 8, time)
    with pytest.raises(UserError, match="leaves no time"):
        job_script(Path("/runs/a"), SlurmSiteConfig(seconds_to_save=seconds - 60), 1, 8, time)


def test_a_preparation_takes_from_the_site_what_it_has_not_itself():
    def preparation(**slurm) -> PrepareConfig:
        return PrepareConfig(
            sources=[Source(name="a", path="a")], tokenizer="t", output="o", slurm=SlurmConfig(**slurm)
        )

    site = SlurmSiteConfig(partition="cpu", account="group", time="1:00:00", setup="a", options={"qos": "low"})
    taken = for_preparation(preparation(), site)
    assert taken.executor == "slurm"
    expected = SlurmConfig(partition="cpu", time="1:00:00", setup="a", options={"account": "group", "qos": "low"})
    assert taken.slurm == expected
    own = {"partition": "own", "time": "2:00:00", "setup": "b", "options": {"qos": "high", "account": "other"}}
    assert for_preparation(preparation(**own), site).slurm == SlurmConfig(**own)
    assert for_preparation(preparation(**own), site, "3:00:00").slurm.time == "3:00:00"


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--time", "5x"], "the time limit 5x is none"),
        (["--nodes", "3", "--parallel.shard_degree", "4"], "parallel.shard_degree 4"),
        (["--train.global_batch_size", "3"], "train.global_batch_size 3 is not a multiple"),
        (["--run-dir", "a%j"], "'%' in the path of a log"),
        (["--site", "missing.yaml"], "missing.yaml: no such file"),
        (["--stage", "prepare"], "--nodes goes with --stage train"),
        (["--train.max_stepz", "3"], "did you mean --train.max_steps"),
        (["--data.store", "missing"], "missing"),
        (["--tokenizer.path", "https://me:word@host/t"], "tokenizer.path holds what looks like a credential"),
    ],
)
def test_wrong_input_is_refused_in_a_line(flags, says, recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert launch(recipe, tmp_path / "run", *flags) == 2
    refused = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tsumugu: ")]
    assert len(refused) == 1
    assert says in refused[0]
    assert not list(tmp_path.iterdir())


def test_what_a_site_may_not_say(recipe, tmp_path, capsys):
    for content, says in (
        ({"slurm": {"partitions": "gpu"}}, "did you mean slurm.partition?"),
        ({"slurm": {"options": {"nodes": "2"}}}, "slurm.options.nodes"),
        ({"slurm": {"options": {"comment": "a\nb"}}}, "the sbatch option comment"),
        ({"slurm": {"container_mounts": ["/fsx:/fsx"]}}, "slurm.container_mounts"),
    ):
        (tmp_path / "site.yaml").write_text(yaml.safe_dump(content))
        assert launch(recipe, tmp_path / "run", "--site", str(tmp_path / "site.yaml"), "--dry-run") == 2
        assert says in capsys.readouterr().err


def test_nodes_and_processes_must_be_said(recipe, capsys):
    assert main(["launch", "slurm", "--config", str(recipe)]) == 2
    assert main(["launch", "slurm", "--config", str(recipe), "--nodes", "1"]) == 2
    errors = capsys.readouterr().err
    assert "--nodes is missing" in errors
    assert "set slurm.processes_per_node" in errors


def test_what_sbatch_says_against_it_is_passed_on(recipe, tmp_path, commands, capsys):
    stand_in(commands, "sbatch", "echo 'sbatch: error: invalid partition specified: gpu' >&2; exit 1")
    assert launch(recipe, tmp_path / "run") == 2
    assert "invalid partition specified: gpu" in capsys.readouterr().err


def test_without_sbatch_nothing_is_written(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nowhere")
    assert launch(recipe, tmp_path / "run") == 2
    assert "there is no sbatch here" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_two_jobs_do_not_train_into_one_run(recipe, tmp_path, commands, capsys):
    stand_in(commands, "sbatch", "echo 41")
    stand_in(commands, "squeue", "echo 41")
    assert launch(recipe, tmp_path / "run") == 0
    assert "submitted as job 41" in capsys.readouterr().out
    assert config.load(config.TrainingRun, [str(tmp_path / "run" / "slurm" / "config.yaml")]) == config.load(
        config.TrainingRun, [str(recipe)]
    )
    assert launch(recipe, tmp_path / "run") == 2
    assert "job 41 already trains into" in capsys.readouterr().err
    stand_in(commands, "squeue", "echo 40")
    assert launch(recipe, tmp_path / "run") == 0


# --- a real cluster --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    if lacking := support.missing():
        pytest.skip(lacking)
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    with pytest.MonkeyPatch.context() as patch, support.cluster(folder) as conf:
        patch.setenv("SLURM_CONF", str(conf))
        # also the environment of jobs
        patch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
        yield
        subprocess.run(["scancel", "--me"], check=False)
    shutil.rmtree(folder)


def until(met: Callable[[], object], seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def job(of: Path) -> str:
    return (of / "slurm" / "slurm-jobs.txt").read_text()


def shown(job_id: str) -> dict[str, str]:
    """What scontrol says of a job."""
    output = subprocess.run(["scontrol", "show", "job", job_id], capture_output=True, text=True, check=True).stdout
    return dict(part.split("=", 1) for part in output.split() if "=" in part)


def ended(job_id: str, state: str) -> bool:
    found = shown(job_id)
    logs = sorted(Path(found["StdOut"]).parent.glob("*.log")) if "StdOut" in found else []
    said = "\n".join(log.read_text()[-1000:] for log in logs)
    assert found["JobState"] in (state, "PENDING", "RUNNING", "COMPLETING", "CONFIGURING"), said
    return found["JobState"] == state


def tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the last checkpoint: weights and moments."""
    reader = dcp.FileSystemReader(checkpoint.folder(run_dir, STEPS))
    stored = reader.read_metadata().state_dict_metadata
    entries = {name: entry for name, entry in stored.items() if isinstance(entry, TensorStorageMetadata)}
    found = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()}
    dcp.load(found, storage_reader=reader, no_dist=True)
    return found


def train_here(folder: Path, recipe: Path, run_dir: Path) -> None:
    os.chdir(folder)
    train(config.load(config.TrainingRun, [str(recipe)]), run_dir)


def test_a_job_that_is_stopped_is_queued_again_and_ends_as_an_undisturbed_one(
    cluster, quickstart, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(quickstart)
    undisturbed, stopped = tmp_path / "undisturbed", tmp_path / "it's #1 $HOME"
    assert pretrain(stopped, "--time", "1:00:00") == 0
    number = job(stopped)
    until(lambda: len(read_metrics(stopped)) > 2)
    # what --signal does in time for the limit: SIGTERM to the tasks
    subprocess.run(["scancel", "--signal=TERM", number], check=True)
    until(lambda: shown(number)["Restarts"] == "1")
    [saved] = checkpoint.complete_steps(stopped)
    assert saved < STEPS
    until(lambda: shown(number)["JobState"] == "PENDING")
    # Slurm itself waits for two minutes; a node refuses a job that it was told to end within the same second
    subprocess.run(["scontrol", "update", f"JobId={number}", "StartTime=now+3"], check=True)
    until(lambda: ended(number, "COMPLETED"))
    run_ranks(train_here, 2, quickstart, stopped / "slurm" / "config.yaml", undisturbed)
    log = (stopped / "logs" / f"slurm-{number}.log").read_text()
    assert log.index("start 1 on localhost") < log.index("exit code 3") < log.index("start 2 on localhost")
    assert "interrupted, checkpoint saved at step" in (stopped / "logs" / "rank-0.log").read_text()
    assert (stopped / "logs" / "rank-1.log").exists()
    assert figures(stopped) == figures(undisturbed)
    wanted, found = tensors(undisturbed), tensors(stopped)
    assert wanted.keys() == found.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    capsys.readouterr()
    assert pretrain(stopped) == 0
    assert f"already done, {STEPS} steps" in capsys.readouterr().out


def test_what_is_wrong_on_the_node_ends_the_job(cluster, quickstart, tmp_path):
    """As a store that the nodes do not see; the login node saw it."""
    store = tmp_path / "store"
    shutil.copytree(quickstart / "quickstart" / "store", store)
    site = tmp_path / "site.yaml"
    setup = f"export PATH={Path(sys.executable).parent}:$PATH\nrm -r {store}"
    site.write_text(yaml.safe_dump({"slurm": {"setup": setup}}))
    assert pretrain(tmp_path / "run", "--data.store", str(store), "--site", str(site)) == 0
    until(lambda: ended(job(tmp_path / "run"), "FAILED"))
    assert shown(job(tmp_path / "run"))["ExitCode"] == "2:0"
    said = (tmp_path / "run" / "logs" / "rank-0.log").read_text()
    assert next(line for line in said.splitlines() if line.startswith("tsumugu: ")).startswith(f"tsumugu: {store}")


def test_a_preparation_is_submitted_and_makes_the_store_of_one_machine(cluster, tokenizer_folder, tmp_path, capsys):
    lines = [f'{{"text": "{number}日目の朝、川沿いの道を歩いた。霧が晴れた。"}}\n' for number in range(300)]
    (tmp_path / "text.jsonl").write_text("".join(lines), encoding="utf-8")
    sources = [{"name": "text", "path": str(tmp_path / "text.jsonl")}]
    content = {"sources": sources, "tokenizer": str(tokenizer_folder), "output": str(tmp_path / "here"), "workers": 1}
    (tmp_path / "prepare.yaml").write_text(yaml.safe_dump({"prepare": content}))
    (tmp_path / "site.yaml").write_text(yaml.safe_dump({"slurm": {"partition": "main"}}))
    recipe = ["--config", str(tmp_path / "prepare.yaml")]
    assert main(["prepare", *recipe]) == 0
    command = ["launch", "slurm", "--stage", "prepare", *recipe, "--site", str(tmp_path / "site.yaml")]
    command += ["--time", "10", f"--prepare.output={tmp_path / 'there'}", "--prepare.slurm.memory_gib=1"]
    assert main(command) == 0
    assert "submitted as jobs" in capsys.readouterr().out
    until((tmp_path / "there" / "manifest.json").exists)
    here, there = (open_store(tmp_path / name).manifest for name in ("here", "there"))
    assert here["splits"] == there["splits"]  # with size and hash of every file
    until(lambda: not subprocess.run(["squeue", "--noheader"], capture_output=True, check=True).stdout)
    assert main(command) == 0
    assert "already done" in capsys.readouterr().out

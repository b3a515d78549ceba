"""`--prove-resume`: a killed run is the run that was not, proven from outside, and a difference is found."""

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from support.models import tiny_config
from support.runs import run_config
from support.stores import random_documents, write_store

from tsumugu import cli, config
from tsumugu.errors import UserError
from tsumugu.launch import proof


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    write_store(tmp_path / "store", random_documents(200, seed=3))
    dropout = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
    tiny_config("gpt2", tied=True, **dropout).save_pretrained(tmp_path / "model")
    changes = {"model.config": str(tmp_path / "model"), "train.max_steps": 1000, "train.global_batch_size": 4}
    config.write(run_config(tmp_path / "store", changes), tmp_path / "recipe.yaml")
    return tmp_path / "recipe.yaml"


def test_a_killed_run_is_proven_equal(recipe: Path, capsys):
    run_dir = recipe.parent / "run"
    arguments = ["--config", str(recipe), "--run-dir", str(run_dir), "--prove-resume", "60"]
    assert cli.main(["train", *arguments]) == 0
    shown = capsys.readouterr().out
    [(at, back_to)] = re.findall(r"killed after step (\d+); goes on from step (\d+)", shown)
    assert 30 < int(at) < 60
    assert int(back_to) in (20, 40)
    for line in ("steps compared: 60", "loss: 0 of 60 differ", "grad_norm: 0 of 60 differ", "equal, bit for bit"):
        assert line in shown
    assert re.search(r"weights: 0 of [1-9]\d* tensors differ\nmoments and optimizer state: 0 of [1-9]\d* tens", shown)
    assert sorted(path.name for path in recipe.parent.iterdir()) == ["model", "recipe.yaml", "store"]


def test_with_a_process_die_those_it_has_started_in_sessions_of_their_own(tmp_path: Path):
    """As torchrun starts its workers."""
    script = "import subprocess, sys, time; child = subprocess.Popen(['sleep', '300'], start_new_session=True); "
    script += "print(child.pid, flush=True); time.sleep(300)"
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    child = int(process.stdout.readline())
    assert proof._alive([child])
    proof._kill(process)
    assert process.returncode == -signal.SIGKILL
    assert not proof._alive([child])


def test_differences_are_found_and_counted(tmp_path: Path, monkeypatch, capsys):
    """Two runs that are made up: one loss, one weight by one bit, one moment."""
    for name, loss, last in (("straight", 2.5, 1.0), ("killed", 2.25, 1.0000001192092896)):
        folder = tmp_path / name / "checkpoints" / "step-00000004"
        contents = {"model": {"a": torch.ones(3), "b": torch.tensor([1.0, last])}}
        contents |= {"optimizer": {"state": {"a": {"exp_avg": torch.tensor(loss)}}}}
        dcp.save(contents, checkpoint_id=folder, no_dist=True)
        (folder / "state.json").write_text(json.dumps({"step": 4, "tokens_seen": 7}))
        lines = [{"step": step, "loss": 3.0, "grad_norm": 1.0} for step in (1, 2, 3)]
        lines.append({"step": 4, "loss": loss, "grad_norm": 1.0})
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(proof.tempfile, "mkdtemp", lambda **_: str(tmp_path))
    monkeypatch.setattr(proof._Run, "finish", lambda _: None)
    monkeypatch.setattr(proof._Run, "kill", lambda _, after: (after + 1, after))
    assert proof.prove_resume(["train"], tmp_path / "run", 4) == 1
    shown = capsys.readouterr().out
    assert "loss: 1 of 4 differ, by 0.25 at most" in shown
    assert "grad_norm: 0 of 4 differ" in shown
    assert "weights: 1 of 2 tensors differ: model.b" in shown
    assert "moments and optimizer state: 1 of 1 tensors differ: optimizer.state.a.exp_avg" in shown
    assert "counters: 0 of 2 differ" in shown
    assert f"DIFFERENT; both runs are kept in {tmp_path}" in shown


def test_what_cannot_be_proven_is_refused(recipe: Path, monkeypatch, capsys):
    train = ["train", "--config", str(recipe), "--run-dir", str(recipe.parent / "run")]
    assert cli.main([*train, "--prove-resume", "3"]) == 2
    assert cli.main([*train, "--prove-resume", "1001"]) == 2
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"starts processes itself .use `tsumugu launch local --prove-resume`"):
        proof.prove_resume(["train"], recipe.parent / "run", 10)
    shown = capsys.readouterr().err
    assert "no middle to be killed in" in shown
    assert "the run has 1000 steps" in shown
    shutil.rmtree(recipe.parent / "model")
    monkeypatch.delenv("WORLD_SIZE")
    assert cli.main([*train, "--prove-resume", "10"]) == 2
    assert "the run that is to be proven ended with 2: tsumugu: no model configuration at" in capsys.readouterr().err

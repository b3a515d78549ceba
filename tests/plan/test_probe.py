"""A probe on this machine's CPU, and a plan by its calibration."""

import json
from pathlib import Path

import pytest
from support.models import tiny_config
from support.runs import run_config
from support.stores import random_documents, write_store

from tsumugu.plan import command, probe


def test_a_plan_by_a_probe_tells_what_the_probe_measured(tmp_path: Path):
    write_store(tmp_path / "text", random_documents(900, seed=1, shortest=40, longest=90))
    tiny_config("llama", tied=True).save_pretrained(tmp_path / "llama")
    changes = {"model.config": str(tmp_path / "llama"), "data.sequence_length": 32, "train.max_steps": 500}
    run = run_config(tmp_path / "text", changes | {"train.micro_batch_size": 2, "train.global_batch_size": 4})
    file = tmp_path / "calibration.json"
    said = probe.probe(run, command.Asked(), file)
    assert said.startswith(f"{file}: ")
    measured = json.loads(file.read_text())["measured"]["step_seconds"]
    [unknown] = command.plans(run, command.Asked())
    [known] = command.plans(run, command.Asked(calibration=file))
    assert unknown.step is None
    assert unknown.to_json()["days"] is None
    assert known.step
    assert known.step.total == pytest.approx(measured, rel=0.02)
    assert known.to_json()["days"] == pytest.approx(500 * measured / 86400, rel=0.02)

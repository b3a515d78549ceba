"""A probe on this machine's CPU, and a plan by its calibration."""

import json
from pathlib import Path

import pytest
from support.models import tiny_config
from support.runs import run_config
from support.stores import random_documents, write_store

from tsumugu.distributed import mesh
from tsumugu.errors import UserError
from tsumugu.plan import command, instances, probe, time
from tsumugu.training.schedule import check_schedule


def test_a_plan_by_a_probe_tells_what_the_probe_measured(tmp_path: Path):
    write_store(tmp_path / "text", random_documents(900, seed=1, shortest=40, longest=90))
    tiny_config("llama", tied=True).save_pretrained(tmp_path / "llama")
    changes = {"model.config": str(tmp_path / "llama"), "data.sequence_length": 32, "train.max_steps": 500}
    changes |= {"schedule.warmup_steps": 100, "schedule.kind": "wsd"}  # more steps than are probed
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
    assert known.mfu is None  # of a CPU no peak is known
    with pytest.raises(UserError, match="was measured on CPU, the plan is for A10G"):
        time.shipped(instances.gpu("A10G"), file)
    assert known.step.total == pytest.approx(measured, rel=0.02)
    assert known.to_json()["days"] == pytest.approx(500 * measured / 86400, rel=0.02)


def test_a_recipe_for_many_devices_and_steps_is_probed_on_one_and_in_few():
    changes = {"model.preset": "1b", "train.max_epochs": 3, "train.micro_batch_size": 4, "schedule.warmup_steps": 2000}
    changes |= {"parallel.shard_degree": 8, "parallel.replicate_degree": 4, "schedule.kind": "wsd"}
    short = probe._short(run_config(Path("x"), changes | {"schedule.decay_steps": 500}))
    check_schedule(probe.STEPS, short.schedule)
    assert mesh.degrees(short.parallel, 1) == {"replicate": 1, "shard": 1}
    assert (short.train.max_steps, short.train.global_batch_size) == (20, 8)


def test_a_probe_refuses_a_folder_that_is_not_there_before_it_trains(tmp_path: Path):
    run = run_config(tmp_path / "none", {"model.preset": "1b", "train.max_steps": 1})
    with pytest.raises(UserError, match="there is no folder"):
        probe.probe(run, command.Asked(), tmp_path / "none" / "calibration.json")


@pytest.mark.parametrize("change", [{"matrix": "fast"}, {"memory": -1}, {"launch": None}])
def test_a_calibration_of_something_else_is_refused(tmp_path: Path, change: dict):
    content = {"matrix": 0.5, "attention": 0.5, "varlen": 0.5, "memory": 0.5, "launch": 1e-6} | change
    (tmp_path / "calibration.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="is no calibration"):
        time.shipped(instances.gpu("A10G"), tmp_path / "calibration.json")

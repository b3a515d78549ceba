"""`tsumugu plan` from the command line."""

import json
import time
from pathlib import Path

import pytest
import yaml
from support.runs import run_config

from tsumugu import cli
from tsumugu.errors import UserError
from tsumugu.plan import command, planning

KEYS = {
    *("fits", "memory_gib", "device_memory_gib", "micro_batch_size", "shard_degree", "tokens_per_second"),
    *("step_seconds", "mfu", "days", "cost"),
}


def recipe(folder: Path, **sections) -> str:
    content = {
        "model": {"preset": "1b"},
        "data": {"store": str(folder / "no store")},
        "train": {"max_tokens": 10**9, "global_batch_size": 64, "micro_batch_size": 2},
    }
    for name, changes in sections.items():
        content[name] = content.get(name, {}) | changes
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    return str(file)


def planned(capsys: pytest.CaptureFixture, *arguments: str) -> tuple[int, str]:
    code = cli.main(["plan", *arguments])
    return code, capsys.readouterr().out


def test_json_has_the_keys_of_the_design(tmp_path: Path, capsys):
    arguments = ["--config", recipe(tmp_path), "--instance-type", "ml.p4d.24xlarge", "--json"]
    code, text = planned(capsys, *arguments)
    found = json.loads(text)
    assert code == 0
    assert set(found) == KEYS
    assert found["fits"]
    assert found["device_memory_gib"] == 40
    assert found["shard_degree"] == 8
    parts = found["memory_gib"]
    assert parts["total"] == pytest.approx(sum(size for part, size in parts.items() if part != "total"))
    assert set(found["cost"]) == {"currency", "amount", "price_per_hour", "price_date"}
    assert found["cost"]["amount"] == pytest.approx(found["days"] * 24 * 32.7726)
    assert found["days"] == pytest.approx(10**9 / found["tokens_per_second"] / 86400, rel=0.01)
    assert found["tokens_per_second"] == pytest.approx(64 * 2048 / found["step_seconds"])


def test_several_side_by_side_with_the_fastest_and_the_cheapest(tmp_path: Path, capsys):
    arguments = ["--config", recipe(tmp_path), "--instance-type", "ml.p4d.24xlarge", "p5.48xlarge"]
    arguments += ["--price-per-hour", "p5.48xlarge=500", "--yen-per-dollar", "150"]
    code, text = planned(capsys, *arguments, "--json")
    first, second = json.loads(text)
    assert code == 0
    assert second["days"] < first["days"]
    assert first["cost"]["currency"] == "JPY"
    assert first["cost"]["price_per_hour"] == pytest.approx(32.7726 * 150)
    assert second["cost"]["price_per_hour"] == 75_000
    _, text = planned(capsys, *arguments, "--chart", str(tmp_path / "chart.png"))
    rows = {
        line.split()[0]: line.rstrip() for line in text.splitlines() if "24xlarge ×" in line or "48xlarge ×" in line
    }
    assert rows["p4d.24xlarge"].endswith("cheapest")
    assert rows["p5.48xlarge"].endswith("fastest")
    assert (tmp_path / "chart.png").read_bytes()[:4] == b"\x89PNG"


def test_what_does_not_fit_is_said_with_what_would_help(tmp_path: Path, capsys):
    file = recipe(tmp_path, model={"preset": "3.6b"}, train={"micro_batch_size": 8})
    code, text = planned(capsys, "--config", file, "--instance-type", "g5.12xlarge")
    assert code == 1
    assert "its price is not known" in text
    helps = [line for line in text.splitlines() if "parallel.activation_checkpointing full " in line]
    assert len(helps) == 1
    # what is promised is what a plan with that change says
    promised = float(helps[0].split()[2])
    file = recipe(
        tmp_path, model={"preset": "3.6b"}, train={"micro_batch_size": 8}, parallel={"activation_checkpointing": "full"}
    )
    _, text = planned(capsys, "--config", file, "--instance-type", "g5.12xlarge", "--json")
    assert json.loads(text)["memory_gib"]["total"] == pytest.approx(promised, abs=0.01)


def test_the_largest_micro_batch_fits_and_one_more_does_not(tmp_path: Path, capsys):
    [found] = command.plans(
        _run(tmp_path, 2), command.Asked(instance_types=["p4d.24xlarge"])
    )  # fmt: skip
    largest = found.largest_micro_batch
    fits = [
        command.plans(_run(tmp_path, rows), command.Asked(instance_types=["p4d.24xlarge"]))[0].fits
        for rows in (largest, largest + 1)
    ]
    assert fits == [True, False]


def _run(folder: Path, rows: int):
    changes = {"model.preset": "1b", "data.sequence_length": 2048, "train.max_steps": 10}
    changes |= {"train.micro_batch_size": rows, "train.global_batch_size": 8 * 64}
    return run_config(folder / "no store", changes)


def test_20b_is_planned_in_seconds_and_without_its_memory(tmp_path: Path, capsys):
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    file = recipe(tmp_path, model={"preset": "20b"}, parallel={"activation_checkpointing": "full"})
    _, text = planned(capsys, "--config", file, "--instance-type", "p4d.24xlarge", "--instance-count", "4", "--json")
    assert json.loads(text)["fits"]
    assert time.process_time() - started < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2 * 2**20  # KiB: 2 GiB, of 83 in float32


def test_what_cannot_be_known_is_asked_for(tmp_path: Path):
    with pytest.raises(UserError, match="--vocab-size"):
        planning.find_model_config(run_config(tmp_path / "none", {"model.preset": "tiny", "train.max_steps": 1}), None)
    epochs = run_config(tmp_path / "none", {"model.preset": "1b", "train.max_epochs": 2})
    with pytest.raises(UserError, match="--tokens"):
        planning.count_steps(epochs, None)
    assert planning.count_steps(epochs, 1000 * 32 * 16) == 2000


def test_unknown_instances_are_refused(tmp_path: Path, capsys):
    assert cli.main(["plan", "--config", recipe(tmp_path), "--instance-type", "p9.huge"]) == 2
    assert "known: ml.g5.12xlarge" in capsys.readouterr().err

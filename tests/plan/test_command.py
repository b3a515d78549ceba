"""`tsumugu plan` from the command line."""

import json
import logging
import math
import time
from pathlib import Path

import pytest
import torch
import yaml
from support.models import tiny_config
from support.runs import run_config

from tsumugu import cli
from tsumugu.config import TrainingRun, load
from tsumugu.errors import UserError
from tsumugu.model.presets import sized_config
from tsumugu.plan import command, instances, memory, planning
from tsumugu.training import checkpoint

KEYS = {
    *("fits", "memory_gib", "device_memory_gib", "micro_batch_size", "shard_degree", "tokens_per_second"),
    *("step_seconds", "mfu", "days", "cost", "instance_type", "instance_count", "activations_gib", "unmeasured"),
}


def recipe(folder: Path, **sections) -> str:
    """A recipe whose store is nowhere, and the same in all tests, so that they share its traces."""
    content = {
        "model": {"preset": "1b"},
        "data": {"store": "no store"},
        "train": {"max_tokens": 10**9, "global_batch_size": 512, "micro_batch_size": 2},
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
    assert found["tokens_per_second"] == pytest.approx(512 * 2048 / found["step_seconds"])


def test_every_kind_of_recomputation_is_shown_with_what_its_layers_keep(tmp_path: Path, capsys):
    """With full recomputation a layer keeps its input: 24 layers of 2 × 2,048 tokens of 2,048 numbers of 2 bytes."""
    arguments = ["--config", recipe(tmp_path), "--instance-type", "ml.p4d.24xlarge"]
    kept = json.loads(planned(capsys, *arguments, "--json")[1])["activations_gib"]
    assert list(kept) == ["none", "selective", "full"]
    assert kept["full"] == pytest.approx(24 * 2 * 2048 * 2048 * 2 / 2**30)
    assert kept["full"] < kept["selective"] < kept["none"]
    [line] = [line for line in planned(capsys, *arguments)[1].splitlines() if line.startswith("layers keep")]
    assert line.startswith("layers keep, recomputing none / selective / full, GiB")
    assert line.split("GiB")[1].strip() == " / ".join(f"{size:.2f}" for size in kept.values())


def test_what_was_not_measured_is_said(tmp_path: Path, capsys):
    pytest.importorskip("peft")
    tiny_config("llama", tied=True).save_pretrained(tmp_path / "llama")
    model = {"preset": None, "pretrained": str(tmp_path / "llama"), "lora": {"rank": 4}}
    file = recipe(tmp_path, model=model, data={"sequence_length": 16}, parallel={"compile": False})
    code, text = planned(capsys, "--config", file, "--instance-type", "p4d.24xlarge", "--json")
    assert code == 0
    assert json.loads(text)["unmeasured"] == [
        "the memory of runs with model.lora", "memory and speed of more than two GPUs", "the speed of A100-40GB",
    ]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), [("tensor_degree", "2"), ("fp8", "tensorwise")])
def test_what_plan_cannot_tell_is_refused_in_a_line(tmp_path: Path, capsys, key: str, value: str):
    arguments = ["--config", recipe(tmp_path), "--instance-type", "p5.48xlarge", f"--parallel.{key}", value]
    assert cli.main(["plan", *arguments]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line == f"tsumugu: plan does not know parallel.{key} (leave it out to plan without it)"


def test_torch_does_not_warn(tmp_path: Path):
    """As it does where layers that are computed again are compiled, once in a process."""
    torch._logging._internal.warning_once.cache_clear()
    logger, records = logging.getLogger("torch._higher_order_ops.wrap"), []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    changes = {"model.preset": "1b", "data.sequence_length": 512, "train.max_steps": 1}
    run = run_config(tmp_path, changes | {"parallel.activation_checkpointing": "selective"})
    logger.addHandler(handler)
    try:
        setup = memory.set_up(run, sized_config("1b", 52096), instances.gpu("H100").device(), 1)
        memory.trace_model(setup, 1)
    finally:
        logger.removeHandler(handler)
    assert setup.parallel.compile
    assert records == []
    assert not logging.root.manager.disable


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
    arguments = ["--config", recipe(tmp_path), "--instance-type", "g5.12xlarge", "--parallel.shard_degree", "1"]
    code, text = planned(capsys, *arguments)
    assert code == 1
    assert "its price is not known" in text
    helps = [line for line in text.splitlines() if "parallel.activation_checkpointing full " in line]
    assert len(helps) == 1
    # what is promised is what a plan with that change says
    promised = float(helps[0].split()[2])
    _, text = planned(capsys, *arguments, "--parallel.activation_checkpointing", "full", "--json")
    assert json.loads(text)["memory_gib"]["total"] == pytest.approx(promised, abs=0.01)


def test_sums_of_gradients_and_gathered_weights_are_named_where_they_are_too_much(tmp_path: Path, capsys):
    """By hand: 1,421,987,840 float32 sums, of which a device of four keeps a quarter in the end."""
    file = recipe(tmp_path, parallel={"compile": False})
    arguments = ["--config", file, "--instance-type", "g5.12xlarge", "--train.micro_batch_size", "16"]
    arguments += ["--parallel.sync_each_micro_batch", "false", "--parallel.reshard_after_forward", "never"]
    arguments += ["--train.global_batch_size", "128"]
    code, text = planned(capsys, *arguments)
    needs = float(next(line for line in text.splitlines() if line.startswith("a device needs")).split()[-1])
    promised = {line.split()[0]: float(line.split()[2]) for line in text.splitlines() if line.startswith("  parallel.")}
    saved = needs - promised["parallel.sync_each_micro_batch"]
    assert code == 1
    assert saved == pytest.approx(1_421_987_840 * 4 * 3 / 4 / 2**30 * 1.05, rel=0.1)
    assert needs - promised["parallel.reshard_after_forward"] > 1
    _, text = planned(capsys, *arguments, "--parallel.sync_each_micro_batch", "true", "--json")
    assert json.loads(text)["memory_gib"]["total"] == pytest.approx(needs - saved, abs=0.01)


def test_the_largest_micro_batch_fits_and_one_more_does_not(tmp_path: Path, capsys):
    file = recipe(tmp_path, parallel={"compile": False})
    arguments = ["--config", file, "--instance-type", "p4d.24xlarge"]
    _, text = planned(capsys, *arguments)
    [line] = [line for line in text.splitlines() if line.startswith("largest micro batch")]
    largest = int(line.split()[-1])
    codes = [planned(capsys, *arguments, "--train.micro_batch_size", str(rows))[0] for rows in (largest, largest + 1)]
    assert codes == [0, 1]


def test_rows_that_are_empty_count_neither_as_tokens_nor_as_work(tmp_path: Path, capsys):
    """16 rows on 32 devices: a step takes as long as one of 64, and does a quarter of it."""
    arguments = ["--config", recipe(tmp_path), "--instance-type", "p4d.24xlarge", "--instance-count", "4", "--json"]
    few, many = (
        json.loads(planned(capsys, *arguments, "--train.global_batch_size", str(rows))[1]) for rows in (16, 64)
    )
    assert few["step_seconds"] == pytest.approx(many["step_seconds"])
    assert few["tokens_per_second"] == pytest.approx(many["tokens_per_second"] / 4)
    assert few["mfu"] == pytest.approx(many["mfu"] / 4)
    _, text = planned(capsys, *arguments[:-1], "--train.global_batch_size", "16")
    assert "of every 64 rows that its devices compute 48 are empty" in text


def test_checkpoints_at_the_interval_of_young_and_daly(tmp_path: Path):
    """By hand: of 1,421,987,840 parameters 12 bytes each are copied at 49.9 GB/s by each of the 8 devices of a replica;
    32 devices of 50,700 hours each fail every 1,584 hours."""
    run = load(TrainingRun, [recipe(tmp_path)], ["--parallel.shard_degree", "8"])
    [found] = command.plans(run, command.Asked(instance_types=["p4d.24xlarge"], instance_counts=[4]))
    assert found.step
    assert found.checkpoint_bytes == 1_421_987_840 * 12
    seconds = math.sqrt(2 * (1_421_987_840 * 12 / 8 / 49.9e9) * (50_700 * 3600 / 32))
    assert found.checkpoint_every == round(seconds / found.step.total)


def test_a_machine_without_a_gpu_has_its_memory(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr(instances.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(instances.os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2**20}.__getitem__)
    code, text = planned(capsys, "--config", recipe(tmp_path), "--json")
    found = json.loads(text)
    assert (code, found["fits"], found["device_memory_gib"]) == (1, False, 4)  # 1b: 16 bytes a parameter are 21 GiB


def test_no_time_is_told_of_what_waits_for_the_host(tmp_path: Path, capsys):
    arguments = [
        "--config",
        recipe(tmp_path),
        "--instance-type",
        "p4d.24xlarge",
        "--parallel.offload_optimizer",
        "true",
    ]
    code, text = planned(capsys, *arguments, "--json")
    found = json.loads(text)
    assert code == 0
    assert [found[key] for key in ("tokens_per_second", "days", "cost")] == [None] * 3
    assert "parallel.offload_" in planned(capsys, *arguments)[1]


def test_a_gpu_holds_less_than_its_data_sheet_says():
    """torch has 139.8 of an H200's 141 GiB (benchmarks/RESULTS.md): what needs 140 does not fit."""
    gpu = instances.gpu("H200")
    assert gpu.memory
    assert 139.3 < (gpu.memory - gpu.withheld) / 2**30 <= 139.8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--yen-per-dollar", "0"], "--yen-per-dollar"),
        (["--price-per-hour", "-3"], "--price-per-hour -3 is no price"),
        (["--chart", "nowhere/chart.png"], "--chart nowhere/chart.png"),
        (["--chart", "chart.doc"], "--chart chart.doc"),
        (["--instance-count", "0"], "--instance-count"),
        (["--calibration", "nowhere.json"], "nowhere.json is no calibration"),
        (["--instance-type", "p4d.24xlarge", "p5.48xlarge", "--prices", "prices.json", "--price-per-hour",
          "p4d.24xlarge=1"], "some prices are in USD, others in JPY"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused_in_a_line(tmp_path: Path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("prices.json").write_text(json.dumps({"p5.48xlarge": {"on_demand": 9000, "currency": "JPY"}}))
    assert cli.main(["plan", "--config", recipe(tmp_path), "--instance-type", "p4d.24xlarge", *arguments]) == 2
    assert message in capsys.readouterr().err


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
    padded = run_config(tmp_path / "none", {"model.preset": "1b", "train.max_epochs": 2, "data.packing": "pad_left"})
    with pytest.raises(UserError, match="--tokens does not tell the rows"):
        planning.count_steps(padded, 10**6)
    start = {"train.start_from": str(tmp_path / "run@5"), "train.max_steps": 1}
    with pytest.raises(UserError, match="is not here"):
        planning.find_model_config(run_config(tmp_path / "none", start), None)


def test_a_run_that_goes_on_takes_the_steps_that_are_left(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(checkpoint, "resolve", lambda reference: (Path(reference), 30))
    changes = {"train.start_from": "run", "train.max_steps": 100}
    assert planning.count_steps(run_config(tmp_path, changes), None) == 100
    assert planning.count_steps(run_config(tmp_path, changes | {"train.start_state": "full"}), None) == 70


def test_unknown_instances_are_refused(tmp_path: Path, capsys):
    assert cli.main(["plan", "--config", recipe(tmp_path), "--instance-type", "p9.huge"]) == 2
    assert "known: ml.g5.12xlarge" in capsys.readouterr().err

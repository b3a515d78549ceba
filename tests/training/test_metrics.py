"""Figures: those of all processes, what log services find in the lines, norms, profiles, and no credential anywhere."""

import gzip
import json
import math
import re
from pathlib import Path

import pytest
import torch
from support.models import tiny_config
from support.ranks import run_ranks
from support.runs import figures, run_config, whole
from support.stores import random_documents, write_store

from tsumugu.distributed.environment import process_group
from tsumugu.errors import UserError
from tsumugu.training import trainer as trainer_module
from tsumugu.training.metrics import Metrics, metric_definitions, read_metrics
from tsumugu.training.signals import StopRequest
from tsumugu.training.trainer import Outcome, Trainer, train

COMMON = {"train.max_steps": 4, "train.global_batch_size": 4, "optimizer.learning_rate": 1e-6}
TOKEN = "hf_" + "aB3" * 11


def config_of(made: Path, **changes):
    return run_config(made / "text", {**COMMON, "model.config": str(made / "gpt_neox"), **changes})


def found(lines: list[str], stores: tuple[str, ...] = ()) -> list[dict[str, float]]:
    patterns = metric_definitions(stores)
    matches = [{name: re.search(pattern, line) for name, pattern in patterns.items()} for line in lines]
    return [{name: float(match[1]) for name, match in of_line.items() if match} for of_line in matches]


def test_every_figure_is_found_in_the_lines_of_a_run(made: Path, tmp_path: Path, capsys):
    train(config_of(made, **{"evaluate.every": 2}), tmp_path)
    lines = [line for line in capsys.readouterr().err.splitlines() if re.match(r"step \d", line)]
    written = [line for line in read_metrics(tmp_path) if "checkpoint_seconds" not in line]
    assert len(lines) == len(written) == 4 + 3
    for line, expected in zip(found(lines), written, strict=True):
        names = {name for name in metric_definitions() if expected.get(name) is not None}
        assert line.keys() == names
        assert {"validation_loss", "validation_bits_per_byte"} <= names or {"loss", "grad_norm"} <= names
        assert line == pytest.approx({name: expected[name] for name in names}, rel=1e-5)
    assert "e-07" in "".join(lines)


def test_figures_that_are_no_numbers_and_stores_of_a_mixture_are_found(tmp_path: Path, capsys):
    metrics = Metrics(tmp_path, 0, 10, {})
    line = dict.fromkeys(metric_definitions(), 1.0) | {"step": 3, "loss": math.nan, "grad_norm": math.inf, "mfu": None}
    metrics.write({key: value for key, value in line.items() if not key.startswith("validation")})
    metrics.write({"step": 3, "validation_loss": 2.0, "validation/日本語/loss": 1e-7})
    metrics.close()
    training, validation = found(capsys.readouterr().err.splitlines()[:2], ("日本語",))
    assert (training["step"], training["tokens_seen"]) == (3, 1)
    assert math.isnan(training["loss"])
    assert math.isnan(training["grad_norm"])
    assert "mfu" not in training
    assert validation == {"step": 3, "validation_loss": 2, "validation/日本語/loss": 1e-7}


def test_the_memory_is_that_of_the_process_that_has_most_and_each_profiles_its_steps(made: Path, tmp_path: Path):
    run_ranks(_with_uneven_memory, 2, made, tmp_path)
    assert {line["memory_peak_gib"] for line in read_metrics(tmp_path) if "loss" in line} == {11.0}
    for rank in (0, 1):
        with gzip.open(tmp_path / "profile" / f"rank-{rank}.json.gz") as file:
            names = [event.get("name", "") for event in json.load(file)["traceEvents"]]
        assert names.count("aten::log_softmax") == 2 * 2  # steps × micro batches
        assert "aten::_fused_adamw_" in names


def _with_uneven_memory(made: Path, run_dir: Path) -> None:
    trainer_module.memory_peak_gib = lambda _device: 10.0 + torch.distributed.get_rank()
    train(config_of(made, **{"train.profile_steps": [2, 3]}), run_dir)


def test_norms_by_part_are_those_of_the_whole_tensors_on_any_mesh(made: Path, tmp_path: Path):
    config = config_of(made, **{"train.log_norms": True, "train.log_every": 2})
    with process_group() as environment:
        trainer = Trainer(config, tmp_path / "plain", environment)
        weights = {name: whole(p) for name, p in trainer.model.named_parameters()}
        gradients: dict[str, torch.Tensor] = {}
        for name, parameter in trainer.model.named_parameters():
            parameter.register_post_accumulate_grad_hook(
                lambda p, name=name: gradients.__setitem__(name, whole(p.grad))
            )
        trainer.train_step(StopRequest())
    groups = {"embedding": "embed_in", "layer.0": "layers.0.", "layer.1": "layers.1.", "head": "lm_head"}
    groups["final_layer_norm"] = "final_layer_norm"
    expected = {"parameter_norm": torch.cat([w.flatten() for w in weights.values()]).norm()}
    for group, part in groups.items():
        for prefix, tensors in (("parameter_norm", weights), ("grad_norm", gradients)):
            chosen = [t.flatten().double() for name, t in tensors.items() if part in name]
            expected[f"{prefix}/{group}"] = torch.cat(chosen).norm()
    train(config, tmp_path / "one")
    replicas = config_of(made, **{"train.log_norms": True, "parallel.shard_degree": 1})
    run_ranks(_train_both, 2, config, tmp_path / "sharded", replicas, tmp_path / "replicas")
    for run in ("one", "sharded", "replicas"):
        line = next(line for line in figures(tmp_path / run) if "loss" in line)
        named = {key: line[key] for key in line if "norm/" in key or key == "parameter_norm"}
        assert named == pytest.approx({key: float(value) for key, value in expected.items()}, rel=1e-5), run
        parts = [line[key] ** 2 for key in line if key.startswith("grad_norm/")]
        assert math.sqrt(sum(parts)) == pytest.approx(line["grad_norm"], rel=1e-5)


def _train_both(first, first_dir: Path, second, second_dir: Path) -> None:
    train(first, first_dir)
    train(second, second_dir)


def test_norms_change_nothing_that_is_learned(made: Path, tmp_path: Path):
    train(config_of(made), tmp_path / "without")
    train(config_of(made, **{"train.log_norms": True}), tmp_path / "with")
    without, with_norms = figures(tmp_path / "without"), figures(tmp_path / "with")
    assert [{key: line[key] for key in plain} for line, plain in zip(with_norms, without, strict=True)] == without


@pytest.mark.parametrize("steps", [[3], [3, 2], [0, 2], [1, 2, 3]])
def test_steps_to_profile_are_a_range(steps: list[int], made: Path):
    with pytest.raises(UserError, match=r"train\.profile_steps"):
        config_of(made, **{"train.profile_steps": steps})


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_a_memory_snapshot_needs_a_gpu(made: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"train\.memory_snapshot .* no GPU"):
        train(config_of(made, **{"train.memory_snapshot": 2}), tmp_path / "run")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_memory_snapshot_is_of_its_step(made: Path, tmp_path: Path):
    train(config_of(made, **{"train.memory_snapshot": 2}), tmp_path)
    assert (tmp_path / "memory" / "rank-0.pickle").stat().st_size > 1000


def test_credentials_are_not_in_the_run_folder_and_the_run_resumes(tmp_path: Path, capsys):
    secret = tmp_path / TOKEN
    write_store(secret / "store", random_documents(30, seed=1), random_documents(9, seed=2))
    tiny_config("gpt_neox", tied=False).save_pretrained(secret / "model")
    changes = {**COMMON, "model.config": str(secret / "model"), "train.log_to": ["tensorboard"]}
    config = run_config(secret / "store", {**changes, "train.stop_after": 2})
    assert train(config, tmp_path / "run") == Outcome(2, 4, interrupted=True)
    assert train(run_config(secret / "store", changes), tmp_path / "run") == Outcome(4, 4)
    with pytest.raises(UserError) as refused:
        train(run_config(secret / "nowhere", changes), tmp_path / "run")
    assert TOKEN not in str(refused.value)
    shown = capsys.readouterr()
    assert TOKEN not in shown.out + shown.err
    for file in (tmp_path / "run").rglob("*"):
        assert file.is_dir() or TOKEN.encode() not in file.read_bytes(), file
    assert "[redacted]/model" in (tmp_path / "run" / "config.yaml").read_text()

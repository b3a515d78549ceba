"""A run from its start to its end: length, figures, what it refuses, and how it is interrupted."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist
import yaml
from support.models import VOCABULARY, tiny_config
from support.ranks import run_ranks
from support.runs import TIMINGS, StopAfter, run_config
from support.stores import write_store

from tsumugu import cli, config
from tsumugu.data.batches import training_batches
from tsumugu.distributed.environment import process_group
from tsumugu.distributed.mesh import build_mesh
from tsumugu.errors import UserError
from tsumugu.training import checkpoint, trainer
from tsumugu.training.metrics import read_metrics
from tsumugu.training.signals import StopRequest
from tsumugu.training.trainer import Outcome, Trainer, train

COMMON = {"train.max_steps": 3, "train.global_batch_size": 2, "optimizer.learning_rate": 1e-2}


def config_of(made: Path, store: str = "text", **changes):
    return run_config(made / store, {**COMMON, "model.config": str(made / "gpt_neox"), **changes})


def test_the_run_folder_holds_what_was_done(made: Path, tmp_path: Path):
    changes = {"train.log_every": 2, "evaluate.every": 2, "train.log_to": ["tensorboard"]}
    before = time.monotonic()
    assert train(config_of(made, **changes), tmp_path) == Outcome(3, 3)
    elapsed = time.monotonic() - before
    lines = read_metrics(tmp_path)
    training = [line for line in lines if "loss" in line]
    assert [line["step"] for line in training] == [1, 2, 3]  # the first step is always there
    assert [line["step"] for line in lines if "validation_loss" in line] == [0, 2, 3]
    assert [line["tokens_seen"] for line in training] == [2 * 16, 2 * 2 * 16, 3 * 2 * 16]
    assert [line["supervised_tokens"] for line in training] == [2 * 16, 2 * 2 * 16, 3 * 2 * 16]
    for line in training:
        assert line.keys() >= {*TIMINGS, "step", "loss", "learning_rate", "grad_norm", "tokens_seen"}
        assert line["mfu"] is None  # nobody states the peak of this processor
        assert 0 < line["data_seconds"] < line["step_seconds"] < elapsed
        assert line["tokens_per_second"] == pytest.approx(2 * 16 / line["step_seconds"])
        assert line["tokens_per_second_per_device"] == line["tokens_per_second"]
        assert 0.01 < line["memory_peak_gib"] < 100
    assert config.load(config.TrainingRun, [str(tmp_path / "config.yaml")]) == config_of(made, **changes)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["model_type"] == "gpt_neox"
    assert (tmp_path / "tokenizer" / "contract.json").exists()
    assert list((tmp_path / "tensorboard").iterdir())
    content = (tmp_path / "metrics.jsonl").read_bytes()
    assert train(config_of(made, **changes), tmp_path) == Outcome(3, 3, already_done=True)
    assert (tmp_path / "metrics.jsonl").read_bytes() == content


def test_steps_are_timed_without_evaluations_and_checkpoints(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    save = Trainer.save
    monkeypatch.setattr(Trainer, "save", lambda self: (time.sleep(0.5), save(self))[1])
    train(config_of(made, **{"checkpoint.every": 1, "train.log_every": 3}), tmp_path)
    assert [line["step_seconds"] < 0.5 for line in read_metrics(tmp_path) if "loss" in line] == [True, True]


def slow_second_rank(made: Path, folder: Path) -> None:
    def late(*arguments):
        if dist.get_rank() == 1:
            time.sleep(0.3)
        return training_batches(*arguments)

    trainer.training_batches = late  # in this process alone
    train(config_of(made), folder)
    dist.barrier()


def test_data_seconds_are_those_of_the_slowest_process(made: Path, tmp_path: Path):
    run_ranks(slow_second_rank, 2, made, tmp_path)
    assert [line["data_seconds"] >= 0.3 for line in read_metrics(tmp_path) if "loss" in line] == [True] * 3


@pytest.mark.parametrize(
    ("length", "steps", "rows"),
    [
        ({"train.max_tokens": 100}, 4, 8),  # 32 tokens a step
        ({"train.max_tokens": 96}, 3, 6),
        ({"train.max_epochs": 1.1}, 6, 11),  # 1.1 × 10 is a little over 11 in floating point
        ({"train.max_epochs": 0.05}, 1, 1),
        ({"train.max_steps": 9}, 9, 18),
    ],
    ids=str,
)
def test_the_length_of_a_run(length: dict, steps: int, rows: int, made: Path, tmp_path: Path):
    write_store(tmp_path / "store", [[4 + id % 90 for id in range(16 * 10 + 1)]])
    changes = {**COMMON, "model.config": str(made / "gpt_neox"), "train.max_steps": None, **length}
    with process_group() as environment:
        trainer = Trainer(run_config(tmp_path / "store", changes), tmp_path / "run", environment)
        assert (trainer.data.mixture.rows, trainer.max_steps, trainer.data.mixture.total) == ((10,), steps, rows)
        while trainer.step < trainer.max_steps:
            trainer.train_step(StopRequest())
            trainer.step += 1
        assert trainer.tokens_seen == rows * 16


def test_the_ids_of_a_model_from_scratch_are_the_tokenizers(made: Path, tmp_path: Path):
    """Foreign ids would name rows that do not learn (padding), or none of the vocabulary."""
    for pad_id in (7, VOCABULARY + 5):
        foreign = tiny_config("llama", True, pad_token_id=pad_id, bos_token_id=8, eos_token_id=[9, 0])
        foreign.save_pretrained(tmp_path / "config")
        train(config_of(made, **{"model.config": str(tmp_path / "config")}), tmp_path / f"run-{pad_id}")
        found = json.loads((tmp_path / f"run-{pad_id}" / "model" / "config.json").read_text())
        assert [found[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [1, 2, 3]


def test_a_store_without_supervised_tokens_trains_nothing(made: Path, tmp_path: Path):
    ids = list(range(4, 16))
    store = write_store(tmp_path / "store", [ids] * 4, masks=[[0] * len(ids)] * 4)
    changes = {**COMMON, "model.config": str(made / "gpt_neox"), "data.packing": "pad_left"}
    assert train(run_config(store, changes), tmp_path / "run") == Outcome(3, 3)
    lines = [line for line in read_metrics(tmp_path / "run") if "loss" in line]
    assert [(line["loss"], line["grad_norm"]) for line in lines] == [(None, 0.0)] * 3


def test_a_loss_that_is_no_number_ends_the_run(made: Path, tmp_path: Path):
    with pytest.raises(
        UserError,
        match=r"step 2: not finite: loss nan, .* \(rank 0, rows store:\d+ store:\d+\); the step is not applied",
    ):
        train(config_of(made, **{"optimizer.learning_rate": 1e38}), tmp_path)
    assert checkpoint.complete_steps(tmp_path) == []


@pytest.mark.parametrize(
    ("store", "changes", "message"),
    [
        ("nowhere", {}, "nowhere holds no token store"),
        ("instructions", {}, "data.packing is concatenate, but .*instructions holds instructions"),
        ("instructions", {"data.packing": "pad_left", "data.sequence_length": 8}, "longest example has 17 tokens"),
        (
            "instructions",
            {"data.packing": "pad_left", "train.max_steps": None, "train.max_tokens": 99},
            "train.max_tokens counts full rows",
        ),
        ("text", {"train.global_batch_size": 3, "train.micro_batch_size": 2}, "not a multiple of"),
        ("text", {"schedule.warmup_steps": 4}, "take 4 steps, the run has 3"),
        ("text", {"parallel.shard_degree": 2}, "is not the world size 1"),
        ("text", {"parallel.replicate_degree": 2}, "is not the world size 1"),
        ("text", {"data.sequence_length": 4096}, "the model has 2048 positions"),
        ("text", {"model.config": __file__}, "no model configuration at"),
    ],
)
def test_what_contradicts_itself_is_refused(store: str, changes: dict, message: str, made: Path, tmp_path: Path):
    with pytest.raises(UserError, match=message):
        train(config_of(made, store, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_store_of_another_tokenizer_is_refused(made: Path, tmp_path: Path):
    train(config_of(made), tmp_path / "run")
    other = write_store(tmp_path / "other", [list(range(4, 90))], fingerprint="of another tokenizer")
    changes = {**COMMON, "train.start_from": str(tmp_path / "run")}
    with pytest.raises(UserError, match=r"made with another tokenizer than train\.start_from"):
        train(run_config(other, changes), tmp_path / "new")
    with pytest.raises(UserError, match=r"data\.store was"):
        train(run_config(other, {**COMMON, "model.config": str(made / "gpt_neox")}), tmp_path / "run")
    (other / "tokenizer" / "contract.json").write_bytes((made / "text" / "tokenizer" / "contract.json").read_bytes())
    with pytest.raises(UserError, match="its tokenizer folder is not the tokenizer that made its ids"):
        train(run_config(other, changes), tmp_path / "new")
    tiny_config("gpt_neox", tied=False, vocab_size=VOCABULARY - 1).save_pretrained(tmp_path / "narrow")
    with pytest.raises(UserError, match="has 131 ids, the model only 130"):
        train(config_of(made, **{"model.config": str(tmp_path / "narrow")}), tmp_path / "new")


@pytest.mark.parametrize(
    ("shard", "replicate", "shape"), [(None, None, (1, 1)), (1, None, (1, 1)), (None, 1, (1, 1)), (1, 1, (1, 1))]
)
def test_degrees_that_are_not_set_follow_from_the_world(shard, replicate, shape):
    with process_group():
        mesh = build_mesh(config.ParallelConfig(shard_degree=shard, replicate_degree=replicate), 1, "cpu")
        assert (tuple(mesh.shape), mesh.mesh_dim_names) == (shape, ("replicate", "shard"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_its_step_and_exit_3_says_so(
    number: signal.Signals, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    """The same signal arrives twice at once, as it does where a scheduler and torchrun both pass it on."""
    train_step = Trainer.train_step

    def signalled(self: Trainer, request):
        launched = train_step(self, request)
        if self.step == 1:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
        return launched

    monkeypatch.setattr(Trainer, "train_step", signalled)
    handler = signal.getsignal(number)
    config.write(config_of(made), tmp_path / "config.yaml")
    arguments = ["train", "--config", str(tmp_path / "config.yaml"), "--run-dir", str(tmp_path / "run")]
    assert cli.main(arguments) == 3
    assert "interrupted, checkpoint saved at step 2 of 3" in capsys.readouterr().out
    assert signal.getsignal(number) is handler
    assert checkpoint.complete_steps(tmp_path / "run") == [2]
    assert cli.main(arguments) == 0
    assert "done, 3 steps" in capsys.readouterr().out


def test_a_signal_in_the_last_step_does_not_make_a_run_unfinished(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with process_group() as environment:
        trainer = Trainer(config_of(made, **{"train.max_steps": 1}), tmp_path, environment)
        assert trainer.train(StopAfter(1)) == Outcome(1, 1)


def test_a_second_signal_later_ends_the_process_at_once():
    script = """
import os, signal, time
from tsumugu.training import signals
signals._ECHO_SECONDS = 0.2
with signals.stop_requests() as request:
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    assert request
    time.sleep(0.3)
    print("still here", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    print("never here")
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (128 + signal.SIGTERM, "still here\n")


def test_figures_that_are_no_numbers_are_null(made: Path, tmp_path: Path):
    train(config_of(made), tmp_path)
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))
        assert all(value is None or math.isfinite(value) for value in values.values())


def test_the_resolved_configuration_is_yaml_with_every_default(made: Path, tmp_path: Path):
    train(config_of(made), tmp_path)
    written = yaml.safe_load((tmp_path / "config.yaml").read_text(encoding="utf-8"))
    assert written["optimizer"]["beta2"] == 0.95
    assert written["checkpoint"] == {"every": None, "keep": 2, "keep_every": None, "asynchronous": True}

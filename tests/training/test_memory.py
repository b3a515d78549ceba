"""Out of memory: where it is, by hand, and which changes save how much."""

import dataclasses
from pathlib import Path

import pytest
import torch
from support.models import VOCABULARY
from support.ranks import run_ranks
from support.runs import run_config

from tsumugu import cli
from tsumugu import config as configuration
from tsumugu.errors import UserError
from tsumugu.training.memory import Memory, changes
from tsumugu.training.trainer import Trainer, train

GIB = 2**30
COMMON = {"train.max_steps": 4, "train.global_batch_size": 8, "train.micro_batch_size": 4}

# GPT-NeoX, 2 layers of 32, MLP 64: attention 4 matrices, MLP 2, each with its bias, 2 layer norms
_LAYER = 4 * 32 * 32 + 4 * 32 + 2 * 32 * 64 + 64 + 32 + 2 * 2 * 32
PARAMETERS = 2 * VOCABULARY * 32 + 2 * _LAYER + 2 * 32


def config_of(made: Path, **more):
    return run_config(made / "text", {**COMMON, "model.config": str(made / "gpt_neox"), **more})


def runs_out(monkeypatch: pytest.MonkeyPatch, at_step: int, at_rank: int = 0) -> None:
    summed_loss = Trainer._summed_loss

    def full(self: Trainer, batch):
        if self.step + 1 == at_step and self.environment.rank == at_rank and self.model.training:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore words of torch.")
        return summed_loss(self, batch)

    monkeypatch.setattr(Trainer, "_summed_loss", full)


def shown_parts(text: str) -> dict[str, float]:
    lines = [line.split() for line in text.splitlines() if line.startswith("  ") and line.endswith(" GiB")]
    return {line[0]: float(line[-2]) for line in lines}


def test_the_report_says_where_the_memory_is(made: Path, tmp_path: Path, monkeypatch, capsys):
    runs_out(monkeypatch, at_step=3)
    configuration.write(config_of(made), tmp_path / "config.yaml")
    assert cli.main(["train", "--config", str(tmp_path / "config.yaml"), "--run-dir", str(tmp_path / "run")]) == 2
    shown = capsys.readouterr().err
    assert "out of memory: rank 0, step 3: CUDA out of memory. Tried to allocate 2.00 GiB." in shown
    assert "More words" not in shown
    assert "Traceback" not in shown
    parts = shown_parts(shown)
    # rotary frequencies (not parameters) are a few bytes; a moment's step counter is 4 bytes a parameter tensor
    assert parts["weights"] == pytest.approx(4 * PARAMETERS / GIB, rel=0.02)
    assert parts["moments"] == pytest.approx(8 * PARAMETERS / GIB, rel=0.02)
    assert parts["gradients"] == 0
    # 4 rows of 16 tokens, in float32
    assert parts["logits"] == pytest.approx(4 * 16 * VOCABULARY * 4 / GIB, rel=0.01)
    [last] = [line for line in shown.splitlines() if line.startswith("tsumugu: out of memory: rank 0, step 3 (")]
    assert "set train.micro_batch_size 2" in last


@pytest.mark.parametrize("way", [{}, {"parallel.fsdp": True, "parallel.sync_each_micro_batch": False}])
def test_gradients_that_have_gathered_are_there(way: dict, made: Path, tmp_path: Path, monkeypatch, capsys):
    """In the second micro batch of a step, those of the first are."""
    summed_loss, calls = Trainer._summed_loss, []

    def full(self: Trainer, batch):
        calls.append(batch)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("full")
        return summed_loss(self, batch)

    monkeypatch.setattr(Trainer, "_summed_loss", full)
    monkeypatch.setattr(Trainer, "evaluate", lambda _: {})
    with pytest.raises(UserError, match="out of memory: rank 0, step 1"):
        train(config_of(made, **way), tmp_path)
    parts = shown_parts(capsys.readouterr().err)
    assert parts["gradients"] == pytest.approx(4 * PARAMETERS / GIB, rel=0.02)
    assert parts["moments"] == 0


def test_building_that_runs_out_is_said_so(made: Path, tmp_path: Path, monkeypatch, capsys):
    def full(*_):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr("tsumugu.training.trainer.build_optimizer", full)
    with pytest.raises(UserError, match=r"out of memory: rank 0, building the model .use more or larger devices"):
        train(config_of(made), tmp_path)


def test_savings_by_hand_and_the_cheapest_first(made: Path):
    memory = Memory(
        weights=4 * GIB,
        trained=4 * GIB,
        gradients=4 * GIB,
        waiting=0,
        moments=8 * GIB,
        logits=6 * GIB,
        activations=34 * GIB,
        unused=0,
    )
    config = config_of(made, **{"parallel.shard_degree": 2})
    found = {change.setting: change.saves / GIB for change in changes(config, memory, world_size=8)}
    assert found == pytest.approx(
        {
            "train.micro_batch_size 2": 20,
            "parallel.shard_degree 8, parallel.replicate_degree 1": 16 * 6 / 8,
            "parallel.activation_checkpointing selective": 14,
            "parallel.activation_checkpointing full": 32,
            "parallel.offload_optimizer true": 16,
            "parallel.offload_activations true": 34,
            "data.sequence_length 8": 20,
        }
    )
    waits = dataclasses.replace(memory, gradients=12 * GIB, waiting=8 * GIB)
    once = {change.setting: change.saves / GIB for change in changes(config, waits, world_size=8)}
    assert once == pytest.approx(found | {"parallel.sync_each_micro_batch true": 4})
    assert next(iter(once)) == "parallel.sync_each_micro_batch true"
    alone = config_of(made, **{"train.micro_batch_size": 1})
    assert [change.setting for change in changes(alone, memory, world_size=1)][:2] == [
        "parallel.activation_checkpointing selective",
        "parallel.activation_checkpointing full",
    ]


def test_every_process_that_runs_out_reports(made: Path, tmp_path: Path):
    errors = run_ranks(_run_out_on_both, 2, made, tmp_path)
    for rank, error in enumerate(errors):
        assert error.startswith(f"out of memory: rank {rank}, step 2 (set parallel.sync_each_micro_batch true or set ")


def _run_out_on_both(made: Path, run_dir: Path) -> str:
    with pytest.MonkeyPatch.context() as monkeypatch:
        runs_out(monkeypatch, at_step=2, at_rank=torch.distributed.get_rank())
        once = {"train.micro_batch_size": 2, "parallel.sync_each_micro_batch": False}
        with pytest.raises(UserError) as refused:
            train(config_of(made, **once), run_dir)
    return str(refused.value)

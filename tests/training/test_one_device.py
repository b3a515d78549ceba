"""One device that holds all: plain weights and masters in two parts are the run that FSDP2 over one process is."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import tiny_config
from support.ranks import run_ranks
from support.runs import StopAfter, figures, run_config, whole
from transformers import AutoConfig

from tsumugu.distributed.environment import process_group
from tsumugu.errors import UserError
from tsumugu.model import masters
from tsumugu.training import trainer as trainer_module
from tsumugu.training.trainer import Trainer

STEPS = 6
SHARDED = {"parallel.fsdp": True}


def config_of(made: Path, dtype: str = "bfloat16", **changes: Any):
    defaults = {
        "model.config": str(made / "gpt_neox"),
        "train.max_steps": STEPS,
        "train.global_batch_size": 8,
        "train.micro_batch_size": 2,
        "train.dtype": dtype,
        "optimizer.learning_rate": 1e-3,
        "schedule.warmup_steps": 2,
    }
    return run_config(made / "text", {**defaults, **changes})


def take(config, run_dir: Path, stop: int | None = None) -> dict[str, torch.Tensor]:
    """Trains, and returns masters and moments as they are at the end, whole."""
    with process_group() as environment:
        trainer = Trainer(config, run_dir, environment)
        trainer.train(StopAfter(stop))
        state = {}
        for name, parameter in trainer.model.named_parameters():
            master = masters.of(parameter)
            state[name] = master.whole() if master else whole(parameter)
            for key, value in trainer.optimizer.state[parameter].items():
                state[f"{name} {key}"] = whole(value)
        return state


def losses(run_dir: Path) -> list[float]:
    return [line["loss"] for line in figures(run_dir) if "loss" in line]


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert not [name for name in expected if not torch.equal(found[name], expected[name])]


def test_in_float32_it_is_the_same_bit_for_bit(made: Path, tmp_path: Path):
    assert_same(
        take(config_of(made, "float32"), tmp_path / "plain"),
        take(config_of(made, "float32", **SHARDED), tmp_path / "sharded"),
    )
    assert figures(tmp_path / "plain") == figures(tmp_path / "sharded")


def test_in_bfloat16_it_differs_by_a_master_halfway_between_two_weights_at_most(made: Path, tmp_path: Path):
    take(config_of(made), tmp_path / "plain")
    take(config_of(made, **SHARDED), tmp_path / "sharded")
    assert losses(tmp_path / "plain") == pytest.approx(losses(tmp_path / "sharded"), rel=1e-4)
    take(config_of(made, "float32"), tmp_path / "exact")
    assert losses(tmp_path / "plain") == pytest.approx(losses(tmp_path / "exact"), rel=1e-3)


@pytest.mark.parametrize("changes", [{}, {"checkpoint.asynchronous": False}])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(made: Path, tmp_path: Path, changes: dict[str, Any]):
    expected = take(config_of(made, **changes), tmp_path / "whole")
    take(config_of(made, **changes), tmp_path / "stopped", 3)
    assert_same(take(config_of(made, **changes), tmp_path / "stopped"), expected)


def at_the_checkpoint(made: Path, run_dir: Path, **changes: Any) -> dict[str, torch.Tensor]:
    return take(config_of(made, **changes), run_dir, 0)


def on_two(made: Path, folder: Path) -> dict[str, torch.Tensor]:
    found = at_the_checkpoint(made, folder / "to two")
    take(config_of(made), folder / "from two", 3)
    return found


def test_checkpoints_hold_plain_masters_whichever_way_they_are_kept(made: Path, tmp_path: Path):
    plain = take(config_of(made), tmp_path / "from plain", 3)
    assert_same(at_the_checkpoint(made, tmp_path / "from plain", **SHARDED), plain)
    take(config_of(made), tmp_path / "to two", 3)
    assert_same(run_ranks(on_two, 2, made, tmp_path)[0], plain)
    sharded = take(config_of(made, **SHARDED), tmp_path / "from sharded", 3)
    assert_same(at_the_checkpoint(made, tmp_path / "from sharded"), sharded)
    take(config_of(made), tmp_path / "from two")
    take(config_of(made), tmp_path / "whole")
    assert losses(tmp_path / "from two") == pytest.approx(losses(tmp_path / "whole"), rel=1e-3)


def test_a_run_in_two_parts_goes_back_before_a_spike(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    own = trainer_module.Trainer._summed_loss
    spiked = []

    def loss(self, batch):
        spike = self.step == 4 and self.model.training
        spiked.append(spike)
        return own(self, batch) * (100.0 if spike else 1.0)

    monkeypatch.setattr(trainer_module.Trainer, "_summed_loss", loss)
    guard = {"guard.spike": "rewind", "guard.spike_window": 3, "checkpoint.every": 2}
    take(config_of(made, **guard), tmp_path / "run")
    assert any(spiked)
    found = {line["step"]: line["loss"] for line in figures(tmp_path / "run") if "loss" in line}
    assert list(found) == list(range(1, STEPS + 1))
    assert [step for step in found if found[step] is None] == [5]


def test_adapters_are_in_two_parts_too(made: Path, tmp_path: Path):
    pytest.importorskip("peft")
    from support.models import stock_model

    from tsumugu.config import LoraConfig

    stock_model(tiny_config("llama", False)).save_pretrained(tmp_path / "model")
    lora = {
        "model.config": None,
        "model.pretrained": str(tmp_path / "model"),
        "model.lora": LoraConfig(rank=4),
        "tokenizer.path": str(made / "text" / "tokenizer"),
    }
    take(config_of(made, **lora), tmp_path / "plain")
    take(config_of(made, **lora, **SHARDED), tmp_path / "sharded")
    assert losses(tmp_path / "plain") == pytest.approx(losses(tmp_path / "sharded"), rel=1e-4)


def test_what_a_model_does_beside_its_head_keeps_logits_whole(made: Path, tmp_path: Path):
    capped = AutoConfig.for_model(
        "gemma2", vocab_size=131, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, head_dim=8, bos_token_id=1, eos_token_id=2, pad_token_id=3,
    )  # fmt: skip
    capped.save_pretrained(tmp_path / "gemma2")
    config = config_of(made, **{"model.config": str(tmp_path / "gemma2")})
    for changes in ({}, SHARDED):
        with process_group() as environment:
            config = config_of(made, **{"model.config": str(tmp_path / "gemma2")}, **changes)
            trainer = Trainer(config, tmp_path / "run", environment)
            assert "a model of type gemma2 does more than its head to make logits" in (trainer.whole_logits or "")
    asked = config_of(made, **{"model.config": str(tmp_path / "gemma2"), "parallel.chunked_loss": True})
    with process_group() as environment, pytest.raises(UserError, match=r"parallel\.chunked_loss is true, but"):
        Trainer(asked, tmp_path / "run", environment)

"""train.deterministic: kernels are limited while a run trains, and what has none is said."""

from pathlib import Path

import pytest
import torch
from support.runs import figures, run_config

from tsumugu.errors import UserError
from tsumugu.training import trainer
from tsumugu.training.trainer import train


def test_a_run_takes_deterministic_kernels_and_leaves_torch_as_it_was(made: Path, tmp_path: Path, monkeypatch):
    modes = []

    def seen(batch_loss):
        modes.append(torch.are_deterministic_algorithms_enabled())
        return batch_loss

    own = trainer.Trainer._summed_loss
    monkeypatch.setattr(trainer.Trainer, "_summed_loss", lambda self, batch: seen(own(self, batch)))
    for name, wanted in (("plain", False), ("deterministic", True)):
        run = {"train.max_steps": 3, "train.global_batch_size": 2, "model.config": str(made / "gpt_neox")}
        train(run_config(made / "text", run | {"train.deterministic": wanted}), tmp_path / name)
        assert modes
        assert all(mode is wanted for mode in modes)
        assert not torch.are_deterministic_algorithms_enabled()
        modes.clear()
    assert figures(tmp_path / "plain") == figures(tmp_path / "deterministic")  # a CPU has no other kernels


def test_an_operation_without_a_deterministic_kernel_is_named(made: Path, tmp_path: Path, monkeypatch):
    def put(self, batch):
        return torch.zeros(3, requires_grad=True).put(torch.tensor([0]), torch.ones(1), accumulate=False).sum()

    monkeypatch.setattr(trainer.Trainer, "_summed_loss", put)
    run = {"train.max_steps": 3, "model.config": str(made / "gpt_neox"), "train.deterministic": True}
    with pytest.raises(UserError, match=r"but put_ does not have a deterministic implementation \(set it"):
        train(run_config(made / "text", run), tmp_path)

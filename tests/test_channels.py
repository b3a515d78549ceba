"""`channel:NAME/…` in a configuration: one recipe, whose data lie elsewhere on every machine."""

import subprocess
import sys

import pytest

from tsumugu import config
from tsumugu.cli import main
from tsumugu.errors import UserError

RECIPE = """
model: {pretrained: channel:model, lora: {rank: 4}}
data:
  stores:
    - {name: a, path: channel:data/a, weight: 1}
    - {name: b, path: /else/channel:data, weight: 1}
train: {max_steps: 1}
"""


def paths(loaded: config.TrainingRun) -> list:
    return [loaded.model.pretrained, *(store.path for store in loaded.data.stores)]


@pytest.fixture
def recipe(tmp_path) -> str:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return str(tmp_path / "recipe.yaml")


def test_a_channel_stands_for_a_path_at_any_depth(recipe):
    channels = {"model": "/m", "data": "/d"}
    assert paths(config.load(config.TrainingRun, [recipe], [], channels)) == ["/m", "/d/a", "/else/channel:data"]
    flags = ["--model.pretrained", "channel:data/m", "--tokenizer.path=channel:model/t"]
    loaded = config.load(config.TrainingRun, [recipe], flags, channels)
    assert (loaded.model.pretrained, loaded.tokenizer.path) == ("/d/m", "/m/t")


def test_by_default_they_come_from_the_environment(recipe, monkeypatch):
    monkeypatch.setenv(config.CHANNELS, "model=/m")
    config.write_channels(config.read_channels() | {"data": "/a folder/d"})
    assert paths(config.load(config.TrainingRun, [recipe]))[:2] == ["/m", "/a folder/d/a"]


def test_a_channel_that_is_not_there_is_named(recipe, monkeypatch):
    monkeypatch.delenv(config.CHANNELS, raising=False)
    with pytest.raises(UserError, match=r"model.pretrained is channel:model.*--channel model=PATH"):
        config.load(config.TrainingRun, [recipe])
    with pytest.raises(UserError, match=r"data.stores\[0\].path is channel:data/a, .*there is: model"):
        config.load(config.TrainingRun, [recipe], [], {"model": "/m"})


def test_the_flag_reaches_the_processes_that_are_started(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(config.CHANNELS, "")
    (tmp_path / "recipe.yaml").write_text("model: {preset: tiny}\ndata: {store: 'channel:s/x'}\ntrain: {max_steps: 1}")
    arguments = ["--config", str(tmp_path / "recipe.yaml"), "--channel", f"s={tmp_path}/some where/"]
    assert main(["train", *arguments, "--run-dir", str(tmp_path / "run")]) == 2
    assert "some where/x" in capsys.readouterr().err
    started = [sys.executable, "-c", "from tsumugu import config; print(config.read_channels()['s'])"]
    assert subprocess.run(started, check=True, capture_output=True, text=True).stdout == f"{tmp_path}/some where\n"
    assert main(["train", *arguments[:2], "--channel", "data"]) == 2
    assert "is not NAME=PATH" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["data='/disk/data", "data"])
def test_an_environment_variable_that_cannot_be_read_is_refused(text, recipe, monkeypatch):
    monkeypatch.setenv(config.CHANNELS, text)
    with pytest.raises(UserError, match="NAME=PATH"):
        config.load(config.TrainingRun, [str(recipe)])

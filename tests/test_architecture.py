"""The house as docs/architecture.md draws it, and the recipes that it ships."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tsumugu import config
from tsumugu.cli import main
from tsumugu.data.mixture import mix

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def test_imports_go_one_way():
    lint_imports = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([lint_imports, "--no-cache"], cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_parses(recipe):
    config_class = config.Preparation if "prepare" in recipe.stem else config.TrainingRun
    loaded = config.load(config_class, [str(recipe)])
    assert isinstance(loaded, config_class)


def test_a_written_configuration_reads_back_equal(tmp_path):
    loaded = config.load(config.TrainingRun, [str(ROOT / "recipes" / "quickstart-pretrain.yaml")])
    config.write(loaded, tmp_path / "config.yaml")
    assert config.load(config.TrainingRun, [str(tmp_path / "config.yaml")]) == loaded


def test_a_later_file_and_flags_win_and_lists_are_replaced_whole(tmp_path):
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("prepare: {tokenizer: t, output: o, sources: [{name: a, path: a}, {name: b, path: b}]}")
    second.write_text("prepare: {output: p, sources: [{name: c, path: c}]}")
    loaded = config.load(config.Preparation, [str(first), str(second)], ["--prepare.output", "q"])
    assert [source.name for source in loaded.prepare.sources] == ["c"]
    assert (loaded.prepare.tokenizer, loaded.prepare.output) == ("t", "q")


def test_a_later_list_replaces_the_earlier_one_whole(tmp_path):
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("prepare: {tokenizer: t, output: o, sources: [{name: a, path: a, language: en, text: body}]}")
    second.write_text("prepare: {sources: [{name: b, path: b}]}")
    [source] = config.load(config.Preparation, [str(first), str(second)]).prepare.sources
    assert (source.name, source.language, source.text) == ("b", "ja", None)
    [source] = config.load(
        config.Preparation, [str(first)], ['--prepare.sources=[{"name":"c","path":"c"}]']
    ).prepare.sources
    assert (source.name, source.language, source.text) == ("c", "ja", None)
    added = config.load(
        config.Preparation, [str(first)], ['--prepare.sources+={"name":"c","path":"c"}']
    ).prepare.sources
    assert [(source.name, source.language) for source in added] == [("a", "en"), ("c", "ja")]


def test_the_english_recipe_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("quickstart/corpus").mkdir(parents=True)
    shutil.copy(ROOT / "src/tsumugu/sample/english.jsonl", "quickstart/corpus")
    prepare, pretrain = (str(ROOT / "recipes" / f"english-{name}.yaml") for name in ("prepare", "pretrain"))
    command = next(line for line in Path(prepare).read_text().splitlines() if "tokenizer train" in line)
    assert main(command.lstrip("# ").split()[1:]) == 0
    assert main(["prepare", "--config", prepare]) == 0
    shorter = ["--train.max_epochs=null", "--train.max_steps=2", "--schedule.warmup_steps=0", "--evaluate.batches=1"]
    assert main(["train", "--config", pretrain, "--run-dir", "run", *shorter]) == 0


def test_the_mixture_recipe_anneals_while_the_learning_rate_decays():
    loaded = config.load(config.TrainingRun, [str(ROOT / "recipes" / "mixture-pretrain.yaml")])
    [stage] = loaded.data.stages
    assert loaded.train.max_steps is not None
    assert stage.from_step == loaded.train.max_steps - (loaded.schedule.decay_steps or 0)
    mixture = mix(loaded.data, [10**7, 10**6, 10**5], 20_000 * 512, 512, seed=1)
    # the annealing stage wants 0.4 of its 2,048,000 rows from 100,000 that may be read four times
    rest = (2_048_000 - 400_000) // 2
    assert [list(stage) for stage in mixture.counts] == [[6_144_000, 2_048_000, 0], [rest, rest, 400_000]]
    assert mixture.cut == {"encyclopaedia"}

"""Training looks at its stores first, and does not begin on one that would teach the wrong thing."""

from pathlib import Path

import pytest
from support.ranks import run_ranks
from support.runs import figures, run_config
from support.stores import random_documents, write_store

from tsumugu import config
from tsumugu.errors import UserError
from tsumugu.training.trainer import train

EOS = 2


def _store(path: Path, stop_supervised: bool) -> Path:
    """Instructions that end with eos, of no tokenizer."""
    train = [[*ids, EOS] for ids in random_documents(40, seed=1)]
    masks = [[int(place >= 2) for place in range(len(ids) - 1)] + [int(stop_supervised)] for ids in train]
    return write_store(path, train, random_documents(8, seed=2), masks)


def _config(made: Path, store: Path, **changes):
    values = {
        "model.config": str(made / "gpt_neox"),
        "data.packing": "pad_left",
        "data.sequence_length": 32,
        "train.max_steps": 1,
        "train.global_batch_size": 4,
    }
    return run_config(store, values | {key.replace("__", "."): value for key, value in changes.items()})


def test_a_store_that_teaches_no_stop_is_refused_before_anything_is_made(made: Path, tmp_path: Path):
    broken = _store(tmp_path / "broken", stop_supervised=False)
    with pytest.raises(UserError, match="stop-not-supervised: 40 of 40 rows") as error:
        train(_config(made, broken, data__audit="refuse"), tmp_path / "run")
    assert "tsumugu audit" in error.value.hint
    assert "data.audit: warn" in error.value.hint
    assert not (tmp_path / "run").exists()


def test_it_can_be_trained_on_with_a_warning_or_without(made: Path, tmp_path: Path, capfd: pytest.CaptureFixture):
    broken = _store(tmp_path / "broken", stop_supervised=False)
    train(_config(made, broken, data__audit="warn"), tmp_path / "warned")
    assert "tsumugu: warning: " in (told := capfd.readouterr().err)
    assert "stop-not-supervised" in told
    train(_config(made, broken, data__audit="off"), tmp_path / "silent")
    assert "stop-not-supervised" not in capfd.readouterr().err
    assert figures(tmp_path / "warned")[1:] == figures(tmp_path / "silent")[1:]


def test_a_good_store_is_trained_on_without_a_word(made: Path, tmp_path: Path, capfd: pytest.CaptureFixture):
    train(_config(made, _store(tmp_path / "good", stop_supervised=True), data__audit="refuse"), tmp_path / "run")
    assert "warning" not in capfd.readouterr().err


def test_a_run_that_resumes_is_not_looked_at_again(made: Path, tmp_path: Path, capfd: pytest.CaptureFixture):
    broken = _store(tmp_path / "broken", stop_supervised=False)
    train(_config(made, broken, data__audit="warn", train__max_steps=2, train__stop_after=1), tmp_path / "run")
    capfd.readouterr()
    train(_config(made, broken, data__audit="refuse", train__max_steps=2), tmp_path / "run")
    assert "stop-not-supervised" not in capfd.readouterr().err


def _refused(made: str, store: str, run_dir: str) -> str:
    try:
        train(_config(Path(made), Path(store), data__audit="refuse"), Path(run_dir))
    except UserError as error:
        return str(error)
    return "trained"


def test_every_process_refuses_alike(made: Path, tmp_path: Path):
    broken = _store(tmp_path / "broken", stop_supervised=False)
    told = run_ranks(_refused, 2, str(made), str(broken), str(tmp_path / "run"))
    assert told[0] == told[1]
    assert "stop-not-supervised" in told[0]


@pytest.mark.parametrize(("written", "meant"), [("off", "off"), ('"off"', "off"), ("warn", "warn")])
def test_off_may_be_written_with_and_without_quotes(tmp_path: Path, written: str, meant: str):
    file = tmp_path / "train.yaml"
    file.write_text(f"model: {{preset: tiny}}\ntrain: {{max_steps: 1}}\ndata: {{store: s, audit: {written}}}\n")
    loaded = config.load(config.TrainingRun, [str(file)])
    assert loaded.data.audit == meant
    config.write(loaded, tmp_path / "again.yaml")
    assert config.load(config.TrainingRun, [str(tmp_path / "again.yaml")]) == loaded
    flags = [f"--data.audit={meant}"]
    assert config.load(config.TrainingRun, [str(file)], flags).data.audit == meant

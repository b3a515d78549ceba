"""Training goes on while a checkpoint is written, and what is written is the state at its step."""

import json
import pickle
import random
import shutil
import threading
from pathlib import Path

import pytest
import torch
from support.runs import StopAfter, figures, run_config
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException

from tsumugu.config import CheckpointConfig
from tsumugu.distributed.environment import process_group
from tsumugu.errors import UserError
from tsumugu.training import checkpoint
from tsumugu.training.metrics import read_metrics
from tsumugu.training.trainer import Outcome, Trainer, train

COMMON = {"train.max_steps": 6, "train.global_batch_size": 2, "optimizer.learning_rate": 1e-2, "checkpoint.keep": 3}


def config_of(made: Path, **changes):
    return run_config(made / "text", {**COMMON, "model.config": str(made / "gpt_neox"), **changes})


@pytest.fixture(scope="module")
def run(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that waited for its checkpoints at 2, 4 and 6."""
    run_dir = tmp_path_factory.mktemp("run") / "run"
    train(config_of(made, **{"checkpoint.every": 2, "checkpoint.asynchronous": False}), run_dir)
    return run_dir


def contents_of(run_dir: Path, step: int) -> tuple[dict, dict[str, torch.Tensor]]:
    stored = checkpoint.read_metadata(checkpoint.folder(run_dir, step)).state_dict_metadata
    tensors = {
        name: torch.zeros(entry.size, dtype=entry.properties.dtype)
        for name, entry in stored.items()
        if hasattr(entry, "size")
    }
    checkpoint.load(tensors, checkpoint.folder(run_dir, step))
    return checkpoint.read_state(run_dir, step), tensors


class Releases(StopAfter):
    """Lets the writing of a checkpoint go on once the step after the next is to be taken."""

    def __init__(self, trainer: Trainer, gate: threading.Event):
        super().__init__(None)
        self.trainer, self.gate, self.seen = trainer, gate, []

    def __bool__(self) -> bool:
        if self.trainer.step == 3:
            self.seen.append((self.trainer.saver.running, checkpoint.complete_steps(self.trainer.run_dir)))
            self.gate.set()
        return False


def test_a_checkpoint_is_of_its_step_whatever_happens_while_it_is_written(
    run: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    gate, write = threading.Event(), FileSystemWriter.write_data

    def wait_and_write(*arguments):
        assert gate.wait(60)
        return write(*arguments)

    monkeypatch.setattr(FileSystemWriter, "write_data", wait_and_write)
    with process_group() as environment:
        trainer = Trainer(config_of(made, **{"checkpoint.every": 2}), tmp_path / "run", environment)
        request = Releases(trainer, gate)
        assert trainer.train(request) == Outcome(6, 6)
    assert request.seen == [(True, [])]  # a third step was done while the checkpoint of the second was not written
    for step in (2, 4, 6):
        (state, found), (expected_state, expected) = contents_of(tmp_path / "run", step), contents_of(run, step)
        assert state == expected_state
        assert found.keys() == expected.keys()
        assert not [name for name in expected if not torch.equal(found[name], expected[name])]


def test_stall_and_duration_are_written_down(run: Path, made: Path, tmp_path: Path):
    train(config_of(made, **{"checkpoint.every": 2}), tmp_path / "run")
    lines = [line for line in read_metrics(tmp_path / "run") if "checkpoint_seconds" in line]
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert all(0 < line["checkpoint_stall_seconds"] <= line["checkpoint_seconds"] for line in lines)
    waited = [line for line in read_metrics(run) if "checkpoint_seconds" in line]
    assert all(line["checkpoint_stall_seconds"] == line["checkpoint_seconds"] for line in waited)
    assert figures(run) == figures(tmp_path / "run")


def test_an_error_while_writing_ends_the_run_at_the_next_step(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def broken(*_):
        raise OSError(5, "Input/output error")

    with process_group() as environment:
        trainer = Trainer(config_of(made, **{"checkpoint.every": 2}), tmp_path / "run", environment)
        save = trainer.save

        def save_then_wait() -> None:
            monkeypatch.setattr(FileSystemWriter, "write_data", broken)
            save()
            while not trainer.saver.failed:
                threading.Event().wait(0.001)

        monkeypatch.setattr(trainer, "save", save_then_wait)
        with pytest.raises(CheckpointException, match="Input/output error"):
            trainer.train(StopAfter(None))
        assert trainer.step == 2
    assert [*(tmp_path / "run" / "checkpoints").iterdir()] == []


def test_at_least_two_checkpoints_stay():
    with pytest.raises(UserError, match=r"checkpoint\.keep is 1 .use 2 or more"):
        CheckpointConfig(keep=1)


def newest_of(run_dir: Path) -> int | str | None:
    with process_group():
        try:
            found = checkpoint.newest(run_dir, torch.distributed.group.WORLD, lambda line: None, set())
        except UserError as error:
            return str(error)
        return found.step if found else None


def files_of(run_dir: Path) -> dict[int, list[Path]]:
    steps = checkpoint.complete_steps(run_dir)
    return {step: [path.relative_to(run_dir) for path in checkpoint.folder(run_dir, step).iterdir()] for step in steps}


def copy_file(source: Path, destination: Path, name: Path) -> None:
    (destination / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source / name, destination / name)


def test_of_a_run_that_is_copied_in_any_order_the_newest_whole_checkpoint_is_found(run: Path, tmp_path: Path):
    generator, files = random.Random(0), files_of(run)
    everything = [name for names in files.values() for name in names]
    for number in range(40):
        copied = generator.sample(everything, generator.randint(0, len(everything)))
        for name in copied:
            copy_file(run, tmp_path / f"{number}", name)
        if copied and generator.random() < 0.3:  # the last one is still on its way
            last = tmp_path / f"{number}" / copied[-1]
            last.write_bytes(last.read_bytes()[:-1])
            copied.pop()
        whole = [step for step, names in files.items() if set(names) <= set(copied)]
        found = newest_of(tmp_path / f"{number}")
        if whole:
            assert found == whole[-1]
        else:  # nothing that was promised, or a promise that is not kept
            assert found is None or "every checkpoint of" in str(found)


def test_at_every_moment_of_a_synchronisation_a_whole_checkpoint_is_there(run: Path, tmp_path: Path):
    """From the checkpoints of steps 2 and 4 to those of 4 and 6: uploads and deletions come in any order."""
    generator, files = random.Random(1), files_of(run)
    for number in range(40):
        bucket = tmp_path / f"{number}"
        for name in files[2] + files[4]:
            copy_file(run, bucket, name)
        changes = generator.sample(files[2] + files[6], generator.randint(0, len(files[2] + files[6])))
        for name in changes:
            if name in files[2]:
                (bucket / name).unlink()
            else:
                copy_file(run, bucket, name)
        assert newest_of(bucket) == (6 if set(files[6]) <= set(changes) else 4)


class Malicious:
    def __reduce__(self):
        return print, ("arbitrary code",)


def signed(run_dir: Path, name: str, content: bytes) -> None:
    """Replaces a file of the checkpoint of step 6 and its entry in COMPLETE."""
    folder = checkpoint.folder(run_dir, 6)
    (folder / name).write_bytes(content)
    files = json.loads((folder / "COMPLETE").read_text())
    files[name] = {"size": len(content), "sha256": checkpoint.sha256(folder / name)}
    (folder / "COMPLETE").write_text(json.dumps(files))


def test_metadata_that_would_run_code_are_refused(run: Path, made: Path, tmp_path: Path, capsys):
    shutil.copytree(run, tmp_path / "run")
    signed(tmp_path / "run", ".metadata", pickle.dumps(Malicious()))
    config = config_of(made, **{"model.config": None, "train.start_from": str(tmp_path / "run"), "train.max_steps": 1})
    with pytest.raises(UserError, match=r"holds builtins\.print, which no checkpoint needs") as refused:
        train(config, tmp_path / "new")
    assert "\n" not in str(refused.value)
    assert "arbitrary code" not in capsys.readouterr().out


def test_values_beside_the_tensors_that_would_run_code_are_refused(tmp_path: Path, capsys):
    with process_group():
        torch.distributed.checkpoint.save({"value": Malicious()}, checkpoint_id=tmp_path)
        with pytest.raises(Exception, match="value of a checkpoint may be made to run code"):
            checkpoint.load({"value": 0}, tmp_path)
    assert "arbitrary code" not in capsys.readouterr().out

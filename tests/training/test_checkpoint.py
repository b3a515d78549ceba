"""A checkpoint exists or it does not: whatever is killed, damaged or full, the newest whole one is found."""

import errno
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.models import VOCABULARY
from support.ranks import run_ranks
from support.runs import StopAfter, figures, run_config, whole
from support.stores import store_with_new_ids

from tsumugu.distributed.environment import on_main, process_group
from tsumugu.errors import UserError
from tsumugu.training import checkpoint, saving
from tsumugu.training.saving import Saver
from tsumugu.training.trainer import Outcome, Trainer, train

COMMON = {
    "train.max_steps": 6,
    "train.global_batch_size": 2,
    "optimizer.learning_rate": 1e-2,
    "checkpoint.every": 2,
    "checkpoint.keep": 3,
}


def config_of(made: Path, **changes):
    return run_config(made / "text", {**COMMON, "model.config": str(made / "gpt_neox"), **changes})


@pytest.fixture(scope="module")
def run(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps with checkpoints at 2, 4 and 6."""
    run_dir = tmp_path_factory.mktemp("run") / "run"
    assert train(config_of(made), run_dir) == Outcome(6, 6)
    assert checkpoint.complete_steps(run_dir) == [2, 4, 6]
    return run_dir


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def loaded(config, run_dir: Path) -> tuple[int, dict[str, torch.Tensor], int]:
    """Steps done, weights, and how many parameters have moments, of a run before its next step."""
    with process_group() as environment:
        trainer = Trainer(config, run_dir, environment)
        weights = {name: whole(parameter) for name, parameter in trainer.model.named_parameters()}
        return trainer.step, weights, len(trainer.optimizer.state)


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


DAMAGES: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "flipped byte in the weights": (flip_a_byte, "__0_0.distcp", "has another sha256"),
    "flipped byte in the state": (flip_a_byte, "state.json", "has another sha256"),
    "cut file": (cut, "__0_0.distcp", "bytes, not"),
    "missing file": (Path.unlink, ".metadata", ".metadata is missing"),
    "cut marker": (cut, "COMPLETE", "COMPLETE marker is damaged"),
    "no marker": (Path.unlink, "COMPLETE", "has no COMPLETE marker"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_aloud(damage: str, run: Path, copy: Path, made: Path, capsys):
    act, file, reason = DAMAGES[damage]
    act(checkpoint.folder(copy, 6) / file)
    assert train(config_of(made), copy) == Outcome(6, 6)
    report = capsys.readouterr().out
    assert f"{checkpoint.folder(copy, 6)} is passed over" in report
    assert reason in report
    assert figures(copy) == figures(run)
    assert checkpoint.complete_steps(copy) == [2, 4, 6]
    for step in (2, 4, 6):
        checkpoint.check(checkpoint.folder(copy, step))


def test_a_file_that_cannot_be_read_is_damage(copy: Path, monkeypatch: pytest.MonkeyPatch):
    def broken_disk(file: Path) -> str:
        raise OSError(errno.EIO, "Input/output error", str(file))

    monkeypatch.setattr(checkpoint, "sha256", broken_disk)
    with pytest.raises(UserError, match="cannot be read: Input/output error"):
        checkpoint.check(checkpoint.folder(copy, 6))


def test_a_run_whose_checkpoints_are_all_damaged_is_not_written_over(copy: Path, made: Path):
    for step in (2, 4, 6):
        flip_a_byte(checkpoint.folder(copy, step) / "__0_0.distcp")
    before = (copy / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"every checkpoint of .* is damaged"):
        train(config_of(made), copy)
    assert (copy / "metrics.jsonl").read_bytes() == before


def test_a_damaged_later_checkpoint_does_not_push_out_whole_ones(copy: Path, made: Path):
    shutil.rmtree(checkpoint.folder(copy, 4))
    flip_a_byte(checkpoint.folder(copy, 6) / "__0_0.distcp")
    with process_group() as environment:
        config = config_of(made, **{"checkpoint.every": 1, "checkpoint.keep": 2})
        Trainer(config, copy, environment).train(StopAfter(1))
    checkpoint.check(checkpoint.folder(copy, 3))
    assert checkpoint.complete_steps(copy) == [2, 3, 6]


def test_folders_of_other_names_are_no_checkpoints_and_are_never_deleted(copy: Path, made: Path):
    names = {"step-00000004-backup", "step-00000004-half", ".step-notes", "step-best"}
    for name in names:
        shutil.copytree(checkpoint.folder(copy, 4), copy / "checkpoints" / name)
    (copy / "checkpoints" / "step-00000004-half" / "COMPLETE").unlink()
    assert checkpoint.complete_steps(copy) == [2, 4, 6]
    shutil.rmtree(checkpoint.folder(copy, 6))
    assert train(config_of(made, **{"checkpoint.keep": 2}), copy) == Outcome(6, 6)
    assert {path.name for path in (copy / "checkpoints").iterdir()} == names | {"step-00000004", "step-00000006"}


def test_what_no_run_has_made_is_no_checkpoint(tmp_path: Path, made: Path):
    with process_group():
        assert checkpoint.newest(tmp_path / "nowhere", dist.group.WORLD, print, set()) is None
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        train(config_of(made, **{"model.config": None, "train.start_from": str(tmp_path)}), tmp_path / "run")


def test_the_newest_are_kept(made: Path, tmp_path: Path):
    train(config_of(made, **{"checkpoint.every": 1, "checkpoint.keep": 2}), tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000005", "step-00000006"]


def test_start_from_takes_the_weights_alone(run: Path, made: Path, tmp_path: Path):
    def start(reference: str) -> tuple[int, dict[str, torch.Tensor], int]:
        return loaded(config_of(made, **{"model.config": None, "train.start_from": reference}), tmp_path / "new")

    step, newest, moments = start(str(run))
    assert (step, moments) == (0, 0)
    resumed_step, resumed, resumed_moments = loaded(config_of(made), run)
    assert (resumed_step, resumed_moments) == (6, len(newest))
    assert all(torch.equal(newest[name], resumed[name]) for name in newest)
    step, earlier, moments = start(f"{run}@2")
    assert (step, moments) == (0, 0)
    assert not any(torch.equal(earlier[name], newest[name]) for name in newest)
    for wanted in ("3", "two", "-2"):
        with pytest.raises(UserError, match=f"no complete checkpoint of step {wanted} .it has: 2, 4, 6"):
            start(f"{run}@{wanted}")


def start_extended(store: Path, run: Path, run_dir: Path) -> dict[str, torch.Tensor]:
    config = run_config(store, {**COMMON, "train.max_steps": 2, "train.start_from": str(run)})
    weights = loaded(config, run_dir)[1]
    train(config, run_dir)
    dist.is_initialized() and dist.barrier()
    return weights


def test_start_from_a_run_whose_tokenizer_was_extended_gives_new_rows_their_means(
    run: Path, made: Path, tmp_path: Path
):
    store = store_with_new_ids(made / "text", tmp_path / "store")
    _, old, _ = loaded(config_of(made), run)
    alone = start_extended(store, run, tmp_path / "alone")
    for found in (alone, *run_ranks(start_extended, 2, store, run, tmp_path / "two")):
        assert found.keys() == old.keys()
        for name, weight in found.items():
            torch.testing.assert_close(weight[: len(old[name])], old[name], rtol=0, atol=0)
            if len(weight) > len(old[name]):
                pair = (old[name][5] + old[name][9]) / 2
                for row, expected in enumerate((pair, old[name][:VOCABULARY].mean(0), pair), start=VOCABULARY):
                    torch.testing.assert_close(weight[row], expected)
        assert len([name for name in found if len(found[name]) == VOCABULARY + 3]) == 2
    again = run_config(store, {**COMMON, "train.max_steps": 2, "train.start_from": str(run)})
    assert train(again, tmp_path / "two").already_done
    back = config_of(made, **{"model.config": None, "train.start_from": str(tmp_path / "alone")})
    with pytest.raises(UserError, match=r"another tokenizer than train\.start_from"):
        train(back, tmp_path / "back")


def test_start_from_a_damaged_checkpoint_is_refused(copy: Path, made: Path, tmp_path: Path):
    flip_a_byte(checkpoint.folder(copy, 6) / "__0_0.distcp")
    config = config_of(made, **{"model.config": None, "train.start_from": str(copy)})
    with pytest.raises(UserError, match=r"is damaged: __0_0\.distcp has another sha256"):
        train(config, tmp_path / "new")
    assert not (tmp_path / "new").exists()


class Killed(BaseException):
    """No clean-up code may depend on seeing it."""


def run_lines(action: Callable[[], None], last: int | None = None) -> list[tuple[str, int]]:
    """Runs `action`, killed after line number `last` of the modules that save; the places of the lines run."""
    lines: list[tuple[str, int]] = []

    def trace(frame, event, _argument):
        file = frame.f_code.co_filename
        if file not in (checkpoint.__file__, saving.__file__, shutil.__file__):
            return None
        if event == "line":
            if len(lines) == last:
                raise Killed
            lines.append((file, frame.f_lineno))
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    except Killed:
        pass
    except OSError:  # shutil may close a file again on its way out
        if len(lines) != last:
            raise
    finally:
        sys.settrace(before)
    return lines


def test_a_kill_between_any_two_lines_leaves_a_whole_checkpoint(run: Path, made: Path, tmp_path: Path):
    for step in (1, 2):
        shutil.copytree(checkpoint.folder(run, 2), checkpoint.folder(tmp_path / "before", step))
    with process_group() as environment:
        config = config_of(made, **{"checkpoint.keep": 2, "checkpoint.asynchronous": False})
        trainer = Trainer(config, run, environment)

        def save(run_dir: Path, step: int) -> None:
            saver = Saver(run_dir, trainer.group, config.checkpoint, lambda step: False, set())
            saver.open()
            saver.save(step, trainer.model, trainer.optimizer, {"step": step})

        def copy_to(name: str) -> Path:
            return Path(shutil.copytree(tmp_path / "before", tmp_path / name))

        whole_run = copy_to("not killed")
        lines = run_lines(lambda: save(whole_run, 3))
        # of a line that is run many times, the first and the last; of shutil's every tenth
        kills = [i for i, line in enumerate(lines) if line not in lines[:i] or line not in lines[i + 1 :]]
        kills = [kill for kill in kills if lines[kill][0] != shutil.__file__ or kill % 10 == 0]
        assert len(kills) > 40
        found = []
        for kill in kills:
            run_dir = copy_to(str(kill))
            assert len(run_lines(lambda run_dir=run_dir: save(run_dir, 3), kill)) == kill
            newest = checkpoint.newest(run_dir, trainer.group, lambda line: None, set())
            assert newest is not None
            found.append(newest.step)
            save(run_dir, 4)
            names = {path.name for path in (run_dir / "checkpoints").iterdir()}
            assert names == {f"step-{newest.step:08d}", "step-00000004"}, lines[kill]
            shutil.rmtree(run_dir)
    assert found == sorted(found)
    assert set(found) == {2, 3}


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of one megabyte."""
    if not shutil.which("mount"):
        pytest.skip("there is no mount here")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"mounting is not permitted here: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def refusal(made: Path, run_dir: Path) -> str:
    try:
        train(config_of(made), run_dir)
    except UserError as error:
        return str(error)
    return "none"


def failure_of_the_main_process(made: Path, run_dir: Path) -> list[str]:
    """What every process sees of a full disk, and of an error on the main process."""

    def fail() -> None:
        raise UserError("the main process alone", "its hint")

    try:
        on_main(fail)
    except UserError as error:
        return [str(error), on_main(lambda: f"from {dist.get_rank()}"), refusal(made, run_dir)]
    return []


def test_a_full_disk_is_said_and_the_checkpoint_before_stays(small_disk: Path, made: Path):
    """The first checkpoint fits, the second does not; with room again, the run goes on."""
    run_dir = small_disk / "run"
    expected = f"no space left to write {run_dir} (free space, then start again: it resumes)"
    assert refusal(made, run_dir) == expected
    saved = checkpoint.complete_steps(run_dir)
    assert saved in ([2], [2, 4])
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == [f"step-{step:08d}" for step in saved]
    every = ["the main process alone (its hint)", "from 0", expected]
    assert run_ranks(failure_of_the_main_process, 2, made, run_dir) == [every, every]
    assert checkpoint.complete_steps(run_dir) == saved
    subprocess.run(["mount", "-o", "remount,size=9m", str(small_disk)], check=True)
    assert train(config_of(made), run_dir) == Outcome(6, 6)
    steps = [line["step"] for line in figures(run_dir) if "loss" in line]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_a_disk_too_full_for_the_run_folder_is_said(small_disk: Path, made: Path):
    (small_disk / "ballast").write_bytes(bytes(2**20))
    assert refusal(made, small_disk / "run").startswith("no space left to write")


def test_the_marker_lists_every_other_file(run: Path):
    folder = checkpoint.folder(run, 6)
    listed = json.loads((folder / "COMPLETE").read_text())
    assert {"state.json", ".metadata", "__0_0.distcp"} <= listed.keys()
    assert listed.keys() | {"COMPLETE"} == {path.name for path in folder.iterdir()}
    digest = subprocess.run(["sha256sum", folder / "__0_0.distcp"], capture_output=True, text=True, check=True).stdout
    assert digest.split()[0] == listed["__0_0.distcp"]["sha256"]

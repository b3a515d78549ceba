"""Where every node has a disk of its own, a checkpoint is the files of all of them, and is found and loaded as one."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from support.ranks import run_ranks
from support.runs import StopAfter, figures, run_config

from tsumugu.distributed.environment import process_group
from tsumugu.errors import UserError
from tsumugu.training import checkpoint, storages
from tsumugu.training.trainer import Outcome, Trainer, train

COMMON = {"train.max_steps": 6, "train.global_batch_size": 4, "optimizer.learning_rate": 1e-2}


def config_of(made: Path, **changes):
    return run_config(made / "text", {**COMMON, "model.config": str(made / "gpt_neox"), **changes})


def take(made: Path, folders: list[Path], stop: int | None = None, shard: int | None = None) -> Outcome | str:
    """Trains with another run folder for every rank: where the paths are the same, ranks share a storage."""
    with process_group() as environment:
        config = config_of(made, **{"checkpoint.every": 2, "parallel.shard_degree": shard})
        try:
            return Trainer(config, folders[environment.rank], environment).train(StopAfter(stop))
        except UserError as error:
            return str(error)


def copied(folder: Path, name: str, damage: Callable[[Path], None] = lambda folder: None) -> list[Path]:
    """Copies of the two nodes, as the folders of the four processes."""
    if dist.get_rank() == 0:
        for node in ("a", "b"):
            shutil.copytree(folder / "stopped" / node, folder / name / node)
        damage(folder / name)
    dist.barrier()
    return [folder / name / node for node in "aabb"]


def without_marker(folder: Path) -> None:
    """As if it had been killed just before the marker was written there."""
    (checkpoint.folder(folder / "b", 3) / "COMPLETE").unlink()


def flip_last_byte(folder: Path) -> None:
    file = checkpoint.folder(folder / "b", 3) / "__3_0.distcp"
    file.write_bytes(file.read_bytes()[:-1] + b"?")


def remove_from_both(folder: Path) -> None:
    for step in (2, 3):
        (checkpoint.folder(folder / "b", step) / "__2_0.distcp").unlink()


def pieces(folder: Path) -> list[bytes | None]:
    """From rank 1, which alone has the files, to rank 3, in pieces of seven bytes."""
    group = storages.new_group()
    own = folder / "pieces" / str(dist.get_rank())
    own.mkdir(parents=True)
    parts = []
    for content in (b"", b"1234567", b"ten bytes!"):
        if dist.get_rank() == 1:
            (own / f"{len(content)}").write_bytes(content)
        parts.append(storages.Part(3, f"{len(content)}", 0, len(content), 1))
    parts += [storages.Part(0, "10", 4, 5, 1)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storages, "CHUNK_BYTES", 7)
        storages.send(own, parts, group)
    return [path.read_bytes() for path in sorted(own.iterdir())]


def on_four(made: Path, folder: Path) -> dict[str, Any]:
    """All that needs four processes, two on each of the nodes `a` and `b`."""
    results: dict[str, Any] = {"pieces": pieces(folder)}
    (folder / "who").mkdir(exist_ok=True)
    group, own = storages.new_group(), [folder / "who" / name for name in ("a", "b", "link", "b")][dist.get_rank()]
    if dist.get_rank() == 0:
        (folder / "who" / "link").symlink_to(folder / "who" / "a")
        (folder / "who" / "a").mkdir()
    dist.barrier()
    results["leaders"] = storages.find_leaders(own, group), storages.find_sharing(own, group)
    results["shared"] = take(made, [folder / "shared"] * 4)
    results["stopped"] = take(made, [folder / "stopped" / node for node in "aabb"], 3)
    results["resumed"] = take(made, copied(folder, "resumed"), 1)
    results["done"] = take(made, copied(folder, "done"))
    a, _, b, _ = copied(folder, "moved", without_marker)
    results["moved"] = take(made, [b, b, a, folder / "moved" / "new"], 1)
    results["meshes"] = take(made, [folder / "moved" / "new", a, b, b], 1, 2)
    results["damaged"] = take(made, copied(folder, "damaged", flip_last_byte), 1)
    results["lost"] = take(made, copied(folder, "lost", remove_from_both))
    return results


@pytest.fixture(scope="module")
def nodes(made: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("nodes")
    return folder, run_ranks(on_four, 4, made, folder)


def files_of(run_dir: Path, step: int) -> set[str]:
    return {path.name for path in checkpoint.folder(run_dir, step).iterdir()}


def losses(run_dir: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in figures(run_dir) if "loss" in line}


COMMON_FILES = {".metadata", "state.json", "COMPLETE"}
FIRST_NODE, SECOND_NODE = {"__0_0.distcp", "__1_0.distcp"}, {"__2_0.distcp", "__3_0.distcp"}


def test_who_shares_a_folder_is_found_out_and_leaves_nothing(nodes):
    folder, results = nodes
    assert [result["leaders"] for result in results] == [([0, 1, 0, 1], [0, 1, 0, 1])] * 4
    assert [*(folder / "who" / "a").iterdir(), *(folder / "who" / "b").iterdir()] == []


def test_files_are_sent_in_pieces(nodes):
    *_, last = nodes[1]
    assert last["pieces"] == [b"", b"ten bytes!", b"1234567"]
    assert nodes[1][0]["pieces"] == [bytes(4) + b"bytes"]


def test_each_node_holds_the_files_of_its_processes_and_the_same_marker(nodes):
    folder, results = nodes
    assert [result["stopped"] for result in results] == [Outcome(3, 6, interrupted=True)] * 4
    a, b = (folder / "stopped" / node for node in "ab")
    assert (files_of(a, 3), files_of(b, 3)) == (COMMON_FILES | FIRST_NODE, COMMON_FILES | SECOND_NODE)
    for name in COMMON_FILES:
        assert (checkpoint.folder(a, 3) / name).read_bytes() == (checkpoint.folder(b, 3) / name).read_bytes()
    assert checkpoint.complete_steps(a) == []  # not on this node alone
    with pytest.raises(UserError, match=r"__2_0\.distcp is missing"):
        checkpoint.check(checkpoint.folder(a, 3))


def test_the_same_nodes_resume_exactly_and_keep_their_files(nodes):
    folder, results = nodes
    assert [result["resumed"] for result in results] == [Outcome(4, 6, interrupted=True)] * 4
    assert files_of(folder / "resumed" / "a", 3) == COMMON_FILES | FIRST_NODE
    assert [result["done"] for result in results] == [Outcome(6, 6)] * 4
    assert figures(folder / "done" / "a") == figures(folder / "shared")
    for node in "ab":  # older ones are deleted on every node
        names = {path.name for path in (folder / "done" / node / "checkpoints").iterdir()}
        assert names == {"step-00000004", "step-00000006"}


def test_other_nodes_and_meshes_are_sent_what_they_lack(nodes, made: Path):
    """The nodes change places, one is new; then with half as many shards; then one process with all files."""
    folder, results = nodes
    assert [result["moved"] for result in results] == [Outcome(4, 6, interrupted=True)] * 4
    assert [result["meshes"] for result in results] == [Outcome(5, 6, interrupted=True)] * 4
    assert not [*(folder / "moved").rglob("*.part")]  # what was sent is deleted once it is loaded
    for node in ("a", "b", "new"):
        shutil.copytree(folder / "moved" / node, folder / "one", dirs_exist_ok=True)
    assert train(config_of(made), folder / "one") == Outcome(6, 6)
    expected = losses(folder / "shared")
    found = losses(folder / "moved" / "b") | losses(folder / "moved" / "new") | losses(folder / "one")
    assert found == pytest.approx({step: expected[step] for step in found}, rel=0, abs=1e-6)
    assert {4, 5, 6} <= found.keys()


def test_a_file_that_is_whole_on_no_node_is_named_with_what_to_do(nodes):
    folder, results = nodes
    assert [result["damaged"] for result in results] == [Outcome(3, 6, interrupted=True)] * 4  # on from step 2
    assert losses(folder / "damaged" / "a") == losses(folder / "stopped" / "a")
    assert all(result["lost"].startswith("every checkpoint of") for result in results)
    assert "the newest: __2_0.distcp is missing, on every storage: start on the nodes that" in results[3]["lost"]

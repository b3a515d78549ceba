"""Copies are removed for the sake of what stays: all exact ones, most near ones, and nothing that is not alike."""

import concurrent.futures
import json
import multiprocessing
import random
import tracemalloc
import unicodedata
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import dill
import numpy as np
import pytest
from datatrove.io import DataFolder
from datatrove.pipeline.dedup.minhash import MinhashConfig, read_sigs
from datatrove.utils.hashing import HashConfig
from loguru import logger

import tsumugu
from tsumugu.data.comparison import dedup
from tsumugu.data.comparison.dedup import Stage, compared_text, exact_stage, near_stages, read_removed
from tsumugu.data.documents import DocumentWriter
from tsumugu.data.instructions import Message, to_json

logger.disable("datatrove")

SAMPLE = Path(tsumugu.__file__).parent / "sample" / "japanese.jsonl"

Place = tuple[int, int]


def write(folder: Path, shards: list[list[tuple[str, bool]]]) -> Path:
    """Shards of (content, whether it is for validation)."""
    for task, shard in enumerate(shards):
        writer = DocumentWriter(folder / "documents" / f"{task:05d}")
        for content, validation in shard:
            writer.add(content, "here", validation)
        writer.close()
    return folder / "documents"


def training(*shards: list[str]) -> list[list[tuple[str, bool]]]:
    return [[(content, False) for content in shard] for shard in shards]


def run_task(pickled: bytes, rank: int) -> None:
    stage: Stage = dill.loads(pickled)
    for step in stage.pipeline:
        step.run(None, rank, stage.tasks)


def run(stage: Stage, ranks: Iterator[int] | None = None) -> None:
    for rank in ranks or range(stage.tasks):
        run_task(dill.dumps(stage), rank)


def removed(folder: Path, tasks: int) -> dict[Place, Place]:
    rows = [row for task in range(tasks) for row in read_removed(folder, task).tolist()]
    return {(task, document): (kept_task, kept_document) for task, document, kept_task, kept_document, _ in rows}


def exact(folder: Path, shards: list[list[tuple[str, bool]]], modes: list[str], size: int = 0) -> dict[Place, Place]:
    run(exact_stage(write(folder, shards), folder / "exact", modes, size))
    return removed(folder / "exact", len(shards))


def stages(folder: Path, shards: int, min_similarity: float = 0.4, kind: str = "text") -> list[Stage]:
    modes = ["near"] * shards
    near = near_stages(folder / "documents", folder / "exact", folder / "near", modes, kind, min_similarity)
    return [exact_stage(folder / "documents", folder / "exact", modes, 2**31), *near]


def near(folder: Path, shards: list[list[tuple[str, bool]]], min_similarity: float = 0.4, kind: str = "text") -> dict:
    write(folder, shards)
    for stage in stages(folder, len(shards), min_similarity, kind):
        run(stage)
    return removed(folder / "near" / "removed", len(shards))


def similarity(one: str, other: str) -> float:
    """Jaccard similarity of the sets of 5-grams of letters and digits."""
    sets = []
    for text in (one, other):
        folded = unicodedata.normalize("NFKC", text).casefold()
        plain = "".join(character for character in folded if unicodedata.category(character)[0] not in "ZCP")
        sets.append({plain[start : start + 5] for start in range(len(plain) - 4)})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Unlike texts of 400 to 1,000 characters."""
    lines = SAMPLE.read_text(encoding="utf-8").splitlines()
    return [text for line in lines if len(text := json.loads(line)["text"]) >= 400][:100]


def edited(text: str, share: float, rng: random.Random, characters: str) -> str:
    """A share of the characters replaced, removed, or followed by another one."""
    result = []
    for character in text:
        other = rng.choice(characters)
        edits = [other, "", character + other]
        result.append(rng.choice(edits) if rng.random() < share else character)
    return "".join(result)


def copies(texts: list[str], share: float, seed: int = 0) -> list[str]:
    rng, characters = random.Random(seed), "".join(texts)
    return [edited(text, share, rng, characters) for text in texts]


# exact


def test_exact_is_what_a_dictionary_finds(tmp_path: Path):
    rng = random.Random(0)
    shards = [[(f"{rng.randrange(150)}番", rng.random() < 0.3) for _ in range(rng.randrange(60))] for _ in range(9)]
    modes = [rng.choice(["none", "exact", "near"]) for _ in shards]
    first: dict[str, Place] = {}  # of those that are compared
    validation: dict[str, Place] = {}
    expected = {}
    order = sorted(
        (not validated, task, document)
        for task, shard in enumerate(shards)
        for document, (_, validated) in enumerate(shard)
    )
    for is_training, task, document in order:
        content = shards[task][document][0]
        if is_training and content in validation:
            expected[task, document] = validation[content]
        elif modes[task] != "none" and content in first:
            expected[task, document] = first[content]
        elif modes[task] != "none":
            first[content] = task, document
        if not is_training:
            validation.setdefault(content, (task, document))
    assert len(expected) > 50
    assert exact(tmp_path / "one", shards, modes) == expected
    assert exact(tmp_path / "many", shards, modes, size=7 * 2**30) == expected


def test_without_deduplication_training_still_does_not_overlap_validation(tmp_path: Path):
    shards = [[("甲", False), ("甲", False), ("乙", False)], [("乙", True), ("乙", True), ("丙", False)]]
    assert exact(tmp_path, shards, ["none", "none"]) == {(0, 2): (1, 0)}


@pytest.mark.parametrize("shards", [[[]], [[("一つ", False)]], [[], [("一つ", False), ("二つ", True)], []]])
def test_nothing_to_remove(tmp_path: Path, shards: list):
    assert near(tmp_path, shards) == {}
    assert removed(tmp_path / "exact", len(shards)) == {}


# near


def test_copies_are_found_and_nothing_else_is_removed(tmp_path: Path, texts: list[str]):
    shards = training(texts, copies(texts, 0.05), copies(texts, 0.1), copies(texts, 0.2), texts[:30])
    gone = near(tmp_path, shards, 0.3)
    assert all(document == kept_document for (_, document), (_, kept_document) in gone.items())  # of its own original
    found = [sum(task == shard for task, _ in gone) / len(texts) for shard in range(4)]
    assert found[0] == 0
    assert found[1] >= 0.99
    assert found[2] >= 0.75
    assert removed(tmp_path / "exact", 5) == {(4, document): (0, document) for document in range(30)}


@pytest.mark.parametrize("min_similarity", [0.3, 0.5, 1])
def test_removed_documents_are_like_one_that_stays(tmp_path: Path, texts: list[str], min_similarity: float):
    texts = texts[:40]
    chain = [texts[:20]]  # each a copy of the one before
    for number in range(12):
        chain.append(copies(chain[-1], 0.04, seed=number))
    shards = training(*chain[6:], texts, *chain[:6])
    shards[3] = [(content, True) for content, _ in shards[3]]
    gone = near(tmp_path, shards, min_similarity)
    rows = np.concatenate([read_removed(tmp_path / "near" / "removed", task) for task in range(len(shards))])
    assert len(gone) == len(rows)
    for task, document, kept_task, kept_document, said in rows.tolist():
        true = similarity(shards[task][document][0], shards[kept_task][kept_document][0])
        assert true >= min_similarity
        assert true == pytest.approx(said, abs=1e-6)
        assert (kept_task, kept_document) not in gone
        assert (not shards[kept_task][kept_document][1], kept_task, kept_document) < (
            not shards[task][document][1],
            task,
            document,
        )
    assert bool(gone) == (min_similarity < 1)


def test_what_stays_is_unlike(tmp_path: Path, texts: list[str]):
    families = [copies([text] * 12, 0.06, seed) for seed, text in enumerate(texts[:10])]
    shards = training(*families)
    gone = near(tmp_path, shards, 0.5)
    alike = 0
    for task, family in enumerate(families):
        staying = [text for document, text in enumerate(family) if (task, document) not in gone]
        alike += sum(similarity(one, other) >= 0.6 for one, other in combinations(staying, 2))
    assert alike == 0


def chosen_slowly(folder: Path, shards: list[list[tuple[str, bool]]], min_similarity: float) -> dict[Place, Place]:
    """The choice by its definition: the documents in their order, each beside those that it was compared with."""
    compared: dict[tuple, dict[tuple, float]] = {}
    for file in folder.glob("near/similar/*.npy"):
        for later, earlier, value in np.load(file).tolist():
            one, other = ((order >> 63, order >> 32 & 2**31 - 1, order & 2**32 - 1) for order in (later, earlier))
            assert other < one
            compared.setdefault(one, {})[other] = value
    kept: dict[tuple, tuple] = {}
    for one in sorted(compared):
        others = sorted(compared[one].items(), key=lambda item: (-item[1], item[0]))
        staying = {other: value for other, value in others if other not in kept}
        if not any(value >= min_similarity for value in staying.values()):
            behind = list(dict.fromkeys(kept[other] for other, _ in others if other in kept))
            for other in [other for other in behind if other not in compared[one]][:8]:
                staying[other] = similarity(shards[one[1]][one[2]][0], shards[other[1]][other[2]][0])
        best = min(staying, key=lambda other: (-staying[other], other), default=None)
        if best is not None and staying[best] >= min_similarity:
            kept[one] = best
    return {one[1:]: best[1:] for one, best in kept.items()}


@pytest.mark.parametrize("groups", [3, 512])
def test_the_choice_is_the_same_whatever_is_in_memory_at_a_time(
    tmp_path: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch, groups: int
):
    rng, chain = random.Random(1), [texts[:12]]
    for number in range(24):  # each text a copy of one before, most of them unlike the first
        chain.append(copies(rng.choice(chain), 0.07, seed=number))
    rng.shuffle(chain)
    shards = [[(content, rng.random() < 0.3) for content in shard] for shard in chain]
    monkeypatch.setattr(dedup, "_GROUPS", groups)
    gone = near(tmp_path, shards, 0.4)
    assert gone == chosen_slowly(tmp_path, shards, 0.4)
    before_training = sum(not shards[task][number][1] and shards[to][n][1] for (task, number), (to, n) in gone.items())
    assert len(gone) > 100
    assert before_training > 20


def test_the_choice_needs_no_more_memory_for_more_groups(tmp_path: Path):
    def peak(groups: int) -> int:
        folder = tmp_path / str(groups)
        (folder / "near" / "similar").mkdir(parents=True)
        for group in range(groups):  # of each shard, 3,000 documents are like the first of all
            similar = np.zeros(3000, dedup._SIMILAR)
            similar["later"] = np.arange(1, 3001, dtype=np.uint64) + (2**63 + (group << 32))
            similar["earlier"], similar["similarity"] = 2**63, 0.9
            np.save(folder / "near" / "similar" / f"{group:05d}.npy", similar)
        tracemalloc.start()
        run(near_stages(folder, folder, folder / "near", ["near"] * groups, "text", 0.4)[-1])
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert all(len(read_removed(folder / "near" / "removed", task)) == 3000 for task in range(groups))
        return most

    peak(2)
    assert peak(20) < 1.2 * peak(4)


def test_layout_width_and_punctuation_do_not_count(tmp_path: Path, texts: list[str]):
    other = [text.translate(str.maketrans("、。0123", "，．０１２３")).replace("，", "，\n　") for text in texts[:20]]
    assert near(tmp_path, training(texts, other), 1) == {(1, number): (0, number) for number in range(20)}


def test_validation_stays_before_training(tmp_path: Path, texts: list[str]):
    shards = [[(text, False) for text in texts[:20]], [(text, True) for text in copies(texts[:20], 0.03)]]
    assert near(tmp_path, shards) == {(0, number): (1, number) for number in range(20)}


def test_instructions_are_compared_by_the_contents_of_their_messages(tmp_path: Path, texts: list[str]):
    def conversation(content: str, role: str) -> str:
        return to_json([Message(role, content[:300]), Message("assistant", content[300:])])

    assert compared_text(conversation("あ" * 300 + "い", "user"), "instructions") == "あ" * 300 + "\nい"
    shards = training(
        [conversation(text, "user") for text in texts[:20]], [conversation(text, "system") for text in texts[:20]]
    )
    assert near(tmp_path, shards, 1, "instructions") == {(1, number): (0, number) for number in range(20)}


def test_only_shards_of_mode_near_are_compared(tmp_path: Path, texts: list[str]):
    shards = training(texts[:10], copies(texts[:10], 0.02), copies(texts[:10], 0.03))
    folder, modes = write(tmp_path, shards), ["near", "exact", "near"]
    run(exact_stage(folder, tmp_path / "exact", modes, 0))
    for stage in near_stages(folder, tmp_path / "exact", tmp_path / "near", modes, "text", 0.5):
        run(stage)
    assert removed(tmp_path / "near" / "removed", 3) == {(2, number): (0, number) for number in range(10)}


def test_documents_of_any_size(tmp_path: Path, texts: list[str]):
    long = "".join(texts) * 3 + "終わり"
    shards = training(
        ["", "短い文", "短い文です", "。。。。。。。。"],
        [long, "短い文でず", "、、、、、、"],
        [long + "。追記", "短い文です！"],
    )
    assert near(tmp_path, shards) == {(2, 0): (1, 0), (2, 1): (0, 2)}


def test_a_common_beginning_does_not_make_documents_alike(tmp_path: Path, texts: list[str]):
    head = texts[0][:150]
    assert near(tmp_path, training([head + text for text in texts[1:]])) == {}


# stages


def files_of(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_the_result_depends_neither_on_processes_nor_on_the_order_of_tasks(tmp_path: Path, texts: list[str]):
    shards = training(texts[:50], copies(texts[:50], 0.05), [], texts[40:] + copies(texts[:20], 0.1))
    near(tmp_path / "one", shards)
    write(tmp_path / "other", shards)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(3, context) as pool:
        for number, stage in enumerate(stages(tmp_path / "other", 4)):
            if number < 3:
                run(stage, iter(range(stage.tasks - 1, -1, -1)))
            else:
                list(pool.map(run_task, [dill.dumps(stage)] * stage.tasks, range(stage.tasks)))
    assert files_of(tmp_path / "one") == files_of(tmp_path / "other")


def test_a_task_run_again_writes_the_same_bytes(tmp_path: Path, texts: list[str]):
    near(tmp_path, training(texts[:50], copies(texts[:50], 0.05)))
    before = files_of(tmp_path)
    outputs = [["exact"], ["near/signatures", "near/sketches"], ["near/collisions", "near/candidates"]]
    for stage, folders in zip(stages(tmp_path, 2), [*outputs, ["near/similar"], ["near/removed"]], strict=True):
        for folder in folders:
            victim = next(path for path in sorted((tmp_path / folder).rglob("*")) if path.is_file())
            victim.with_name(f".{victim.name}").write_bytes(b"left over from a killed task")
            victim.unlink()
        run(stage)
        run(stage)
    assert files_of(tmp_path) == before


def test_many_shards_share_files(tmp_path: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dedup, "_GROUPS", 4)
    gone = near(tmp_path, training(texts[:9], *([copy] for copy in copies(texts[:9], 0.03))))
    assert gone == {(number + 1, 0): (0, number) for number in range(9)}
    assert [stage.tasks for stage in stages(tmp_path, 10)] == [3, 4, 48, 4, 1]
    assert [stage.tasks for stage in stages(tmp_path, 9)] == [3, 3, 48, 3, 1]


def test_signatures_are_sorted_records_of_datatrove(tmp_path: Path, texts: list[str]):
    near(tmp_path, training(texts[:30], ["短い", *texts[30:60]]))
    config = MinhashConfig(num_buckets=48, hashes_per_bucket=4, hash_config=HashConfig(precision=32, hash_fc="sha1"))
    for path in sorted((tmp_path / "near" / "signatures").rglob("00001.minhash.sig")):
        with DataFolder(str(path.parent)).open(path.name, "rb") as file:
            records = list(read_sigs(file, 1, config))  # which checks their order
        assert sorted(record.doc_id for record in records) == list(range(1, 31))
        assert {record.file_stem for record in records} == {"00001"}

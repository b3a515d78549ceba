"""How many planted copies deduplication finds, what else it removes, and how fast.

    python benchmarks/dedup.py CORPUS.jsonl.gz [--work-dir FOLDER] [--text COLUMN]

The corpus is cut into documents of 1,500 characters, all of them unlike each other but for what the corpus itself
repeats. Of 2,000 of them, taken evenly, copies are added: exact ones, ones with a share of the characters edited (each
character with that probability, and then, with equal probabilities, replaced by another one, removed, or followed by
another one), and ones with other punctuation and line breaks. Others are drawn from the corpus as they are frequent.

A copy is found if it is removed; copies of originals that go themselves, since the corpus repeats them, are not
counted. A false positive is a removed document whose true Jaccard similarity with the one that it was removed for,
computed here from Python sets of 5-grams, is below the wanted one. Stages run in one process; seconds are of CPU time,
and MB/s of UTF-8 in all documents.
"""

import argparse
import json
import random
import tempfile
import time
import unicodedata
from pathlib import Path

import numpy as np
from loguru import logger

from tsumugu.data import corpus
from tsumugu.data.comparison.contamination import Contamination
from tsumugu.data.comparison.dedup import Stage, exact_stage, near_stages, read_removed
from tsumugu.data.documents import DocumentWriter

_CHARACTERS = 1500
_ORIGINALS = 2000
_SHARD = 5000
_SIMILARITIES = (0.3, 0.35, 0.4, 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("corpus", help="a file that tsumugu reads")
    parser.add_argument("--text", default="text", help="its column")
    parser.add_argument("--work-dir", type=Path, help="where to work (default: a temporary folder)")
    options = parser.parse_args()
    logger.disable("datatrove")
    with tempfile.TemporaryDirectory(dir=options.work_dir) as folder:
        print(measure(documents_of(options.corpus, options.text), Path(folder)))


def documents_of(path: str, column: str) -> list[str]:
    texts = corpus.texts(corpus.plan(corpus.find_files(path)), column)
    cut = [text[start : start + _CHARACTERS] for text in texts for start in range(0, len(text), _CHARACTERS)]
    return [document for document in cut if len(document) == _CHARACTERS]


def measure(documents: list[str], folder: Path) -> str:
    rng = random.Random(0)
    characters = "".join(documents[::20])
    originals = list(range(0, len(documents), len(documents) // _ORIGINALS))[:_ORIGINALS]
    kinds = {"exact": [documents[number] for number in originals]}
    for share in (0.05, 0.1, 0.2):
        kinds[f"{share:.0%} edited"] = [edited(documents[number], share, characters, rng) for number in originals]
    kinds["other layout"] = [reformatted(documents[number]) for number in originals]
    shards = [documents[start : start + _SHARD] for start in range(0, len(documents), _SHARD)]
    first_copies = len(shards)
    shards += kinds.values()
    size = sum(len(document.encode()) for shard in shards for document in shard)
    for task, shard in enumerate(shards):
        writer = DocumentWriter(folder / "documents" / f"{task:05d}")
        for document in shard:
            writer.add(document, "", False)
        writer.close()

    modes, exact = ["near"] * len(shards), folder / "exact"
    times = [run(exact_stage(folder / "documents", exact, modes, size))]
    rows = []
    for similarity in _SIMILARITIES:
        near = near_stages(folder / "documents", exact, folder / "near", modes, "text", similarity)
        times += [run(stage) for stage in (near if similarity == _SIMILARITIES[0] else near[2:])]
        removed = {}
        for where in (exact, folder / "near" / "removed"):
            for row in np.concatenate([read_removed(where, task) for task in range(len(shards))]).tolist():
                removed[row[:2]] = row[2:4]
        found = []
        for kind in range(len(kinds)):
            staying = [index for index, number in enumerate(originals) if divmod(number, _SHARD) not in removed]
            found.append(sum((first_copies + kind, index) in removed for index in staying) / len(staying))
        true = [jaccard(shards[a][b], shards[c][d]) for (a, b), (c, d) in removed.items()]
        own = sum(task < first_copies for task, _ in removed)
        shares = [f"{share:.1%}" for share in found]
        false = sum(value < similarity for value in true)
        rows.append([f"{similarity}", *shares, f"{own}", f"{false}", f"{min(true):.3f}"])

    speeds = [[name, f"{seconds:.2f}", f"{size / 1e6 / seconds:.0f}"] for name, seconds in times[:5]]
    speeds.append(contamination_row(documents, folder))
    return "\n".join(
        [
            f"{sum(map(len, shards)):,} documents, {size / 1e6:.0f} MB; {len(originals):,} copies of each kind",
            "",
            *table(["min_similarity", *kinds, "repeated by the corpus", "false positives", "least similarity"], rows),
            "",
            *table(["stage", "seconds", "MB/s"], speeds),
        ]
    )


def edited(text: str, share: float, characters: str, rng: random.Random) -> str:
    result = []
    for character in text:
        other = rng.choice(characters)
        result.append(rng.choice([other, "", character + other]) if rng.random() < share else character)
    return "".join(result)


def reformatted(text: str) -> str:
    return text.replace("\n", "").translate(str.maketrans("、「」", "，“”")).replace("。", "．\n　")


def jaccard(one: str, other: str) -> float:
    sets = []
    for text in (one, other):
        folded = unicodedata.normalize("NFKC", text).casefold()
        plain = "".join(character for character in folded if unicodedata.category(character)[0] not in "ZCP")
        sets.append({plain[start : start + 5] for start in range(len(plain) - 4)})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def run(stage: Stage) -> tuple[str, float]:
    start = time.process_time()
    for rank in range(stage.tasks):
        for step in stage.pipeline:
            step.run(None, rank, stage.tasks)
    return stage.name, time.process_time() - start


def contamination_row(documents: list[str], folder: Path) -> list[str]:
    """Documents against a benchmark of 1,000 stretches of 60 characters, each of another document."""
    benchmark = folder / "benchmark.jsonl"
    holders = documents[:: len(documents) // 1000][:1000]
    lines = [json.dumps({"question": text[700:760]}, ensure_ascii=False) + "\n" for text in holders]
    benchmark.write_text("".join(lines), encoding="utf-8")
    contamination = Contamination([str(benchmark)])
    start = time.process_time()
    found = sum(file is not None for file in contamination.check(documents))
    seconds = time.process_time() - start
    size = sum(len(document.encode()) for document in documents)
    return [f"contamination: {found:,} documents hold one of 1,000", f"{seconds:.2f}", f"{size / 1e6 / seconds:.0f}"]


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows]]


if __name__ == "__main__":
    main()

"""How fast one process reads its batches, seeks and opens stores: data must never be what a training step waits for.

    python benchmarks/data_loading.py [--folder DIR]

Makes its stores in a temporary folder (in DIR: on the disk that is to be measured), 0.6 GB of them real and the rest
sparse files, reads them with what `tsumugu train` reads with, and prints a Markdown table.
"""

import argparse
import json
import os
import resource
import struct
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tsumugu.config import DataConfig, MixedStore
from tsumugu.data import store
from tsumugu.data.batches import Rows, Share, training_batches
from tsumugu.data.mixture import Mixture, mix
from tsumugu.data.packing import Concatenated, LeftPadded
from tsumugu.data.store import open_store

SEQUENCE, BATCH, MICRO_BATCH = 2048, 64, 8
TOKENS_PER_SECOND = 100_000  # of the process that trains
STEPS = 200
SHARE = Share(rank=0, world_size=1, global_batch_size=BATCH, micro_batch_size=MICRO_BATCH)


def write_manifest(path: Path, kind: str, shards: list[dict]) -> Path:
    splits = {"train": store.describe_split(shards), "validation": store.describe_split([])}
    manifest = {"version": store.FORMAT_VERSION, "kind": kind, "template": None, "add_bos": False, "add_eos": True}
    manifest["tokenizer"] = {"fingerprint": "of no tokenizer", "files": {}}
    (path / store.MANIFEST).write_text(json.dumps(manifest | {"splits": splits}))
    return path


def real_store(path: Path, tokens: int, length: int, supervised: bool) -> Path:
    """Random ids in documents of `length` tokens, for instructions of half to one and a half times as many."""
    draw = np.random.default_rng(0)
    writer, left = store.ShardWriter(path / "train" / "00000", np.uint16, supervised), tokens
    while left > 0:
        size = int(draw.integers(length // 2, length * 3 // 2)) if supervised else length
        writer.add(draw.integers(4, 32_000, size), np.arange(size) > size // 2 if supervised else None)
        left -= size
    shard = writer.close()
    assert shard is not None
    return write_manifest(path, "instructions" if supervised else "text", [shard])


def sparse_store(path: Path, shards: int, tokens: int, documents: int) -> Path:
    """Shards of so many tokens and documents each, all holes but for the index's beginning and end."""
    (path / "train").mkdir(parents=True)
    entries = []
    for number in range(shards):
        idx, ids = (path / "train" / f"{number:05d}.{ending}" for ending in ("idx", "bin"))
        with open(idx, "wb") as file:
            file.write(b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, documents, documents + 1))
            file.seek(34 + 12 * documents - 8)
            file.write(struct.pack("<q", 2 * tokens))  # an empty last document
            file.truncate(34 + 12 * documents + 8 * (documents + 1))
        with open(ids, "wb") as file:
            file.truncate(2 * tokens)
        files = {file.name: {"size": file.stat().st_size, "sha256": ""} for file in (idx, ids)}
        counts = {"documents": documents, "tokens": tokens, "supervised_tokens": tokens, "longest_document": 1}
        entries.append({"name": idx.stem, **counts, "files": files})
    return write_manifest(path, "text", entries)


def opened(*paths: Path, padded: bool = False) -> tuple[list[Rows], Mixture]:
    packing = LeftPadded if padded else Concatenated
    rows: list[Rows] = [packing(open_store(path).train, SEQUENCE, 3) for path in paths]
    weights = {path.name: weight for path, weight in zip(paths, (0.7, 0.2, 0.1), strict=False)}
    entries = [MixedStore(name=name, path=name, weight=weight) for name, weight in weights.items()]
    data = DataConfig(stores=entries, sequence_length=SEQUENCE)
    return rows, mix(data, [len(of_store) for of_store in rows], 10**9, BATCH, seed=1)


def read_steps(rows: list[Rows], mixture: Mixture, steps: int, pause: float = 0.0) -> tuple[float, int]:
    """Seconds and tokens of so many steps, without the pauses between them."""
    seconds, tokens = 0.0, 0
    for step in range(steps):
        started = time.perf_counter()
        batches, _ = training_batches(rows, mixture, step, SHARE)
        seconds += time.perf_counter() - started
        tokens += sum(sum(batch.lengths) for batch in batches)
        time.sleep(pause)
    return seconds, tokens


def warm(path: Path) -> None:
    for file in (path / "train").iterdir():
        file.read_bytes()


def forget(path: Path) -> bool:
    """Drops the files from the page cache, where the system can; nothing may have them mapped."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for file in (path / "train").iterdir():
        with open(file, "rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def best(action: Callable[[], object], repetitions: int = 5) -> float:
    times = []
    for _ in range(repetitions):
        started = time.perf_counter()
        action()
        times.append(time.perf_counter() - started)
    return min(times)


def memory_of(action: Callable[[], object]) -> int:
    tracemalloc.start()
    kept = action()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    del kept
    return peak


def order_of(tokens: int) -> Mixture:
    """Two stores by 3 to 1 over so many tokens, of which the smaller is read three times."""
    rows = tokens // SEQUENCE
    entries = [MixedStore(name="a", path="a", weight=3), MixedStore(name="b", path="b", weight=1)]
    return mix(DataConfig(stores=entries, sequence_length=SEQUENCE), [rows, rows // 12], rows, BATCH, seed=1)


def measure(folder: Path) -> list[tuple[str, str, str]]:
    table = []

    def reading(name: str, seconds: float, tokens: int) -> None:
        share = seconds / (tokens / TOKENS_PER_SECOND)
        table.append((f"reading, {name}", f"{tokens / seconds / 1e6:.1f} M tokens/s", f"{share:.2%} of step time"))

    stores = [real_store(folder / name, 60_000_000, 1000, supervised=False) for name in ("web", "code", "math")]
    instructions = real_store(folder / "instructions", 40_000_000, 300, supervised=True)
    if forget(stores[0]):
        reading("concatenate, one store, cold cache", *read_steps(*opened(stores[0]), steps=40, pause=0.2))
    for path in (*stores, instructions):
        warm(path)
    reading("concatenate, one store", *read_steps(*opened(stores[0]), STEPS))
    reading("concatenate, mixture of three stores", *read_steps(*opened(*stores), STEPS))
    reading("pad_left, with masks", *read_steps(*opened(instructions, padded=True), STEPS))

    sparse = sparse_store(folder / "sparse", shards=10, tokens=10**8, documents=10**5)
    middle = 10**9 // SEQUENCE // 2 // BATCH
    seconds = best(lambda: training_batches(*opened(sparse), middle, SHARE), 1)
    table.append(
        ("seeking to the middle of an epoch of 10⁹ tokens", f"{seconds * 1e3:.1f} ms", "with opening the store")
    )

    large = sparse_store(folder / "large", shards=5000, tokens=2 * 10**7, documents=2 * 10**4)
    seconds = best(lambda: opened(large), 3)
    size = memory_of(lambda: opened(large))
    what = "opening 10¹¹ tokens, 10⁸ documents, 5,000 shards"
    table.append((what, f"{seconds * 1e3:.0f} ms", f"{size / 2**20:.1f} MiB at most"))

    for name, tokens in (("10⁷", 10**7), ("10¹³", 10**13)):
        order = order_of(tokens)
        positions = order.total // 2 + np.arange(1024)
        seconds = best(lambda order=order, positions=positions: order.at(positions))
        size = memory_of(lambda order=order, positions=positions: order.at(positions))
        table.append(
            (f"1,024 positions → rows, {name} tokens", f"{seconds * 1e3:.2f} ms", f"{size / 2**10:.0f} KiB at most")
        )
    unit = 1 if sys.platform == "darwin" else 1024
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
    table.append(("all of it, resident, mapped files included", f"{resident:.0f} MiB", ""))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", metavar="DIR", help="where the temporary folder is made")
    with tempfile.TemporaryDirectory(dir=parser.parse_args().folder) as folder:
        table = measure(Path(folder))
    print(f"One process, rows of {SEQUENCE} tokens, {BATCH} a step, {MICRO_BATCH} a micro batch; ", end="")
    print(f"step time: at {TOKENS_PER_SECOND:,} tokens/s.\n\n| what | figure | |\n| --- | ---: | --- |")
    for row in table:
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()

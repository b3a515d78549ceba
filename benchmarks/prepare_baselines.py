"""The other ways to tokenise a corpus that `prepare.py` compares tsumugu with; it starts each as a command of its own.

    python benchmarks/prepare_baselines.py WAY INPUT --tokenizer DIR --processes N --output DIR

INPUT is a folder of .jsonl files with the column `text`. Every way appends the tokenizer's end-of-text token to every
document, adds nothing else, and is given what makes it fast where its own documentation leaves a choice. `documents`
and `block_digests` read back what they wrote.

sample: what a well-known sample for SageMaker does with mC4-ja: `datasets.load_dataset("json")`, `map` with a fast
tokenizer, concatenate and group into blocks of 2,048 within each batch of `map`, filter the short ones, shuffle, and
write JSON lines. All of it with N processes (the sample writes with one).

datatrove: its own `JsonlReader` and `DocumentTokenizer` on `LocalPipelineExecutor`, N tasks on N workers; each task
reads whole files, so there must be N of them or a multiple. Shuffling of documents within a task, on by default, is
left out.

megatron: what Megatron-LM's tools/preprocess_data.py does, which is in no package: a pool of N workers that encode
lines (`imap`, chunks of 32, as there), and the main process, which hands every document to megatron-core's
`IndexedDatasetBuilder`. It is one process more than N.

reference: no way of its own; writes the ids that transformers' tokenizer gives to each document, to compare with.
"""

import argparse
import hashlib
import itertools
import json
import multiprocessing
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

BLOCK = 2048
MAP_BATCH = 1000  # the default of datasets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("way", choices=["sample", "datatrove", "megatron", "reference"])
    parser.add_argument("input", type=Path, metavar="INPUT", help="folder of .jsonl files")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with a tokenizer.json")
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    options.output.mkdir(parents=True)
    way = {"sample": sample, "datatrove": datatrove, "megatron": megatron, "reference": reference}[options.way]
    way(options.input, options.tokenizer, options.processes, options.output)


def sample(folder: Path, tokenizer_folder: Path, processes: int, output: Path) -> None:
    import datasets
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)

    def tokenize(batch: dict) -> dict:
        encoded = tokenizer(batch["text"], add_special_tokens=False)
        return {
            "input_ids": [[*ids, tokenizer.eos_token_id] for ids in encoded["input_ids"]],
            "attention_mask": [[*mask, 1] for mask in encoded["attention_mask"]],
        }

    def group(batch: dict) -> dict:
        joined = {column: list(itertools.chain.from_iterable(rows)) for column, rows in batch.items()}
        starts = range(0, len(joined["input_ids"]), BLOCK)
        return {column: [values[start : start + BLOCK] for start in starts] for column, values in joined.items()}

    cache = str(output / "cache")
    files = [str(file) for file in input_files(folder)]
    dataset = datasets.load_dataset("json", data_files=files, split="train", cache_dir=cache)
    dataset = dataset.map(tokenize, batched=True, num_proc=processes, remove_columns=dataset.column_names)
    dataset = dataset.map(group, batched=True, num_proc=processes)
    dataset = dataset.filter(lambda row: len(row["input_ids"]) == BLOCK, num_proc=processes)
    dataset.shuffle(seed=1234).to_json(output / "blocks.jsonl", num_proc=processes)


def datatrove(folder: Path, tokenizer_folder: Path, processes: int, output: Path) -> None:
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    executor = LocalPipelineExecutor(
        pipeline=[
            JsonlReader(str(folder)),
            DocumentTokenizer(
                str(output / "tokens"),
                tokenizer_name_or_path=str(tokenizer_folder / "tokenizer.json"),
                eos_token=eos_token(tokenizer_folder),
                shuffle_documents=False,
            ),
        ],
        tasks=processes,
        workers=processes,
        logging_dir=str(output / "logs"),
    )
    executor.run()


def megatron(folder: Path, tokenizer_folder: Path, processes: int, output: Path) -> None:
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    builder = IndexedDatasetBuilder(str(output / "text.bin"), dtype=DType.optimal_dtype(len(tokenizer)))
    with multiprocessing.Pool(processes, _load, [tokenizer_folder]) as pool:
        for ids in pool.imap(_encode, _lines(folder), 32):
            builder.add_document(ids, [len(ids)])
    builder.finalize(str(output / "text.idx"))


def _load(tokenizer_folder: Path) -> None:
    global _tokenizer
    from transformers import AutoTokenizer

    _tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)


def _encode(line: str) -> list[int]:
    ids = _tokenizer(json.loads(line)["text"], add_special_tokens=False)["input_ids"]
    return [*ids, _tokenizer.eos_token_id]


def input_files(folder: Path) -> list[Path]:
    """The files of INPUT in the order in which every way reads them."""
    return sorted(folder.glob("*.jsonl"))


def _lines(folder: Path) -> Iterator[str]:
    for file in input_files(folder):
        with open(file, encoding="utf-8") as stream:
            yield from stream


def reference(folder: Path, tokenizer_folder: Path, _processes: int, output: Path) -> None:
    _load(tokenizer_folder)
    ids = [_encode(line) for line in _lines(folder)]
    (output / "ids.json").write_text(json.dumps(ids), encoding="utf-8")


def eos_token(tokenizer_folder: Path) -> str:
    config = json.loads((tokenizer_folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    token = config.get("eos_token")
    if token is None:
        raise SystemExit(f"{tokenizer_folder} has no end-of-text token, which separates documents here")
    return token["content"] if isinstance(token, dict) else token


def files_of_ids(way: str, output: Path) -> list[Path]:
    """The files in which a way left ids, in order; what else it left are indexes."""
    pattern = {"sample": "blocks.jsonl", "datatrove": "tokens/*.ds", "megatron": "text.bin"}[way]
    return sorted(output.glob(pattern))


def files_of_indexes(way: str, output: Path) -> list[Path]:
    pattern = {"sample": "no index", "datatrove": "tokens/*.index", "megatron": "text.idx"}[way]
    return sorted(output.glob(pattern))


def documents(way: str, output: Path) -> list[np.ndarray]:
    """The ids of every document, mapped from what `datatrove` or `megatron` wrote, in the order of the input.

    (datatrove's are in that order where there was a file a task.)
    """
    found = []
    for ids, index in zip(files_of_ids(way, output), files_of_indexes(way, output), strict=True):
        if way == "megatron":
            with open(index, "rb") as file:  # 9 bytes magic, 8 version, 1 dtype, 8 sequences, 8 documents
                (count,) = struct.unpack("<Q", file.read(34)[18:26])
                ends = np.cumsum(np.fromfile(file, np.int32, count), dtype=np.int64)
        else:
            ends = np.fromfile(index, np.uint64).astype(np.int64)
        dtype = {2: np.uint16, 4: np.int32}[ids.stat().st_size // int(ends[-1])]
        found += np.split(np.memmap(ids, dtype, mode="r"), ends[:-1])
    return found


def count(way: str, output: Path) -> tuple[int | None, int]:
    """Documents (None for `sample`, which cuts them into blocks) and tokens of what a way wrote."""
    if way == "sample":
        with open(output / "blocks.jsonl", "rb") as file:
            return None, BLOCK * sum(1 for _ in file)
    lengths = [len(document) for document in documents(way, output)]
    return len(lengths), sum(lengths)


def block_digests(output: Path) -> Counter[bytes]:
    """How often each block occurs in what `sample` wrote, by `digest`."""
    with open(output / "blocks.jsonl", encoding="utf-8") as file:
        return Counter(digest(json.loads(line)["input_ids"]) for line in file)


def expected_digests(documents: list[np.ndarray], processes: int) -> Counter[bytes]:
    """What `block_digests` must be: `map` gives each process an equal run of documents, in batches of MAP_BATCH."""
    share, more = divmod(len(documents), processes)
    found: Counter[bytes] = Counter()
    stop = 0
    for process in range(processes):
        start, stop = stop, stop + share + (process < more)
        for first in range(start, stop, MAP_BATCH):
            ids = np.concatenate(documents[first : min(first + MAP_BATCH, stop)])
            found.update(digest(block) for block in ids[: len(ids) // BLOCK * BLOCK].reshape(-1, BLOCK))
    return found


def digest(ids: np.ndarray | list[int]) -> bytes:
    return hashlib.blake2b(np.asarray(ids, np.int64).tobytes(), digest_size=16).digest()


if __name__ == "__main__":
    main()

"""Imported tokenizers over a whole corpus: differences from the original engine, and the speed of bulk encoding.

    python benchmarks/tokenizer_import.py --input CORPUS.jsonl.gz --models MODEL...

Every line of the corpus is encoded by SentencePiece and by the saved fast tokenizer as stock transformers loads it, and
whole documents by the bulk encoder. A Markdown table is printed: a difference is anything but a tie, which is a line
cut otherwise with the same score within float32's rounding. Speeds are MB of UTF-8 a second of one core (CPU time).
"""

import argparse
import itertools
import tempfile
import time
from pathlib import Path

from transformers import AutoTokenizer

from tsumugu.data import corpus
from tsumugu.errors import UserError
from tsumugu.tokenizer import convert
from tsumugu.tokenizer.importer import import_tokenizer
from tsumugu.tokenizer.load import BulkEncoder, load_tokenizer

BATCH = 64  # documents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", nargs="+", required=True)
    parser.add_argument("--text", default="text")
    parser.add_argument("--models", nargs="+", required=True)
    options = parser.parse_args()
    pieces = corpus.plan(corpus.find_files(options.input))
    print(
        "| model | lines | characters | differences | ties | documents cut otherwise in bulk | SentencePiece MB/s | ",
        end="",
    )
    print("bulk MB/s | fast MB/s |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for model in options.models:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "tokenizer"
            import_tokenizer(model, folder)
            print(row(Path(model), folder, corpus.texts(pieces, options.text)), flush=True)


def row(path: Path, folder: Path, documents) -> str:
    model = convert.read_model(path)
    original, bulk, fast = convert.processor(model), BulkEncoder(folder), load_tokenizer(folder)
    served = AutoTokenizer.from_pretrained(folder)
    special = [token.content for token in fast.get_added_tokens_decoder().values()]
    seconds = dict.fromkeys(("original", "bulk", "fast"), 0.0)
    size = lines = characters = differences = ties = otherwise = 0
    while batch := list(itertools.islice(documents, BATCH)):
        size += sum(len(text.encode()) for text in batch)
        parts = [line for text in batch for line in text.splitlines(keepends=True)]
        lines, characters = lines + len(parts), characters + sum(map(len, parts))
        assert not any(token in text for token in special for text in batch)

        started = time.process_time()
        by_original = original.encode(batch, num_threads=1)
        seconds["original"] += time.process_time() - started
        started = time.process_time()
        by_bulk = bulk(batch)
        seconds["bulk"] += time.process_time() - started
        otherwise += sum(list(ours) != theirs for ours, theirs in zip(by_bulk, by_original, strict=True))
        started = time.process_time()
        by_fast = served(parts, add_special_tokens=False).input_ids
        seconds["fast"] += time.process_time() - started
        encoded = dict(zip(parts, by_fast, strict=True))
        try:
            ties += convert.compare(model, lambda texts, encoded=encoded: [encoded[text] for text in texts], parts).ties
        except UserError as error:
            differences += 1
            print(error)
    speeds = " | ".join(f"{size / 1e6 / seconds[name]:.1f}" for name in ("original", "bulk", "fast"))
    name = path.stem
    return f"| {name} | {lines:,} | {characters:,} | {differences} | {ties} | {otherwise} | {speeds} |"


if __name__ == "__main__":
    main()

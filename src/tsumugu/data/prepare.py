"""From corpora to a token store, on datatrove's local executor.

A task of the executor reads one piece of the input and writes one shard of either split. datatrove's completion markers
make a killed run go on where it stopped; the manifest, written last, makes the folder a store.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from datatrove.data import Document, DocumentsPipeline
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from loguru import logger
from tqdm import tqdm

from tsumugu.config import PrepareConfig, Source
from tsumugu.data import corpus, instructions, store
from tsumugu.errors import UserError
from tsumugu.tokenizer.contract import Contract, check_contract, read_contract
from tsumugu.tokenizer.load import BulkEncoder

_BATCH_DOCUMENTS = 256
_WORK = ".work"


def prepare(config: PrepareConfig) -> dict:
    """Makes the token store that `config` describes, or finds it already made.

    Returns:
        The manifest, with the key `already_done` set when nothing was left to do.

    Raises:
        UserError: Input that cannot be used, or an output folder that holds something else.
    """
    output = Path(config.output)
    tokenizer = Path(config.tokenizer)
    contract = read_contract(tokenizer)
    settings = _settings(config, contract)
    if (output / store.MANIFEST).exists():
        manifest = store.open_store(output).manifest
        if manifest["settings"] != settings:
            raise UserError(f"{output} holds a store made otherwise", "choose another prepare.output, or delete it")
        return {**manifest, "already_done": True}
    check_contract(tokenizer)
    _check_special_tokens(config, contract)

    work = output / _WORK
    plan_file = work / "plan.json"
    if plan_file.exists() and json.loads(plan_file.read_text(encoding="utf-8")) != settings:
        raise UserError(f"{output} holds an unfinished store made otherwise", "delete it, or choose another output")
    work.mkdir(parents=True, exist_ok=True)
    plan_file.write_text(json.dumps(settings, ensure_ascii=False), encoding="utf-8")

    tasks = [(source, piece) for source in config.sources for piece in corpus.plan(corpus.find_files(source.path))]
    if not tasks:
        raise UserError("prepare.sources hold no bytes", "give files that are not empty")
    progress = np.memmap(work / "progress.bin", dtype=np.int64, mode="w+", shape=(len(tasks),))
    executor = _Executor(
        pipeline=[_Read(tasks), _Encode(tasks, config, contract)],
        tasks=len(tasks),
        workers=min(config.workers or os.cpu_count() or 1, len(tasks)),
        logging_dir=str(work),
    )
    with _progress_bar(progress, [piece.stop - piece.start for _, piece in tasks]):
        executor.run()
    manifest = _write_manifest(config, contract, settings, [source.name for source, _ in tasks])
    shutil.rmtree(work)
    return manifest


def _settings(config: PrepareConfig, contract: Contract) -> dict:
    """What the contents of the store depend on: equal settings give an equal store."""
    settings = dataclasses.asdict(config)
    for key in ("output", "workers", "tokenizer"):
        del settings[key]
    settings["tokenizer"] = contract.fingerprint
    settings["files"] = [
        [file, Path(file).stat().st_size] for source in config.sources for file in corpus.find_files(source.path)
    ]
    return settings


def _check_special_tokens(config: PrepareConfig, contract: Contract) -> None:
    needs = {
        "prepare.add_bos": (config.add_bos, contract.bos_id),
        "prepare.add_eos": (config.add_eos or config.kind == "instructions", contract.eos_id),
    }
    for key, (wanted, token_id) in needs.items():
        if wanted and token_id is None:
            raise UserError(f"{key} needs a token that the tokenizer {config.tokenizer} does not have", "set it false")
    if config.kind == "instructions":
        template = instructions.find_template(config.template)
        if contract.newline == "lost" and "\n" in template.without_input:
            raise UserError(
                f"template {config.template} has newlines, which the tokenizer {config.tokenizer} cannot express",
                "use a tokenizer with a newline",
            )


class _Executor(LocalPipelineExecutor):
    """datatrove's executor, with our progress bar in place of its log on the terminal."""

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1):
        logger.disable("datatrove")
        return super()._run_for_rank(rank, local_rank, node_rank)


class _Read(PipelineStep):
    """Yields the records of this task's piece."""

    name = "read"
    type = "READER"

    def __init__(self, tasks: list[tuple[Source, corpus.Piece]]):
        super().__init__()
        self.tasks = tasks

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        source, piece = self.tasks[rank]
        for record in corpus.read_records(piece):
            if source.kind == "text":
                values = {"text": corpus.column_of(record, source.text)}
            else:
                columns = {key: source.fields.get(key, key) for key in ("instruction", "input", "output")}
                if columns["input"] not in record.values:
                    del columns["input"]
                values = {key: corpus.column_of(record, column) for key, column in columns.items()}
            yield Document(text=values.get("text", ""), id=record.place, metadata=values | {"at": record.consumed})


class _Encode(PipelineStep):
    """Encodes documents or examples and writes this task's shard of both splits, and what it counted."""

    name = "encode"
    type = "WRITER"

    def __init__(self, tasks: list[tuple[Source, corpus.Piece]], config: PrepareConfig, contract: Contract):
        super().__init__()
        self.sources = [source for source, _ in tasks]
        self.config = config
        add_bos = contract.adds_bos if config.add_bos is None else config.add_bos
        add_eos = contract.adds_eos if config.add_eos is None else config.add_eos
        self.before = [contract.bos_id] if add_bos else []
        self.after = [contract.eos_id] if add_eos else []
        self.eos_id = contract.eos_id
        self.dtype = store.token_dtype(contract.vocab_size)

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        source, output = self.sources[rank], Path(self.config.output)
        share = self.config.validation_share if source.validation_share is None else source.validation_share
        supervised = source.kind == "instructions"
        writers = {
            split: store.ShardWriter(output / split / f"{rank:05d}", self.dtype, supervised) for split in store.SPLITS
        }
        progress = np.memmap(output / _WORK / "progress.bin", dtype=np.int64, mode="r+")
        encode_all = self._encode_examples if supervised else self._encode_documents
        counts = Counter()
        encode = BulkEncoder(Path(self.config.tokenizer))
        for documents in _batches(data, _BATCH_DOCUMENTS):
            for document, encoded in zip(documents, encode_all(documents, encode), strict=True):
                if isinstance(encoded, str):
                    counts[f"dropped: {encoded}"] += 1
                else:
                    split = "validation" if _hash_share(document.metadata) < share else "train"
                    writers[split].add(*encoded)
                    counts["documents"] += 1
                    counts["characters"] += sum(len(v) for v in document.metadata.values() if isinstance(v, str))
            progress[rank] = documents[-1].metadata["at"]
        for writer in writers.values():
            writer.close()
        (output / _WORK / f"counts-{rank:05d}.json").write_text(json.dumps(counts, ensure_ascii=False))
        yield from ()

    def _encode_documents(self, documents: list[Document], encode) -> list:
        """(ids,) of each document, or the reason why it is dropped."""
        encoded = encode([document.text for document in documents])
        return [
            (np.concatenate([self.before, ids, self.after]).astype(np.int64),) if document.text else "empty"
            for document, ids in zip(documents, encoded, strict=True)
        ]

    def _encode_examples(self, documents: list[Document], encode) -> list:
        """(ids, mask) of each example, or the reason why it is dropped."""
        template = instructions.find_template(self.config.template)
        results = []
        for record in (document.metadata for document in documents):
            if not record["output"]:
                results.append("empty response")
                continue
            prompt = template.prompt(record["instruction"], record.get("input", ""))
            example = instructions.encode_example(
                prompt, record["output"], encode, self.before, self.eos_id, self.config.train_on
            )
            too_long = self.config.max_length is not None and len(example[0]) > self.config.max_length
            results.append("longer than prepare.max_length" if too_long else example)
        return results


def _batches(data: DocumentsPipeline, size: int) -> Iterator[list[Document]]:
    batch: list[Document] = []
    for document in data or ():
        batch.append(document)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _hash_share(values: dict) -> float:
    """A number in [0, 1) that depends on the text (of an example: on its question) alone."""
    key = values.get("text") or json.dumps([values.get("instruction"), values.get("input", "")], ensure_ascii=False)
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") / 2**64


@contextlib.contextmanager
def _progress_bar(progress: np.ndarray, sizes: list[int]) -> Iterator[None]:
    """Shows how many bytes of the pieces the tasks have read, from the array that they write into."""
    bar = tqdm(total=sum(sizes), unit="B", unit_scale=True, desc="prepare", disable=None)
    finished = threading.Event()

    def watch() -> None:
        while not finished.wait(0.2):
            bar.update(int(progress.sum()) - bar.n)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
        bar.update(sum(sizes) - bar.n)
    finally:
        finished.set()
        thread.join()
        bar.close()


def _write_manifest(config: PrepareConfig, contract: Contract, settings: dict, source_names: list[str]) -> dict:
    output = Path(config.output)
    sources: dict[str, Counter] = {}
    for rank, name in enumerate(source_names):
        counts = json.loads((output / _WORK / f"counts-{rank:05d}.json").read_text())
        sources.setdefault(name, Counter()).update(counts)
    splits = {split: store.describe_shards(output, split) for split in store.SPLITS}
    if splits["train"]["documents"] == 0:
        dropped = {name: dict(counts) for name, counts in sources.items()}
        raise UserError(f"no document is left for training: {dropped or 'the sources are empty'}", "check the sources")
    shares = [config.validation_share if s.validation_share is None else s.validation_share for s in config.sources]
    if max(shares) > 0 and splits["validation"]["documents"] == 0:
        raise UserError(
            f"of {splits['train']['documents']} documents none was chosen for validation",
            "add documents, raise prepare.validation_share, or set it to 0 to train without validation",
        )
    shutil.copytree(config.tokenizer, output / "tokenizer", dirs_exist_ok=True)
    manifest = {
        "version": store.FORMAT_VERSION,
        "kind": config.kind,
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "tokenizer": {"fingerprint": contract.fingerprint, "vocab_size": contract.vocab_size},
        "template": config.template if config.kind == "instructions" else None,
        "add_bos": contract.adds_bos if config.add_bos is None else config.add_bos,
        "add_eos": config.kind == "instructions" or (contract.adds_eos if config.add_eos is None else config.add_eos),
        "splits": splits,
        "sources": {name: dict(counts) for name, counts in sources.items()},
        "settings": settings,
    }
    temporary = output / f".{store.MANIFEST}"
    temporary.write_text(json.dumps(manifest, ensure_ascii=False, indent=1), encoding="utf-8")
    temporary.replace(output / store.MANIFEST)
    return manifest


def describe(manifest: dict) -> str:
    """A store in one line: documents and tokens of both splits, and what was dropped."""
    parts = [
        f"{split} {entry['documents']:,} documents, {entry['tokens']:,} tokens"
        for split, entry in manifest["splits"].items()
    ]
    parts += [
        f"{name}: {count:,} {reason}"
        for name, counts in manifest["sources"].items()
        for reason, count in counts.items()
        if reason.startswith("dropped")
    ]
    if manifest["kind"] == "text" and not (manifest["add_bos"] or manifest["add_eos"]):
        parts.append("nothing marks where documents end (set prepare.add_eos or prepare.add_bos)")
    return "; ".join(parts)

"""From corpora to a token store, on datatrove's local executor.

A task of the executor reads some of the input, planned from the files alone, and writes one shard of either split.
datatrove's completion markers make a killed run go on where it stopped; the manifest, written last, makes the folder a
store.

Which split a document goes to depends on its text alone, so equal documents of sources with equal validation shares
never lie on both sides.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datatrove.data import Document
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from loguru import logger
from tqdm import tqdm

from tsumugu.config import PrepareConfig, Source
from tsumugu.data import corpus, instructions, store
from tsumugu.errors import UserError
from tsumugu.tokenizer.contract import Contract, check_contract, copy_tokenizer, read_contract
from tsumugu.tokenizer.load import BulkEncoder

TASK_BYTES = 8 * 2**20  # small files of a source share a task up to this size

_BATCH_DOCUMENTS = 256
_WORK = ".work"


@dataclass(frozen=True)
class _Task:
    """What one task of the executor reads, one piece after another."""

    source: Source
    pieces: list[corpus.Piece]

    @property
    def size(self) -> int:
        return sum(piece.size for piece in self.pieces)


def prepare(config: PrepareConfig) -> dict:
    """Makes the token store that `config` describes, or finds it already made.

    Returns:
        The manifest, with the key `already_done` set when nothing was left to do.

    Raises:
        UserError: Input that cannot be used, or an output folder that holds something else.
    """
    output, tokenizer = Path(config.output), Path(config.tokenizer)
    contract = read_contract(tokenizer)
    files = [file for source in config.sources for file in corpus.find_files(source.path)]
    settings = _settings(config, contract, files)
    if (output / store.MANIFEST).exists():
        manifest = store.open_store(output).manifest
        if changed := _changed(manifest.get("settings", {}), settings):
            raise UserError(
                f"{output} holds a store made with other settings: {changed}",
                "choose another prepare.output, or delete that folder",
            )
        if (output / _WORK).exists():  # killed between the manifest and the end
            shutil.rmtree(output / _WORK)
        return {**manifest, "already_done": True}
    _check_fields(config)
    _check_special_tokens(config, contract)
    check_contract(tokenizer)

    tasks = [task for source in config.sources for task in _tasks(source)]
    _start(output, settings)
    progress_file = output / _WORK / "progress.bin"
    np.zeros(len(tasks), np.int64).tofile(progress_file)
    executor = _Executor(
        pipeline=[_Read(tasks), _Encode(tasks, config, contract)],
        tasks=len(tasks),
        workers=min(config.workers or os.cpu_count() or 1, len(tasks)),
        logging_dir=str(output / _WORK),
    )
    with _progress_bar(np.memmap(progress_file, np.int64, mode="r"), [task.size for task in tasks]):
        executor.run()
    manifest = _write_manifest(config, contract, settings, [task.source.name for task in tasks])
    shutil.rmtree(output / _WORK)
    return manifest


def _tasks(source: Source) -> list[_Task]:
    """The pieces of a source, small ones taken together."""
    groups: list[list[corpus.Piece]] = []
    room = -1
    for piece in corpus.plan(corpus.find_files(source.path)):
        room -= piece.size
        if room < 0:
            groups.append([])
            room = TASK_BYTES - piece.size
        groups[-1].append(piece)
    return [_Task(source, pieces) for pieces in groups]


def _settings(config: PrepareConfig, contract: Contract, files: list[str]) -> dict:
    """What the contents of the store depend on: equal settings give an equal store."""
    settings = dataclasses.asdict(config)
    for key in ("output", "workers"):
        del settings[key]
    settings["tokenizer"] = contract.fingerprint
    settings["files"] = [[file, stat.st_size, stat.st_mtime_ns] for file in files if (stat := Path(file).stat())]
    return settings


def _changed(old: dict, new: dict) -> str:
    """The keys that differ, for a message; empty where none does."""
    names = [f"prepare.{key}" for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    return ", ".join("input files were modified" if name == "prepare.files" else name for name in names)


def _start(output: Path, settings: dict) -> None:
    """Readies the output folder: unfinished work with the same settings stays there, other work is thrown away."""
    work, settings_file = output / _WORK, output / _WORK / "settings.json"
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is not a folder", "choose another prepare.output")
    if output.is_dir() and not work.exists() and any(not path.name.startswith(".") for path in output.iterdir()):
        raise UserError(
            f"{output} holds something else than a token store", "choose another prepare.output, or empty it"
        )
    unfinished = json.loads(settings_file.read_text(encoding="utf-8")) if settings_file.exists() else None
    if unfinished == settings:
        return
    if unfinished is not None:
        changed = _changed(unfinished, settings)
        print(f"{output}: unfinished work is thrown away, since it was made otherwise ({changed})", file=sys.stderr)
    for folder in (*store.SPLITS, "tokenizer", _WORK):  # _WORK last: whatever is left after a kill is thrown away too
        if (output / folder).exists():
            shutil.rmtree(output / folder)
    work.mkdir(parents=True)
    _write_json(settings_file, settings)


def _write_json(path: Path, content: dict) -> None:
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
    temporary.replace(path)


def _check_fields(config: PrepareConfig) -> None:
    for index, source in enumerate(config.sources):
        if unknown := set(source.fields) - {"instruction", "input", "output"}:
            raise UserError(
                f"prepare.sources[{index}].fields has {', '.join(sorted(unknown))}",
                "its keys are instruction, input, output, its values the names of columns",
            )


def _check_special_tokens(config: PrepareConfig, contract: Contract) -> None:
    for key, wanted, token_id in (
        ("add_bos", config.add_bos, contract.bos_id),
        ("add_eos", config.add_eos, contract.eos_id),
    ):
        if wanted and token_id is None:
            raise UserError(f"prepare.{key} is set, but {config.tokenizer} has no such token", "set it to false")
    if config.kind == "instructions":
        if contract.eos_id is None:
            raise UserError(
                f"{config.tokenizer} has no end-of-text token, which ends every response",
                "use a tokenizer with an eos_token",
            )
        template = instructions.find_template(config.template)
        if contract.newline == "lost" and "\n" in template.without_input:
            raise UserError(
                f"template {config.template} has newlines, which the tokenizer {config.tokenizer} cannot express",
                "use a tokenizer with a newline",
            )


class _Executor(LocalPipelineExecutor):
    """datatrove's executor with a pool in which a dead worker is an error, and no worker outlives its parent.

    Its tasks, markers and statistics are datatrove's own; its log on the terminal is left out for our progress bar.
    """

    def run(self) -> None:
        ranks = self.get_incomplete_ranks()
        if self.workers == 1:
            for rank in ranks:
                self._run_for_rank(rank)
            return
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(self.workers, context, _end_with_parent) as pool:
            try:
                for task in concurrent.futures.as_completed([pool.submit(self._run_for_rank, rank) for rank in ranks]):
                    task.result()
            except BrokenProcessPool:
                raise UserError(
                    "a worker process was killed, most often for lack of memory",
                    "use fewer prepare.workers; run again to go on where it stopped",
                ) from None
            finally:
                pool.shutdown(cancel_futures=True)

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1):
        logger.disable("datatrove")
        return super()._run_for_rank(rank, local_rank, node_rank)


def _end_with_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches every process; one of them says so
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class _Read(PipelineStep):
    """Yields the records of this task."""

    name = "read"
    type = "READER"

    def __init__(self, tasks: list[_Task]):
        super().__init__()
        self.tasks = tasks

    def run(self, data: Iterator[Document] | None = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        source, before = self.tasks[rank].source, 0
        if source.kind == "instructions":
            columns = {field: source.fields.get(field, field) for field in ("instruction", "input", "output")}
        else:
            columns = {"text": source.text or corpus.find_text_column(self.tasks[rank].pieces)}
        for piece in self.tasks[rank].pieces:
            for record in corpus.records([piece], list(columns.values())):
                values = {
                    field: corpus.column_of(record, column)
                    for field, column in columns.items()
                    # the one column that may be absent, unless the user has named it
                    if not (field == "input" and "input" not in source.fields and column not in record.columns)
                }
                at = before + record.consumed
                yield Document(text=values.get("text", ""), id=record.place, metadata=values | {"at": at})
            before += piece.size


class _Encode(PipelineStep):
    """Encodes documents or examples and writes this task's shard of both splits, and what it counted."""

    name = "encode"
    type = "WRITER"

    def __init__(self, tasks: list[_Task], config: PrepareConfig, contract: Contract):
        super().__init__()
        self.tasks = tasks
        self.config = config
        add_bos = contract.adds_bos if config.add_bos is None else config.add_bos
        add_eos = contract.adds_eos if config.add_eos is None else config.add_eos
        self.before = [contract.bos_id] if add_bos and contract.bos_id is not None else []
        self.after = [contract.eos_id] if add_eos and contract.eos_id is not None else []
        self.eos_id = contract.eos_id
        self.dtype = store.token_dtype(contract.vocab_size)

    def run(self, data: Iterator[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        source, output = self.tasks[rank].source, Path(self.config.output)
        share = self.config.validation_share if source.validation_share is None else source.validation_share
        supervised = source.kind == "instructions"
        writers = {
            split: store.ShardWriter(output / split / f"{rank:05d}", self.dtype, supervised) for split in store.SPLITS
        }
        progress = np.memmap(output / _WORK / "progress.bin", np.int64, mode="r+")
        encode_all = self._encode_examples if supervised else self._encode_documents
        counts = Counter()
        encode = BulkEncoder(Path(self.config.tokenizer))
        for documents in _batches(data, _BATCH_DOCUMENTS):
            for document, encoded in zip(documents, encode_all(documents, encode), strict=True):
                if isinstance(encoded, str):
                    counts[f"dropped: {encoded}"] += 1
                else:
                    split = "validation" if hash_share(document.metadata) < share else "train"
                    writers[split].add(*encoded)
                    counts["documents"] += 1
                    counts["characters"] += sum(len(v) for v in document.metadata.values() if isinstance(v, str))
            progress[rank] = documents[-1].metadata["at"]
        shards = {split: writer.close() for split, writer in writers.items()}
        _write_json(output / _WORK / f"task-{rank:05d}.json", {"counts": counts, "shards": shards})
        yield from ()

    def _encode_documents(self, documents: list[Document], encode) -> list:
        """(ids,) of each document, or the reason why it is dropped."""
        encoded = encode([document.text for document in documents])
        return [
            (np.concatenate([self.before, ids, self.after]).astype(np.int64),) if ids else "empty" for ids in encoded
        ]

    def _encode_examples(self, documents: list[Document], encode) -> list:
        """(ids, mask) of each example, or the reason why it is dropped."""
        template = instructions.find_template(self.config.template)
        assert self.eos_id is not None
        results = []
        for record in (document.metadata for document in documents):
            if empty := [field for field in ("instruction", "output") if not record[field]]:
                results.append(f"empty {empty[0]}")
                continue
            messages = instructions.messages_of(record, {})
            (example,) = instructions.encode_conversations(
                [messages], template, encode, self.before, self.eos_id, self.config.train_on
            )
            too_long = self.config.max_length is not None and len(example[0]) > self.config.max_length
            results.append("longer than prepare.max_length" if too_long else example)
        return results


def _batches(data: Iterator[Document], size: int) -> Iterator[list[Document]]:
    batch: list[Document] = []
    for document in data:
        batch.append(document)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def hash_share(values: dict) -> float:
    """A number in [0, 1) that depends on the text (of an example: on its question) alone."""
    if "text" in values:
        key = values["text"]
    else:
        key = json.dumps([values["instruction"], values.get("input", "")], ensure_ascii=False)
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
    sources: dict[str, Counter] = {name: Counter() for name in source_names}
    shards: dict[str, list[dict]] = {split: [] for split in store.SPLITS}
    for rank, name in enumerate(source_names):
        task = json.loads((output / _WORK / f"task-{rank:05d}.json").read_text(encoding="utf-8"))
        sources[name].update(task["counts"])
        for split, shard in task["shards"].items():
            shards[split] += [shard] if shard else []
    splits = {split: store.describe_split(entries) for split, entries in shards.items()}
    if splits["train"]["documents"] == 0:
        counts = [f"{count} {what}" for counts in sources.values() for what, count in sorted(counts.items())]
        raise UserError(
            f"no document is left for training ({', '.join(counts) or 'the sources are empty'})", "check the sources"
        )
    shares = [config.validation_share if s.validation_share is None else s.validation_share for s in config.sources]
    if max(shares) > 0 and splits["validation"]["documents"] == 0:
        raise UserError(
            f"of {splits['train']['documents']} documents none was chosen for validation",
            "add documents, raise prepare.validation_share, or set it to 0 to train without validation",
        )
    copy_tokenizer(Path(config.tokenizer), output / "tokenizer")
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
    _write_json(output / store.MANIFEST, manifest)
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

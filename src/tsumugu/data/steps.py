"""The steps of a preparation, for datatrove: read, clean, check that it fits, keep for comparison, read again, encode.

Between steps a document carries, in its metadata, how far its task has come (`at`), why it is dropped (`dropped`), why
it could not be read (`set_aside`), and its split (`validation`). The last step of a task counts them all and writes.
"""

import dataclasses
import functools
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from tsumugu.config import PrepareConfig, Source
from tsumugu.data import corpus, instructions, store, too_long
from tsumugu.data.cleaning.clean import Cleaner
from tsumugu.data.comparison import dedup
from tsumugu.data.comparison.contamination import Contamination
from tsumugu.data.documents import Documents, DocumentWriter
from tsumugu.data.executor import Progress
from tsumugu.data.instructions.chat import ChatTemplate
from tsumugu.data.instructions.encode import special_ids
from tsumugu.errors import UserError
from tsumugu.tokenizer.contract import Contract
from tsumugu.tokenizer.load import BulkEncoder

WORK = ".work"  # what lies here does not outlive the preparation
DOCUMENTS = "documents"  # below it: what is compared
REMOVED = {"duplicates": "duplicate", "near/removed": "near duplicate"}  # below it: what is found, and the reason

_BATCH_DOCUMENTS = 256
_BATCH_CHARACTERS = 2**21


@dataclass(frozen=True)
class Task:
    """What one task reads, one piece after another: `columns` of the records of a source."""

    source: Source
    columns: list[str]
    pieces: list[corpus.Piece]

    @property
    def size(self) -> int:
        return sum(piece.size for piece in self.pieces)

    def __str__(self) -> str:
        first, last = self.pieces[0], self.pieces[-1]
        if len(self.pieces) == 1:
            return f"{first.path}, bytes {first.start:,} to {first.stop:,}"
        return f"{first.path} to {last.path}"


@functools.lru_cache(maxsize=1)
def _encoder(folder: str, fingerprint: str) -> BulkEncoder:
    """One a process: reading a large vocabulary takes as long as encoding some megabytes."""
    return BulkEncoder(Path(folder))


@functools.lru_cache(maxsize=1)
def _template(name: str, tokenizer: str) -> instructions.Template | ChatTemplate:
    """One a process."""
    return instructions.find_template(name, Path(tokenizer))


@functools.lru_cache(maxsize=1)
def _learns_earlier_replies(name: str, tokenizer: str) -> bool:
    return instructions.learns_earlier_replies(_template(name, tokenizer))


@functools.lru_cache(maxsize=1)
def _contamination(identities: tuple) -> Contamination | None:
    """One a process, of the files at the head of `identities`."""
    return Contamination([path for path, *_ in identities]) if identities else None


def contamination_of(config: PrepareConfig) -> Contamination | None:
    files = corpus.find_files(config.contamination) if config.contamination else []
    return _contamination(tuple(map(tuple, corpus.fingerprints(files))))


def adds_bos(config: PrepareConfig, contract: Contract) -> bool:
    """Whether a bos token is stored before every document; a template may write it by itself."""
    if config.kind == "instructions":
        template = _template(config.template, config.tokenizer)
        if config.template == "chat" or instructions.writes_bos(template, Path(config.tokenizer), contract):
            return False
    return contract.adds_bos if config.add_bos is None else config.add_bos


class Tally:
    """What became of a task's documents: counts by reason, and the files of what was dropped and set aside."""

    def __init__(self, stage: str, rank: int, config: PrepareConfig):
        self.counts: Counter[str] = Counter()
        self._config, self._stage, self._rank = config, stage, rank
        self._files: dict[Path, IO[str]] = {}

    def drop(self, document: Document) -> None:
        """Counts a document that is dropped for document.metadata["dropped"]; keeps it where that was asked for."""
        self.counts[f"dropped: {document.metadata['dropped']}"] += 1
        if self._config.keep_dropped:
            more = {key: document.metadata[key] for key in ("equals",) if key in document.metadata}
            self._write("dropped", {"reason": document.metadata["dropped"], **more, "text": document.text}, document.id)

    def set_aside(self, document: Document) -> None:
        """Counts and keeps a record that could not be read."""
        self.counts["set aside"] += 1
        self._write("set_aside", {"reason": document.metadata["set_aside"], "record": document.text}, document.id)

    def _write(self, folder: str, values: dict, place: str) -> None:
        path = Path(self._config.output) / folder / f"{self._stage}-{self._rank:05d}.jsonl"
        if path not in self._files:
            path.parent.mkdir(exist_ok=True)
            self._files[path] = open(path.with_name(f".{path.name}"), "w", encoding="utf-8")  # noqa: SIM115
        self._files[path].write(json.dumps({"place": place, **values}, ensure_ascii=False) + "\n")

    def close(self, shards: dict[str, dict | None] | None = None) -> None:
        """Makes the files appear, and then the result of the task."""
        for path, file in self._files.items():
            file.close()
            path.with_name(f".{path.name}").replace(path)
        result = {"counts": self.counts, "shards": shards or {}}
        write_json(result_file(self._config, self._stage, self._rank), result)


def write_json(path: Path, content: dict) -> None:
    """Writes a file that is whole or absent."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
    temporary.replace(path)


def result_file(config: PrepareConfig, stage: str, rank: int) -> Path:
    return Path(config.output) / WORK / f"{stage}-{rank:05d}.json"


def _validation_rows_file(config: PrepareConfig, rank: int) -> Path:
    """Where `Fit` keeps the keys of a task's validation rows, 16 bytes each, where rows are shortened."""
    return Path(config.output) / WORK / f"validation-rows-{rank:05d}"


def _validation_rows(config: PrepareConfig, tasks: int) -> set[bytes]:
    """The keys of all validation rows; none where rows are not shortened, which alone makes different ones equal."""
    if config.too_long == "drop":
        return set()
    keys = b"".join(_validation_rows_file(config, rank).read_bytes() for rank in range(tasks))
    return {keys[start : start + 16] for start in range(0, len(keys), 16)}


def _row_key(ids: np.ndarray) -> bytes:
    return hashlib.blake2b(ids.astype(np.int64).tobytes(), digest_size=16).digest()


def _documents_prefix(config: PrepareConfig, rank: int) -> Path:
    return Path(config.output) / WORK / DOCUMENTS / f"{rank:05d}"


class Read(PipelineStep):
    """Yields the records of this task, and those that could not be read with the metadata `set_aside`."""

    name = "read"
    type = "READER"

    def __init__(self, tasks: list[Task], config: PrepareConfig):
        super().__init__()
        self.tasks, self.config = tasks, config

    def run(self, data: Iterator[Document] | None = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        task, before = self.tasks[rank], 0
        for piece in task.pieces:
            for record in corpus.read_records(piece, task.columns):
                yield self._document(record, task, (before + record.consumed) / max(task.size, 1))
            before += piece.size

    def _document(self, record: corpus.Record | corpus.BadRecord, task: Task, at: float) -> Document:
        metadata = {"at": at, "dropped": None}
        if isinstance(record, corpus.Record):
            try:
                return Document(_content(record, task, self.config), record.place, metadata=metadata)
            except instructions.UnusableError as error:
                raw = corpus.unusable(record, error).raw
                return Document(raw, record.place, metadata=metadata | {"dropped": error.message})
            except UserError as error:
                record = corpus.unusable(record, error)
        if self.config.bad_records == "stop":
            raise record.error
        return Document(record.raw, record.place, metadata=metadata | {"set_aside": str(record.error)})


def _content(record: corpus.Record, task: Task, config: PrepareConfig) -> str:
    """The text of a record; of instructions, the conversation as JSON."""
    if task.source.kind == "text":
        return corpus.column_of(record, task.columns[0])
    messages = instructions.messages_of(record.values, task.source.fields)
    _template(config.template, config.tokenizer).segments(messages)  # refuses what it has no place for
    return instructions.to_json(messages)


class Clean(PipelineStep):
    """Cleans documents, names why one is dropped, and decides its split."""

    name = "clean"
    type = "FILTER"

    def __init__(self, tasks: list[Task], config: PrepareConfig):
        super().__init__()
        self.tasks, self.config = tasks, config

    def run(self, data: Iterator[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        source = self.tasks[rank].source
        share = self.config.validation_share_of(source)
        cleaner = Cleaner(self.config.clean_of(source), source.language)
        contamination = contamination_of(self.config)
        for documents in _batches(data):
            fit = _fit(documents)
            clean = _clean_texts if source.kind == "text" else _clean_conversations
            clean(fit, cleaner)
            if contamination:
                texts = [document.text for document in fit]
                if source.kind == "instructions":
                    conversations = map(instructions.from_json, texts)
                    texts = ["\n".join(part for m in ms for part in (m.content, m.input)) for ms in conversations]
                for document, file in zip(fit, contamination.check(texts), strict=True):
                    if file and not document.metadata["dropped"]:
                        document.metadata["dropped"] = f"contaminated by {file}"
            for document in fit:
                document.metadata["validation"] = hash_share(split_key(document.text, source.kind)) < share
            yield from documents


def _clean_texts(documents: list[Document], cleaner: Cleaner) -> None:
    texts, places = [document.text for document in documents], [document.id for document in documents]
    for document, cleaned in zip(documents, cleaner(texts, places), strict=True):
        document.text = cleaned.text
        document.metadata["dropped"] = cleaned.dropped or (None if cleaned.text else "empty")


def _clean_conversations(documents: list[Document], cleaner: Cleaner) -> None:
    """Cleans each message for itself; a conversation goes where one of its messages does."""
    conversations = [instructions.from_json(document.text) for document in documents]
    texts = [text for messages in conversations for message in messages for text in (message.content, message.input)]
    places = [document.id for document, messages in zip(documents, conversations, strict=True) for _ in 2 * messages]
    cleaned = iter(cleaner(texts, places))
    for document, messages in zip(documents, conversations, strict=True):
        results = [(next(cleaned), next(cleaned)) for _ in messages]
        document.metadata["dropped"] = next((r.dropped for pair in results for r in pair if r.dropped), None)
        made = [
            dataclasses.replace(message, content=content.text, input=input.text)
            for message, (content, input) in zip(messages, results, strict=True)
        ]
        document.text = instructions.to_json(made)
        try:
            instructions.check_turns(made)
        except instructions.UnusableError as error:
            document.metadata["dropped"] = document.metadata["dropped"] or error.message


def split_key(content: str, kind: str) -> str:
    """What decides the split of a content: a text itself, of a conversation what stands before its first reply."""
    return content if kind == "text" else instructions.question_key(instructions.from_json(content))


def hash_share(key: str) -> float:
    """A number in [0, 1) that depends on the key alone."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") / 2**64


class Fit(PipelineStep):
    """Names why a conversation will not be stored, so that none is removed for the sake of one that is not there.

    It is encoded for that, and again when it is stored. Texts are not: what has no tokens has no letters to compare.
    Where conversations are shortened, `Encode` learns from it what is held out.
    """

    name = "fit"
    type = "FILTER"

    def __init__(self, config: PrepareConfig, contract: Contract):
        super().__init__()
        self.encoding = _Encoding(config, contract)

    def run(self, data: Iterator[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        held_out = bytearray()
        for documents in _batches(data):
            fit = _fit(documents)
            for document, encoded in zip(fit, self.encoding(fit), strict=True):
                parts, reason = self.encoding.parts(encoded)
                document.metadata["dropped"] = None if parts else reason
                if document.metadata["validation"]:
                    held_out += b"".join(_row_key(ids) for ids, *_ in parts)
            yield from documents
        if self.encoding.config.too_long != "drop":
            _validation_rows_file(self.encoding.config, rank).write_bytes(held_out)


class Keep(PipelineStep):
    """Writes the documents of a task for comparison with all others."""

    name = "keep"
    type = "WRITER"

    def __init__(self, stage: str, tasks: list[Task], config: PrepareConfig):
        super().__init__()
        self.stage, self.tasks, self.config = stage, tasks, config

    def run(self, data: Iterator[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        tally = Tally(self.stage, rank, self.config)
        progress = Progress(Path(self.config.output) / WORK / self.stage, rank)
        writer = DocumentWriter(_documents_prefix(self.config, rank))
        for documents in _batches(data):
            for document in _wanted(documents, tally):
                key = split_key(document.text, self.config.kind)
                writer.add(document.text, document.id, document.metadata["validation"], key)
            progress.show(documents[-1].metadata["at"])
        writer.close()
        tally.close()
        yield from ()


class Kept(PipelineStep):
    """Yields the documents of a task again, those that comparison removed with the reason."""

    name = "kept"
    type = "READER"

    def __init__(self, tasks: list[Task], config: PrepareConfig):
        super().__init__()
        self.tasks, self.config = tasks, config

    def run(self, data: Iterator[Document] | None = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        documents = Documents(_documents_prefix(self.config, rank))
        removed = {}
        compared = self.config.deduplicate_of(self.tasks[rank].source) != "none"
        for folder, reason in REMOVED.items():
            for row in dedup.read_removed(Path(self.config.output) / WORK / folder, rank).tolist():
                removed[row[1]] = (reason if compared else "in validation", *row[2:4])
        for index, place in enumerate(documents.places()):
            validation = bool(documents.rows["validation"][index])
            metadata = {"at": (index + 1) / len(documents), "validation": validation, "dropped": None}
            if index in removed:
                metadata["dropped"], task, other = removed[index]
                if self.config.keep_dropped:
                    metadata["equals"] = _places(_documents_prefix(self.config, task))[other]
            yield Document(text=documents.content(index), id=place, metadata=metadata)


@functools.lru_cache(maxsize=4)
def _places(prefix: Path) -> list[str]:
    return list(Documents(prefix).places())


class Encode(PipelineStep):
    """Encodes documents or conversations and writes this task's shard of both splits, and what it counted."""

    name = "encode"
    type = "WRITER"

    def __init__(self, stage: str, config: PrepareConfig, contract: Contract):
        super().__init__()
        self.stage, self.config, self.contract = stage, config, contract
        self.encoding = _Encoding(config, contract)

    def run(self, data: Iterator[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        output, supervised = Path(self.config.output), self.config.kind == "instructions"
        dtype = store.token_dtype(self.contract.vocab_size)
        writers = {
            split: store.ShardWriter(output / split / f"{rank:05d}", dtype, supervised) for split in store.SPLITS
        }
        tally = Tally(self.stage, rank, self.config)
        progress = Progress(output / WORK / self.stage, rank)
        held_out = _validation_rows(self.config, world_size)
        for documents in _batches(data):
            wanted = _wanted(documents, tally)
            for document, encoded in zip(wanted, self.encoding(wanted), strict=True):
                parts, note = self.encoding.parts(encoded)
                split = "validation" if document.metadata["validation"] else "train"
                if held_out and split == "train":
                    new = [part for part in parts if _row_key(part[0]) not in held_out]
                    if len(new) < len(parts):
                        tally.counts["dropped: rows that equal validation rows once shortened"] += len(parts) - len(new)
                        if not new:
                            continue
                        parts = new
                if not parts:
                    document.metadata["dropped"] = note
                    tally.drop(document)
                    continue
                for part in parts:
                    writers[split].add(*part)
                tally.counts["documents"] += len(parts)
                tally.counts["characters"] += len(document.text)
                if note:
                    tally.counts[note] += 1
                if unlearned := self.encoding.unlearned_replies(document):
                    tally.counts["not learned: earlier replies, as the template shows them otherwise"] += unlearned
            progress.show(documents[-1].metadata["at"])
        tally.close({split: writer.close() for split, writer in writers.items()})
        yield from ()


class _Encoding:
    """How documents, or conversations, become what the store holds of them."""

    def __init__(self, config: PrepareConfig, contract: Contract):
        self.config, self.contract = config, contract
        add_bos = adds_bos(config, contract)
        add_eos = contract.adds_eos if config.add_eos is None else config.add_eos
        self.before = np.array([contract.bos_id] if add_bos and contract.bos_id is not None else [], np.int32)
        self.after = np.array([contract.eos_id] if add_eos and contract.eos_id is not None else [], np.int32)

    def __call__(self, documents: list[Document]) -> Iterable[tuple[np.ndarray, ...] | UserError]:
        """(ids,) of each document, (ids, mask) of each conversation or why it cannot be used."""
        encode = _encoder(self.config.tokenizer, self.contract.fingerprint)
        encode_all = self._encode_conversations if self.config.kind == "instructions" else self._encode_texts
        return encode_all(documents, encode)

    def unlearned_replies(self, document: Document) -> int:
        """How many replies of a conversation would be learned, were they not shown otherwise than as generated."""
        config = self.config
        if config.kind != "instructions" or config.train_on != "responses":
            return 0
        if _learns_earlier_replies(config.template, config.tokenizer):
            return 0
        messages = instructions.from_json(document.text)
        return sum(message.train for message in messages[:-1] if message.role == "assistant")

    def parts(self, encoded: tuple[np.ndarray, ...] | UserError) -> tuple[list[tuple[np.ndarray, ...]], str | None]:
        """The documents that the store holds of it, and how they were shortened; or none, and why."""
        if isinstance(encoded, UserError):
            return [], encoded.message
        ids, *masks = encoded
        if len(ids) == 0:
            return [], "empty"
        parts, shortened, most = [encoded], None, self.config.max_length
        if masks and most and len(ids) > most:
            head = int(ids[0] == self.contract.bos_id)  # prepare's own, or the template's
            parts, shortened = too_long.fit(ids, masks[0], most, self.config.too_long, head)
            if not parts:
                return [], "longer than prepare.max_length"
        return ([], "no supervised token") if masks and not parts[0][1].any() else (parts, shortened)

    def _encode_texts(self, documents: list[Document], encode: BulkEncoder) -> Iterable[tuple[np.ndarray, ...]]:
        """(ids,) of each document, without tokens where it encodes to none."""
        for ids in encode([document.text for document in documents]):
            yield (np.concatenate([self.before, ids, self.after]) if len(ids) else ids,)

    def _encode_conversations(
        self, documents: list[Document], encode: BulkEncoder
    ) -> Iterable[tuple[np.ndarray, ...] | UserError]:
        """(ids, mask) of each conversation, or why it cannot be used."""
        return instructions.encode_conversations(
            [instructions.from_json(document.text) for document in documents],
            _template(self.config.template, self.config.tokenizer),
            encode,
            self.before.tolist(),
            self.contract.eos_id,
            self.config.train_on,
            special_ids(Path(self.config.tokenizer)),
        )


def _wanted(documents: list[Document], tally: Tally) -> list[Document]:
    """The documents that go on; the others are counted."""
    for document in documents:
        if "set_aside" in document.metadata:
            tally.set_aside(document)
        elif document.metadata["dropped"]:
            tally.drop(document)
    return _fit(documents)


def _fit(documents: list[Document]) -> list[Document]:
    return [d for d in documents if "set_aside" not in d.metadata and not d.metadata["dropped"]]


def _batches(data: Iterator[Document]) -> Iterator[list[Document]]:
    """Documents in lists that are worth a call, and no larger than memory allows."""
    batch: list[Document] = []
    characters = 0
    for document in data:
        batch.append(document)
        characters += len(document.text)
        if len(batch) == _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch

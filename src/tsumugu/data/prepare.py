"""From corpora to a token store, in stages of datatrove steps.

    read → clean → encode                                  nothing is compared
    read → clean → fit │ exact │ near … │ encode           documents are compared with each other

A task reads some of the input, planned from the files alone, and ends as one shard of either split. datatrove's
completion markers make a killed run go on where it stopped; the manifest, written last, makes the folder a store.

Which split a document goes to depends on its text alone. Where sources have different validation shares, documents are
deduplicated, or too long ones shortened, training documents that equal a validation document are removed, so that the
splits never overlap.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from tsumugu.config import PrepareConfig, Source, redacted
from tsumugu.data import corpus, instructions, store
from tsumugu.data.cleaning.clean import Cleaner
from tsumugu.data.comparison import dedup
from tsumugu.data.executor import Stage, run_local, run_ray, run_slurm, unfinished_jobs
from tsumugu.data.steps import (
    DOCUMENTS,
    REMOVED,
    WORK,
    Clean,
    Encode,
    Fit,
    Keep,
    Kept,
    Read,
    Task,
    adds_bos,
    contamination_of,
    result_file,
    write_json,
)
from tsumugu.errors import UserError
from tsumugu.tokenizer.contract import Contract, check_contract, copy_tokenizer, read_contract

_LOCK = ".lock"

# Bytes of input a task: a 256th of all, within these. A function of the input alone, so that the store is too.
TASK_BYTES = (8 * 2**20, 256 * 2**20)


def prepare(config: PrepareConfig) -> dict:
    """Makes the token store that `config` describes, or finds it already made.

    Returns:
        The manifest, with the key `already_done` set when nothing was left to do; on a Slurm cluster, where others do
        the work, {"submitted": a line that says what}.

    Raises:
        UserError: Input that cannot be used, or an output folder that holds something else.
    """
    output, tokenizer = Path(config.output), Path(config.tokenizer)
    contract = read_contract(tokenizer)
    check_records(config)
    for source in config.sources:  # what is wrong with files that they name shows here
        Cleaner(config.clean_of(source), source.language)
    files = {source.name: corpus.find_files(source.path) for source in config.sources}
    read = [file for several in files.values() for file in several]
    local = [Path(file).resolve() for file in read if "://" not in file]
    if inside := [file for file in local if output.resolve() in file.parents]:
        raise UserError(f"{inside[0]} is read, and lies in prepare.output", "choose another prepare.output")
    settings = _settings(config, contract, read + corpus.find_files(config.contamination))
    if (output / store.MANIFEST).exists():
        made = _already_made(output, settings)
        if any((output / name).exists() for name in (WORK, _LOCK)):  # killed between the manifest and the end
            with contextlib.suppress(UserError), _locked(output):  # what others hold, or is not writable, stays
                if (output / WORK).exists() and not unfinished_jobs(output / WORK):
                    shutil.rmtree(output / WORK)
        return made
    _check_special_tokens(config, contract)
    check_contract(tokenizer)
    if contamination := contamination_of(config):
        for file, records, unchecked, example in contamination.coverage:
            if unchecked:
                print(
                    f"{file}: {unchecked:,} of {records:,} records are too short to be looked for, such as {example}",
                    file=sys.stderr,
                )

    tasks = plan(config, files)
    for line in _read_twice(tasks):
        print(line, file=sys.stderr)
    stages = _stages(config, contract, settings, tasks)
    with _locked(output):
        if (output / store.MANIFEST).exists():  # made by another process since
            return _already_made(output, settings)
        jobs = unfinished_jobs(output / WORK)
        if jobs and (config.executor != "slurm" or _unfinished_settings(output) != settings):
            raise UserError(
                f"jobs {', '.join(jobs)} of an earlier call with other settings still work on {output}",
                "wait for them, or end them with scancel",
            )
        _start(output, settings)
        if config.executor == "slurm":
            return {"submitted": run_slurm(stages, output / WORK, config)}
        if config.executor == "ray":
            run_ray(stages, output / WORK, config.workers)
        else:
            run_local(stages, output / WORK, config.workers or os.cpu_count() or 1)
        manifest = store.read_manifest(output)
        shutil.rmtree(output / WORK)
    return manifest


def _read_twice(tasks: list[Task]) -> list[str]:
    """A line for every two sources that read the same columns of the same files."""
    first: dict[tuple, str] = {}
    shared: dict[tuple[str, str], dict[str, None]] = {}
    for task in tasks:
        for piece in task.pieces:
            name, other = (
                task.source.name,
                first.setdefault((corpus.identity(piece.path), *task.columns), task.source.name),
            )
            if name != other:
                shared.setdefault((other, name), {})[piece.path] = None
    lines = []
    for (one, other), paths in shared.items():
        which = next(iter(paths)) if len(paths) == 1 else f"{len(paths):,} files, such as {next(iter(paths))},"
        lines.append(f"sources {one} and {other} both read {which} with the same column: what is in there counts twice")
    return lines


def _already_made(output: Path, settings: dict) -> dict:
    """The manifest of the store in the output folder, with `already_done`, if that was made with these settings."""
    manifest = store.open_store(output).manifest
    if changed := _changed(manifest.get("settings", {}), settings):
        raise UserError(
            f"{output} holds a store made with other settings: {changed}",
            "choose another prepare.output, or delete that folder",
        )
    return {**manifest, "already_done": True}


def plan(config: PrepareConfig, files: dict[str, list[str]]) -> list[Task]:
    """The tasks of every source, in order; small files of a source share one."""
    total = sum(size for several in files.values() for _, size, _ in corpus.fingerprints(several))
    least, most = TASK_BYTES
    task_bytes = min(max(total // 256, least), most)
    tasks: list[Task] = []
    for source in config.sources:
        pieces = corpus.plan(files[source.name], task_bytes)
        columns = (
            instructions.columns_for(source.fields) if source.kind == "instructions" else [_text_column(source, pieces)]
        )
        room = -1
        for piece in pieces:
            room -= piece.size
            if room < 0:
                tasks.append(Task(source, columns, []))
                room = task_bytes - piece.size
            tasks[-1].pieces.append(piece)
    return tasks


def training_texts(config: PrepareConfig) -> Iterator[str]:
    """What would be trained on, cleaned, before deduplication: documents, or conversations as JSON."""
    files = {source.name: corpus.find_files(source.path) for source in config.sources}
    for task in plan(config, files):
        for document in Clean([task], config).run(Read([task], config).run()):
            unfit = "set_aside" in document.metadata or document.metadata["dropped"]
            if not unfit and not document.metadata["validation"]:
                yield document.text


def _text_column(source: Source, pieces: list[corpus.Piece]) -> str:
    return source.text or corpus.find_text_column(pieces)


def _stages(config: PrepareConfig, contract: Contract, settings: dict, tasks: list[Task]) -> list[Stage]:
    work = (Path(config.output) / WORK).absolute()  # datatrove would expand a ~
    modes: list[dedup.Mode] = [config.deduplicate_of(task.source) for task in tasks]
    shares = {config.validation_share_of(source) for source in config.sources}
    inputs, sizes = [str(task) for task in tasks], np.array([float(task.size) for task in tasks])
    read: list[PipelineStep] = [Read(tasks, config), Clean(tasks, config)]

    def finish(*counted: str) -> Stage:
        return Stage("finish", [_Finish(config, contract, settings, tasks, counted)], [config.output], [0.0])

    if set(modes) == {"none"} and len(shares) == 1 and config.too_long == "drop":
        encode = Encode("encode", config, contract)
        return [Stage("encode", [*read, encode], inputs, list(sizes)), finish("encode")]
    read += [Fit(config, contract)] if config.kind == "instructions" else []
    stages = [Stage("read", [*read, Keep("read", tasks, config)], inputs, list(sizes * 0.5))]
    documents, exact, near = (work / name for name in (DOCUMENTS, *REMOVED))
    comparisons = [dedup.exact_stage(documents, exact, modes, int(sizes.sum()))]
    if "near" in modes:
        comparisons += dedup.near_stages(documents, exact, near.parent, modes, config.kind, config.min_similarity)
    for name, pipeline, parts in comparisons:
        inputs_of_parts = [f"part {number + 1} of {parts} of the documents" for number in range(parts)]
        stages.append(Stage(name, pipeline, inputs_of_parts, [0.0] * parts))
    encode = [Kept(tasks, config), Encode("encode", config, contract)]
    return [*stages, Stage("encode", encode, inputs, list(sizes * 0.5)), finish("read", "encode")]


def _settings(config: PrepareConfig, contract: Contract, files: list[str]) -> dict:
    """What the contents of the store depend on: equal settings give an equal store."""
    settings = dataclasses.asdict(config)
    for key in ("output", "workers", "executor", "slurm"):
        del settings[key]
    settings["tokenizer"] = contract.fingerprint
    lists = [config.clean_of(source).ng_words for source in config.sources]
    for source in config.sources:
        arguments = [value for item in config.clean_of(source).hojichar for value in item.values()]
        lists += [value for value in arguments if isinstance(value, str) and Path(value).is_file()]
    if config.kind == "instructions":
        template = instructions.find_template(config.template, Path(config.tokenizer))
        settings["template"] = instructions.definition(config.template, template)
    settings["files"] = corpus.fingerprints((*files, *filter(None, lists)))
    return redacted(json.loads(json.dumps(settings)))


def _changed(old: dict, new: dict) -> str:
    """The keys that differ, for a message; empty where none does."""
    names = [f"prepare.{key}" for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    return ", ".join("input files were modified" if name == "prepare.files" else name for name in names)


def _start(output: Path, settings: dict) -> None:
    """Readies the output folder: unfinished work with the same settings stays there, other work is thrown away."""
    work = output / WORK
    if not work.exists() and any(not path.name.startswith(".") for path in output.iterdir()):
        raise UserError(
            f"{output} holds something else than a token store", "choose another prepare.output, or empty it"
        )
    unfinished = _unfinished_settings(output)
    if unfinished == settings:
        return
    if unfinished is not None:
        changed = _changed(unfinished, settings)
        print(f"{output}: unfinished work is thrown away, since it was made otherwise ({changed})", file=sys.stderr)
    for folder in (
        *store.SPLITS,
        "tokenizer",
        "dropped",
        "set_aside",
        WORK,
    ):  # WORK last: whatever is left after a kill is thrown away too
        if (output / folder).exists():
            shutil.rmtree(output / folder)
    work.mkdir(parents=True)
    write_json(work / "settings.json", settings)


def _unfinished_settings(output: Path) -> dict | None:
    """The settings of the work that lies unfinished in the output folder."""
    file = output / WORK / "settings.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def check_records(config: PrepareConfig) -> None:
    """Refuses what no record could be read by: fields and templates that do not exist."""
    if config.kind == "instructions":
        instructions.find_template(config.template, Path(config.tokenizer))
    for index, source in enumerate(config.sources):
        if unknown := set(source.fields) - set(instructions.FIELDS):
            raise UserError(
                f"prepare.sources[{index}].fields has {', '.join(sorted(unknown))}",
                f"its keys are {', '.join(instructions.FIELDS)}, its values the names of columns",
            )


def _check_special_tokens(config: PrepareConfig, contract: Contract) -> None:
    for key, wanted, token_id in (
        ("add_bos", config.add_bos, contract.bos_id),
        ("add_eos", config.add_eos, contract.eos_id),
    ):
        if wanted and token_id is None:
            raise UserError(f"prepare.{key} is set, but {config.tokenizer} has no such token", "set it to false")
    if config.kind == "instructions":
        tokenizer = Path(config.tokenizer)
        template = instructions.find_template(config.template, tokenizer)
        if config.add_bos and (config.template == "chat" or instructions.writes_bos(template, tokenizer, contract)):
            raise UserError(
                f"prepare.add_bos is set, but template {config.template} writes bos by itself", "leave it out"
            )
        instructions.check_template(template, config.template, tokenizer, contract)


@contextlib.contextmanager
def _locked(output: Path) -> Iterator[None]:
    """Keeps a second preparation of the same folder out until this one ends, however it ends."""
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is not a folder", "choose another prepare.output")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{output} cannot be made ({error.strerror})", "choose another prepare.output") from None
    lock = output / _LOCK
    while True:
        try:
            file = open(lock, "w")  # noqa: SIM115 - closed below
        except OSError as error:
            raise UserError(f"{output} cannot be written ({error.strerror})", "choose another prepare.output") from None
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"another process prepares {output} at this moment", "wait for it, or end it") from None
            if not _is_at(file.fileno(), lock):  # its last holder has removed it since it was opened
                continue
            try:
                yield
            finally:
                lock.unlink()
            return


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


class _Finish(PipelineStep):
    """Writes the manifest from what the tasks of `stages` counted."""

    name = "finish"
    type = "WRITER"

    def __init__(
        self, config: PrepareConfig, contract: Contract, settings: dict, tasks: list[Task], stages: tuple[str, ...]
    ):
        super().__init__()
        self.config, self.contract, self.settings, self.tasks, self.stages = config, contract, settings, tasks, stages

    def run(self, data: Iterator[Document] | None = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        _write_manifest(self.config, self.contract, self.settings, self.tasks, self.stages)
        yield from ()


def _write_manifest(
    config: PrepareConfig, contract: Contract, settings: dict, tasks: list[Task], stages: tuple[str, ...]
) -> None:
    output = Path(config.output)
    sources = {source.name: Counter() for source in config.sources}
    shards: dict[str, list[dict]] = {split: [] for split in store.SPLITS}
    for rank, task in enumerate(tasks):
        for stage in stages:
            result = json.loads(result_file(config, stage, rank).read_text(encoding="utf-8"))
            sources[task.source.name].update(result["counts"])
            for split, shard in result["shards"].items():
                shards[split] += [shard] if shard else []
    splits = {split: store.describe_split(entries) for split, entries in shards.items()}
    if splits["train"]["documents"] == 0:
        counts = [f"{count} {what}" for counts in sources.values() for what, count in sorted(counts.items())]
        raise UserError(
            f"no document is left for training ({', '.join(counts) or 'the sources are empty'})", "check the sources"
        )
    if any(config.validation_share_of(source) for source in config.sources) and not splits["validation"]["documents"]:
        raise UserError(
            f"of {splits['train']['documents']} documents none was chosen for validation",
            "add documents, raise prepare.validation_share, or set it to 0 to train without validation",
        )
    tokenizer = Path(config.tokenizer)
    copy_tokenizer(tokenizer, output / "tokenizer")
    template = None
    if config.kind == "instructions":
        found = instructions.find_template(config.template, tokenizer)
        template = instructions.definition(config.template, found)
        chat_template = instructions.jinja_of(found, adds_bos(config, contract))
        (output / "tokenizer" / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
    manifest = {
        "version": store.FORMAT_VERSION,
        "kind": config.kind,
        "tokenizer": {
            "fingerprint": contract.fingerprint,
            "vocab_size": contract.vocab_size,
            "files": store.describe_files(output / store.TOKENIZER),
        },
        "template": template,
        "add_bos": adds_bos(config, contract),
        "add_eos": config.kind == "instructions" or (contract.adds_eos if config.add_eos is None else config.add_eos),
        "splits": splits,
        "sources": {name: dict(sorted(counts.items())) for name, counts in sources.items()},
        "settings": settings,
    }
    write_json(output / store.MANIFEST, manifest)


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
        if reason.startswith(("dropped", "shortened", "not learned")) or reason == "set aside"
    ]
    if manifest["kind"] == "text" and not (manifest["add_bos"] or manifest["add_eos"]):
        parts.append("nothing marks where documents end (set prepare.add_eos or prepare.add_bos)")
    return "; ".join(parts)


def warnings(manifest: dict) -> list[str]:
    """A line for every source of which more than half was dropped, with the most frequent reasons."""
    lines = []
    for name, counts in manifest["sources"].items():
        dropped = Counter(
            {what.removeprefix("dropped: "): n for what, n in counts.items() if what.startswith("dropped")}
        )
        if dropped.total() > counts.get("documents", 0):
            total = dropped.total() + counts.get("documents", 0)
            reasons = ", ".join(f"{reason} {count:,}" for reason, count in dropped.most_common(3))
            lines.append(f"{name}: {dropped.total():,} of {total:,} documents were dropped ({reasons})")
    return lines

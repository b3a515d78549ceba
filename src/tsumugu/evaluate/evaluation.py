"""`tsumugu evaluate`: several models on the same data, side by side, as JSON and as a table."""

import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

import tsumugu
from tsumugu.data import corpus
from tsumugu.data.store import Store, open_store
from tsumugu.distributed import paths
from tsumugu.distributed.environment import on_main, process_group
from tsumugu.errors import UserError
from tsumugu.evaluate import harness, likelihood, models
from tsumugu.evaluate.likelihood import Packing, Windows
from tsumugu.evaluate.models import Model, Reference
from tsumugu.generate import Decoding, Generator, Prompts, answer, read_prompts
from tsumugu.tokenizer.load import BulkEncoder
from tsumugu.training.storages import Group, new_group, together
from tsumugu.training.watchdog import group_timeout


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is asked of which models; the command line's words.

    Attributes:
        models: Hugging Face folders, RUN or RUN@STEP.
        each_checkpoint: A RUN stands for all its checkpoints.
        tokenizer: For models without a contract of their tokenizer.
        stores: Token stores, of which `split` is read.
        texts: Files, folders or globs as `data.corpus` reads them; `text_column` names the column.
        packing: See `likelihood.Windows`; so sequence_length and stride. None: as the first run was trained.
        tasks: Names or task files, whose documents lie below `task_data`; `limit` documents of each.
        chat_template: Whether the tasks' prompts go through it.
        prompts: A file of prompts as `generate` takes it, each to be continued by at most `max_new_tokens`, with
            `template`.
        dtype: None: bfloat16 on a GPU that has it, float32 elsewhere.
        batch_size: Windows or requests a batch.
    """

    models: Sequence[str]
    each_checkpoint: bool = False
    tokenizer: Path | None = None
    stores: Sequence[Path] = ()
    split: str = "validation"
    texts: Sequence[str] = ()
    text_column: str | None = None
    packing: Packing | None = None
    sequence_length: int | None = None
    stride: int | None = None
    tasks: Sequence[str] = ()
    task_data: Path | None = None
    limit: int | None = None
    chat_template: bool = False
    prompts: Path | None = None
    template: str | None = None
    max_new_tokens: int = 128
    dtype: str | None = None
    batch_size: int = 8


def evaluate(asked: Evaluation) -> dict[str, Any]:
    """The report; every process of a torchrun job calls it, and all get it.

    Raises:
        UserError: Models, data or settings that cannot be used, or that do not go together.
    """
    _check(asked)
    with process_group(group_timeout(None)) as environment:
        group, device = new_group(), environment.device
        dtype = on_main(lambda: paths.compute_dtype(asked.dtype, paths.this_device(device)))
        references = models.find(asked.models, asked.each_checkpoint, asked.tokenizer, group)
        stores = [open_store(path) for path in asked.stores]
        for store in stores:
            _check_fingerprints(store, references)
        of_run, positions = models.data_settings(references), [reference.positions for reference in references]
        asked_windows = {"packing": asked.packing, "length": asked.sequence_length, "stride": asked.stride}
        windows = [
            likelihood.choose_windows(
                store.supervised, _split(store, asked).longest_document, positions, of_run, **asked_windows
            )
            for store in stores
        ]
        pieces = [
            likelihood.store_pieces(_split(store, asked), store.supervised, cut)
            for store, cut in zip(stores, windows, strict=True)
        ]
        texts = _Texts(asked, references, of_run, group) if asked.texts else None
        assert asked.task_data or not asked.tasks
        tasks = [harness.read_task(name, asked.task_data) for name in asked.tasks] if asked.task_data else []
        if tasks:
            harness.check(tasks, references, asked.limit, asked.chat_template)
        prompts = [record for record, _ in read_prompts(asked.prompts)] if asked.prompts else []
        if asked.prompts:
            for reference in references:
                Prompts(reference.name, asked.template, reference.tokenizer).read(asked.prompts, reference.positions)

        entries = []
        for reference in references:
            entry: dict[str, Any] = {"model": reference.name, "step": reference.step}
            entry["tokenizer"] = reference.contract.fingerprint
            if stores or texts or tasks:
                model = models.load(reference, dtype, device, group)
                entry |= {"weights": model.weights, "parameters": model.module.num_parameters()}
                entry["stores"] = [
                    _over_store(model, store, asked, cut, group) for store, cut in zip(stores, pieces, strict=True)
                ]
                entry |= {"text": texts.score(model)} if texts else {}
                if tasks:
                    entry["tasks"] = harness.run(
                        tasks, model, asked.batch_size, group, asked.limit, asked.chat_template
                    )
                del model
            if asked.prompts:
                entry["replies"] = _replies(reference, asked, asked.prompts, dtype, group)
            entries.append(entry)
        return {
            "versions": _versions(),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
            "processes": environment.world_size,
            "dtype": dtype,
            "batch_size": asked.batch_size,
            "stores": [_describe_store(store, asked, cut) for store, cut in zip(stores, windows, strict=True)],
            "text": texts.description() if texts else None,
            "chat_template": asked.chat_template,
            "prompts": prompts,
            "models": entries,
        }


def show(report: dict[str, Any], console: Console) -> None:
    """The report as a table, a line a model; below it what the scores compare with, and the replies."""
    columns = _columns(report)
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("model", overflow="fold")
    for name, _ in columns:
        table.add_column(escape(name), justify="right")
    for entry in report["models"]:
        table.add_row(escape(entry["model"]), *(value(entry) for _, value in columns))
    if columns:
        needed = Measurement.get(console, console.options.update(max_width=10_000), table).maximum
        console.width = max(needed, console.width)
        console.print(table)
    lines = [_line(place) for place in [*report["stores"], *filter(None, [report["text"]])]]
    processes = f", {report['processes']} processes" if report["processes"] > 1 else ""
    lines.append(f"{report['dtype']} on {report['device']}{processes}")
    for line in [*lines, *_remarks(report)]:
        console.print(escape(line), soft_wrap=True)
    for number, prompt in enumerate(report["prompts"]):
        shown = prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)
        console.print(f"\n[bold]{escape(shown)}[/bold]")
        for entry in report["models"]:
            reply = entry["replies"][number]
            console.print(
                f"  [dim]{escape(entry['model'])}[/dim] {escape(reply['reply'])}{'' if reply['stopped'] else ' …'}"
            )


def _check(asked: Evaluation) -> None:
    if not (asked.stores or asked.texts or asked.tasks or asked.prompts):
        raise UserError("nothing to evaluate on", "give --store, --text, --tasks or --prompts")
    if asked.tasks and asked.task_data is None:
        raise UserError("--tasks is given, but no --task-data", "name the folder that the data of the tasks lie in")
    if asked.tasks:
        harness.check_installed()


def _check_fingerprints(store: Store, references: Sequence[Reference]) -> None:
    for reference in references:
        if reference.contract.fingerprint != store.fingerprint:
            raise UserError(
                f"{store.path} was made with another tokenizer than {reference.name}",
                "prepare it with that model's tokenizer, or give --text, which every model reads with its own",
            )


def _split(store: Store, asked: Evaluation):
    return store.train if asked.split == "train" else store.validation


def _over_store(model: Model, store: Store, asked: Evaluation, pieces: np.ndarray, group: Group) -> dict[str, Any]:
    split = _split(store, asked)
    what = f"{model.reference.name}: {store.path.name}"
    contract = model.reference.contract
    return likelihood.score(model.module, pieces, split.read, contract, asked.batch_size, group, what).figures()


def _describe_store(store: Store, asked: Evaluation, windows: Windows) -> dict[str, Any]:
    contents = json.dumps([store.fingerprint, store.manifest["splits"][asked.split]], sort_keys=True)
    return {
        "path": str(store.path),
        "split": asked.split,
        "kind": store.manifest["kind"],
        "tokenizer": store.fingerprint,
        "contents": hashlib.sha256(contents.encode()).hexdigest(),
        **dataclasses.asdict(windows),
    }


class _Texts:
    """Documents of raw text, which every model reads with its own tokenizer.

    A document is read after one token that is no part of it, so that each of its own tokens is predicted once: bos
    where the model was trained with it, else eos, which stands between documents that are trained on one after another.
    Bytes are those of the text in UTF-8, so that the figure compares models with different tokenizers.
    """

    def __init__(self, asked: Evaluation, references: Sequence[Reference], of_run: dict[str, Any], group: Group):
        self.group, self.batch_size = group, asked.batch_size
        positions = [reference.positions for reference in references]
        for reference in references:
            if reference.contract.bos_id is None and reference.contract.eos_id is None:
                raise UserError(
                    f"{reference.tokenizer} has neither bos nor eos, to predict the first token of a text from",
                    "evaluate on a store",
                )
        if asked.packing not in (None, "documents"):
            raise UserError("--text is read document by document", "leave out --packing, or give --packing documents")
        self.windows = likelihood.choose_windows(
            False, None, positions, of_run, "documents", asked.sequence_length, asked.stride
        )
        files = corpus.find_files(list(asked.texts))
        pieces = corpus.plan(files)
        self.documents = [text for text in corpus.texts(pieces, asked.text_column) if text]
        if not self.documents:
            raise UserError(f"{' '.join(asked.texts)}: no text", "give files with documents")
        self.files = files
        self.hash = hashlib.sha256("\0".join(self.documents).encode()).hexdigest()
        self.encoded: dict[Any, tuple[np.ndarray, np.ndarray]] = {}

    def score(self, model: Model) -> dict[str, Any]:
        contract = model.reference.contract
        with_bos = contract.adds_bos if model.add_bos is None else model.add_bos
        candidates = [contract.bos_id, contract.eos_id] if with_bos else [contract.eos_id, contract.bos_id]
        before = next(id for id in candidates if id is not None)
        key = contract.fingerprint, before
        if key not in self.encoded:
            self.encoded = {key: self._encode(model.reference.tokenizer, before)}
        ids, bounds = self.encoded[key]
        sums = likelihood.score(
            model.module,
            likelihood.pieces_of(bounds, self.windows),
            lambda start, stop: (ids[start:stop].astype(np.int64), None),
            contract,
            self.batch_size,
            self.group,
            f"{model.reference.name}: text",
        )
        text_bytes = sum(len(document.encode()) for document in self.documents)
        return dataclasses.replace(sums, bytes=text_bytes).figures() | {"first_token_after": before}

    def description(self) -> dict[str, Any]:
        return {
            "files": self.files,
            "documents": len(self.documents),
            "contents": self.hash,
            **dataclasses.asdict(self.windows),
        }

    def _encode(self, tokenizer: Path, before: int) -> tuple[np.ndarray, np.ndarray]:
        """The ids of all documents one after another, each behind the token `before`, and where they begin and end."""
        rank, world_size = dist.get_rank(), dist.get_world_size()
        parts = together(self.group, lambda: BulkEncoder(tokenizer)(self.documents[rank::world_size]))
        encoded = [parts[index % world_size][index // world_size] for index in range(len(self.documents))]
        bounds = np.cumsum([0, *(len(ids) + 1 for ids in encoded)])
        joined = np.full(bounds[-1], before, np.int32)
        for start, ids in zip(bounds.tolist(), encoded, strict=False):
            joined[start + 1 : start + 1 + len(ids)] = ids
        return joined, bounds


def _replies(reference: Reference, asked: Evaluation, prompts: Path, dtype: str, group: Group) -> list[dict]:
    """Greedy continuations; the processes share the prompts out."""
    rank, world_size = dist.get_rank(), dist.get_world_size()

    def reply() -> list[dict]:
        generator = Generator(reference.name, asked.template, dtype, reference.tokenizer)
        decoding = Decoding(max_new_tokens=asked.max_new_tokens)
        return list(answer(generator, prompts, decoding, asked.batch_size, part=slice(rank, None, world_size)))

    parts = together(group, reply)
    replies = [parts[index % world_size][index // world_size] for index in range(sum(map(len, parts)))]
    return [{key: reply[key] for key in ("reply", "stopped")} for reply in replies]


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"tsumugu": tsumugu.__version__}
    for name in ("torch", "transformers", "lm_eval"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _columns(report: dict[str, Any]) -> list[tuple[str, Callable[[dict], str]]]:
    """Headings, and what stands below each for a model."""
    columns: list[tuple[str, Callable[[dict], str]]] = []
    short = {"loss": "loss", "perplexity": "perplexity", "bits_per_byte": "bits/byte", "tokens": "tokens"}
    alone = len(report["stores"]) == 1 and not report["text"]
    for number, store in enumerate(report["stores"]):
        prefix = "" if alone else f"{Path(store['path']).name} "
        for key, heading in short.items():
            columns.append((f"{prefix}{heading}", lambda entry, n=number, k=key: _number(entry["stores"][n][k])))
    if report["text"]:
        for key, heading in short.items():
            columns.append((f"raw text {heading}", lambda entry, k=key: _number(entry["text"][k])))
    for task, found in report["models"][0].get("tasks", {}).items():
        star = "*" if found["not_comparable"] else ""
        for metric in found["scores"]:
            heading = f"{task} {metric}{star}"
            columns.append((heading, lambda entry, t=task, m=metric: f"{entry['tasks'][t]['scores'][m]:.4f}"))
    return columns


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.6g}"


def _line(place: dict[str, Any]) -> str:
    name = f"{place['path']} ({place['split']})" if "path" in place else f"text of {place['documents']:,} documents"
    if place.get("kind") == "instructions":
        return f"{name}: example by example, supervised tokens"
    how = {
        "documents": "document by document",
        "concatenate": "documents one after another",
        "document_mask": "documents one after another, kept apart",
    }[place["packing"]]
    stride = "" if place["stride"] == place["length"] else f", {place['stride']} tokens apart"
    return f"{name}: {how}, windows of {place['length']:,} tokens{stride}"


def _remarks(report: dict[str, Any]) -> list[str]:
    """What one must know about the scores of tasks."""
    lines: dict[str, None] = {}
    for entry in report["models"]:
        for task, found in entry.get("tasks", {}).items():
            if found["not_comparable"]:
                lines[f"* {task}: not comparable with others' scores: {'; '.join(found['not_comparable'])}"] = None
            else:
                lines[f"{task}: as lm-evaluation-harness's {found['upstream']}, {found['shots']} shots"] = None
            if "char_f1" in found["scores"]:
                lines[f"{task}: char_f1 is no metric of the harness"] = None
            if found["prompts_cut"]:
                cut = (
                    f"{found['prompts_cut']:,} of {found['documents']:,} prompts are longer than the model's positions"
                )
                lines[f"{task}: {cut}, and were cut at the beginning ({entry['model']})"] = None
    return list(lines)

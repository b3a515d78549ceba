"""What a preparation would do to a sample of each source, without writing anything: shares, reasons, examples.

Only reading, cleaning and the check for contamination are tried; what deduplication removes shows in the store alone.
"""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

from datatrove.data import Document
from rich.console import Console

from tsumugu.config import PrepareConfig
from tsumugu.data import corpus
from tsumugu.data.cleaning.quality import measures
from tsumugu.data.prepare import check_records, plan
from tsumugu.data.steps import Clean, Read, Task

_PLACES = 16  # places of a source that the sample is taken from
_EXAMPLES = 2
_SHOWN = 60  # characters


@dataclass
class SourcePreview:
    """Of one source: documents tried, how many stay, why others do not, and what cleaning changes in those that stay.

    Attributes:
        dropped: Counts by reason (also of records that cannot be read).
        examples: Some documents by reason: (place, text, what the rule measured, where it measures, or why the record
            cannot be read).
        changed: Documents that stay and are changed.
        changes: Some of their changed lines: (before, after).
    """

    name: str
    documents: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[tuple[str, str, float | str | None]]] = field(default_factory=dict)
    changed: int = 0
    changes: list[tuple[str, str]] = field(default_factory=list)


def preview(config: PrepareConfig, documents: int) -> list[SourcePreview]:
    """Tries `documents` documents of every source, or all where it has fewer, from places spread over its files.

    Raises:
        UserError: As `prepare` does, but for records that cannot be read where prepare.bad_records is set_aside.
    """
    check_records(config)
    files = {source.name: corpus.find_files(source.path) for source in config.sources}
    tasks = plan(config, files)
    result = []
    for source in config.sources:
        found = SourcePreview(source.name)
        alone = [
            Task(source, task.columns, [piece]) for task in tasks if task.source is source for piece in task.pieces
        ]
        one_each = all(task.pieces[0].path.lower().endswith(".txt") for task in alone)
        ahead = [(task, Read([task], config).run()) for task in alone]  # generators: nothing is opened yet
        cut_off: list[tuple[Task, Iterator[Document]]] = []  # they have more
        while (left := documents - found.documents) and (ahead or cut_off):
            ahead, cut_off = (ahead, cut_off) if ahead else (cut_off, [])
            chosen = _spread(len(ahead), min(left, left if one_each else _PLACES))
            for number, place in enumerate(chosen):
                share = (number + 1) * left // len(chosen) - number * left // len(chosen)
                task, reader = ahead[place]
                if _try(task, islice(reader, share), config, found) == share:
                    cut_off.append((task, reader))
            tried = set(chosen)
            ahead = [item for place, item in enumerate(ahead) if place not in tried]
        result.append(found)
    return result


def _try(task: Task, documents: Iterator[Document], config: PrepareConfig, found: SourcePreview) -> int:
    """Cleans and counts documents; says how many there were."""
    before: list[str] = []
    cleaned = Clean([task], config).run(_remember(documents, before))
    for document, text in zip(cleaned, before, strict=False):  # which fills `before` first
        _count(found, text, document)
    return len(before)


def _spread(count: int, most: int) -> list[int]:
    """At most so many of `count` places, evenly."""
    most = min(most, count)
    return [number * count // most for number in range(most)]


def _remember(documents: Iterator[Document], texts: list[str]) -> Iterator[Document]:
    for document in documents:
        texts.append(document.text)
        yield document


def _count(found: SourcePreview, before: str, document: Document) -> None:
    found.documents += 1
    reason = "cannot be read" if "set_aside" in document.metadata else document.metadata["dropped"]
    if reason:
        found.dropped[reason] += 1
        examples = found.examples.setdefault(reason, [])
        if len(examples) < _EXAMPLES:
            why = document.metadata.get("set_aside") or _measured(reason, document.text)
            examples.append((document.id, document.text, why))
        return
    found.kept += 1
    if document.text != before:
        found.changed += 1
        lines = zip(before.split("\n"), document.text.split("\n"), strict=False)
        changed = next(((old, new) for old, new in lines if old != new), None)
        if changed and len(found.changes) < _EXAMPLES:
            found.changes.append(changed)


def _measured(reason: str, text: str) -> float | None:
    """The value for which a quality rule drops a text; its reason is min_MEASURE or max_MEASURE."""
    values = measures([text])
    name = reason.removeprefix("min_").removeprefix("max_")
    return float(values[name][0]) if name in values else None


def show(previews: list[SourcePreview], console: Console) -> None:
    """Prints what `preview` found."""

    def line(text: str, style: str = "") -> None:
        console.print(text, style=style, markup=False, no_wrap=True, overflow="ellipsis")

    for found in previews:
        share = found.kept / found.documents if found.documents else 0
        line(f"{found.name}: {found.kept:,} of {found.documents:,} documents stay ({share:.1%})", "bold")
        for reason, count in found.dropped.most_common():
            line(f"  {reason}: {count:,} dropped ({count / found.documents:.1%}), such as")
            for place, text, why in found.examples[reason]:
                if isinstance(why, str):  # begins with the place
                    line(f"    {os.path.basename(place)}{why.removeprefix(place)}: {_short(text)}")
                    continue
                measured = "" if why is None else f" ({why:.3g})"
                line(f"    {os.path.basename(place)}{measured}: {_short(text)}")
        if found.changed:
            line(f"  {found.changed:,} of them are changed, such as")
        for before, after in found.changes:
            for sign, text in zip("-+", _around_change(before, after), strict=True):
                line(f"    {sign} {text}")
        if found.documents and share < 0.5:
            line(f"  over half of {found.name} would be dropped", "yellow")


def _around_change(before: str, after: str) -> tuple[str, str]:
    same = next((n for n, (old, new) in enumerate(zip(before, after, strict=False)) if old != new), len(after))
    start = max(0, same - _SHOWN // 3)
    return _short(before[start:]), _short(after[start:])


def _short(text: str) -> str:
    text = text.replace("\n", "⏎")
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"

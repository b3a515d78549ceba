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
        examples: Some documents by reason: (place, text, what the rule measured, where it measures).
        changed: Documents that stay and are changed.
        changes: Some of their changed lines: (before, after).
    """

    name: str
    documents: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[tuple[str, str, float | None]]] = field(default_factory=dict)
    changed: int = 0
    changes: list[tuple[str, str]] = field(default_factory=list)


def preview(config: PrepareConfig, documents: int) -> list[SourcePreview]:
    """Tries about `documents` documents of every source, taken from places spread over its files.

    Raises:
        UserError: As `prepare` does, but for records that cannot be read where prepare.bad_records is set_aside.
    """
    check_records(config)
    files = {source.name: corpus.find_files(source.path) for source in config.sources}
    tasks = plan(config, files)
    result = []
    for source in config.sources:
        found = SourcePreview(source.name)
        pieces = [(task, piece) for task in tasks if task.source is source for piece in task.pieces]
        one_each = all(piece.path.lower().endswith(".txt") for _, piece in pieces)
        places = _spread(pieces, documents if one_each else _PLACES)
        for task, piece in places:
            one = Task(source, task.columns, [piece])
            before: list[str] = []
            read = _remember(islice(Read([one], config).run(), -(-documents // len(places))), before)
            for document, text in zip(Clean([one], config).run(read), before, strict=False):  # fills `before` first
                _count(found, text, document)
        result.append(found)
    return result


def _spread(items: list, most: int) -> list:
    if len(items) <= most:
        return items
    return [items[number * len(items) // most] for number in range(most)]


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
            examples.append((document.id, document.text, _measured(reason, document.text)))
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
            for place, text, value in found.examples[reason]:
                measured = "" if value is None else f" ({value:.3g})"
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

"""An audit's report for people: in the terminal, and as a piece of HTML. What is in it comes from audit.py."""

from collections.abc import Iterator
from html import escape

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tsumugu.data.audit import Example, Finding, Kind, Report

_STYLES: dict[Kind, str] = {
    "ignored": "dim",
    "supervised": "bold green",
    "stop": "bold black on green",
    "ignored stop": "black on yellow",
}
_BAR = 30  # characters


def show(report: Report, console: Console) -> None:
    """Prints a report."""
    console.print(Text(report.store, "bold"), Text(_headline(report)))
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    names = [name for name, figures in report.splits.items() if figures.rows]
    for name in names:
        table.add_column(name, justify="right")
    for label, values in _figures(report, names):
        table.add_row(label, *values)
    console.print(table)
    for low, high, count, bar in _bars(report):
        console.print(Text(f"{low:>9,} to {high:>9,} tokens {count:>12,}  {bar}"))
    if report.unknown_characters:
        characters = "  ".join(f"{_visible(character)} {count:,}" for character, count in report.unknown_characters)
        console.print(Text(f"characters without a token (in a sample of the sources): {characters}"))
    for line in report.not_checked:
        console.print(Text(f"not checked: {line}", "yellow"))
    for finding in report.findings:
        console.print()
        style = "bold red" if finding.level == "error" else "bold yellow"
        console.print(Text.assemble((f"{finding.level}: {finding.name}", style), f" {_extent(finding)}"))
        console.print(Text(f"  {finding.message}"))
        console.print(Text(f"  mend: {finding.mend}"))
        for example in finding.examples[:1]:
            console.print(_coloured(example))
    if report.examples:
        console.print()
        key = [piece for kind, style in _STYLES.items() for piece in ((f" {kind} ", style), " ")]
        console.print(Text.assemble("rows: ", *key))
    for example in report.examples:
        console.print(_coloured(example))
    if not report.findings:
        console.print(Text("no finding", "bold green"))


def to_html(report: Report) -> str:
    """A report as one <section>, with a style of its own; every text of the store is escaped."""
    names = [name for name, figures in report.splits.items() if figures.rows]
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    body = "".join(
        f"<tr><th>{escape(label)}</th>{''.join(f'<td>{escape(value)}</td>' for value in values)}</tr>"
        for label, values in _figures(report, names)
    )
    lengths = "".join(
        f'<tr><th>{low:,}–{high:,}</th><td>{count:,}</td><td class="blocks">{bar}</td></tr>'
        for low, high, count, bar in _bars(report)
    )
    parts = [
        f"<h2>{escape(report.store)}</h2><p>{escape(_headline(report))}</p>",
        f"<table><tr><th></th>{head}</tr>{body}</table>",
        f"<h3>Lengths in tokens</h3><table>{lengths}</table>",
    ]
    if report.unknown_characters:
        characters = ", ".join(f"{escape(_visible(c))} {count:,}" for c, count in report.unknown_characters)
        parts.append(f"<p>Characters without a token: {characters}</p>")
    parts += [f"<p>Not checked: {escape(line)}</p>" for line in report.not_checked]
    parts += [
        f'<div class="{finding.level}"><h3>{finding.level}: {escape(finding.name)}</h3>'
        f"<p>{escape(_extent(finding))} {escape(finding.message)}</p><p>Mend: {escape(finding.mend)}</p>"
        f"{''.join(map(_html_example, finding.examples))}</div>"
        for finding in report.findings
    ]
    parts += ["" if report.findings else "<p>No finding.</p>"]
    if report.examples:
        parts += ["<h3>Rows</h3>", *map(_html_example, report.examples)]
    return f'<section class="audit"><style>{_CSS}</style>{"".join(parts)}</section>\n'


def to_page(report: Report) -> str:
    """A report as an HTML page."""
    title = f"<title>{escape(report.store)}</title>"
    return f'<!DOCTYPE html>\n<html lang="en"><meta charset="utf-8">{title}<body>{to_html(report)}</body></html>\n'


_CSS = """
.audit { font-family: sans-serif; }
.audit td, .audit th { padding: .1em .8em .1em 0; text-align: right; font-weight: normal; }
.audit .blocks { text-align: left; letter-spacing: -.05em; color: #06632a; color: light-dark(#06632a, #63d39b); }
.audit .error h3 { color: #b00020; color: light-dark(#b00020, #ff8a80); }
.audit .warning h3 { color: #8a6d00; color: light-dark(#8a6d00, #f0c75a); }
.audit pre { white-space: pre-wrap; padding: .6em; background: #f6f6f6; background: light-dark(#f6f6f6, #22262e); }
.audit .ignored { color: #777; color: light-dark(#777, #939cad); }
.audit .supervised { color: #06632a; color: light-dark(#06632a, #7fe0b0); font-weight: bold; }
.audit .stop { background: #06632a; color: #fff; } .audit .ignored-stop { background: #ffd24d; color: #000; }
"""


def _headline(report: Report) -> str:
    if report.kind != "instructions":
        return report.kind
    return f"{report.kind}, template {report.template}, train_on {report.train_on}, stop token {report.stop}"


def _figures(report: Report, names: list[str]) -> Iterator[tuple[str, list[str]]]:
    splits = [report.splits[name] for name in names]
    yield "rows", [f"{figures.rows:,}" for figures in splits]
    yield "tokens", [f"{figures.tokens:,}" for figures in splits]
    if report.kind == "instructions":
        shares = [f"{figures.supervised_tokens:,} ({figures.supervised_share:.1%})" for figures in splits]
        yield "supervised tokens", shares
        yield "replies", [f"{figures.replies:,}" for figures in splits]
        yield "rows without supervision", [f"{figures.rows_without_supervision:,}" for figures in splits]
    yield "unknown tokens", [f"{figures.unknown_tokens:,} ({figures.unknown_share:.3%})" for figures in splits]
    for name in splits[0].lengths if splits else ():
        yield f"{name} row", [f"{figures.lengths[name]:,}" for figures in splits]


def _bars(report: Report) -> list[tuple[int, int, int, str]]:
    histogram = report.splits["train"].histogram
    most = max((count for *_, count in histogram), default=1)
    return [(low, high, count, "█" * -(-count * _BAR // most)) for low, high, count in histogram]


def _extent(finding: Finding) -> str:
    return f"({finding.count:,} of {finding.of:,} {finding.unit}, {finding.share:.1%})" if finding.of else ""


def _coloured(example: Example) -> Text:
    pieces = [(_visible(text), _STYLES[kind]) for kind, text in example.parts]
    return Text.assemble((f"  {example.split} row {example.row}: ", "cyan"), *pieces)


def _html_example(example: Example) -> str:
    pieces = "".join(
        f'<span class="{kind.replace(" ", "-")}" title="{kind}">{escape(_visible(text))}</span>'
        for kind, text in example.parts
    )
    return f"<pre>{escape(example.split)} row {example.row}: {pieces}</pre>"


def _visible(text: str) -> str:
    """Without what would move the cursor or colour the terminal."""
    return "".join(c if c.isprintable() or c in "\n\u3000" else f"\\x{ord(c):02x}" for c in text)

"""One HTML page about a run, or comparing several: curves, data, replies, configuration. It needs no network.

The page is `page/report.html` with `page/report.css`, `page/report.js` and the figures in it. What the page shows of a
run is what its folder says, without what names a person or a secret; text from data is escaped wherever it goes.
"""

import json
import math
import re
import tempfile
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from tsumugu import __version__
from tsumugu.config import redacted
from tsumugu.data.audit import Report, audit, quick_audit
from tsumugu.data.audit_view import to_html
from tsumugu.data.store import open_store
from tsumugu.errors import UserError, redact
from tsumugu.generate import Decoding, Generator, answer, read_prompts
from tsumugu.model import build
from tsumugu.training import checkpoint
from tsumugu.training.metrics import METRICS, metric_lines
from tsumugu.training.trainer import STARTS

POINTS = 1000  # of a curve: as many as a screen has; each keeps the least and the largest value of its stretch
_ALL_POINTS = 60_000  # of a page, so that it stays below some megabytes
_MARKS = 100  # places shown where a figure is not a number
_AUDITED_TOKENS = 2 * 10**7  # up to here a store is read whole, within some seconds
_STEPS_WITH_REPLIES = 8
_HOME = re.compile(r"(?:/home|/Users)/[^/\s\"'<&]+|/root(?![\w.-])|[A-Za-z]:\\Users\\[^\\\s\"'<&]+")
_START = {"step", "at", "processes", "device", "paths", "versions"}
_OF_TRAINING = ("loss", "learning_rate", "grad_norm", "tokens_per_second", "step_seconds", "tokens_seen")

_PICTURES = (  # file, title, figures, whether the axis is logarithmic
    ("loss", "Loss", ("loss", "validation_loss"), False),
    ("loss-log", "Loss", ("loss", "validation_loss"), True),
    ("validation-bits-per-byte", "Validation bits per byte", ("validation_bits_per_byte",), False),
    ("learning-rate", "Learning rate", ("learning_rate",), False),
    ("grad-norm", "Gradient norm", ("grad_norm",), True),
    ("tokens-per-second", "Tokens per second", ("tokens_per_second",), False),
    ("mfu", "MFU", ("mfu",), False),
    ("memory", "Peak memory, GiB", ("memory_peak_gib",), False),
)


@dataclass
class Curve:
    """A figure over the steps: steps and values (points,), the least and largest value of each stretch where points
    stand for several (else None); and steps at which it was not a number, with how many there are."""

    x: np.ndarray
    y: np.ndarray
    low: np.ndarray | None
    high: np.ndarray | None
    marks: np.ndarray
    missing: int

    def to_json(self) -> dict:
        """With numbers to six digits."""
        content: dict[str, Any] = {"x": _short(self.x), "y": _short(self.y)}
        if self.low is not None and self.high is not None:
            content |= {"lo": _short(self.low), "hi": _short(self.high)}
        return content | ({"marks": _short(self.marks), "missing": self.missing} if self.missing else {})


@dataclass
class Run:
    """What a run folder says.

    Attributes:
        figures: Names to steps and values (lines,) in float64, nan where a line has null.
    """

    path: Path
    name: str
    figures: dict[str, tuple[np.ndarray, np.ndarray]]
    config: dict
    mixture: dict | None
    starts: list[dict]

    def last(self, figure: str) -> float | None:
        """The last finite value."""
        return _pick(self.figures, figure, lambda values: len(values) - 1)

    def best(self, figure: str) -> tuple[float, int] | None:
        """The least value and its step."""
        steps, values = _finite(self.figures, figure)
        return (float(values.min()), int(steps[values.argmin()])) if len(values) else None

    @property
    def first_step(self) -> int:
        """After which it begins: not 0 where it goes on from another run."""
        return self.starts[0]["step"] if self.starts else 0

    @property
    def hours(self) -> float:
        """Of the steps, without evaluation and saving."""
        _, hours = _hours(self)
        return float(hours[-1]) if len(hours) else 0.0


def report(
    runs: Sequence[Path],
    output: Path | None = None,
    *,
    prompts: Path | None = None,
    max_new_tokens: int = 128,
    png: Path | None = None,
) -> list[Path]:
    """Writes the page.

    Args:
        runs: Run folders.
        output: The file; by default report.html, in the run or, for several, in the current folder.
        prompts: A file of prompts, as of `generate`, to which the kept checkpoints reply, greedily.
        max_new_tokens: Of each reply.
        png: A folder to write the curves to as pictures.

    Returns:
        The files written.

    Raises:
        UserError: No run there, one that is given twice, or one whose files are damaged.
    """
    for place, path in enumerate(runs):
        if not (path / METRICS).is_file():
            raise UserError(f"{path} holds no {METRICS}", "give a run folder")
        if path.resolve() in [other.resolve() for other in runs[:place]]:
            raise UserError(f"{path} is given twice", "give each run once")
    if png:
        _need_matplotlib()
    if prompts:
        read_prompts(prompts)  # before all else is read
    read = [_read(path, name) for path, name in zip(runs, _names(runs), strict=True)]
    curves = _curves(read)
    replies = [_replies(run, prompts, max_new_tokens) for run in read] if prompts else []
    page = _page(read, curves, replies)
    target = output or (runs[0] / "report.html" if len(runs) == 1 else Path("report.html"))
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as folder:
        partial = Path(folder) / target.name
        partial.write_text(page, encoding="utf-8")
        partial.replace(target)
    return [target, *(_pictures(read, curves, png) if png else [])]


# --- what a run folder says ------------------------------------------------------------------------------------------


def _read(path: Path, name: str) -> Run:
    columns: dict[str, tuple[array, array]] = defaultdict(lambda: (array("d"), array("d")))
    for line in metric_lines(path):
        for key, value in line.items():
            if key != "step" and (value is None or isinstance(value, int | float)):
                steps, values = columns[key]
                steps.append(line["step"])
                values.append(math.nan if value is None else value)
    figures = {key: (np.array(steps), np.array(values)) for key, (steps, values) in columns.items()}
    return Run(
        path=path,
        name=name,
        figures=figures,
        config=redacted(_content(path / "config.yaml", yaml.safe_load) or {}),
        mixture=_content(path / "mixture.json", json.loads),
        starts=(_content(path / STARTS, _read_starts) or {}).get("starts", []),
    )


def _read_starts(text: str) -> dict:
    """The starts of a run; a line that was cut short is left out."""
    starts = [json.loads(line) for line in text.split("\n")[:-1]]
    if not all(_START.issubset(start) and isinstance(start["step"], int) for start in starts):
        raise ValueError("not every line is a start")
    return {"starts": starts}


def _content(path: Path, parse: Callable[[str], Any]) -> dict | None:
    """A file of the run, None where it has none."""
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise UserError(f"{path} is damaged: {' '.join(str(error).split())}", "mend it, or move it away") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: not keys and values", "mend it, or move it away")
    return content


def _names(runs: Sequence[Path]) -> list[str]:
    """The names of the folders, with those around them as far as it takes to tell them apart."""
    parts = [path.resolve().parts for path in runs]
    return [
        next(
            name
            for depth in range(1, len(own) + 1)
            if [other[-depth:] for other in parts].count(own[-depth:]) == 1
            for name in ["/".join(own[-depth:])]
        )
        for own in parts
    ]


def _finite(figures: dict, name: str) -> tuple[np.ndarray, np.ndarray]:
    steps, values = figures.get(name, (np.array([]), np.array([])))
    good = np.isfinite(values)
    return steps[good], values[good]


def _pick(figures: dict, name: str, place: Any) -> float | None:
    _, values = _finite(figures, name)
    return float(values[place(values)]) if len(values) else None


def _hours(run: Run) -> tuple[np.ndarray, np.ndarray]:
    steps, seconds = _finite(run.figures, "step_seconds")
    return steps, np.cumsum(seconds * np.diff(steps, prepend=run.first_step)) / 3600


def _curves(runs: Sequence[Run]) -> list[dict[str, Curve]]:
    """The curves of every run, in so few points that the page stays small."""
    shown = [{key: of for key, of in run.figures.items() if np.isfinite(of[1]).any()} for run in runs]
    points = max(50, min(POINTS, _ALL_POINTS // max(1, sum(map(len, shown)))))
    return [{key: downsample(*of, points) for key, of in figures.items()} for figures in shown]


def downsample(steps: np.ndarray, values: np.ndarray, points: int) -> Curve:
    """A curve of at most so many points, each the mean, least and largest value of a stretch of lines."""
    good = np.isfinite(values)
    missing = steps[~good]
    marks = missing[np.unique(np.linspace(0, len(missing) - 1, _MARKS).astype(int))] if len(missing) else missing
    steps, values = steps[good], values[good]
    if len(values) <= points:
        return Curve(steps, values, None, None, marks, len(missing))
    starts = np.arange(points) * len(values) // points
    sizes = np.diff(starts, append=len(values))
    low, high = np.minimum.reduceat(values, starts), np.maximum.reduceat(values, starts)
    return Curve(steps[starts + sizes // 2], np.add.reduceat(values, starts) / sizes, low, high, marks, len(missing))


def _short(values: np.ndarray) -> list[float]:
    numbers = (float(f"{value:.6g}") if abs(value) < 1e6 else round(value) for value in values.tolist())
    return [int(number) if float(number).is_integer() else number for number in numbers]


def _axes(run: Run) -> dict:
    """Steps to tokens and hours, for the other axes."""
    steps, tokens = _finite(run.figures, "tokens_seen")
    if not len(steps):
        return {"step": [0, 1], "tokens": [0, 0], "hours": [0, 0]}
    some = np.unique(np.linspace(0, len(steps) - 1, POINTS).astype(int))
    hours = np.interp(steps[some], *_hours(run)) if run.hours else np.zeros(len(some))
    first, before = run.first_step, 0.0  # tokens seen
    if first:
        a_step = (tokens[-1] - tokens[0]) / (steps[-1] - steps[0]) if len(steps) > 1 else tokens[0] / steps[0]
        before = max(0.0, tokens[0] - a_step * (steps[0] - first))
    axes = {"step": (first, steps[some]), "tokens": (before, tokens[some]), "hours": (0.0, hours)}
    return {name: _short(np.concatenate([[start], values])) for name, (start, values) in axes.items()}


def _private(text: str) -> str:
    """Without credentials, and without the folders of people."""
    return _HOME.sub("~", redact(text))


def _planned_steps(run: Run) -> int | None:
    steps = checkpoint.complete_steps(run.path)
    if not steps:
        return None
    return checkpoint.read_state(run.path, steps[-1])["identity"].get("the length of the run (steps)")


def _parameters(run: Run) -> int | None:
    if not (run.path / "model").exists():
        return None
    return build.meta_model(build.read_config(str(run.path / "model")), torch.float32).num_parameters()


def _replies(run: Run, prompts: Path, max_new_tokens: int) -> dict[int, list[dict]]:
    """Step → replies to the prompts, of at most so many checkpoints: the first, the last, and some between."""
    steps = checkpoint.complete_steps(run.path)
    places = np.unique(np.linspace(0, len(steps) - 1, _STEPS_WITH_REPLIES).astype(int)) if steps else []
    decoding = Decoding(max_new_tokens=max_new_tokens)
    return {
        steps[place]: list(answer(Generator(f"{run.path}@{steps[place]}"), prompts, decoding, 8)) for place in places
    }


# --- the page --------------------------------------------------------------------------------------------------------


def _page(runs: Sequence[Run], curves: Sequence[dict[str, Curve]], replies: Sequence[dict[int, list[dict]]]) -> str:
    data = {
        "runs": [
            {"name": run.name, "axes": _axes(run), "series": {key: of.to_json() for key, of in own.items()}}
            for run, own in zip(runs, curves, strict=True)
        ]
    }
    sections = [_summary(runs), '<section id="charts"></section>', _composition(runs), _audits(runs)]
    sections += [_samples(runs, replies), _environment(runs), _checkpoints(runs), _configuration(runs)]
    names = ", ".join(run.name for run in runs)
    filled = {
        "title": escape(names),
        "made": escape(f"tsumugu {__version__} · {datetime.now(UTC):%Y-%m-%d %H:%M} UTC"),
        "style": _of_package("report.css"),
        "script": _of_package("report.js"),
        "data": json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"),
        "body": "".join(sections),
    }
    # in one pass, so that what is filled in is never read as a place
    return re.sub(r"<!--(\w+)-->", lambda found: filled[found[1]], _of_package("report.html"))


def _of_package(name: str) -> str:
    return (resources.files("tsumugu") / "page" / name).read_text(encoding="utf-8")


def _t(text: str) -> str:
    """A text of the page itself, which has a Japanese twin in report.js."""
    return f"<span data-t>{escape(text)}</span>"


def _e(value: object) -> str:
    return escape(_private(str(value)))


def _section(id: str, title: str, content: str) -> str:
    return f'<section id="{id}"><h2>{_t(title)}</h2>{content}</section>' if content else ""


def _table(head: Iterable[str], rows: Iterable[Iterable[str]], kind: str = "") -> str:
    """A table of HTML cells, the first of each row a heading."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>' for first, *rest in rows
    )
    return f'<div class="wide"><table class="{kind}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _number(value: float | None, form: str = ".4g") -> str:
    return "–" if value is None else f"{value:{form}}"


def _si(value: float | None) -> str:
    """A large number in thousands, millions and so on."""
    if value is None:
        return "–"
    for power, unit in ((12, "T"), (9, "B"), (6, "M"), (3, "k")):
        if abs(value) >= 10**power:
            return f"{value / 10**power:.3g}{unit}"
    return f"{value:.3g}"


def _duration(hours: float) -> str:
    for size, unit in ((24, "d"), (1, "h"), (1 / 60, "min")):
        if hours >= size:
            return f"{hours / size:.3g} <small>{unit}</small>"
    return f"{hours * 3600:.3g} <small>s</small>"


def _summary(runs: Sequence[Run]) -> str:
    facts: dict[str, list[str]] = defaultdict(list)  # names to a value for each run
    for run in runs:
        steps = [of[0][-1] for key, of in run.figures.items() if key in _OF_TRAINING and len(of[0])]
        done, planned = int(max(steps, default=0)), _planned_steps(run)
        best, best_bytes = run.best("validation_loss"), run.best("validation_bits_per_byte")
        _, rates = _finite(run.figures, "tokens_per_second")
        _, shares = _finite(run.figures, "mfu")
        devices = {f"{start['processes']} × {start['device']}" for start in run.starts}
        at = lambda found: f" <small>@ {found[1]:,}</small>" if found else ""  # noqa: E731
        facts["Steps"].append(f"{done:,}" + (f" <small>/ {planned:,}</small>" if planned else ""))
        facts["Last loss"].append(_number(run.last("loss")))
        facts["Best validation loss"].append(_number(best and best[0]) + at(best))
        facts["Best bits per byte"].append(_number(best_bytes and best_bytes[0]) + at(best_bytes))
        facts["Tokens seen"].append(_si(run.last("tokens_seen")))
        facts["Time of steps"].append(_duration(run.hours))
        facts["Tokens per second, median"].append(_si(float(np.median(rates)) if len(rates) else None))
        facts["MFU, median"].append(f"{np.median(shares):.1%}" if len(shares) else "–")
        peak = run.last("memory_peak_gib")
        facts["Peak memory"].append("–" if peak is None else f"{peak:.3g} <small>GiB</small>")
        facts["Parameters"].append(_si(_parameters(run)))
        facts["Devices"].append(_e(", ".join(sorted(devices)) or "–"))
    known = {name: values for name, values in facts.items() if set(values) != {"–"}}
    if len(runs) == 1:
        tiles = "".join(f"<div><dt>{_t(name)}</dt><dd>{value}</dd></div>" for name, (value,) in known.items())
        return f'<section id="summary"><dl class="tiles">{tiles}</dl></section>'
    names = [f'<i class="dot" style="--c:var(--c{place % 8})"></i>{_e(run.name)}' for place, run in enumerate(runs)]
    return _section(
        "summary", "Runs", _table(["", *names], [[_t(name), *values] for name, values in known.items()], "numbers")
    )


def _stores(run: Run) -> dict[str, str]:
    """Names to paths of the stores that a run reads."""
    data = run.config.get("data") or {}
    if data.get("store"):
        return {"store": data["store"]}
    return {entry["name"]: entry["path"] for entry in data.get("stores") or []}


def _bar(share: float, kind: str) -> str:
    return f'<span class="bar {kind}" style="width:{max(share, 0) * 100:.1f}%"></span>'


def _composition(runs: Sequence[Run]) -> str:
    parts = []
    for run in runs:
        title = f"<h3>{_e(run.name)}</h3>" if len(runs) > 1 else ""
        if run.mixture:
            kinds = ("planned", "seen")
            rows = [
                [
                    _e(name) + (f" <em>{_t('cut by max_epochs')}</em>" if store["cut_by_max_epochs"] else ""),
                    f"{store['planned_share']:.1%}",
                    f"{store['seen_share']:.1%}",
                    f'<div class="bars">{"".join(_bar(store[f"{kind}_share"], kind) for kind in kinds)}</div>',
                    f"{store['planned_epochs']:.3g}",
                    f"{store['seen_epochs']:.3g}",
                    _si(store["seen_tokens"]),
                ]
                for name, store in run.mixture["stores"].items()
            ]
            head = ["Store", "Planned share", "Seen share", "Planned, seen", "Planned epochs", "Seen epochs", "Tokens"]
            parts.append(title + _table(map(_t, head), rows, "numbers"))
            if len(run.mixture["stages"]) > 1:
                names = list(run.mixture["stores"])
                stages = [
                    [f"{stage['from_row']:,}", *(f"{stage['planned_shares'].get(name, 0):.1%}" for name in names)]
                    for stage in run.mixture["stages"]
                ]
                parts.append(_table([_t("Stage from row"), *map(_e, names)], stages, "numbers"))
            continue
        for path in _stores(run).values():
            tokens = run.last("tokens_seen") or 0
            try:
                train = open_store(Path(path)).train
                size = [_si(train.tokens), f"{train.documents:,}", f"{tokens / max(train.tokens, 1):.3g}"]
            except (UserError, OSError):
                size = ["–", "–", "–"]
            head = ["Store", "Tokens", "Documents", "Tokens seen / tokens", "Tokens seen"]
            parts.append(title + _table(map(_t, head), [[_e(path), *size, _si(tokens)]], "numbers"))
    return _section("data", "Data", "".join(parts))


def _audits(runs: Sequence[Run]) -> str:
    paths = {path: None for run in runs for path in _stores(run).values()}
    parts = []
    for path in paths:
        try:
            store = open_store(Path(path))
            whole = store.train.tokens + store.validation.tokens <= _AUDITED_TOKENS
            found: Report = audit(Path(path)) if whole else quick_audit(store, rows=3)
        except (UserError, OSError) as error:
            parts.append(f'<p class="note">{_t("Not audited:")} {_e(error)}</p>')
            continue
        note = "" if whole else f'<p class="note">{_t("A sample of the rows; `tsumugu audit` reads all of them.")}</p>'
        parts.append(note + _private(to_html(found)))
    return _section("audit", "Audit", "".join(parts))


def _samples(runs: Sequence[Run], replies: Sequence[dict[int, list[dict]]]) -> str:
    if not any(replies):
        return ""
    number = max(len(answers) for by_step in replies for answers in by_step.values())
    parts = []
    for place in range(number):
        rows, asked = [], ""
        for run, by_step in zip(runs, replies, strict=True):
            for step, answers in by_step.items():
                found = answers[place]
                asked = _asked(found["prompt"])
                who = f"{_e(run.name)} " if len(runs) > 1 else ""
                stop = "" if found["stopped"] else f' <em title="max_new_tokens">{_t("cut off")}</em>'
                rows.append(
                    f'<div class="reply"><b>{who}{_t("step")} {step:,}</b><p>{_e(found["reply"])}{stop}</p></div>'
                )
        parts.append(f'<article><h3 class="prompt">{asked}</h3>{"".join(rows)}</article>')
    return _section("samples", "Replies by step", "".join(parts))


def _asked(prompt: Any) -> str:
    return _e(prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False))


def _environment(runs: Sequence[Run]) -> str:
    rows, paths = [], []
    for run in runs:
        for start in run.starts:
            versions = " ".join(f"{name} {version}" for name, version in start["versions"].items() if version)
            rows.append(
                [
                    *([_e(run.name)] if len(runs) > 1 else []),
                    f"{start['step']:,}",
                    _e(start["at"].replace("T", " ").replace("+00:00", " UTC")),
                    f"{start['processes']:,}",
                    _e(start["device"]),
                    _e(versions),
                ]
            )
        if run.starts:
            lines = "\n".join(run.starts[-1]["paths"])
            name = f"{_e(run.name)}: " if len(runs) > 1 else ""
            paths.append(f"<details><summary>{name}{_t('Paths taken')}</summary><pre>{_e(lines)}</pre></details>")
    head = [*(["Run"] if len(runs) > 1 else []), "From step", "Started", "Processes", "Device", "Versions"]
    return _section("environment", "Environment", _table(map(_t, head), rows) + "".join(paths) if rows else "")


def _checkpoints(runs: Sequence[Run]) -> str:
    rows = []
    for run in runs:
        complete = set(checkpoint.complete_steps(run.path))
        times = dict(zip(*_finite(run.figures, "checkpoint_seconds"), strict=True))
        stalls = dict(zip(*_finite(run.figures, "checkpoint_stall_seconds"), strict=True))
        for step, path in checkpoint.named(run.path):
            size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
            rows.append(
                [
                    *([_e(run.name)] if len(runs) > 1 else []),
                    f"{step:,}",
                    f"{size / 2**20:,.1f} MiB",
                    _number(times.get(step), ".3g"),
                    _number(stalls.get(step), ".3g"),
                    _t("complete" if step in complete else "not complete"),
                ]
            )
    head = [*(["Run"] if len(runs) > 1 else []), "Step", "Size", "Seconds to write", "Seconds training waited", ""]
    heads = (_t(name) if name else "" for name in head)
    return _section("checkpoints", "Checkpoints", _table(heads, rows, "numbers") if rows else "")


def _configuration(runs: Sequence[Run]) -> str:
    flat = [dict(_flattened(run.config)) for run in runs]
    keys = list({key: None for own in flat for key in own})
    cell = lambda own, key: _e(own.get(key, "–"))  # noqa: E731
    parts = []
    names = [_e(run.name) for run in runs]
    if len(runs) > 1:
        differing = [key for key in keys if len({own.get(key) for own in flat}) > 1]
        rows = [[_e(key), *(cell(own, key) for own in flat)] for key in differing]
        parts.append(f"<h3>{_t('What differs')}</h3>" + _table(["", *names], rows, "config"))
    rows = [[_e(key), *(cell(own, key) for own in flat)] for key in keys]
    parts.append(
        f"<details><summary>{_t('All keys')} ({len(keys)})</summary>{_table(['', *names], rows, 'config')}</details>"
    )
    return _section("configuration", "Configuration", "".join(parts) if keys else "")


def _flattened(content: Any, prefix: str = "") -> Iterable[tuple[str, str]]:
    if isinstance(content, dict) and content:
        for key, value in content.items():
            yield from _flattened(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(content, list) and content and isinstance(content[0], dict):
        for index, value in enumerate(content):
            yield from _flattened(value, f"{prefix}[{index}]")
    else:
        yield prefix, "null" if content is None else json.dumps(content, ensure_ascii=False).strip('"')


# --- pictures --------------------------------------------------------------------------------------------------------


def _need_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError("--png needs matplotlib", "pip install 'tsumugu[plots]'") from None


def _pictures(runs: Sequence[Run], curves: Sequence[dict[str, Curve]], folder: Path) -> list[Path]:
    import matplotlib
    from matplotlib import font_manager
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    installed = {font.name for font in font_manager.fontManager.ttflist}
    japanese = ("Noto Sans CJK JP", "Noto Sans JP", "Hiragino Sans", "Yu Gothic", "IPAexGothic", "TakaoPGothic")
    fonts = ["DejaVu Sans", *(name for name in japanese if name in installed)]
    written = []
    for file, title, keys, log in _PICTURES:
        if not any(key in own for own in curves for key in keys):
            continue
        with matplotlib.rc_context({"font.family": fonts, "text.parse_math": False}):
            figure = Figure(figsize=(8, 4.5), layout="constrained")
            axes = figure.subplots()
            lines, labels = [], []
            for place, (run, own) in enumerate(zip(runs, curves, strict=True)):
                for key in (key for key in keys if key in own):
                    color = f"C{place if len(runs) > 1 else keys.index(key)}"
                    style = "--" if len(runs) > 1 and key.startswith("validation") else "-"
                    curve = own[key]
                    (line,) = axes.plot(curve.x, curve.y, style, color=color, linewidth=1.5)
                    if curve.low is not None and curve.high is not None:
                        axes.fill_between(curve.x, curve.low, curve.high, color=color, alpha=0.2, linewidth=0)
                    lines.append(line)
                    labels.append(" ".join([*([run.name] if len(runs) > 1 else []), *([key] if len(keys) > 1 else [])]))
            axes.set(title=title, xlabel="step", yscale="log" if log else "linear")
            axes.grid(alpha=0.3)
            if len(lines) > 1:
                axes.legend(lines, labels)
            figure.savefig(folder / f"{file}.png", dpi=150)
        written.append(folder / f"{file}.png")
    return written

"""The page about runs: what it says, that it is safe to open, and that it works in a browser."""

import itertools
import json
import math
import platform
import random
import re
import socket
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from support.browser import EXECUTABLE, Browser, browser
from support.runs import run_config, text_run

from tsumugu.cli import main
from tsumugu.errors import UserError
from tsumugu.report import downsample, report
from tsumugu.training.metrics import read_metrics
from tsumugu.training.trainer import train

HOSTILE = '</script><script>window.hacked = 1</script><img src=x onerror="window.hacked = 1">&amp;"\''


def make_run(folder: Path, lines: int = 60, **config: Any) -> Path:
    """A run folder with figures alone: a loss that falls, has a spike at half of it and is null at two thirds."""
    folder.mkdir(parents=True)
    chance = random.Random(0)
    with open(folder / "metrics.jsonl", "w", encoding="utf-8") as file:
        for step in range(1, lines + 1):
            loss: float | None = 3 + 5 / step + chance.random() / 10
            loss = 40.0 if step == lines // 2 else None if step == lines * 2 // 3 else loss
            figures = {"loss": loss, "learning_rate": 1e-3, "grad_norm": chance.random(), "tokens_seen": step * 512}
            figures |= {"tokens_per_second": 900.0, "mfu": 0.4, "memory_peak_gib": 2.5, "step_seconds": 0.5}
            figures |= {"tokens/<b>": step * 100, "tokens/b": step * 412, "something_new": 1.0}
            file.write(json.dumps({"step": step, **figures}) + "\n")
            if step % 20 == 0:
                validation = {"validation_loss": 4.0 + step / lines, "validation_bits_per_byte": 2.0}
                file.write(json.dumps({"step": step, **validation, "validation/<b>/loss": 4.0}) + "\n")
        file.write('{"step": 99')  # cut by a kill
    (folder / "config.yaml").write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    return folder


class _Page(HTMLParser):
    """The tags of a page, and the figures in it."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.figures = ""
        self._inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        assert not any(name.startswith("on") or name in ("src", "href") for name, _ in attrs)
        self._inside = ("id", "figures") in attrs

    def handle_data(self, data: str) -> None:
        self.figures += data if self._inside else ""


def read(path: Path) -> tuple[str, _Page, dict]:
    text = path.read_text(encoding="utf-8")
    page = _Page(text)
    return text, page, json.loads(page.figures)


# --- what it says ----------------------------------------------------------------------------------------------------


def test_figures_are_those_of_the_run(tmp_path: Path):
    (written,) = report([make_run(tmp_path / "run")])
    assert written == tmp_path / "run" / "report.html"
    _, _, figures = read(written)
    series = figures["runs"][0]["series"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[:-1]]
    losses = [(line["step"], line["loss"]) for line in lines if line.get("loss") is not None]
    assert series["loss"]["x"] == [step for step, _ in losses]
    assert series["loss"]["y"] == pytest.approx([loss for _, loss in losses], rel=1e-5)
    assert (series["loss"]["marks"], series["loss"]["missing"]) == ([40], 1)
    assert series["validation_loss"]["x"] == [20, 40, 60]
    assert figures["runs"][0]["axes"]["tokens"][-1] == 60 * 512
    assert figures["runs"][0]["axes"]["hours"][-1] == pytest.approx(60 * 0.5 / 3600, rel=1e-5)


def test_downsampling_keeps_every_spike_and_says_where_there_is_no_number():
    random = np.random.default_rng(0)
    values = random.normal(size=10_007)
    values[5003], values[7], values[9000:9300] = 100.0, -50.0, math.nan
    steps = np.arange(10_007) * 10.0
    curve = downsample(steps, values, 100)
    good = [(step, value) for step, value in zip(steps, values, strict=True) if not math.isnan(value)]
    borders = [place * len(good) // 100 for place in range(101)]
    for place, (start, stop) in enumerate(itertools.pairwise(borders)):  # by hand
        stretch = [value for _, value in good[start:stop]]
        assert curve.low[place] == min(stretch)
        assert curve.high[place] == max(stretch)
        assert curve.y[place] == pytest.approx(sum(stretch) / len(stretch))
        assert good[start][0] <= curve.x[place] <= good[stop - 1][0]
    assert curve.missing == 300
    assert set(curve.marks) <= set(steps[9000:9300])
    assert len(curve.marks) == 100


def test_a_page_does_not_grow_with_the_run(tmp_path: Path):
    sizes = [report([make_run(tmp_path / str(lines), lines)])[0].stat().st_size for lines in (3000, 12_000)]
    assert sizes[1] < 1.1 * sizes[0] < 1_000_000
    _, _, figures = read(tmp_path / "12000" / "report.html")
    assert max(figures["runs"][0]["series"]["loss"]["hi"]) == 40


def test_text_from_data_never_becomes_part_of_the_page(tmp_path: Path):
    run = make_run(tmp_path / "<i>run & co", data={"store": HOSTILE}, train={HOSTILE: HOSTILE})
    tags = read(report([make_run(tmp_path / "tame", data={"store": "x"}, train={"a": "b"})])[0])[1].tags
    share = {"planned_share": 1.0, "seen_share": 1.0, "planned_epochs": 1, "seen_epochs": 1, "seen_tokens": 9}
    mixture = {"stores": {HOSTILE: {**share, "cut_by_max_epochs": True}}, "stages": []}
    text, page, figures = read(report([run])[0])
    assert page.tags == tags
    assert figures["runs"][0]["name"] == "<i>run & co"
    (run / "mixture.json").write_text(json.dumps(mixture))
    text, page, _ = read(report([run])[0])
    assert page.tags.count("script") == 2
    assert "<img" not in text


def test_nothing_names_a_person_a_host_or_a_secret(tmp_path: Path):
    secret = "hf_" + "a" * 30
    data = {"store": "/home/hanako/stores/wiki", "stores": []}
    run = make_run(
        tmp_path / "run", data=data, model={"pretrained": "/Users/taro/m"}, train={"x": secret, "y": "/root/z"}
    )
    start = {"step": 0, "at": "2026-11-24T00:00:00+00:00", "processes": 8, "device": "NVIDIA H100", "paths": []}
    (run / "starts.jsonl").write_text(json.dumps(start | {"versions": {"torch": "2.13.0", "cuda": None}}) + "\n")
    text, *_ = read(report([run])[0])
    for private in ("hanako", "taro", "/root", secret, socket.gethostname(), str(Path.home())):
        assert private not in text
    assert "~/stores/wiki" in text
    assert "8 × NVIDIA H100" in text
    assert "torch 2.13.0" in text


def test_several_runs_are_told_apart_and_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    runs = [
        make_run(tmp_path / group / "run", optimizer={"learning_rate": rate}, same=1) for group, rate in ("a1", "b2")
    ]
    monkeypatch.chdir(tmp_path)
    assert report(runs) == [Path("report.html")]
    text, _, figures = read(Path("report.html"))
    assert [run["name"] for run in figures["runs"]] == ["a/run", "b/run"]
    differing = text[text.index("What differs") : text.index("All keys")]
    assert "optimizer.learning_rate" in differing
    assert "same" not in differing


def test_hours_of_a_run_that_goes_on_from_another_are_those_of_its_own_steps(trained: Path, tmp_path: Path):
    changes = {"train.start_from": f"{trained}@2", "train.start_state": "full", "train.max_steps": 6}
    changes |= {"train.global_batch_size": 2, "train.micro_batch_size": 2, "optimizer.learning_rate": 0.01}
    train(run_config(trained.parent / "store", changes), tmp_path / "run")
    _, _, figures = read(report([tmp_path / "run"])[0])
    lines = [line for line in read_metrics(tmp_path / "run") if "step_seconds" in line]
    assert [line["step"] for line in lines] == [3, 4, 5, 6]
    axes = figures["runs"][0]["axes"]
    assert axes["step"] == [2, 3, 4, 5, 6]
    assert axes["hours"][0] == 0
    assert axes["hours"][-1] == pytest.approx(sum(line["step_seconds"] for line in lines) / 3600, rel=1e-4)
    of_two_steps = next(line for line in read_metrics(trained) if line["step"] == 2 and "tokens_seen" in line)
    assert axes["tokens"][0] == pytest.approx(of_two_steps["tokens_seen"], rel=0.1)


def test_nothing_beside_the_page_is_touched(tmp_path: Path):
    run = make_run(tmp_path / "run")
    (run / ".report.html").write_text("mine")
    before = {path.name for path in run.iterdir()}
    report([run])
    assert {path.name for path in run.iterdir()} == before | {"report.html"}
    assert (run / ".report.html").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.yaml", "train: [1", "config.yaml is damaged"),
        ("config.yaml", "- 1", "config.yaml is damaged: not keys and values"),
        ("config.yaml", "train: 雨", "config.yaml is damaged"),  # in CP932
        ("mixture.json", "{", "mixture.json is damaged"),
        ("starts.jsonl", '{"step": 0}\n', "starts.jsonl is damaged: not every line is a start"),
        ("starts.jsonl", "3\n", "starts.jsonl is damaged"),
        ("metrics.jsonl", '{"step": 1, "loss": 2}\n[1, 2]\n', "metrics.jsonl:2 holds no figures of a step"),
        ("metrics.jsonl", '"loss"\n', "metrics.jsonl:1 holds no figures of a step"),
        ("metrics.jsonl", '{"step": 1, "loss": "2"}\n', "metrics.jsonl:1 holds no figures of a step"),
        (
            "starts.jsonl",
            '{"at": "0", "device": "0", "paths": "0", "processes": "0", "step": "0", "versions": "0"}\n',
            "starts.jsonl is damaged",
        ),
    ],
)
def test_damaged_files_of_a_run_are_one_line(
    name: str, content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture
):
    run = make_run(tmp_path / "run")
    (run / name).write_bytes(content.encode("cp932"))
    assert main(["report", str(run)]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert main(["report", str(tmp_path)]) == 2
    assert "holds no metrics.jsonl" in capsys.readouterr().err
    run = make_run(tmp_path / "run")
    with pytest.raises(UserError, match="given twice"):
        report([run, tmp_path / "." / "run"])


def test_pictures_of_the_curves(tmp_path: Path):
    pytest.importorskip("matplotlib")
    written = report(
        [make_run(tmp_path / "実験_$1$"), make_run(tmp_path / "_b")], tmp_path / "r.html", png=tmp_path / "png"
    )
    names = {path.name for path in written[1:]}
    assert {"loss.png", "loss-log.png", "grad-norm.png", "tokens-per-second.png", "memory.png", "mfu.png"} <= names
    for path in written[1:]:
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG")
        assert int.from_bytes(content[16:20], "big") == 1200  # pixels wide


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    return text_run(tmp_path_factory.mktemp("report-run"), tokenizer_folder)


def test_a_run_says_for_every_start_where_and_with_what_it_goes_on(trained: Path):
    starts = [json.loads(line) for line in (trained / "starts.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [start["step"] for start in starts] == [0, 2]
    assert starts[0]["processes"] == 1
    assert starts[0]["versions"]["torch"] == torch.__version__
    assert starts[0]["versions"]["python"] == platform.python_version()
    assert socket.gethostname() not in json.dumps(starts)


def test_checkpoints_reply_and_stores_are_audited(trained: Path, tmp_path: Path):
    prompts = tmp_path / "prompts.jsonl"
    asked = [{"prompt": "朝早く"}, {"prompt": HOSTILE}]
    prompts.write_text("\n".join(map(json.dumps, asked)), encoding="utf-8")
    (written,) = report([trained], tmp_path / "deep" / "page.html", prompts=prompts, max_new_tokens=4)
    text, page, _ = read(written)
    assert re.findall(r"<span data-t>step</span> (\d+)</b>", text) == ["2", "4", "2", "4"]
    assert page.tags.count("script") == 2
    assert text.count('<section class="audit">') == 1
    assert 'class="supervised"' in text
    assert text.count("<span data-t>complete</span>") == 2
    assert f"{4:,} <small>/ 4</small>" in text


# --- in a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory):
    if EXECUTABLE is None:
        pytest.skip("no Chromium is installed")
    with browser(tmp_path_factory.mktemp("chromium")) as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory, trained: Path) -> dict[str, str]:
    """Addresses of a page of a long run whose every text is hostile, and of one that compares runs."""
    folder = tmp_path_factory.mktemp("pages")
    long = make_run(folder / "<img src=x onerror=hacked=1>", 5000, data={"store": HOSTILE}, train={HOSTILE: 1})
    (folder / "prompts.txt").write_text(HOSTILE + "\n", encoding="utf-8")
    report([long], folder / "one.html")
    runs = [trained, make_run(folder / "other")]
    report(runs, folder / "two.html")
    return {name: (folder / f"{name}.html").as_uri() for name in ("one", "two")}


# Of every chart: its title, and whether each curve is drawn with numbers and, of the whole range, in the picture.
CURVES = """[...document.querySelectorAll('.chart')].map((chart) => [chart.querySelector('h2').textContent,
    [...chart.querySelectorAll('path.curve')].filter((curve) => curve.closest('g')).map((curve) => {
        const box = curve.getBBox();
        return curve.getAttribute('d').startsWith('M') && !/NaN|Infinity/.test(curve.getAttribute('d'))
            && (state.zoom !== null || (box.width > 0 && box.x >= 0 && box.y >= 0));
    })])"""


def clean(chromium: Browser) -> bool:
    """Whether the page has raised nothing, run nothing of the data, and asked for nothing but itself."""
    return (
        not chromium.faults
        and chromium.evaluate("window.hacked === undefined && document.documentElement.dataset.errors === '0'")
        and all(address.startswith(("file:", "about:", "data:")) for address in chromium.requests)
    )


@pytest.mark.parametrize(
    "view", ["", "log=loss,grad,rate&smooth=0.9", "x=tokens&theme=dark&lang=ja", "x=hours&zoom=0.1~0.3"]
)
@pytest.mark.parametrize("name", ["one", "two"])
def test_every_chart_is_drawn_without_an_error(name: str, view: str, chromium: Browser, pages: dict[str, str]):
    chromium.open(f"{pages[name]}#lang=en&{view}")
    curves = chromium.evaluate(CURVES)
    assert len(curves) >= 9
    for title, drawn in curves:
        assert drawn, title
        assert all(drawn), title
    assert clean(chromium)


def test_the_pointer_shows_values_and_drags_a_range(chromium: Browser, pages: dict[str, str]):
    chromium.open(pages["one"] + "#lang=en&theme=light")
    box = chromium.evaluate("JSON.stringify(document.querySelector('.chart > svg').getBoundingClientRect())")
    box = json.loads(box)
    at = lambda share: box["x"] + 58 + (box["width"] - 72) * share  # noqa: E731
    chromium.mouse("Moved", at(0.5), box["y"] + 60)
    tip = chromium.evaluate("document.querySelector('.chart .tip').innerText")
    assert re.search(r"step 2,[45]\d\d", tip)
    assert re.search(r"training\s+10\.\d+ \(3\.\d+ … 40\)", tip)  # of five steps, one of them the spike
    assert chromium.evaluate("document.querySelectorAll('.cross').length") == len(chromium.evaluate(CURVES))
    chromium.mouse("Pressed", at(0.25), box["y"] + 60, button="left", clickCount=1)
    chromium.mouse("Moved", at(0.4), box["y"] + 60, button="left", buttons=1)
    chromium.mouse("Moved", at(0.75), box["y"] + 60, button="left", buttons=1)
    chromium.mouse("Released", at(0.75), box["y"] + 60, button="left", clickCount=1)
    low, high = chromium.evaluate("state.zoom")
    assert low == pytest.approx(1250, abs=30)
    assert high == pytest.approx(3750, abs=30)
    assert chromium.evaluate("location.hash").count("zoom=") == 1
    chromium.evaluate("document.getElementById('unzoom').click()")
    assert chromium.evaluate("state.zoom") is None
    assert clean(chromium)


def test_language_theme_and_runs_are_switched(chromium: Browser, pages: dict[str, str]):
    chromium.open(pages["two"] + "#lang=en&theme=light")
    english = chromium.evaluate("document.body.innerText")
    paper = chromium.evaluate("getComputedStyle(document.body).backgroundColor")
    chromium.evaluate("document.querySelector('#lang [value=ja]').click()")
    chromium.evaluate("document.querySelector('#theme [value=dark]').click()")
    japanese = chromium.evaluate("document.body.innerText")
    assert "Learning rate" in english
    assert "学習率" in japanese
    assert "Learning rate" not in japanese
    lightness = [
        sum(map(int, re.findall(r"\d+", color)))
        for color in (paper, chromium.evaluate("getComputedStyle(document.body).backgroundColor"))
    ]
    assert lightness[0] > 600 > 150 > lightness[1]
    chromium.evaluate("document.querySelector('#lang [value=en]').click()")
    assert chromium.evaluate("document.body.innerText") == english
    curves = "document.querySelectorAll('#chart-loss g > path.curve').length"
    before = chromium.evaluate(curves)
    chromium.evaluate("document.querySelector('#runs button').click()")
    assert chromium.evaluate(curves) == before // 2
    assert clean(chromium)


def test_every_text_of_the_page_has_a_japanese_twin(chromium: Browser, pages: dict[str, str]):
    for address in pages.values():
        chromium.open(address + "#lang=en")
        texts = "[...document.querySelectorAll('[data-t]')].map((one) => one.dataset.en)"
        assert chromium.evaluate(f"{texts}.filter((text) => text && !(text in JA))") == []

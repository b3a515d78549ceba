"""Speed and memory of `tsumugu prepare`, beside other ways to tokenise the same files on as many processes.

    python benchmarks/prepare.py --input FILE.jsonl.gz            # Markdown tables
    python benchmarks/prepare.py --input FILE.jsonl.gz --json     # the same figures as JSON

Linux only. Beside tsumugu it needs `pip install datasets orjson megatron-core`, and says which of them is missing.
Everything is written below --work-dir, some five times --megabytes at most, and removed at the end.

The corpus is made of the input so that a small one fills --megabytes of text without deduplication emptying it.
Documents are cut at line ends after DOCUMENT_CHARACTERS, about a page of the web (novels as a whole would all fall to
the rule on the longest sentence). The first copy is just that; in each further one the lines of the whole input (long
ones cut after 。) are shuffled and dealt into documents anew: the same lines, and so the same tokens, but no two
documents alike. All documents are shuffled at last, so that the first part of the corpus is like all of it.

Every time is that of a whole command, from its start to its end, pinned to --processes cores; `start` is what the same
command takes for a handful of documents. Speeds count MB (10^6 bytes) of the UTF-8 text that goes in. The baselines
run on the first --baseline-megabytes of the corpus, as does one row of tsumugu. In the ratios tsumugu counts with its
whole command on the whole corpus, and a baseline with its time less its start, so that its shorter run cannot count
against it.

Memory is resident memory: of all processes of a command together, sampled every SAMPLE_SECONDS (pages that several
processes share count in each of them), and of the largest one, as the kernel has it.

Ids are compared: tsumugu's with transformers' on CHECKED documents, and those of the other ways with tsumugu's on every
document of the first part. The exit code is 1 where they differ.
"""

import argparse
import contextlib
import ctypes
import gzip
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import prepare_baselines as baselines
import yaml

from tsumugu.data import store

DOCUMENT_CHARACTERS = 2000
SAMPLE_SECONDS = 0.2
CHECKED = 500

ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1"}  # so that nobody asks the network

_AOZORA = Path(__file__).parents[2] / "shared" / "data" / "aozora-public-domain.jsonl.gz"
_PACKAGES = {"datasets": "datasets", "orjson": "orjson", "megatron.core": "megatron-core"}
_BASELINES = {
    "sample": "the sample's way (datasets)",
    "datatrove": "datatrove's DocumentTokenizer",
    "megatron": "Megatron's preprocess_data",
}
_TSUMUGU = {
    "store": ("tsumugu, tokenise and store", {"clean": {"rules": "none"}, "deduplicate": "none"}),
    "exact": ("tsumugu, all rules and exact dedup", {"clean": {"rules": "swallow"}, "deduplicate": "exact"}),
    "near": ("tsumugu, all rules and near dedup", {"clean": {"rules": "swallow"}, "deduplicate": "near"}),
}


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What all commands have in common.

    Attributes:
        work: Holds a folder for each corpus (start, part, quarter, whole), the tokenizer, and outputs.
        processes: How many, and on how many cores.
        repeat: How often each command is run.
        corpora: (bytes of text, documents) of each corpus.
    """

    work: Path
    processes: int
    repeat: int
    corpora: dict[str, tuple[int, int]]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one command takes.

    Attributes:
        seconds: From start to end.
        cpu_seconds: Of all its processes.
        peak_bytes: Resident memory of all its processes together.
        largest_bytes: Resident memory of its largest process.
    """

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    largest_bytes: int


@dataclass(frozen=True, kw_only=True)
class Run(Cost):
    """What one command took and left: the fastest of its repetitions, with the highest memory of them.

    Attributes:
        way: Of _BASELINES or _TSUMUGU.
        corpus: part, quarter or whole.
        processes: As it was told.
        text_bytes: Of the corpus, UTF-8.
        documents_in: Of the corpus.
        documents: What it left; None for the sample's blocks.
        tokens: What it left.
        id_bytes: Of that on disk, without indexes; of JSON, all.
        index_bytes: The indexes.
        start: The same command on the corpus `start`; None on `quarter`.
    """

    way: str
    corpus: str
    processes: int
    text_bytes: int
    documents_in: int
    documents: int | None
    tokens: int
    id_bytes: int
    index_bytes: int
    start: Cost | None

    @property
    def speed(self) -> float:
        """MB of text a second of the whole command."""
        return self.text_bytes / self.seconds / 1e6

    @property
    def speed_of_a_core(self) -> float:
        """MB of text a second of CPU, without start: what a machine that is busy with other things changes least."""
        assert self.start is not None
        return self.text_bytes / (self.cpu_seconds - self.start.cpu_seconds) / 1e6

    @property
    def speed_without_start(self) -> float:
        assert self.start is not None
        return self.text_bytes / (self.seconds - self.start.seconds) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--input", type=Path, default=_AOZORA, help=".jsonl or .jsonl.gz (default: %(default)s)")
    parser.add_argument("--text", default="text", metavar="COLUMN", help="its text column (default: text)")
    parser.add_argument(
        "--tokenizer", type=Path, help="made by tsumugu, or to import (default: 32,000 ids trained on the corpus)"
    )
    parser.add_argument("--megabytes", type=float, default=1000, help="of text in the corpus (default: 1000)")
    parser.add_argument("--baseline-megabytes", type=float, default=60, help="of it for the baselines (default: 60)")
    parser.add_argument("--processes", type=int, default=2, help="and cores (default: 2)")
    parser.add_argument("--repeat", type=int, default=1, help="runs of each command; the fastest counts (default: 1)")
    parser.add_argument("--work-dir", type=Path, help="where temporary files go (default: the system's folder)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of Markdown")
    options = parser.parse_args()
    if missing := [package for module, package in _PACKAGES.items() if not is_installed(module)]:
        raise SystemExit(f"not installed: {', '.join(missing)}; run `pip install {' '.join(missing)}`")
    if not options.input.is_file():
        raise SystemExit(f"{options.input}: no such file; give --input")
    cores = sorted(os.sched_getaffinity(0))
    if not 2 <= options.processes <= len(cores):
        raise SystemExit(f"--processes is {options.processes}; this machine allows 2 to {len(cores)}")
    adopt_orphans()
    os.sched_setaffinity(0, cores[: options.processes])
    with tempfile.TemporaryDirectory(prefix="benchmark-", dir=options.work_dir) as work:
        figures = measure_all(options, Path(work))
    print(json.dumps(figures, indent=1, ensure_ascii=False) if options.json else markdown(figures))
    if any(figures["differing_ids"].values()):
        raise SystemExit("ids differ")


def measure_all(options: argparse.Namespace, work: Path) -> dict:
    """Makes corpus and tokenizer, runs every command, and returns all that is printed.

    This process stays small, and what needs memory runs apart: a command inherits the peak of the process that starts
    it.
    """
    load_before = os.getloadavg()[0]
    corpora = apart(
        write_corpora,
        options.input,
        options.text,
        work,
        options.megabytes,
        options.baseline_megabytes,
        options.processes,
    )
    setup = Setup(work=work, processes=options.processes, repeat=options.repeat, corpora=corpora)
    make_tokenizer(options.tokenizer, work)

    on_part, differing = [measure(setup, "store", "part")], {}
    ids = work / "store-part"
    differing["tsumugu"] = apart(compare_with_transformers, setup, ids)
    for way in _BASELINES:
        on_part.append(measure(setup, way, "part"))
        differing[way] = apart(compare_with_tsumugu, setup, way, ids)
        shutil.rmtree(work / f"{way}-part")
    shutil.rmtree(ids)
    on_whole, on_quarter = [], []
    for way in _TSUMUGU:
        for processes in (1, options.processes):
            on_whole.append(measure(setup, way, "whole", processes))
            shutil.rmtree(work / f"{way}-whole")
        on_quarter.append(measure(setup, way, "quarter"))
        shutil.rmtree(work / f"{way}-quarter")
    runs = [*on_part[1:], on_part[0], *on_whole, *on_quarter]
    return {
        "machine": {
            "processor": processor(),
            "cores": options.processes,
            "load average before": round(load_before, 2),
            "after": round(os.getloadavg()[0], 2),
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("tokenizers", "datatrove", *_PACKAGES.values())},
        },
        "tokenizer": str(options.tokenizer or "32,000 ids, trained on the corpus"),
        "repeat": options.repeat,
        "runs": [asdict(run) for run in runs],
        "differing_ids": differing,
    }


def is_installed(module: str) -> bool:
    """Whether a module is there, found without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that would hold it
        return False


def apart(function: Callable, *arguments: Any) -> Any:
    """Calls a function in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


# The corpus


def write_corpora(
    file: Path, column: str, work: Path, megabytes: float, baseline_megabytes: float, processes: int
) -> dict[str, tuple[int, int]]:
    """Writes the folders start, part, quarter and whole into `work`; gives bytes of text and documents of each.

    `whole` has four files, of which `quarter` has the first; `part` and `start` have one a process, since datatrove
    shares out whole files.
    """
    documents = list(make_documents(read_texts(file, column), megabytes * 1e6))
    random.Random(1234).shuffle(documents)
    part = list(take(documents, baseline_megabytes * 1e6))
    corpora = {
        "start": write_files(work / "start", documents[: 4 * processes], processes),
        "part": write_files(work / "part", part, processes),
        "whole": write_files(work / "whole", documents, 4),
    }
    (work / "quarter").mkdir()
    os.link(work / "whole" / "0.jsonl", work / "quarter" / "0.jsonl")
    first = documents[: -(-len(documents) // 4)]
    return corpora | {"quarter": (sum(len(text.encode()) for text in first), len(first))}


def read_texts(file: Path, column: str) -> list[str]:
    with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else open(file, encoding="utf-8") as stream:
        return [json.loads(line)[column] for line in stream]


def make_documents(texts: list[str], size: float) -> Iterator[str]:
    """The documents of the corpus, as the module says, until their UTF-8 bytes reach `size`."""
    lines = [line for text in texts for line in cut(text)]

    def copies() -> Iterator[str]:
        for text in texts:
            yield from deal(text.splitlines(keepends=True))
        for number in range(1, 10**6):
            random.Random(number).shuffle(lines)
            yield from deal(lines)

    return take(copies(), size)


def cut(text: str) -> list[str]:
    """The lines of a text; those above a quarter of DOCUMENT_CHARACTERS are cut after every 。."""
    cuts = []
    for line in text.splitlines():
        cuts += [line] if len(line) <= DOCUMENT_CHARACTERS / 4 else re.findall("[^。]+。?|。", line)
    return [f"{line}\n" for line in cuts if line.strip()]


def deal(lines: Iterable[str]) -> Iterator[str]:
    """Joins lines to documents that end where they reach DOCUMENT_CHARACTERS."""
    document, length = [], 0
    for line in lines:
        document.append(line)
        length += len(line)
        if length >= DOCUMENT_CHARACTERS:
            yield "".join(document)
            document, length = [], 0
    if length:
        yield "".join(document)


def take(documents: Iterable[str], size: float) -> Iterator[str]:
    """The first documents, until their UTF-8 bytes reach `size`."""
    for document in documents:
        yield document
        size -= len(document.encode())
        if size <= 0:
            return


def write_files(folder: Path, documents: list[str], files: int) -> tuple[int, int]:
    folder.mkdir()
    each = -(-len(documents) // files)
    for number in range(files):
        with open(folder / f"{number}.jsonl", "w", encoding="utf-8") as file:
            for document in documents[number * each : (number + 1) * each]:
                file.write(json.dumps({"text": document}, ensure_ascii=False) + "\n")
    return sum(len(document.encode()) for document in documents), len(documents)


def make_tokenizer(source: Path | None, work: Path) -> None:
    """Makes the folder work/tokenizer, with an end-of-text token."""
    output = str(work / "tokenizer")
    if source is None:
        tsumugu("tokenizer", "train", "--input", str(work / "part"), "--output", output, "--sample-bytes", "20000000")
    elif (source / "contract.json").is_file():
        shutil.copytree(source, output)
    else:
        tsumugu("tokenizer", "import", str(source), "--output", output)
    baselines.eos_token(Path(output))  # refuses where there is none


def tsumugu(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "tsumugu", *arguments], check=True, stdout=subprocess.DEVNULL)


# Commands and what they take


def measure(setup: Setup, way: str, corpus: str, processes: int | None = None) -> Run:
    """Runs one way on one corpus and leaves its output in the folder WAY-CORPUS of setup.work."""
    processes = processes or setup.processes
    output = setup.work / f"{way}-{corpus}"
    start = None
    if corpus != "quarter":
        starts = [timed(setup, way, "start", processes, output) for _ in range(setup.repeat)]
        start = min(starts, key=lambda cost: cost.seconds)
    costs = [timed(setup, way, corpus, processes, output) for _ in range(setup.repeat)]
    fastest = min(costs, key=lambda cost: cost.seconds)
    text_bytes, documents_in = setup.corpora[corpus]
    if way in _TSUMUGU:
        splits = store.open_store(output).manifest["splits"].values()
        documents, tokens = (sum(split[key] for split in splits) for key in ("documents", "tokens"))
        id_files, index_files = ([*output.glob(f"*/*.{ending}")] for ending in ("bin", "idx"))
    else:
        documents, tokens = apart(baselines.count, way, output)
        id_files, index_files = baselines.files_of_ids(way, output), baselines.files_of_indexes(way, output)
    return Run(
        way=way,
        corpus=corpus,
        processes=processes,
        text_bytes=text_bytes,
        documents_in=documents_in,
        documents=documents,
        tokens=tokens,
        id_bytes=sum(file.stat().st_size for file in id_files),
        index_bytes=sum(file.stat().st_size for file in index_files),
        start=start,
        seconds=fastest.seconds,
        cpu_seconds=fastest.cpu_seconds,
        peak_bytes=max(cost.peak_bytes for cost in costs),
        largest_bytes=max(cost.largest_bytes for cost in costs),
    )


def timed(setup: Setup, way: str, corpus: str, processes: int, output: Path) -> Cost:
    """What one command takes; it replaces `output`."""
    shutil.rmtree(output, ignore_errors=True)
    command = command_of(setup, way, corpus, processes, output)
    print(f"{time.strftime('%H:%M:%S')} {way} on {corpus}, {processes} processes", file=sys.stderr)
    log = setup.work / "command.log"
    status, seconds, usages, ended, samples = -1, 0.0, [], threading.Event(), []
    with open(log, "wb") as stream:
        begun = time.perf_counter()
        process = subprocess.Popen(command, stdout=stream, stderr=stream, start_new_session=True, env=ENVIRONMENT)
        sampler = threading.Thread(target=sample_memory, args=(process.pid, ended, samples))
        sampler.start()
        try:
            while True:  # the command, and processes that it left behind, which become ours
                pid, its_status, usage = os.wait4(-process.pid, 0)
                usages.append(usage)
                if pid == process.pid:
                    status, seconds = its_status, time.perf_counter() - begun
        except ChildProcessError:  # no more of them
            pass
        except BaseException:  # Ctrl-C, which does not reach its session
            os.killpg(process.pid, signal.SIGKILL)
            raise
        finally:
            ended.set()
            sampler.join()
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        last = log.read_text(encoding="utf-8", errors="replace")[-3000:]
        raise SystemExit(f"{last}\n{' '.join(command)} failed with {process.returncode}")
    # of a process and of those it has waited for
    largest = max([usage.ru_maxrss * 1024 for usage in usages])
    return Cost(
        seconds=seconds,
        cpu_seconds=sum(usage.ru_utime + usage.ru_stime for usage in usages),
        peak_bytes=max([largest, *samples]),
        largest_bytes=largest,
    )


def command_of(setup: Setup, way: str, corpus: str, processes: int, output: Path) -> list[str]:
    tokenizer = setup.work / "tokenizer"
    if way in _BASELINES:
        return [
            *(sys.executable, str(Path(baselines.__file__)), way, str(setup.work / corpus)),
            *("--tokenizer", str(tokenizer), "--processes", str(processes), "--output", str(output)),
        ]
    config = {
        "sources": [{"name": "corpus", "path": str(setup.work / corpus), "text": "text", "language": "ja"}],
        "tokenizer": str(tokenizer),
        "output": str(output),
        "validation_share": 0.0,  # one split, so that documents keep their order
        "add_bos": False,
        "add_eos": True,
        **_TSUMUGU[way][1],
    }
    file = setup.work / f"{way}-{corpus}.yaml"
    file.write_text(yaml.safe_dump({"prepare": config}, allow_unicode=True), encoding="utf-8")
    return [
        *(sys.executable, "-m", "tsumugu", "prepare", "--config", str(file)),
        *("--prepare.workers", str(processes)),
    ]


def adopt_orphans() -> None:
    """Makes processes whose parents have ended children of this one, which can then tell what they took."""
    pr_set_child_subreaper = 36  # linux/prctl.h
    if ctypes.CDLL(None).prctl(pr_set_child_subreaper, 1, 0, 0, 0):
        raise SystemExit("prctl(PR_SET_CHILD_SUBREAPER) is refused here")


def sample_memory(session: int, ended: threading.Event, samples: list[int]) -> None:
    """Appends the resident bytes of all processes of a session together until `ended` is set."""
    page = os.sysconf("SC_PAGE_SIZE")
    while not ended.wait(SAMPLE_SECONDS):
        pages = 0
        for entry in os.scandir("/proc"):
            if entry.name.isdigit():
                with contextlib.suppress(OSError):  # it has ended
                    fields = Path(entry.path, "stat").read_text().rpartition(")")[2].split()
                    if int(fields[3]) == session:  # proc(5): field 6 is the session, 24 the resident pages
                        pages += int(fields[21])
        samples.append(pages * page)


# Are the ids right?


def compare_with_transformers(setup: Setup, output: Path) -> int:
    """How many of CHECKED documents tsumugu stored with other ids than transformers' tokenizer gives."""
    lines = [line for file in baselines.input_files(setup.work / "part") for line in file.open(encoding="utf-8")]
    split = store.open_store(output).train
    if split.documents != len(lines):
        return CHECKED
    chosen = np.linspace(0, len(lines) - 1, CHECKED).astype(int)
    (setup.work / "checked").mkdir()
    (setup.work / "checked" / "0.jsonl").write_text("".join(lines[index] for index in chosen), encoding="utf-8")
    baselines.reference(setup.work / "checked", setup.work / "tokenizer", 1, setup.work)
    expected = json.loads((setup.work / "ids.json").read_text(encoding="utf-8"))
    return sum(split.document(index)[0].tolist() != ids for index, ids in zip(chosen, expected, strict=True))


def compare_with_tsumugu(setup: Setup, way: str, ids: Path) -> int:
    """How many documents (of the sample's way: blocks) differ from those of tsumugu's store of the same corpus."""
    split = store.open_store(ids).train
    ours = [split.document(index)[0] for index in range(split.documents)]
    output = setup.work / f"{way}-part"
    if way == "sample":
        difference = baselines.expected_digests(ours, setup.processes)
        difference.subtract(baselines.block_digests(output))
        return sum(map(abs, difference.values()))
    theirs = baselines.documents(way, output)
    differing = sum(not np.array_equal(own, other) for own, other in zip(ours, theirs, strict=False))
    return differing + abs(len(ours) - len(theirs))


# What is printed


def processor() -> str:
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else platform.machine()


def markdown(figures: dict) -> str:
    """The figures as Markdown: every run, the targets with what was reached, and memory by the size of the corpus."""
    runs = read_runs(figures)
    heads = [
        "",
        "processes",
        "text, MB",
        "start, s",
        "time, s",
        "CPU, s",
        "MB/s",
        "MB/s without start",
        "MB a CPU second",
    ]
    heads += ["M tokens/s", "documents kept", "bytes a token", "memory, MiB", "largest process, MiB"]
    rows = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    rows += [
        [
            title(run.way),
            str(run.processes),
            f"{run.text_bytes / 1e6:.0f}",
            f"{run.start.seconds:.1f}",
            f"{run.seconds:.1f}",
            f"{run.cpu_seconds:.1f}",
            f"{run.speed:.2f}",
            f"{run.speed_without_start:.2f}",
            f"{run.speed_of_a_core:.2f}",
            f"{run.tokens / run.seconds / 1e6:.2f}",
            "in blocks" if run.documents is None else f"{run.documents / run.documents_in:.1%}",
            f"{(run.id_bytes + run.index_bytes) / run.tokens:.2f}",
            f"{run.peak_bytes / 2**20:.0f}",
            f"{run.largest_bytes / 2**20:.0f}",
        ]
        for run in runs
        if run.start
    ]
    judged = [["", "reached", "target", "met"], ["---", "---:", "---", "---"]]
    judged += [[what, reached, target, "yes" if met else "**no**"] for what, reached, target, met in targets(figures)]
    machine = figures["machine"]
    about = ", ".join(f"{key} {value}" for key, value in machine.items())
    return "\n".join(
        [
            f"{about}; tokenizer: {figures['tokenizer']}; the fastest of {figures['repeat']} runs.",
            "",
            *(f"| {' | '.join(row)} |" for row in rows),
            "",
            *(f"| {' | '.join(row)} |" for row in judged),
        ]
    )


def read_runs(figures: dict) -> list[Run]:
    return [Run(**run | {"start": run["start"] and Cost(**run["start"])}) for run in figures["runs"]]


def title(way: str) -> str:
    return _BASELINES[way] if way in _BASELINES else _TSUMUGU[way][0]


def targets(figures: dict) -> list[tuple[str, str, str, bool]]:
    """(what, reached, target, whether it is met)."""
    runs = {(run.way, run.corpus, run.processes): run for run in read_runs(figures)}
    processes = max(count for _, _, count in runs)
    part = {way: runs[way, "part", processes] for way in (*_BASELINES, "store")}
    whole = {way: runs[way, "whole", processes] for way in _TSUMUGU}
    found = []

    def at_least(what: str, reached: float, target: float, shown: str = "{:.2f} ×") -> None:
        found.append((what, shown.format(reached), f"≥ {shown.format(target)}", reached >= target))

    at_least("tokenise and store / the sample's way", whole["store"].speed / part["sample"].speed_without_start, 20)
    at_least(
        "with all rules and exact dedup / the sample's way",
        whole["exact"].speed / part["sample"].speed_without_start,
        8,
    )
    at_least("tokenise and store / datatrove", whole["store"].speed / part["datatrove"].speed_without_start, 1.2)
    at_least("tokenise and store / Megatron", whole["store"].speed / part["megatron"].speed_without_start, 1.2)
    for way in _TSUMUGU:
        efficiency = whole[way].speed / runs[way, "whole", 1].speed / processes
        at_least(f"efficiency from 1 to {processes} processes, {title(way)}", efficiency, 0.9, "{:.1%}")
    for way, run in whole.items():
        peak = max(run.peak_bytes, runs[way, "whole", 1].peak_bytes, runs[way, "quarter", processes].peak_bytes)
        found.append((f"memory of all processes, {title(way)}", f"{peak / 2**30:.2f} GiB", "< 2 GiB", peak < 2 * 2**30))
    for way, run in whole.items():
        growth = run.peak_bytes / runs[way, "quarter", processes].peak_bytes - 1
        found.append((f"memory on four times the corpus, {title(way)}", f"{growth:+.0%}", "≤ +10 %", growth <= 0.1))
    ids = whole["store"].id_bytes / whole["store"].tokens
    found.append(("bytes a token, without index", f"{ids:.2f}", "2", ids == 2))
    for way, count in figures["differing_ids"].items():
        other = "transformers'" if way == "tsumugu" else "tsumugu's"
        what = "blocks" if way == "sample" else f"of {CHECKED} documents" if way == "tsumugu" else "documents"
        found.append((f"{what} with other ids than {other}, {way}", str(count), "0", count == 0))
    return found


if __name__ == "__main__":
    main()

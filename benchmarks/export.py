"""What an export needs: time and host memory, of a preset with random weights.

    python benchmarks/export.py [--preset 1b] [--dtype bfloat16] [--folder DIR]

Makes a checkpoint of step 0 in a temporary folder (in DIR), exports it by the command, and watches the memory of the
exporting and of the reloading process: anonymous memory, which must fit, and resident memory with the pages of mapped
files, which the system takes back when it needs them. Prints a Markdown table.
"""

import argparse
import json
import multiprocessing
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from checkpoint import write_store

from tsumugu import config
from tsumugu.distributed.environment import process_group
from tsumugu.training.signals import StopRequest
from tsumugu.training.trainer import Trainer


class Stopped(StopRequest):
    """Asked to stop before the first step."""

    def __bool__(self) -> bool:
        return True


def make_checkpoint(work: Path) -> None:
    with process_group() as environment:
        run = config.load(config.TrainingRun, [str(work / "recipe.yaml")])
        Trainer(run, work / "run", environment).train(Stopped())


def children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found += [child, *children(child)]
    return found


def watch(pid: int, peaks: dict[str, dict[str, float]], done: threading.Event) -> None:
    """Largest RssAnon and VmRSS in GiB of the process and of its children, until `done`."""
    while not done.wait(0.05):
        for process in [pid, *children(pid)]:
            try:
                status = Path(f"/proc/{process}/status").read_text()
            except OSError:
                continue
            peak = peaks.setdefault("export" if process == pid else "reload", {"RssAnon": 0.0, "VmRSS": 0.0})
            for key in peak:
                line = next((line for line in status.splitlines() if line.startswith(f"{key}:")), f"{key}: 0")
                peak[key] = max(peak[key], int(line.split()[1]) / 2**20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="1b")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        work = Path(folder)
        write_store(work / "store", 20_000)
        recipe = {
            "model": {"preset": options.preset},
            "data": {"store": str(work / "store"), "sequence_length": 16, "audit": "off"},
            "train": {"max_steps": 1, "global_batch_size": 1, "micro_batch_size": 1},
        }
        (work / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
        maker = multiprocessing.get_context("spawn").Process(target=make_checkpoint, args=(work,))
        maker.start()
        maker.join()
        peaks: dict[str, dict[str, float]] = {}
        done = threading.Event()
        started = time.monotonic()
        command = [sys.executable, "-m", "tsumugu", "export", str(work / "run"), "--output", str(work / "model")]
        process = subprocess.Popen([*command, "--dtype", options.dtype])
        watcher = threading.Thread(target=watch, args=(process.pid, peaks, done))
        watcher.start()
        code = process.wait()
        seconds = time.monotonic() - started
        done.set()
        watcher.join()
        sizes = [file.stat().st_size / 10**9 for file in sorted((work / "model").glob("*.safetensors"))]
        print("| preset | dtype | files (GB) | seconds | exit | process | anonymous GiB | resident GiB |")
        print("| --- | --- | --- | ---: | ---: | --- | ---: | ---: |")
        for name, peak in peaks.items():
            files = ", ".join(f"{size:.2f}" for size in sizes)
            memory = f"{peak['RssAnon']:.2f} | {peak['VmRSS']:.2f}"
            print(f"| {options.preset} | {options.dtype} | {files} | {seconds:.0f} | {code} | {name} | {memory} |")


if __name__ == "__main__":
    main()

"""Whatever strikes a run, once it is done it is the run that nothing struck.

One run for every kind of fault; `make faults` makes a hundred, and its table is in the documentation.
"""

import subprocess
import sys
from pathlib import Path

HARNESS = Path(__file__).with_name("harness.py")


def test_a_disturbed_run_ends_as_the_undisturbed_one():
    """In a process of its own, which forks: torch has made no threads there."""
    done = subprocess.run([sys.executable, HARNESS, "--runs", "8"], capture_output=True, text=True, check=False)
    assert (done.returncode, "8 runs" in done.stdout, " 0 of other results" in done.stdout) == (0, True, True), (
        done.stdout + done.stderr[-3000:]
    )

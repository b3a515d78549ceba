"""Brings the files of the newest checkpoint to the first host, which exports it: each has those of its processes.

torchrun starts it, one process a host, once training is done: `python -m tsumugu.launch.sagemaker.gather RUN`.
"""

import os
import sys
from pathlib import Path

from tsumugu.distributed.environment import process_group
from tsumugu.training import checkpoint
from tsumugu.training.storages import new_group, received, together


def gather(run_dir: Path) -> None:
    """Makes the newest checkpoint whole in the folder of rank 0; every process calls it."""
    with process_group() as environment:
        group = new_group()
        whole = checkpoint.newest(run_dir, group, lambda line: print(line, flush=True), set())
        assert whole, f"{run_dir} holds no checkpoint"
        lacking = [name for name in whole.files if environment.rank == 0 and whole.lacks(0, name)]
        whole.borrow([(name, 0, whole.files[name]["size"]) for name in lacking])

        def place() -> None:
            for name in lacking:
                file = whole.path / name
                received(file, 0).rename(file)

        together(group, place)


if __name__ == "__main__":
    gather(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # as `tsumugu.cli.main` does, and for its reason

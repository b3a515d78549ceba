"""Brings the newest checkpoint to the first host, which exports it: each host has the files of its own processes."""

import datetime
from pathlib import Path

import torch.distributed as dist

from tsumugu.training import checkpoint
from tsumugu.training.storages import new_group, received, together


def gather(run_dir: Path, rank: int, hosts: int, address: str, port: int) -> None:
    """Makes the newest checkpoint whole in the folder of rank 0; one process of every host calls it.

    Args:
        run_dir: The run folder, as this host sees it.
        rank, hosts: Which one of how many this is.
        address, port: Of rank 0, to meet at.
    """
    patience = datetime.timedelta(minutes=30)
    dist.init_process_group("gloo", f"tcp://{address}:{port}", timeout=patience, rank=rank, world_size=hosts)
    try:
        group = new_group()
        whole = checkpoint.newest(run_dir, group, lambda line: print(line, flush=True), set())
        assert whole, f"{run_dir} holds no checkpoint"
        lacking = [name for name in whole.files if rank == 0 and whole.lacks(0, name)]
        whole.borrow([(name, 0, whole.files[name]["size"]) for name in lacking])

        def place() -> None:
            for name in lacking:
                file = whole.path / name
                received(file, 0).rename(file)

        together(group, place)
    finally:
        dist.destroy_process_group()

"""Functions run in several processes that form a gloo group, by file rendezvous."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# The processes are forks of one that has imported all this and done nothing else, which saves seconds each.
_IMPORTED = ["tsumugu.training.trainer", "tsumugu.export", "transformers.models.gpt_neox.modeling_gpt_neox"]
_IMPORTED += ["transformers.models.llama.modeling_llama", "transformers.models.qwen3.modeling_qwen3"]
mp.get_context("forkserver").set_forkserver_preload(_IMPORTED)


def run_ranks(function: Callable[..., Any], world_size: int, *arguments: Any) -> list[Any]:
    """Calls `function(*arguments)` on every rank; its results (picklable), by rank.

    The function must be at the top level of a module.
    """
    with tempfile.TemporaryDirectory() as folder:
        given = (world_size, folder, function, arguments)
        mp.start_processes(_rank, args=given, nprocs=world_size, start_method="forkserver")
        # what the ranks wrote a moment ago: any picklable result
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def _rank(rank: int, world_size: int, folder: str, function: Callable[..., Any], arguments: tuple) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    try:
        torch.save(function(*arguments), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()
    os._exit(0)  # Python's own end aborts now and then where a thread of gloo's still lets go of a tensor

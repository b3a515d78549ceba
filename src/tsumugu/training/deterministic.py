"""Kernels that give the same bits in every run (train.deterministic)."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch

from tsumugu.errors import UserError


@contextlib.contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Lets torch, cuBLAS and torch's compiler take nothing but such kernels, before the first of them is launched.

    Raises:
        UserError: The model needs an operation that has none.
    """
    if not wanted:
        yield
        return
    import torch._inductor.config as inductor

    memory: Any = torch.utils.deterministic
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch demands one: see its notes on reproducibility
    before = inductor.deterministic, memory.fill_uninitialized_memory
    were = torch.are_deterministic_algorithms_enabled()
    inductor.deterministic = True  # kernels are chosen without timing them
    memory.fill_uninitialized_memory = False  # nothing reads it
    torch.use_deterministic_algorithms(True)
    try:
        yield
    except RuntimeError as error:
        if "deterministic implementation" not in str(error):
            raise
        raise UserError(
            f"train.deterministic is true, but {str(error).partition(',')[0]}", "set it to false"
        ) from error
    finally:
        torch.use_deterministic_algorithms(were)
        inductor.deterministic, memory.fill_uninitialized_memory = before

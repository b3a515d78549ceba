"""A tiny model configuration of each kind, and a small store of each packing."""

from pathlib import Path

import pytest
import torch
from support.models import tiny_config
from support.stores import random_documents, write_store


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Models as small as these are faster without threads, above all where other processes use the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text and instruction stores and the configurations of models."""
    folder = tmp_path_factory.mktemp("made")
    train, validation = random_documents(30, seed=1), random_documents(9, seed=2)
    write_store(folder / "text", train, validation)
    write_store(folder / "other text", random_documents(30, seed=3), validation)
    masks = [[int(position >= 1 + index % 4) for position in range(len(ids))] for index, ids in enumerate(train)]
    write_store(folder / "instructions", train, validation, masks)
    tiny_config("gpt_neox", tied=False).save_pretrained(folder / "gpt_neox")
    tiny_config("gpt_neox", tied=False, hidden_size=16).save_pretrained(folder / "smaller")
    dropout = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
    tiny_config("gpt2", tied=True, **dropout).save_pretrained(folder / "gpt2")
    return folder

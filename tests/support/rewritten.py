"""Stores with other documents than `tsumugu prepare` gave them: what a mistaken tool would have written."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tsumugu.data.store import MANIFEST, SPLITS, ShardWriter, describe_split, open_store

Document = tuple[np.ndarray, np.ndarray]


def documents(store: Path, split: str) -> list[Document]:
    """Ids and mask of every document of a split."""
    opened = open_store(store)
    part = opened.train if split == "train" else opened.validation
    return [part.document(index) for index in range(part.documents)]


def rewrite(
    store: Path,
    output: Path,
    change: Callable[[np.ndarray, np.ndarray], Document] = lambda ids, mask: (ids, mask),
    *,
    more: list[Document] | None = None,
    manifest: dict | None = None,
) -> Path:
    """A copy of a store with every document changed, training documents added and entries of the manifest replaced."""
    output.mkdir()
    content = json.loads((store / MANIFEST).read_text(encoding="utf-8"))
    (output / "tokenizer").mkdir()
    for file in (store / "tokenizer").iterdir():
        (output / "tokenizer" / file.name).write_bytes(file.read_bytes())
    for split in SPLITS:
        writer = ShardWriter(output / split / "00000", np.int32, supervised=content["kind"] == "instructions")
        for ids, mask in documents(store, split):
            writer.add(*change(ids.copy(), mask.astype(np.uint8)))
        for ids, mask in (more or []) if split == "train" else []:
            writer.add(ids, mask)
        shard = writer.close()
        content["splits"][split] = describe_split([shard] if shard else [])
    (output / MANIFEST).write_text(json.dumps(content | (manifest or {})), encoding="utf-8")
    return output

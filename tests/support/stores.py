"""Token stores from lists of ids, with a contract that fits no tokenizer: for tests in which ids have no text."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from support.models import VOCABULARY
from tsumugu.data.store import FORMAT_VERSION, MANIFEST, ShardWriter, describe_files, describe_split, token_dtype
from tsumugu.tokenizer.contract import VERSION

Document = Sequence[int]


def random_documents(number: int, seed: int, shortest: int = 3, longest: int = 17) -> list[list[int]]:
    """Documents of random lengths and ids; low ids are more frequent, so that there is something to learn."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(shortest, longest, endpoint=True, size=number)
    return [(4 + (VOCABULARY - 4) * generator.random(length) ** 3).astype(int).tolist() for length in lengths]


def write_store(
    path: Path,
    train: Sequence[Document],
    validation: Sequence[Document] = (),
    masks: Sequence[Sequence[int]] | None = None,
    fingerprint: str = "of no tokenizer",
) -> Path:
    """Writes a store; with `masks`, one for every training document, it is an instruction store.

    Validation documents of an instruction store are supervised from their third token on.
    """
    splits = {}
    for split, documents in {"train": train, "validation": validation}.items():
        writer = ShardWriter(path / split / "00000", token_dtype(VOCABULARY), supervised=masks is not None)
        for index, ids in enumerate(documents):
            mask = None
            if masks is not None:
                mask = masks[index] if split == "train" else [position >= 2 for position in range(len(ids))]
            writer.add(np.array(ids), None if mask is None else np.array(mask))
        shard = writer.close()
        splits[split] = describe_split([shard] if shard else [])
    contract = {
        "version": VERSION,
        "fingerprint": fingerprint,
        "vocab_size": VOCABULARY,
        "unk_id": 0,
        "bos_id": 1,
        "eos_id": 2,
        "pad_id": 3,
        "adds_bos": False,
        "adds_eos": False,
        "newline": "expressible",
        "golden": [],
        "token_bytes": [0] * 4 + [1 + id % 4 for id in range(4, VOCABULARY)],
    }
    (path / "tokenizer").mkdir(parents=True)
    (path / "tokenizer" / "contract.json").write_text(json.dumps(contract), encoding="utf-8")
    manifest = {
        "version": FORMAT_VERSION,
        "kind": "text" if masks is None else "instructions",
        "tokenizer": {
            "fingerprint": fingerprint,
            "vocab_size": VOCABULARY,
            "files": describe_files(path / "tokenizer"),
        },
        "template": None if masks is None else "alpaca-ja",
        "add_bos": False,
        "add_eos": False,
        "splits": splits,
    }
    (path / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    return path


def store_with_new_ids(source: Path, path: Path) -> Path:
    """A copy of a store, of an extension of its tokenizer: an id for two old ones, one for all, one for the first."""
    store = Path(shutil.copytree(source, path))
    manifest = json.loads((store / "manifest.json").read_text())
    contract = json.loads((store / "tokenizer" / "contract.json").read_text())
    base = {"fingerprint": contract["fingerprint"], "vocab_size": VOCABULARY}
    pieces = [[5, 9], [], [VOCABULARY]]
    rows = [{"id": VOCABULARY + place, "pieces": ids} for place, ids in enumerate(pieces)]
    (store / "tokenizer" / "extension.json").write_text(json.dumps({"bases": [base], "rows": rows}))
    contract |= {"fingerprint": "extended", "vocab_size": VOCABULARY + 3}
    contract["token_bytes"] += [1, 1, 1]
    (store / "tokenizer" / "contract.json").write_text(json.dumps(contract))
    manifest["tokenizer"]["fingerprint"] = "extended"
    (store / "manifest.json").write_text(json.dumps(manifest))
    return store

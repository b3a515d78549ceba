"""Folders of LoRA adapters as peft has them, ours and others': where their base model is, and both as one model."""

import hashlib
import json
import re
from pathlib import Path

import torch
from transformers import PreTrainedModel

from tsumugu import reload
from tsumugu.errors import UserError
from tsumugu.model import build, lora

CONFIG = "adapter_config.json"


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds adapters alone."""
    return (folder / CONFIG).is_file()


def base_name(base: str) -> str:
    """What an export calls a base model: a name of the hub whole, of a local folder its last part, without the way
    there, which may name a person."""
    return base if on_hub(base) else Path(base).resolve().name


def on_hub(base: str) -> bool:
    """Whether this is a name on the hub, and no folder."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", base)) and not Path(base).exists()


def find_base(folder: Path) -> Path:
    """The base model of a folder of adapters: what its configuration names, from the current folder, beside the folder
    of the adapters, or on the hub.

    Raises:
        UserError: It is in none of these places.
    """
    try:
        name = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]
        path = Path(name)
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{folder / CONFIG} names no base model", "export the adapters anew") from None
    beside = folder.resolve().parent / path.name
    for place in (path, beside):
        if (place / "config.json").is_file():
            return place
    if not on_hub(name):
        raise UserError(
            f"{folder} holds adapters of the base model {name}, which is neither here nor beside that folder",
            f"put or link it to {beside}",
        )
    return build.find_pretrained(name)


def check_base(base: Path, origin: dict) -> None:
    """Raises UserError where a base model is not the one that the adapters of `origin` were trained beside."""
    expected = origin.get("base_sha256")
    if expected and build.weights_sha256(base) != expected:
        raise UserError(
            f"{base} is not the model beside which the adapters were trained: its weights differ",
            "put that model back in its place",
        )


def load(folder: Path, origin: dict, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The base model with the adapters merged into it, in float32 and then cast.

    Args:
        folder: Of the adapters.
        origin: What the folder says of itself, {} for others' folders.
        dtype: None: that of the base model.

    Raises:
        UserError: No peft, no such base model, or another one than in training.
    """
    lora.check_installed()
    base = find_base(folder)
    check_base(base, origin)
    model = reload.load_base(str(base), origin, torch.float32)
    try:
        model = reload.with_adapters(model, str(folder)).merge_and_unload()
    except RuntimeError as error:  # torch's, of shapes
        raise UserError(f"the adapters in {folder} do not fit {base}: {error}", "put their base model there") from None
    return model.to(dtype or build.own_dtype(base))


def weights_sha256(folder: Path) -> str:
    """Of the weights of a base model and of the adapters beside it."""
    hashes = [build.weights_sha256(find_base(folder)).encode()]
    hashes += [file.read_bytes() for file in sorted(folder.glob("adapter_model.*"))]
    return hashlib.sha256(b" ".join(hashes)).hexdigest()

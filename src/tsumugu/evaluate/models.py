"""The models that are compared: Hugging Face folders, and checkpoints of runs loaded straight from the run folder.

Every process holds a whole copy, on its own device: what is shared out is the data.
"""

import contextlib
import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedModel

from tsumugu.data.instructions import find_template, jinja_of
from tsumugu.distributed.environment import on_main
from tsumugu.errors import UserError
from tsumugu.export import read_origin
from tsumugu.generate import is_folder, load_folder, model_of_run
from tsumugu.model import adapter, build
from tsumugu.tokenizer.contract import CHAT_TEMPLATE, Contract, copy_tokenizer, read_contract, write_contract
from tsumugu.training import checkpoint
from tsumugu.training.storages import Group


@dataclass(frozen=True)
class Reference:
    """A model that is yet to be loaded.

    Attributes:
        name: As the user has it, of a run with the step: RUN@STEP.
        folder: The Hugging Face folder, or the run folder.
        step: Of a run.
        tokenizer: The folder of its tokenizer.
        contract: Of that tokenizer.
        positions: How many positions the model has; None where it has no limit.
    """

    name: str
    folder: Path
    step: int | None
    tokenizer: Path
    contract: Contract
    positions: int | None


@dataclass(frozen=True)
class Model:
    """A model in memory.

    Attributes:
        module: In evaluation mode, on this process's device.
        add_bos: Whether bos began what it was trained on; None: as its tokenizer does by itself.
        chat_template: The template that it was trained with, or that its tokenizer has.
        weights: sha256 over the files that hold the weights; of a run also its moments.
    """

    reference: Reference
    module: PreTrainedModel
    add_bos: bool | None
    chat_template: str | None
    weights: str


def find(names: Sequence[str], each_checkpoint: bool, tokenizer: Path | None, group: Group) -> list[Reference]:
    """What the names stand for; every process calls it.

    Args:
        names: Hugging Face folders, RUN or RUN@STEP.
        each_checkpoint: A RUN stands for all its complete checkpoints, oldest first.
        tokenizer: A tokenizer folder for those models whose folder has no contract; None: the one in their folder.
        group: The processes.

    Raises:
        UserError: No model there, or no tokenizer that can be described.
    """
    references, runs = [], 0
    for name in names:
        if is_folder(Path(name)):
            references.append(_of_folder(name, tokenizer))
            continue
        runs += 1
        run_dir, steps = _steps(name, each_checkpoint, group)
        contract, config = read_contract(run_dir / "tokenizer"), build.read_config(str(run_dir / "model"))
        positions = getattr(config, "max_position_embeddings", None)
        references += [
            Reference(f"{run_dir}@{step}", run_dir, step, run_dir / "tokenizer", contract, positions) for step in steps
        ]
    if each_checkpoint and not runs:
        raise UserError("--each-checkpoint is given, but no MODEL is a run", "give the folder of a run")
    return references


def data_settings(references: Sequence[Reference]) -> dict[str, Any]:
    """The section `data` of the first run among the models, {} without a run."""
    for reference in references:
        file = reference.folder / "config.yaml"
        if reference.step is not None and file.is_file():
            try:
                return dict(yaml.safe_load(file.read_text(encoding="utf-8"))["data"])
            except (yaml.YAMLError, TypeError, KeyError, ValueError):
                raise UserError(f"{file} is not the configuration of a run", "evaluate its export instead") from None
    return {}


def load(reference: Reference, dtype: str, device: torch.device, group: Group) -> Model:
    """Loads a model on every process, whole; every process calls it.

    Raises:
        UserError: Weights that are damaged, cannot be read or do not fit the device.
    """
    try:
        loaded = (_load_folder if reference.step is None else _load_run)(reference, dtype, device, group)
    except torch.OutOfMemoryError:
        raise UserError(
            f"{reference.name} does not fit the memory of {device}, of which each holds a whole copy",
            "use --dtype bfloat16, or devices with more memory",
        ) from None
    loaded.module.eval().requires_grad_(False)
    return loaded


def has_chat_template(reference: Reference) -> bool:
    """Whether `load` finds one."""
    if reference.step is None:
        return (reference.tokenizer / CHAT_TEMPLATE).is_file()
    return bool(checkpoint.read_state(reference.folder, reference.step)["template"])


@contextlib.contextmanager
def out_of_memory_explained(batch_size: int, device: torch.device) -> Iterator[None]:
    """Has an error of memory say what to do about it."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise UserError(f"--batch-size {batch_size} does not fit the memory of {device}", "use a smaller one") from None


def _steps(name: str, each_checkpoint: bool, group: Group) -> tuple[Path, list[int]]:
    run_dir = Path(name)
    if each_checkpoint and (run_dir / "checkpoints").is_dir():
        if steps := checkpoint.complete_steps_everywhere(run_dir, group):
            return run_dir, steps
    elif not (run_dir / "checkpoints").is_dir() and "@" not in run_dir.name:
        raise UserError(f"{name} holds no model", "give a Hugging Face folder, a run folder, or RUN@STEP")
    found = on_main(lambda: checkpoint.resolve(name))
    return found[0], [found[1]]


def _of_folder(name: str, tokenizer: Path | None) -> Reference:
    folder = Path(name)
    base = adapter.find_base(folder) if adapter.is_adapter(folder) else folder
    config = build.read_config(str(base))
    own = tokenizer if tokenizer and not (folder / "contract.json").is_file() else folder
    if not tokenizer and not (folder / "tokenizer_config.json").is_file():  # other tools leave it with the base model
        own = base
    contract, ids = _describe(own), read_origin(folder).get("vocab_size", config.vocab_size)
    if contract.vocab_size > ids:
        raise UserError(
            f"the tokenizer {own} has {contract.vocab_size} ids, the model {name} only {ids}",
            "give the model's own tokenizer with --tokenizer",
        )
    return Reference(name, folder, None, own, contract, getattr(config, "max_position_embeddings", None))


def _describe(folder: Path) -> Contract:
    """The contract of a folder, made anew where it has none."""
    if (folder / "contract.json").is_file():
        return read_contract(folder)
    if not (folder / "tokenizer.json").is_file():
        raise UserError(
            f"{folder} holds no tokenizer.json",
            "import its tokenizer with `tsumugu tokenizer import`, and give that folder with --tokenizer",
        )
    with tempfile.TemporaryDirectory() as copy:
        copy_tokenizer(folder, Path(copy))
        return write_contract(Path(copy))


def _load_folder(reference: Reference, dtype: str, device: torch.device, _: Group) -> Model:
    folder, origin = reference.folder, read_origin(reference.folder)
    module: Any = load_folder(folder, origin, build.DTYPES[dtype])
    template = reference.tokenizer / CHAT_TEMPLATE
    weights = adapter.weights_sha256 if adapter.is_adapter(folder) else build.weights_sha256
    return Model(
        reference,
        module.to(device),
        origin.get("add_bos"),
        template.read_text(encoding="utf-8") if template.is_file() else None,
        on_main(lambda: weights(folder)),
    )


def _load_run(reference: Reference, dtype: str, device: torch.device, group: Group) -> Model:
    saved = checkpoint.find(reference.name, group)
    state = saved.state()
    fill = checkpoint.weights(saved)
    module = model_of_run(reference.folder, saved.path, state, dtype, device, lambda model: fill(model, []))
    hashes = [entry["sha256"] for _, entry in sorted(saved.files.items())]
    if state.get("lora"):
        hashes.append(state["lora"]["base_sha256"])
    template = find_template(state["template"]) if state["template"] else None
    return Model(
        reference,
        module,
        state["add_bos"],
        jinja_of(template, state["add_bos"]) if template else None,
        hashlib.sha256(" ".join(hashes).encode()).hexdigest(),
    )

"""Checkpoints: a folder that holds everything, or does not exist. Here they are found, checked and loaded.

    checkpoints/step-00000100/
        .metadata, __*.distcp     weights, moments (torch.distributed.checkpoint, one file a process)
        state.json                step, counters, and what the run must not change
        COMPLETE                  JSON list of every file with size and sha256, written last (by `training.saving`)

A checkpoint is valid when every listed file is there at its size; on loading also by its hash. Where every node has a
disk of its own, each holds COMPLETE, .metadata, state.json and the files of its processes; a checkpoint is valid when
every file is whole on one of them, and what a process needs is sent to it. DCP pickles its metadata and what is no
tensor: they are read by unpicklers that build what DCP writes and refuse everything else.
"""

import contextlib
import dataclasses
import errno
import io
import json
import pickle
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from transformers import PreTrainedModel

from tsumugu.data.store import sha256
from tsumugu.errors import UserError
from tsumugu.model import lora, masters
from tsumugu.model.build import NewRows, grown, place, rebuild_buffers, tied_names, vocabulary_names
from tsumugu.training.optimizer import MasterAdamW
from tsumugu.training.storages import Group, Part, find_sharing, flush, received, send, together

COMPLETE = "COMPLETE"
STATE = "state.json"
METADATA = ".metadata"

_NAME = re.compile(r"step-([0-9]{8,})")
_NO_MARKER = "it has no COMPLETE marker"
_OWN = "use checkpoints that tsumugu has written"

Files = dict[str, dict[str, Any]]


def folder(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def named(run_dir: Path) -> list[tuple[int, Path]]:
    """Steps and folders whose names are those of checkpoints, oldest first; other names are somebody else's."""
    matches = [(_NAME.fullmatch(path.name), path) for path in (run_dir / "checkpoints").glob("step-*")]
    return sorted((int(match[1]), path) for match, path in matches if match and path.is_dir())


def is_name(name: str) -> bool:
    """Whether a folder of that name is a checkpoint's."""
    return _NAME.fullmatch(name) is not None


def complete_steps(run_dir: Path) -> list[int]:
    """Steps with a checkpoint whose files are all in this folder at their sizes, oldest first."""
    return _complete(_view(run_dir))


def complete_steps_everywhere(run_dir: Path, group: Group, looks: bool = True) -> list[int]:
    """Likewise with the files of all storages; every process calls it.

    Args:
        run_dir: The run folder, as this process sees it.
        group: The processes.
        looks: Whether this process looks: one of each storage is enough.
    """
    return _complete(*together(group, lambda: _view(run_dir) if looks else {}))


@dataclass(frozen=True)
class Whole:
    """A checkpoint whose every file was found whole.

    Attributes:
        path: Its folder, as this process sees it.
        files: What COMPLETE lists.
        holders: For every file the ranks, one a storage, that have found it whole.
        storages: For every rank the lowest one that sees the same folder.
        group: The processes.
    """

    path: Path
    files: Files
    holders: dict[str, list[int]]
    storages: list[int]
    group: Group

    @property
    def step(self) -> int:
        """Steps done."""
        match = _NAME.fullmatch(self.path.name)
        assert match
        return int(match[1])

    @property
    def run_dir(self) -> Path:
        return self.path.parents[1]

    def state(self) -> dict:
        """state.json."""
        return json.loads((self.path / STATE).read_text(encoding="utf-8"))

    def lacks(self, rank: int, name: str) -> bool:
        """Whether a file is not on the storage of a process."""
        return self.storages[rank] not in {self.storages[holder] for holder in self.holders[name]}

    def borrow(self, ranges: Iterable[tuple[str, int, int]]) -> None:
        """Brings what this process's storage lacks of name, offset and size to `received`; every process calls it."""
        wanted = together(self.group, lambda: sorted(ranges))
        parts: list[Part] = []
        for rank, name, offset, size in ((rank, *wish) for rank, wishes in enumerate(wanted) for wish in wishes):
            if not self.lacks(rank, name):
                continue
            if parts and (parts[-1].destination, parts[-1].name, parts[-1].end) == (rank, name, offset):
                parts[-1] = dataclasses.replace(parts[-1], size=parts[-1].size + size)  # they lie side by side
            else:
                parts.append(Part(rank, name, offset, size, self.holders[name][0]))
        send(self.path, parts, self.group)


def newest(run_dir: Path, group: Group, report: Callable[[str], None], damaged: set[int]) -> Whole | None:
    """The newest checkpoint whose files also have their hashes; every process calls it, and all find the same.

    Args:
        run_dir: The run folder, as this process sees it.
        group: The processes; those that share a storage share the work.
        report: Called on the main process with a line for every checkpoint that is damaged and passed over.
        damaged: Steps whose checkpoints were passed over are added to it.

    Raises:
        UserError: There were checkpoints, and none of them is whole: starting over would write over the run.
    """
    fault = ""
    unmarked = 0
    everywhere = together(group, lambda: [path.name for _, path in named(run_dir)])
    for step in sorted({int(name.removeprefix("step-")) for names in everywhere for name in names}, reverse=True):
        path = folder(run_dir, step)
        found = _verify(path, group)
        if isinstance(found, Whole):
            return found
        if dist.get_rank(group) == 0:
            report(f"{path} is passed over: {found}")
        damaged.add(step)
        fault = fault or (found if found != _NO_MARKER else "")
        unmarked += found == _NO_MARKER
    if unmarked > 1:  # one is what a kill within the first save leaves
        fault = fault or _NO_MARKER
    if fault:
        raise UserError(
            f"every checkpoint of {run_dir} is damaged, the newest: {fault}",
            f"choose another --run-dir, or delete {run_dir / 'checkpoints'} to start this run over",
        )
    return None


def find(reference: str, group: Group) -> Whole:
    """The checkpoint that RUN or RUN@STEP names; every process calls it.

    Raises:
        UserError: No such run or step, or a damaged one.
    """
    run_dir, wanted = _parse(reference)
    path = folder(run_dir, _choose(run_dir, wanted, complete_steps_everywhere(run_dir, group)))
    found = _verify(path, group)
    if not isinstance(found, Whole):
        raise UserError(f"{path} is damaged: {found}", "name another step, as RUN@STEP")
    return found


def resolve(reference: str) -> tuple[Path, int]:
    """RUN or RUN@STEP as run folder and step (the newest complete one), for one process.

    Raises:
        UserError: No such run or step.
    """
    run_dir, wanted = _parse(reference)
    return run_dir, _choose(run_dir, wanted, complete_steps(run_dir))


def check(path: Path) -> None:
    """Raises UserError where a checkpoint's files are not what was written (on one process: it reads them whole)."""
    files = _listed(path)
    faults = [files] if isinstance(files, str) else _faults(path, files, list(files)).values()
    for fault in filter(None, faults):
        raise UserError(f"{path} is damaged: {fault}", "name another step, as RUN@STEP")


def read_state(run_dir: Path, step: int) -> dict:
    """state.json of a checkpoint."""
    return json.loads((folder(run_dir, step) / STATE).read_text(encoding="utf-8"))


def contents(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The tensors that a checkpoint holds, and the names under which it holds them.

    A weight that is split from its master is there as a `Master`, to be made whole by whoever copies it.
    """
    found = ((name, masters.of(parameter)) for name, parameter in model.named_parameters(remove_duplicate=False))
    split = {name: master for name, master in found if master}
    weights = {name: split.get(name, tensor) for name, tensor in _model_state(model).items()}
    state: dict[str, Any] = {"model": weights}
    if optimizer.state:  # before its first step it has none, and torch would take a step to make one
        state["optimizer"] = get_optimizer_state_dict(model, optimizer)
    return state


def load(tensors: dict[str, Any], source: Whole | Path) -> None:
    """Fills tensors in place: on all processes together, or from a folder on this one alone, with its files there."""
    whole = source if isinstance(source, Whole) else None
    reader = _Reader(source.path if isinstance(source, Whole) else source, whole)
    group = whole.group if whole else None
    try:
        dcp.load(tensors, storage_reader=reader, planner=_Planner(), process_group=group, no_dist=whole is None)
    except CheckpointException as error:
        for cause, _ in error.failures.values():
            if isinstance(cause, UserError):
                raise cause from None
        raise


def weights(source: Whole, new_rows: NewRows = ()) -> Callable[[PreTrainedModel, list], None]:
    """Fills a model (see `model.build.build_model`) from the weights of a checkpoint, on any mesh.

    Of a model that has adapters, it fills what is trained; the frozen weights stay as they are.

    Args:
        source: The checkpoint.
        new_rows: Rows of the vocabulary that it lacks, as for `model.build.pretrained`.
    """

    def fill(model: PreTrainedModel, mapping: list) -> None:
        with masters.whole(model):
            fill_whole(model)

    def fill_whole(model: PreTrainedModel) -> None:
        with lora.unwrapped(model):
            rebuild_buffers(model)
        state = _model_state(model)
        vocabulary = vocabulary_names(model) & state.keys() if new_rows else set()
        stored: dict[str, Any] = read_metadata(source.path).state_dict_metadata if vocabulary else {}
        whole = {name: torch.empty(stored[f"model.{name}"].size, dtype=state[name].dtype) for name in vocabulary}
        load({"model": state | whole}, source)
        for name, tensor in whole.items():
            place(grown(tensor, len(state[name]), new_rows), state[name])
        with lora.unwrapped(model):
            model.tie_weights()

    return fill


def load_optimizer(source: Whole, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
    """Loads the moments from a checkpoint, on any mesh; the hyperparameters stay those that the optimizer has."""
    if not any(name.startswith("optimizer.") for name in read_metadata(source.path).state_dict_metadata):
        if isinstance(optimizer, MasterAdamW):
            optimizer.forget()
        else:
            optimizer.state.clear()  # of before the first step
        return
    own = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    tensors: dict[str, Any] = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    load(tensors, source)
    if not isinstance(optimizer, MasterAdamW):  # whose state was filled in place, and would be cast to bfloat16
        set_optimizer_state_dict(model, optimizer, tensors["optimizer"])
    for group, values in zip(optimizer.param_groups, own, strict=True):
        group.update(values)


def read_metadata(path: Path) -> dcp_metadata.Metadata:
    """DCP's description of a checkpoint.

    Raises:
        UserError: It holds anything but what DCP writes there: such a pickle could run any code.
    """
    with open(path / METADATA, "rb") as stream:
        return _Unpickler(stream, path / METADATA).load()


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error means that no space was left, on this or, for a CheckpointException, any process."""
    if isinstance(error, CheckpointException):
        return any(is_disk_full(cause) for cause, _ in error.failures.values())
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        if any(words in str(error) for words in ("No space left", "File too large", "unexpected pos")):
            return True  # torch's and safetensors' writers say only this
        error = error.__cause__ or error.__context__
    return False


def mark(path: Path, files: Files) -> None:
    """Writes COMPLETE: from now on the folder is a checkpoint."""
    marker = path / f".{COMPLETE}"
    marker.write_text(json.dumps(files, indent=1), encoding="utf-8")
    flush(marker)
    marker.rename(path / COMPLETE)
    flush(path)
    flush(path.parent)


def _parse(reference: str) -> tuple[Path, str]:
    name, _, wanted = reference.rpartition("@") if "@" in Path(reference).name else (reference, "", "")
    return Path(name), wanted


def _choose(run_dir: Path, wanted: str, steps: list[int]) -> int:
    if not steps:
        raise UserError(f"{run_dir} holds no complete checkpoint", "give the folder of a run that has saved one")
    if not wanted:
        return steps[-1]
    if not wanted.isdecimal() or int(wanted) not in steps:
        raise UserError(
            f"{run_dir} has no complete checkpoint of step {wanted}", f"it has: {', '.join(map(str, steps))}"
        )
    return int(wanted)


def _view(run_dir: Path) -> dict[int, tuple[Files | None, dict[str, int]]]:
    """What one storage holds of every step: what COMPLETE lists, and the sizes of files."""
    view = {}
    for step, path in named(run_dir):
        files = _listed(path)
        sizes = {file.name: file.stat().st_size for file in path.iterdir() if file.is_file()}
        view[step] = None if isinstance(files, str) else files, sizes
    return view


def _complete(*views: dict[int, tuple[Files | None, dict[str, int]]]) -> list[int]:
    """Steps that some COMPLETE lists and of which every listed file is on one of the storages at its size."""
    complete = set()
    for step in set().union(*views):
        held = [view[step] for view in views if step in view]
        for files, _ in held:
            if files is not None and all(
                any(sizes.get(name) == entry["size"] for _, sizes in held) for name, entry in files.items()
            ):
                complete.add(step)
    return sorted(complete)


def _verify(path: Path, group: Group) -> Whole | str:
    """Reads a checkpoint through, each file once a storage: it, or what is wrong with it."""
    rank, sharing = dist.get_rank(group), find_sharing(path, group)
    listed = together(group, lambda: _listed(path))
    markers = [files for index, files in enumerate(listed) if isinstance(files, dict) and files not in listed[:index]]
    fault = next((fault for fault in listed if isinstance(fault, str) and fault != _NO_MARKER), _NO_MARKER)
    for files in markers:  # several only where storages hold checkpoints of the same step of different runs
        share: list[str] = []
        if sharing[rank] is not None:
            members = [other for other, shared in enumerate(sharing) if shared == sharing[rank]]
            by_size = sorted(files, key=lambda name: -files[name]["size"])
            share = by_size[members.index(rank) :: len(members)]
        found = together(group, lambda files=files, share=share: _faults(path, files, share))
        holders = {name: [r for r, faults in enumerate(found) if faults.get(name, "") is None] for name in files}
        lost = [name for name in files if not holders[name]]
        if not lost:
            return _adopt(path, files, holders, group)
        missing = f"{lost[0]} is missing"
        reasons = [reason for faults in found if (reason := faults.get(lost[0]))]
        fault = next((reason for reason in reasons if reason != missing), missing)
        if len(set(sharing)) > 1:
            fault += ", on every storage: start on the nodes that have it, or copy it there"
    return fault


def _adopt(path: Path, files: Files, holders: dict[str, list[int]], group: Group) -> Whole:
    """Gives a storage that lacks them the folder, its marker and what every process reads."""
    together(group, lambda: path.mkdir(parents=True, exist_ok=True))
    storages = [storage for storage in find_sharing(path, group) if storage is not None]
    whole, rank = Whole(path, files, holders, storages, group), dist.get_rank(group)
    if len(set(storages)) > 1:
        leads = storages[rank] == rank
        lacking = [name for name in (METADATA, STATE) if leads and whole.lacks(rank, name)]
        whole.borrow([(name, 0, files[name]["size"]) for name in lacking])

        def complete() -> None:
            for name in lacking:
                received(path / name, rank).rename(path / name)
            if leads and _listed(path) != files:
                mark(path, files)

        together(group, complete)
    together(group, lambda: read_metadata(path) and None)  # so that what it refuses is said as it is
    return whole


def _listed(path: Path) -> Files | str:
    """What COMPLETE lists, or what is wrong with it."""
    try:
        files = json.loads((path / COMPLETE).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return _NO_MARKER
    except ValueError:
        files = None
    if not isinstance(files, dict) or any(Path(name).name != name for name in files):
        return "its COMPLETE marker is damaged"
    return files


def _faults(path: Path, files: Files, names: Iterable[str]) -> dict[str, str | None]:
    """What is wrong with every named file, or None."""
    return {name: _fault(path / name, files[name]) for name in names}


def _fault(file: Path, entry: dict[str, Any]) -> str | None:
    if not file.is_file():
        return f"{file.name} is missing"
    size = file.stat().st_size
    if size != entry["size"]:
        return f"{file.name} has {size} bytes, not {entry['size']}"
    try:
        if sha256(file) != entry["sha256"]:
            return f"{file.name} has another sha256"
    except OSError as error:
        return f"{file.name} cannot be read: {error.strerror}"
    return None


def _model_state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The tensors of a model that a checkpoint holds: where it has adapters, what is trained alone."""
    if lora.is_adapted(model):
        trained = lora.trained(model)
        return {name: tensor for name, tensor in model.state_dict().items() if name in trained}
    tied = tied_names(model)
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


class _Unpickler(pickle.Unpickler):
    """Builds the classes that DCP's metadata consists of, and torch's dtypes; refuses every other name."""

    _NAMES = (
        *(("torch.distributed.checkpoint.metadata", name) for name in dcp_metadata.__all__),
        ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")),
    )

    def __init__(self, stream: io.BufferedReader, file: Path):
        super().__init__(stream)
        self._file = file

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._NAMES or (module == "torch" and isinstance(getattr(torch, name, 0), torch.dtype)):
            return super().find_class(module, name)
        raise UserError(
            f"{self._file} holds {module}.{name}, which no checkpoint needs: it may be made to run code",
            _OWN,
        )


class _Planner(dcp.DefaultLoadPlanner):
    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        """What is no tensor: torch reads it with plain pickle, hence it is read here first, with its safe unpickler."""
        try:
            torch.load(value, weights_only=True)
        except pickle.UnpicklingError:
            name = read_item.storage_index.fqn
            raise UserError(f"{name} of a checkpoint may be made to run code", _OWN) from None
        value.seek(0)
        super().load_bytes(read_item, value)


class _Reader(dcp.FileSystemReader):
    """DCP's reader, for files that may be on other storages."""

    def __init__(self, path: Path, whole: Whole | None):
        super().__init__(path)
        self._folder, self._whole = path, whole

    def read_metadata(self, *args: Any, **kwargs: Any) -> dcp_metadata.Metadata:
        return read_metadata(self._folder)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> torch.futures.Future[None]:
        whole = self._whole
        if whole is None or len(set(whole.storages)) == 1:
            return super().read_data(plan, planner)
        rank = dist.get_rank(whole.group)
        needed = {item.storage_index: self.storage_data[item.storage_index] for item in plan.items}
        lacking = {index: info for index, info in needed.items() if whole.lacks(rank, info.relative_path)}
        files = {info.relative_path: received(whole.path / info.relative_path, rank) for info in lacking.values()}
        with contextlib.ExitStack() as stack:
            for file in files.values():
                stack.callback(file.unlink, missing_ok=True)
            whole.borrow({(info.relative_path, info.offset, info.length) for info in lacking.values()})
            for index, info in lacking.items():
                needed[index] = dataclasses.replace(info, relative_path=files[info.relative_path].name)
            self.storage_data = needed
            return super().read_data(plan, planner)

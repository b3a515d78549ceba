"""Storages: which processes see the same folder, and files sent to those that do not.

A run folder may lie on a file system that every node mounts, or on a disk of each node's own; nobody has to say which,
and both are found out here. Everything is done by all processes of a gloo group together.
"""

import datetime
import os
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
Group = dist.ProcessGroup

CHUNK_BYTES = 64 * 2**20


def new_group() -> Group:
    """A gloo group of all processes, of its own: a thread may use it while training goes on. Files may take long."""
    group = dist.new_group(backend="gloo", timeout=datetime.timedelta(hours=2))
    assert isinstance(group, dist.ProcessGroup)
    return group


def together(group: Group, action: Callable[[], T]) -> list[T]:
    """Calls `action` on every process; all get the results of all, by rank, or raise the first error of any.

    What it returns or raises must be picklable, and it must not wait for other processes.
    """
    result, error = None, None
    try:
        result = action()
    except Exception as raised:
        error = raised
    everywhere: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everywhere, (result, error), group=group)
    for _, error in everywhere:
        if error is not None:
            raise error
    return [result for result, _ in everywhere]


def find_leaders(folder: Path, group: Group) -> list[int]:
    """For every rank, the lowest rank that sees the same folder (which is made where it is not there).

    Each process makes a file with a random name there, for a moment, and looks whose files it sees.
    """

    def mark() -> str:
        name = f".storage-{uuid.uuid4().hex}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
        return name

    names = together(group, mark)
    try:
        return together(group, lambda: next(i for i, name in enumerate(names) if (folder / name).exists()))
    finally:
        (folder / names[dist.get_rank(group)]).unlink(missing_ok=True)


def find_sharing(folder: Path, group: Group) -> list[int | None]:
    """The same for a folder that is only read, or None where it is not there: by its inode and times.

    A file system that shows them differently on every node is taken for several storages, which costs time alone.
    """

    def identify() -> tuple[int, int, int] | None:
        try:
            found = folder.stat()
        except FileNotFoundError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_ctime_ns

    identities = together(group, identify)
    return [None if identity is None else identities.index(identity) for identity in identities]


def send_files(folder: Path, transfers: Sequence[tuple[str, int, int, int]], group: Group) -> None:
    """Sends files from the folder of one process to that of another, in pieces; all processes call it alike.

    Args:
        folder: This process's own.
        transfers: Name, size in bytes, rank that has it, rank that gets it.
        group: The processes.
    """
    rank, failure = dist.get_rank(group), None
    for name, size, source, destination in transfers:
        if rank == source:
            _send(folder / name, size, destination, group)
        elif rank == destination:
            failure = _receive(folder / name, size, source, group) or failure

    def complain() -> None:
        if failure is not None:
            raise failure

    together(group, complain)


def _pieces(size: int) -> list[torch.Tensor]:
    """Parts of one buffer, which make up `size` bytes."""
    buffer = torch.empty(min(size, CHUNK_BYTES), dtype=torch.uint8)
    return [buffer[: size - start] for start in range(0, size, CHUNK_BYTES)]


def _bytes_of(piece: torch.Tensor) -> memoryview:
    return memoryview(piece.numpy())  # pyright: ignore[reportArgumentType]


def _send(file: Path, size: int, destination: int, group: Group) -> None:
    with open(file, "rb") as stream:
        for piece in _pieces(size):
            stream.readinto(_bytes_of(piece))
            dist.send(piece, destination, group=group)


def _receive(file: Path, size: int, source: int, group: Group) -> OSError | None:
    """The error is returned, so that the sender is listened to until it has finished."""
    failure, temporary = None, file.with_name(f".{file.name}.part")
    try:
        stream = open(temporary, "wb", buffering=0)  # noqa: SIM115 (closed below)
    except OSError as error:
        stream, failure = None, error
    for piece in _pieces(size):
        dist.recv(piece, source, group=group)
        try:
            if stream is not None and failure is None:
                _write_whole(stream.fileno(), _bytes_of(piece))
        except OSError as error:
            failure = error
    if stream is not None:
        stream.close()
    if failure is None:
        flush(temporary)
        temporary.rename(file)
    else:
        temporary.unlink(missing_ok=True)
    return failure


def _write_whole(descriptor: int, rest: memoryview) -> None:
    """os.write, which may write less than it is given, until all is written."""
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def flush(path: Path) -> None:
    """Returns when the file (or the names in a folder) are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

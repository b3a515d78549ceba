"""Storages: which processes see the same folder, and files sent to those that do not.

A run folder may lie on a file system that every node mounts, or on a disk of each node's own; nobody has to say which,
and both are found out here. Everything is done by all processes of a gloo group together.
"""

import datetime
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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
    leaders = together(group, lambda: next(i for i, name in enumerate(names) if (folder / name).exists()))
    together(group, (folder / names[dist.get_rank(group)]).unlink)
    return leaders


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


@dataclass(frozen=True, order=True)
class Part:
    """`size` bytes from `offset` of a file, which rank `source` has and rank `destination` gets."""

    destination: int
    name: str
    offset: int
    size: int
    source: int

    @property
    def end(self) -> int:
        return self.offset + self.size


def received(file: Path, rank: int) -> Path:
    """Where a process puts the parts of a file that it is sent: each at its offset, with holes between them."""
    return file.with_name(f".{file.name}.{rank}.part")


def send(folder: Path, parts: Sequence[Part], group: Group) -> None:
    """Sends parts of files from the folder of one process to that of another; all processes call it alike.

    An error ends nobody's part in it: it is raised, on all processes, when everything was sent.
    """
    rank, failures = dist.get_rank(group), []
    pairs = sorted({(part.source, part.destination) for part in parts})
    for source, destination in pairs:
        if rank not in (source, destination):
            continue
        between = sorted(part for part in parts if (part.source, part.destination) == (source, destination))
        for pieces in _messages(between):
            message = torch.empty(sum(size for _, _, size in pieces), dtype=torch.uint8)
            if rank == source:
                failures += _each(pieces, message, lambda name, *piece: _read(folder / name, *piece))
                dist.send(message, destination, group=group)
            else:
                dist.recv(message, source, group=group)
                failures += _each(pieces, message, lambda name, *piece: _write(received(folder / name, rank), *piece))

    def complain() -> None:
        if failures:
            raise failures[0]

    together(group, complain)


def _messages(parts: Sequence[Part]) -> Iterator[list[tuple[str, int, int]]]:
    """Name, offset and size of what goes into each message: many small parts, or a piece of a large one."""
    message, room = [], CHUNK_BYTES
    for part in parts:
        start = 0
        while start < part.size or part.size == 0:
            size = min(room, part.size - start)
            message.append((part.name, part.offset + start, size))
            start, room = start + size, room - size
            if room == 0:
                yield message
                message, room = [], CHUNK_BYTES
            if part.size == 0:
                break
    if message:
        yield message


def _each(
    pieces: list[tuple[str, int, int]], message: torch.Tensor, action: Callable[[str, int, memoryview], None]
) -> list[OSError]:
    """Calls `action` with every piece and its bytes; the errors."""
    failures, content = [], memoryview(message.numpy())  # pyright: ignore[reportArgumentType]
    for name, offset, size in pieces:
        try:
            action(name, offset, content[:size])
        except OSError as error:
            failures.append(error)
        content = content[size:]
    return failures


def _read(file: Path, offset: int, content: memoryview) -> None:
    with open(file, "rb") as stream:
        stream.seek(offset)
        stream.readinto(content)


def _write(file: Path, offset: int, content: memoryview) -> None:
    with open(file, "r+b" if file.exists() else "w+b") as stream:
        stream.seek(offset)
        stream.write(content)


def flush(path: Path) -> None:
    """Returns when the file (or the names in a folder) are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

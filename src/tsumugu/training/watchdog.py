"""A run that hangs says where: every process prints its step, what it is doing, its last collective and its stacks.

The trainer marks its progress; a thread watches the marks. Waiting for the device, for another process and for a file
system lets that thread run. Code that does not (it holds the interpreter's lock) is left to `faulthandler`, which needs
no lock, prints the stacks alone and exits with 1. A process that cannot speak at all is named by the others.
"""

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from types import FrameType
from typing import Any

from torch._C import _distributed_c10d
from torch.distributed import ProcessGroup, Store, distributed_c10d

EXIT_CODE = 4
LINGER_SECONDS = 15.0
"""A process that ends makes those that wait for it fail: it gives them time to speak first."""
ANSWER_SECONDS = 5.0
"""Within which the store of the process group answers, unless what serves it hangs."""
REPORTED = "reported"
_NO_STORE = "the store of the process group gives no answer: the launcher hangs, or rank 0, or its host"
PATIENCE = 4.0
"""The factor of the longest waits that are no hang, of `mark`."""


def group_timeout(hang_timeout: float | None) -> timedelta | None:
    """A timeout of collectives that lets the watchdog speak before them; None: torch's own."""
    return None if hang_timeout is None else timedelta(seconds=PATIENCE * hang_timeout + 600)


def outlast(hang_timeout: float | None, *longer: ProcessGroup) -> None:
    """Gives every process group that timeout, as those of a mesh are made with torch's own (NCCL: 10 minutes).

    Args:
        hang_timeout: Of the watchdog.
        longer: Groups whose own timeout is longer, and stays.
    """
    timeout = group_timeout(hang_timeout)
    if timeout is not None:
        for group in list(distributed_c10d._world.pg_map):
            if group not in longer:
                distributed_c10d._set_pg_timeout(timeout, group)


class Watchdog:
    """Watches one process.

    Args:
        timeout: Seconds without a mark after which the process reports and ends with `EXIT_CODE`; None: never.
        rank: Of this process.
        world_size: Processes that watch themselves so, which give each other signs of life through the store of their
            process group.
    """

    def __init__(self, timeout: float | None, rank: int, world_size: int = 1):
        self._timeout, self._rank, self._world_size = timeout, rank, world_size
        self._mark: tuple[str, float] = ("starting", PATIENCE)
        self._over, self._hangs = threading.Event(), threading.Event()

    def mark(self, doing: str, patience: float = 1.0) -> None:
        """Progress: from now on the process is `doing` this, for which it may take `patience` × timeout."""
        self._mark = (doing, patience)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watches while what is inside runs."""
        if self._timeout is None:
            yield
            return
        interval = min(5.0, self._timeout / 10)
        speaker = None
        if self._world_size > 1:
            signs = _Signs(self._rank, self._world_size, interval)
            speaker = threading.Thread(target=self._give_signs, args=(signs,), name="signs of life", daemon=True)
            speaker.start()
        thread = threading.Thread(
            target=self._watch, args=(self._timeout, interval, speaker), name="watchdog", daemon=True
        )
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()
            faulthandler.cancel_dump_traceback_later()

    def _give_signs(self, signs: "_Signs") -> None:
        number = 0
        while not self._over.wait(signs.interval):
            if self._hangs.is_set():
                signs.give(REPORTED)
                for rank, doing in signs.silent():
                    line = f"rank {self._rank}: rank {rank} gives no sign of life; the last: {doing}\n"
                    os.write(2, line.encode())
                return
            number += 1
            if not signs.give(f"{number} {self._mark[0]}"):
                return

    def _watch(self, timeout: float, interval: float, speaker: threading.Thread | None) -> None:
        seen, waited, before = self._mark, 0.0, time.monotonic()
        while not self._over.wait(interval):
            # only this thread sets it anew, for which it needs the interpreter's lock
            faulthandler.dump_traceback_later(timeout * self._mark[1] + LINGER_SECONDS, exit=True, file=2)
            now = time.monotonic()
            waited += min(now - before, 2 * interval)  # a process that was stopped, or a machine, did not hang
            before = now
            if self._mark is not seen:
                seen, waited = self._mark, 0.0
            elif waited > timeout * seen[1]:
                os.write(2, self._report(seen[0], waited).encode())
                if speaker:
                    self._hangs.set()
                    speaker.join(5 * interval + ANSWER_SECONDS)  # a store that does not answer holds it for ever
                    if speaker.is_alive():
                        os.write(2, f"rank {self._rank}: {_NO_STORE}\n".encode())
                time.sleep(min(LINGER_SECONDS, timeout))
                os._exit(EXIT_CODE)

    def _report(self, doing: str, seconds: float) -> str:
        lines = [f"tsumugu: rank {self._rank}: no progress for {seconds:.0f} s (train.hang_timeout), while {doing}"]
        lines += [f"rank {self._rank}: last collective: {collective}" for collective in _last_collectives()]
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        for ident, frame in sys._current_frames().items():
            if ident != threading.get_ident():
                lines.append(f"rank {self._rank}: thread {names.get(ident, ident)}, innermost call first:")
                lines += _stack(frame)
        return "\n".join(lines) + "\n"


class _Signs:
    """Signs of life of every process, in the store of the process group, through a connection of their own."""

    def __init__(self, rank: int, world_size: int, interval: float):
        self.interval, self._rank, self._world_size = interval, rank, world_size
        store: Any = distributed_c10d._get_default_store()
        self._store: Store = store.clone()
        self._store.set_timeout(timedelta(seconds=ANSWER_SECONDS))

    def give(self, sign: str) -> bool:
        """Whether the store could be reached."""
        try:
            self._store.set(f"tsumugu/{self._rank}", sign)
        except RuntimeError:
            return False
        return True

    def silent(self) -> list[tuple[int, str]]:
        """Processes that give no sign within some intervals, and what they said last that they were doing."""
        before = self._given()
        time.sleep(4 * self.interval)
        after = self._given()
        return [
            (rank, sign.partition(" ")[2])
            for rank, sign in after.items()
            if sign != REPORTED and before.get(rank) == sign
        ]

    def _given(self) -> dict[int, str]:
        names = [f"tsumugu/{rank}" for rank in range(self._world_size)]
        try:
            return {rank: self._store.get(n).decode() for rank, n in enumerate(names) if self._store.check([n])}
        except RuntimeError:
            return {}


def _stack(frame: FrameType | None) -> Iterator[str]:
    """Places without their source lines: a file system may be what hangs."""
    while frame is not None:
        yield f"    {frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"
        frame = frame.f_back


def _last_collectives() -> list[str]:
    """The newest entry of every process group in torch's flight recorders, where this torch has one that is on."""
    newest = {}
    for name in ("_dump_fr_trace_json", "_dump_nccl_trace_json"):
        dump = getattr(_distributed_c10d, name, None)
        if dump is None:
            continue
        try:
            entries = json.loads(dump()).get("entries", [])
        except (RuntimeError, TypeError, ValueError):  # not compiled in, or another form
            continue
        for entry in entries:
            newest[tuple(entry.get("process_group", ())), entry.get("profiling_name", "")[:4]] = entry
    return [
        f"{entry.get('profiling_name')} number {entry.get('collective_seq_id')} of group "
        f"{' '.join(entry.get('process_group', ()))}, sizes {entry.get('input_sizes')}, {entry.get('state')}"
        for entry in newest.values()
    ]

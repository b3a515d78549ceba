"""One run at a time in a run folder: two that write there would mix their checkpoints and figures.

One process of every storage holds a lock while training goes on: a POSIX one (fcntl), which the system gives back when
that process ends, however it ends, and which NFS, Lustre (mounted with `flock`) and Spectrum Scale show to other nodes.
What is written in the file only says who has the lock, or had it last.
"""

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from io import TextIOWrapper
from pathlib import Path

import torch.distributed as dist

from tsumugu.errors import UserError
from tsumugu.training.storages import find_leaders, new_group, together

LOCK = ".lock"  # in the run folder

# One that was killed a moment ago may still be letting go of its GPU, and a file server may wait for a node that died:
# that of NFS for a lease, 90 s by Linux's default (RFC 8881, section 8.3, leaves it to the server); that of Lustre for
# nine intervals of 25 s between pings (PING_EVICT_TIMEOUT + 3 PING_INTERVAL in its obdclass/genops.c).
_PATIENCE_HERE, _PATIENCE_ELSEWHERE = 10.0, 240.0  # seconds


@contextlib.contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Holds the run folder; every process of the process group enters it.

    The folder is made where it is not there, and taken away at the end where nothing was written into it.

    Raises:
        UserError: Another run holds it, and goes on holding it.
    """
    group, rank = new_group(), dist.get_rank()
    existed = together(group, run_dir.exists)[rank]
    leads = find_leaders(run_dir, group)[rank] == rank
    with contextlib.ExitStack() as stack:

        def hold() -> None:
            if leads:
                file = stack.enter_context(_lock(run_dir / LOCK))
                stack.callback(file.truncate, 0)  # the folder goes on without the name of a host
                stack.callback(_clear, run_dir, existed)

        together(group, hold)
        yield


def _clear(run_dir: Path, existed: bool) -> None:
    with contextlib.suppress(OSError):  # NFS keeps an open file under another name
        if not existed and os.listdir(run_dir) == [LOCK]:
            (run_dir / LOCK).unlink()
            run_dir.rmdir()


def _lock(path: Path) -> TextIOWrapper:
    """The file, which is locked for as long as it is open."""
    started, told = time.monotonic(), False
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = open(path, "a+", encoding="utf-8")  # noqa: SIM115
        except FileNotFoundError:
            continue  # one that was refused took the folder away meanwhile
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                print(f"{path.parent}: nothing keeps a second run out of it: {error.strerror}", flush=True)
                return file
            with file:
                file.seek(0)
                host, _, process = file.read().partition(" ")
            holder = f"process {process} on {host}" if process else "another process"
            here = host == socket.gethostname()
            patience = _PATIENCE_HERE if here else _PATIENCE_ELSEWHERE
            if time.monotonic() - started > patience:
                hint = "wait until it ends, or choose another --run-dir"
                if not here:  # NFS before version 4 keeps the lock of a node that has died until that node is back
                    hint += f"; if {host or 'its host'} has died, remove {path}"
                raise UserError(f"{holder} trains into {path.parent}", hint) from None
            if not told:
                told = True
                print(f"{path.parent}: {holder} trains into it; waiting {patience:.0f} s for its end", flush=True)
            time.sleep(min(1.0, patience / 10))
            continue
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(file.fileno())):
                break
        file.close()  # one that was refused took it away meanwhile
    file.truncate(0)
    file.write(f"{socket.gethostname()} {os.getpid()}")
    file.flush()
    os.fsync(file.fileno())  # for other nodes
    return file

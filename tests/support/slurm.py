"""A Slurm cluster of one node: Debian's slurm-wlm, with a configuration of its own, on ports of the loopback."""

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

_SBIN = "/usr/sbin"
_DAEMONS = ("munged", "slurmctld", "slurmd")

_CONF = """
ClusterName=tests
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={node}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,bf_interval=1
NodeName=localhost NodeAddr=127.0.0.1 CPUs=2 RealMemory=4000 State=UNKNOWN
PartitionName=main Nodes=localhost Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """What a cluster lacks here; empty where it can start."""
    found = (shutil.which(name, path=f"{os.environ['PATH']}:{_SBIN}") for name in (*_DAEMONS, "sbatch"))
    return "" if all(found) else "Slurm is not installed (Debian: apt-get install slurm-wlm)"


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[Path]:
    """Starts the daemons, and ends those at the end.

    Args:
        folder: For configuration, state and logs; owned by this user, with a short path (it holds a socket).

    Yields:
        The configuration, for SLURM_CONF.
    """
    folder.chmod(0o711)  # munged wants its socket to be reachable
    for name in ("munge", "state", "spool"):
        (folder / name).mkdir(mode=0o711)
    key, conf = folder / "munge" / "key", folder / "slurm.conf"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    controller, node = _free_ports()
    user = pwd.getpwuid(os.getuid()).pw_name
    conf.write_text(_CONF.format(folder=folder, controller=controller, node=node, user=user))
    munge = [f"--{name}-file={folder}/munge/{name}" for name in ("key", "pid", "log", "seed")]
    commands = [
        ["munged", "--foreground", f"--socket={folder}/munge/socket", *munge],
        ["slurmctld", "-D"],
        ["slurmd", "-D", "-N", "localhost"],
    ]
    environment = os.environ | {"SLURM_CONF": str(conf), "PATH": f"{os.environ['PATH']}:{_SBIN}"}
    started: list[subprocess.Popen] = []
    try:
        for command in commands:
            with open(folder / f"{command[0]}.out", "wb") as output:
                started.append(
                    subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment)
                )
            if command[0] == "munged":
                _until((folder / "munge" / "socket").exists, started, folder)
        _until(lambda: _state(environment) == "idle", started, folder)
        yield conf
    finally:
        for process in reversed(started):
            process.terminate()
        for process in reversed(started):
            process.wait(timeout=30)


def _state(environment: dict[str, str]) -> str:
    done = subprocess.run(
        ["sinfo", "--noheader", "--format=%T"], env=environment, capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


def _until(met: Callable[[], bool], started: list[subprocess.Popen], folder: Path) -> None:
    deadline = time.monotonic() + 60
    while not met():
        said = "\n".join(path.read_text()[-1000:] for path in folder.glob("*.out"))
        assert all(process.poll() is None for process in started), f"Slurm does not start: {said}"
        assert time.monotonic() < deadline, f"Slurm does not start: {said}"
        time.sleep(0.1)


def _free_ports() -> tuple[int, int]:
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        return one.getsockname()[1], other.getsockname()[1]

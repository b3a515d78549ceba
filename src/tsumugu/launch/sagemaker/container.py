"""The container's side: from the JSON files under /opt/ml to torchrun, and from the last checkpoint to a model.

`start.sh` becomes this process, and torchrun's agent runs in it, so that the SIGTERM by which SageMaker stops a
container reaches the workers. The run folder is /opt/ml/checkpoints, which SageMaker copies to S3 and back to every
host.
"""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.launcher.api import LaunchConfig

from tsumugu import config
from tsumugu.errors import UserError, redact
from tsumugu.launch.local import prepare_environment, run_workers
from tsumugu.launch.sagemaker import INTERRUPTED_REASON

ROOT = "TSUMUGU_ML_ROOT"  # in place of /opt/ml, for tests
PORT = "TSUMUGU_MASTER_PORT"  # in place of 29500, likewise; gathering takes the next one
CODE_CHANNEL = "code"
INTERRUPTED = 3

_SHUTDOWN_SECONDS = 110  # SageMaker kills 120 s after SIGTERM
_RENDEZVOUS_SECONDS = 1800
_RESOLVE_SECONDS = 300
_REASON_CHARACTERS = 1024  # of a failure reason that SageMaker shows


@dataclasses.dataclass(frozen=True)
class Container:
    """What SageMaker says about the job in /opt/ml/input/config.

    Attributes:
        root: /opt/ml.
        recipe: The configuration, with `channel:NAME/…` for what SageMaker brings.
        hosts: Names of all, the same on each; the first one leads.
        host: The one that this is.
        interface: The network interface that they see one another by.
        channels: Folders by the names of channels.
    """

    root: Path
    recipe: Path
    hosts: list[str]
    host: str
    interface: str
    channels: dict[str, str]

    @property
    def leads(self) -> bool:
        return self.host == self.hosts[0]

    @property
    def run_dir(self) -> Path:
        return self.root / "checkpoints"


def main(stage: str = "train") -> int:
    """Trains, and exports on the first host, or prepares; the exit code is that of `tsumugu train` or `prepare`."""
    root = Path(os.environ.get(ROOT, "/opt/ml"))
    with _last_lines() as lines:
        try:
            code, reason = _run(read_container(root)) if stage == "train" else _prepare(root)
        except UserError as error:
            code, reason = 2, str(error)
        except SignalException as error:  # the workers were given time to save, and said how far they came
            code, reason = 128 + error.sigval, f"stopped by signal {error.sigval}"
        except Exception as error:  # shown whole, and its last line is what SageMaker shows
            code, reason = 1, f"{type(error).__name__}: {error}"
            sys.excepthook(type(error), error, error.__traceback__)
    if code:
        write_failure(root, reason or _error_line(lines) or f"exit code {code}")
        print(f"tsumugu: {reason}" if reason else f"tsumugu: ended with {code}", file=sys.stderr, flush=True)
    return code


def read_container(root: Path) -> Container:
    """Reads resourceconfig.json, inputdataconfig.json and hyperparameters.json.

    Raises:
        UserError: One of them is not there, or has not what this job needs.
    """
    resources, inputs, names = (
        _read_json(root / "input" / "config" / f"{name}.json")
        for name in ("resourceconfig", "inputdataconfig", "hyperparameters")
    )
    channels = {name: str(root / "input" / "data" / name) for name in inputs}
    if "recipe" not in names or CODE_CHANNEL not in channels:
        raise UserError(
            "this job has no recipe in hyperparameters.json, or no channel of the name code",
            "start it by `tsumugu launch sagemaker`",
        )
    return Container(
        root=root,
        recipe=Path(channels.pop(CODE_CHANNEL), names["recipe"]),
        hosts=resources["hosts"],
        host=resources["current_host"],
        interface=resources.get("network_interface_name", "eth0"),
        channels=channels,
    )


def write_failure(root: Path, reason: str) -> None:
    """Leaves the reason where SageMaker looks for it, of training and of processing jobs; credentials are redacted."""
    (root / "output").mkdir(parents=True, exist_ok=True)
    for name in ("failure", "message"):
        (root / "output" / name).write_text(redact(" ".join(reason.split()))[:_REASON_CHARACTERS], encoding="utf-8")


def _run(container: Container) -> tuple[int, str]:
    """The exit code, and why it is not 0 where the workers' own last line does not say so."""
    config.write_channels(container.channels)
    config.load(config.TrainingRun, [str(container.recipe)])  # what is wrong with it is said once, not by every process
    # gloo asks for the address of the host's own name, which in SageMaker's containers may be that of nobody
    os.environ.setdefault("GLOO_SOCKET_IFNAME", container.interface)
    os.environ.setdefault("NCCL_DEBUG", "WARN")
    processes = torch.cuda.device_count() or 1
    prepare_environment(processes, _SHUTDOWN_SECONDS)
    _wait_for_name(container.hosts[0])
    node, port = container.hosts.index(container.host), int(os.environ.get(PORT, 29500))
    launch_config = LaunchConfig(
        min_nodes=len(container.hosts),
        max_nodes=len(container.hosts),
        nproc_per_node=processes,
        run_id="tsumugu",
        rdzv_backend="static",  # ranks are in the order of the hosts
        rdzv_endpoint=f"{container.hosts[0]}:{port}",
        rdzv_configs={"rank": node, "timeout": _RENDEZVOUS_SECONDS},
        max_restarts=0,
    )
    code, rank = run_workers(
        launch_config, *("tsumugu", "train", f"--config={container.recipe}", f"--run-dir={container.run_dir}")
    )
    if code == INTERRUPTED:
        from tsumugu.training.checkpoint import complete_steps  # seconds, for which stopping need not wait otherwise

        steps = complete_steps(container.run_dir)
        saved = f", the checkpoint of step {steps[-1]} is saved" if steps else ""
        return code, f"{INTERRUPTED_REASON}{saved}: start it again with the same --run-name, and it goes on"
    if code:
        print(f"tsumugu: rank {rank} ended first, with {code}", file=sys.stderr, flush=True)
        return code, ""
    if len(container.hosts) > 1:
        from tsumugu.launch.sagemaker.gather import gather

        gather(container.run_dir, node, len(container.hosts), container.hosts[0], port + 1)
    if container.leads:
        _export(container)
    return 0, ""


def _prepare(root: Path) -> tuple[int, str]:
    """A processing job's part: from the channels to a store, both in folders that SageMaker copies."""
    from tsumugu.data.prepare import describe, prepare, warnings

    inputs = root / "processing" / "input"
    config.write_channels({path.name: str(path) for path in inputs.iterdir() if path.name != CODE_CHANNEL})
    output = root / "processing" / "output" / "store"
    flags = [f"--prepare.output={output}", "--prepare.executor=local"]
    manifest = prepare(config.load(config.Preparation, [str(inputs / CODE_CHANNEL / "recipe.yaml")], flags).prepare)
    for line in warnings(manifest):
        print(f"tsumugu: warning: {line}", file=sys.stderr)
    print(describe(manifest), flush=True)
    return 0, ""


def _wait_for_name(host: str) -> None:
    """Until the name of a host has an address, which in a container that has just started may take a while."""
    deadline = time.monotonic() + _RESOLVE_SECONDS
    while True:
        try:
            socket.getaddrinfo(host, None)
            return
        except OSError:
            if time.monotonic() > deadline:
                raise UserError(f"the host {host} has no address", "look at the job's VPC and its DNS") from None
        time.sleep(1)


def _export(container: Container) -> None:
    """The newest checkpoint as a Hugging Face folder in /opt/ml/model, a mount that nothing can be renamed to."""
    from tsumugu.export import CertificateError, export

    model = container.root / "model"
    made = model / ".export"
    shutil.rmtree(made, ignore_errors=True)
    try:
        export(str(container.run_dir), made)
    except CertificateError as error:
        raise UserError(
            f"the export is not what was trained: {'; '.join(error.failures)}",
            "the checkpoint is kept under the run's prefix: export it on a machine of yours",
        ) from None
    for path in made.iterdir():
        path.rename(model / path.name)
    made.rmdir()


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is not there", "start this as a SageMaker training job") from None


@contextlib.contextmanager
def _last_lines() -> Iterator[deque[str]]:
    """The latest lines that this process and those that it starts write to stderr, where they also go on to."""
    lines: deque[str] = deque(maxlen=200)
    stderr = os.dup(2)
    receiving, sending = os.pipe()
    os.dup2(sending, 2)
    os.close(sending)

    def copy() -> None:
        with open(receiving, "rb") as stream:
            for line in stream:
                os.write(stderr, line)
                lines.append(line.decode("utf-8", "replace").rstrip())

    thread = threading.Thread(target=copy, name="stderr", daemon=True)
    thread.start()
    try:
        yield lines
    finally:
        sys.stderr.flush()
        os.dup2(stderr, 2)  # closes our end of the pipe; that of workers that were killed is closed already
        thread.join(timeout=10)
        os.close(stderr)


def _error_line(lines: deque[str]) -> str:
    """Of lines on stderr the one that says what is wrong: of tsumugu itself, else of an exception, else the last."""
    for pattern in (
        r"tsumugu: (?!warning: |rank \d+ ended)",
        r"(\[rank\d+\]: )?[\w.]*(Error|Exception|Interrupt)\b",
        r"\S",
    ):
        for line in reversed(lines):
            if re.match(pattern, line):
                return line.removeprefix("tsumugu: ")
    return ""


if __name__ == "__main__":
    # until torchrun's agent has its own handler; a container's first process ignores what it has none for
    signal.signal(signal.SIGTERM, lambda number, _: os._exit(128 + number))
    ended_with = main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(ended_with)  # as `tsumugu.cli.main` does under torchrun, and for its reason

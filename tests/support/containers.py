"""SageMaker's side of a training container without a container: folders like /opt/ml, one a host, on loopback."""

import contextlib
import functools
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from support.models import tiny_config
from tsumugu.config import PrepareConfig, Source
from tsumugu.data.prepare import prepare
from tsumugu.launch.sagemaker.container import PORT, ROOT
from tsumugu.tokenizer.contract import read_contract

ML = "/opt/ml"
HOSTS = ("127.0.0.1", "127.0.0.2")


def free_ports() -> int:
    """The first of two ports of which nobody has one now."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("", 0))
            port = first.getsockname()[1]
            if port < 65000:
                try:
                    second.bind(("", port + 1))
                except OSError:
                    continue
                return port


@contextlib.contextmanager
def no_network() -> Iterator[list[str]]:
    """A network namespace with a loopback of its own and nothing else, which its processes share.

    Yields:
        The beginning of commands that run in it; nothing where the kernel does not allow it, or util-linux or iproute2
        is missing.
    """
    holding = ["sh", "-c", "PATH=$PATH:/usr/sbin; ip link set lo up && echo up && exec sleep infinity"]
    with_user = (["--map-root-user"], ["--user", "--preserve-credentials"])  # of those who are not root
    for made, entered in (([], []), with_user) if shutil.which("unshare") else ():
        with subprocess.Popen(["unshare", "--net", *made, *holding], stdout=subprocess.PIPE, text=True) as holder:
            assert holder.stdout
            if holder.stdout.readline() == "up\n":
                try:
                    yield ["nsenter", "--net", *entered, "--target", str(holder.pid)]
                finally:
                    holder.kill()
                return
    yield []


@functools.cache
def mounts() -> bool:
    """Whether a folder can be mounted at /opt/ml in a namespace: by root, where that folder is there."""
    trial = ["unshare", "--mount", "mount", "--bind", "/tmp", ML]
    return shutil.which("unshare") is not None and subprocess.run(trial, capture_output=True).returncode == 0


def write_data(folder: Path, tokenizer: Path) -> Path:
    """A store, the shape of a tiny model, and a recipe of 60 steps that has both from the channel `data`."""
    texts = [f"朝早く起きて、川沿いの道を{number}キロほど歩いた。" * 5 for number in range(24)]
    lines = (json.dumps({"text": text}) for text in texts)
    folder.mkdir()
    (folder / "text.jsonl").write_text("\n".join(lines), encoding="utf-8")
    source = Source(name="text", path=str(folder / "text.jsonl"))
    store = str(folder / "data" / "store")
    prepare(PrepareConfig(sources=[source], tokenizer=str(tokenizer), output=store, workers=1, validation_share=0.2))
    vocab_size = read_contract(tokenizer).vocab_size
    shape = tiny_config("llama", True, max_position_embeddings=256, vocab_size=vocab_size)
    shape.save_pretrained(folder / "data" / "shape")
    recipe = {
        "model": {"config": "channel:data/shape"},
        "data": {"store": "channel:data/store", "sequence_length": 32},
        "train": {"max_steps": 60, "global_batch_size": 4, "micro_batch_size": 2, "log_every": 1, "log_to": []},
        "optimizer": {"learning_rate": 0.01},
        "checkpoint": {"every": 10},
        "evaluate": {"every": 20},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return folder / "recipe.yaml"


def write_inputs(root: Path, host: str, hosts: Sequence[str], channels: Sequence[str], names: dict[str, str]) -> None:
    """The JSON files that SageMaker writes, of which only what is documented is here."""
    described = {
        "resourceconfig": {"current_host": host, "hosts": list(hosts), "network_interface_name": "lo"},
        "inputdataconfig": {name: {"TrainingInputMode": "File", "RecordWrapperType": "None"} for name in channels},
        "hyperparameters": names,
    }
    config = root / "input" / "config"
    config.mkdir(parents=True, exist_ok=True)
    for name, content in described.items():
        (config / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    for name in ("model", "checkpoints", "output"):
        (root / name).mkdir(exist_ok=True)


def lay_out(root: Path, host: str, hosts: Sequence[str], recipe: Path) -> Path:
    """/opt/ml of one host for a recipe of `write_data`."""
    write_inputs(root, host, hosts, ["code", "data"], {"recipe": "recipe.yaml"})
    (root / "input" / "data" / "code").mkdir(parents=True)
    shutil.copy(recipe, root / "input" / "data" / "code" / "recipe.yaml")
    (root / "input" / "data" / "data").symlink_to(recipe.parent / "data")
    return root


def start(
    root: Path, port: int, command: Sequence[str] = (), keep: Sequence[str] | None = None, **environment: str
) -> subprocess.Popen:
    """The entrypoint on one host, whose output goes to `root`.log.

    Args:
        root: /opt/ml, in a mount namespace of its own; where the kernel does not allow that, in place of it.
        port: For the processes to find one another.
        command: Default: this Python's module.
        keep: What of this process's environment it has too; default: all.
        environment: What it has besides.
    """
    command = command or [sys.executable, "-m", "tsumugu.launch.sagemaker.container"]
    kept = {name: value for name, value in os.environ.items() if keep is None or name in keep}
    given = kept | {PORT: str(port)} | environment
    if mounts():
        command = ["unshare", "--mount", "sh", "-c", f'mount --bind "$0" {ML} && exec "$@"', str(root), *command]
    else:
        given |= {ROOT: str(root)}
    with open(root.with_name(f"{root.name}.log"), "ab") as log:
        return subprocess.Popen(command, env=given, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)

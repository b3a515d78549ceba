"""What goes into the code channel: tsumugu as a wheel, wheels of what the image lacks, the recipe, and start.sh."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Collection, Sequence
from importlib import metadata, resources
from pathlib import Path

import tsumugu
from tsumugu.errors import UserError

RECIPE = "recipe.yaml"

# What `tsumugu train` and the export after it can use, of the dependencies that tsumugu declares; torch is the image's.
_FOR_TRAINING = (
    *("transformers", "tokenizers", "safetensors", "numpy", "jsonargparse", "pyyaml", "tqdm", "tensorboard"),
    *("sentencepiece", "tiktoken", "protobuf"),
)
_OF_THE_IMAGE = re.compile(r"(torch|triton|nvidia-.*|cuda-.*)")
_PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in range(34, 4, -1)] + ["manylinux2014_x86_64"]  # Amazon Linux
_WHEEL = b"Wheel-Version: 1.0\nGenerator: tsumugu\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
_EPOCH = (1980, 1, 1, 0, 0, 0)


def write_code(
    folder: Path, recipe: str, stage: str, extras: Collection[str], wheels: Path | None, python: str
) -> None:
    """Fills a folder with what becomes the channel `code`.

    Args:
        folder: An empty folder.
        recipe: The configuration as YAML.
        stage: train or prepare: what it must be able to do.
        extras: Those of tsumugu that it needs for that.
        wheels: A folder whose wheels go along; None: those of `requirements` are downloaded.
        python: Version of the image's Python, such as 3.12, for which they are.

    Raises:
        UserError: No wheels are there, or they cannot be downloaded.
    """
    needed = requirements(stage, extras)
    (folder / "wheels").mkdir()
    (folder / RECIPE).write_text(recipe, encoding="utf-8")
    (folder / "requirements.txt").write_text("".join(f"{line}\n" for line in needed), encoding="utf-8")
    start = resources.files("tsumugu.launch.sagemaker") / "start.sh"
    (folder / "start.sh").write_text(start.read_text(encoding="utf-8"), encoding="utf-8")
    build_wheel(folder / "wheels")
    if wheels is None:
        download_wheels(needed, folder / "wheels", python)
        return
    for wheel in wheels.glob("*.whl"):
        if not wheel.name.startswith("tsumugu-"):
            shutil.copy(wheel, folder / "wheels")


def requirements(stage: str, extras: Collection[str] = ()) -> list[str]:
    """What a container needs beside torch, as tsumugu declares it."""
    needed, markers = [], [f'extra == "{name}"' for name in extras]
    for line in metadata.requires("tsumugu") or []:
        requirement, _, marker = (part.strip() for part in line.partition(";"))
        name = re.split(r"[^A-Za-z0-9._-]", requirement)[0].lower().replace("_", "-")
        if name == "torch":
            continue
        wanted = name in _FOR_TRAINING if stage == "train" else True
        if (wanted and not marker) or marker in markers:
            needed.append(requirement)
    return sorted(needed)


def build_wheel(folder: Path) -> Path:
    """tsumugu as it is installed here, also in editable mode, as a wheel: the same bytes for the same files."""
    distribution = metadata.distribution("tsumugu")
    package = Path(tsumugu.__file__).parent
    information = f"tsumugu-{tsumugu.__version__}.dist-info"
    files = {
        f"tsumugu/{path.relative_to(package).as_posix()}": path.read_bytes()
        for path in sorted(package.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }
    files[f"{information}/METADATA"] = (distribution.read_text("METADATA") or "").encode()
    files[f"{information}/WHEEL"] = _WHEEL
    files[f"{information}/entry_points.txt"] = b"[console_scripts]\ntsumugu = tsumugu.cli:main\n"
    lines = [f"{name},sha256={_digest(content)},{len(content)}" for name, content in files.items()]
    files[f"{information}/RECORD"] = "\n".join([*lines, f"{information}/RECORD,,", ""]).encode()
    wheel = folder / f"tsumugu-{tsumugu.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, content, zipfile.ZIP_DEFLATED)
    return wheel


def _digest(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


def download_wheels(needed: Sequence[str], folder: Path, python: str) -> None:
    """Wheels of the requirements and of what they require, for Linux on x86_64, but for torch and what it brings.

    pip resolves them first, which reads metadata alone, so that the gigabytes of torch are never downloaded.

    Raises:
        UserError: pip cannot.
    """
    target = ["--only-binary=:all:", "--implementation=cp", f"--python-version={python}"]
    target += [f"--platform={platform}" for platform in _PLATFORMS]
    place = ["--target", str(folder / "nowhere")]  # which pip wants for another platform, and does not make
    resolved = _pip("install", "--dry-run", "--ignore-installed", "--report=-", *place, *target, *needed)
    found = [item["metadata"] for item in json.loads(resolved)["install"]]
    ours = [item for item in found if not _OF_THE_IMAGE.fullmatch(item["name"].lower())]
    _pip("download", "--no-deps", f"--dest={folder}", *target, *(f"{item['name']}=={item['version']}" for item in ours))


def _pip(*arguments: str) -> str:
    command = [sys.executable, "-m", "pip", *arguments, "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["it says nothing"]
        raise UserError(
            f"pip cannot download the wheels that the image needs: {said[-1]}",
            "give a folder of them: --wheels DIR, or --wheels none for an image that has everything",
        )
    return done.stdout

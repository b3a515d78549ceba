"""What the notebooks call: commands and what they say, a training here or on SageMaker, an estimate, pictures.

A notebook shows commands and recipes; everything here only starts those commands and draws what they leave.
"""

import html
import io
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from tsumugu.data import audit_view
from tsumugu.data.audit import audit
from tsumugu.data.store import open_store
from tsumugu.training.metrics import read_metrics


class Picture:
    """A figure that a notebook shows where it is the last value of a cell."""

    def __init__(self, figure: Figure):
        self.figure = figure

    def _repr_png_(self) -> bytes:
        content = io.BytesIO()
        self.figure.savefig(content, format="png", dpi=100, bbox_inches="tight")
        return content.getvalue()


class Page:
    """HTML that a notebook shows where it is the last value of a cell."""

    def __init__(self, content: str):
        self.content = content

    def _repr_html_(self) -> str:
        return self.content


def run(*arguments: str) -> None:
    """Runs `tsumugu ARGUMENTS` and shows what it says line by line.

    Raises:
        RuntimeError: It did not end with 0.
    """
    _run(*arguments)


def _run(*arguments: str) -> str:
    """The same; what it said."""
    print("$ tsumugu", shlex.join(arguments), flush=True)
    code, output = _start(arguments)
    if code:
        raise RuntimeError(f"`tsumugu {arguments[0]}` ended with exit code {code}; it says why above")
    return output


def _start(arguments: Sequence[str]) -> tuple[int, str]:
    command = [sys.executable, "-m", "tsumugu", *arguments]
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8") as process:
        assert process.stdout
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    return process.returncode, "".join(lines)


def sample(name: str, folder: str | Path) -> Path:
    """Lays the built-in documents (japanese, english, instructions) into a folder, where they are not there yet.

    Written again, they would be input that has changed, of which a store is not made twice.
    """
    path = Path(folder) / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        content = (resources.files("tsumugu") / "sample" / f"{name}.jsonl").read_text(encoding="utf-8")
        path.write_text(content, encoding="utf-8")
    return path


def launch(
    where: str,
    recipe: str,
    output: str,
    inputs: Mapping[str, str],
    flags: Sequence[str] = (),
    sagemaker: Mapping[str, Any] | None = None,
    stage: str = "train",
) -> None:
    """Trains or prepares here or on SageMaker, and has the run folder or store here at the end.

    Args:
        where: local, sagemaker.
        recipe: Its file.
        output: The run folder, or the store.
        inputs: Keys of the recipe, such as data.store, and the folders here that they name. For SageMaker each is
            uploaded and becomes a channel. A name without a dot is no key, but a channel that the recipe itself names.
        flags: More of the recipe's keys, such as --train.max_steps=10.
        sagemaker: Flags of `launch sagemaker`, without the dashes; `bucket` must be among them.
        stage: train, prepare.
    """
    if where == "local":
        given = [f"--{key}={folder}" for key, folder in inputs.items() if "." in key]
        command = (
            ["prepare", f"--output={output}"] if stage == "prepare" else ["launch", "local", f"--run-dir={output}"]
        )
        run(*command, f"--config={recipe}", *given, *flags)
        return
    assert where == "sagemaker", f"LAUNCH is {where}: local and sagemaker are known"
    assert sagemaker
    if Path(output).exists():  # a download appears when it is whole
        print(f"{output} はすでにあります。作り直すときは、このフォルダを別の場所に移してください")
        return
    for key, folder in inputs.items():
        _upload(folder, _place(sagemaker["bucket"], output, key))
    said = _run(*sagemaker_command(recipe, output, inputs, flags, sagemaker, stage))
    job = re.search(rf"^({re.escape(Path(output).name)}[\w-]*): ", said, re.MULTILINE)
    assert job, "the name of the job is not in what it said"
    run("launch", "sagemaker", "download", job[1], f"--{'run-dir' if stage == 'train' else 'output'}={output}")


def sagemaker_command(
    recipe: str,
    output: str,
    inputs: Mapping[str, str],
    flags: Sequence[str],
    sagemaker: Mapping[str, Any],
    stage: str = "train",
) -> list[str]:
    """The arguments of `tsumugu` for a job that is named after the output folder; see `launch`."""
    command = ["launch", "sagemaker", f"--config={recipe}", f"--run-name={Path(output).name}"]
    command += ["--stage=prepare"] if stage == "prepare" else []
    command += [f"--{name}={value}" for name, value in sagemaker.items()]
    for key in inputs:
        channel = key.replace(".", "-")
        command.append(f"--channel={channel}={_place(sagemaker['bucket'], output, key)}")
        command += [f"--{key}=channel:{channel}"] if "." in key else []
    return [*command, *flags]


def _place(bucket: str, output: str, key: str) -> str:
    return f"s3://{bucket}/tsumugu-notebooks/{Path(output).name}/{key.replace('.', '-')}"


def _upload(folder: str, uri: str) -> None:
    from fsspec.core import url_to_fs  # with s3fs of the extra `aws`

    print(f"{folder} → {uri}", flush=True)
    storage, path = url_to_fs(uri)
    storage.put(f"{folder.rstrip('/')}/", f"{path}/", recursive=True)


def estimate(
    recipe: str, inputs: Mapping[str, str], instance_type: str, instance_count: int, flags: Sequence[str] = ()
) -> None:
    """Says what `tsumugu plan` finds: whether it fits, how long it takes, and what it costs where a price is known."""
    given = [f"--{key}={folder}" for key, folder in inputs.items()]
    cluster = [f"--instance-type={instance_type}", f"--instance-count={instance_count}"]
    command = ["plan", f"--config={recipe}", *cluster, *given, *flags, "--json"]
    print("$ tsumugu", shlex.join(command), flush=True)
    code, output, errors = _captured(command)
    if code not in (0, 1):  # 1: it does not fit
        raise RuntimeError(errors.strip())
    for line in describe_plan(json.loads(output), f"{instance_type} × {instance_count}"):
        print(line)


def _captured(arguments: Sequence[str]) -> tuple[int, str, str]:
    done = subprocess.run([sys.executable, "-m", "tsumugu", *arguments], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def describe_plan(plan: Mapping[str, Any], cluster: str) -> list[str]:
    """The figures of `tsumugu plan --json` in Japanese; those that it does not know are said to be unknown."""
    memory, of = plan["memory_gib"]["total"], plan["device_memory_gib"]
    room = f"{memory:.1f} GiB" + (f" / {of:.0f} GiB" if of else "")
    lines = [f"{cluster}: {'メモリに収まります' if plan['fits'] else 'メモリに収まりません'} ({room})"]
    days, cost = plan.get("days"), plan.get("cost")
    lines.append("学習時間: 不明 (この GPU の実測値がありません)" if days is None else f"学習時間: {_duration(days)}")
    if not cost or cost.get("amount") is None:
        lines.append("費用: 不明 (価格か学習時間が分かりません。tsumugu plan --help に価格の渡し方があります)")
    else:
        price = f"1 時間 {cost['price_per_hour']:,.2f} {cost['currency']}、{cost['price_date']} 時点"
        amount = f"約 {cost['amount']:,.2f}" if cost["amount"] >= 0.01 else "0.01 未満"
        lines.append(f"費用: {amount} {cost['currency']} ({price})")
    return lines


def _duration(days: float) -> str:
    if days >= 1:
        return f"約 {days:.1f} 日"
    return f"約 {days * 24:.1f} 時間" if days * 24 >= 1 else f"約 {max(1, round(days * 1440))} 分"


def losses(*run_dirs: str) -> Picture:
    """Training and validation loss over the steps of runs, from their metrics.jsonl."""
    figure, axes = _axes("step", "loss (nats per token)")
    for run_dir in run_dirs:
        lines = read_metrics(Path(run_dir))
        for key, style in (("loss", "-"), ("validation_loss", "o--")):
            points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
            label = f"{Path(run_dir).name}: {key.replace('_', ' ')}"
            axes.plot([step for step, _ in points], [value for _, value in points], style, label=label, markersize=4)
    axes.legend()
    return Picture(figure)


def lengths(*stores: str) -> Picture:
    """How long the training documents of stores are, in tokens."""
    figure, axes = _axes("tokens per document", "documents")
    for store in stores:
        bounds = open_store(Path(store)).train.document_bounds()
        axes.hist(np.diff(bounds), bins=40, alpha=0.6, label=Path(store).name)
    axes.legend()
    return Picture(figure)


def _axes(x: str, y: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(7, 3.5))
    axes = figure.subplots()
    axes.set(xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    return figure, axes


def supervision(store: str, rows: int = 3) -> Page:
    """What a store teaches, as `tsumugu audit` finds it: figures, findings, and rows in colour."""
    return Page(audit_view.to_html(audit(Path(store), rows)))


def table(rows: Sequence[Mapping[str, object]]) -> Page:
    """Rows as a table, with the columns of the first."""
    head = "".join(f"<th>{html.escape(str(name))}</th>" for name in rows[0])
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(str(row[name]))}</td>' for name in rows[0])}</tr>" for row in rows)
    return Page(f"<table><tr>{head}</tr>{body}</table>")

"""`tsumugu quickstart`: the whole way once, through the same functions that the subcommands call.

Every stage finds out by itself what is already done, so that quickstart run again skips it, and goes on where it was
killed. The recipes that it uses lie in the work folder, to be read, edited and copied.
"""

import contextlib
import json
import re
import shutil
import sys
import time
from importlib import resources
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table

from tsumugu import config as configuration
from tsumugu.data import corpus
from tsumugu.data.prepare import describe, hash_share, prepare
from tsumugu.errors import UserError
from tsumugu.export import export
from tsumugu.generate import Generator
from tsumugu.launch.local import launch
from tsumugu.tokenizer.contract import read_contract
from tsumugu.tokenizer.train import train_tokenizer
from tsumugu.training.metrics import read_metrics

_RECIPES = ("prepare", "prepare-instructions", "pretrain", "instruct")
_PROCESSES = 2
_MEASURED_STEPS = 20
_OWN_TEXT_STEPS = 800
_PRETRAIN_PROMPTS = ("日本の", "朝起きて窓を開けると、", "作り方は次のとおりです。")


def quickstart(
    work_dir: Path, inputs: list[str] | None, text: str, *, vocab_size: int | None = None, ask: bool = True
) -> int:
    """Text → tokenizer → stores → pretraining → instruction tuning → Hugging Face folder → generated text.

    Args:
        work_dir: Folder for everything that is made.
        inputs: The user's own corpus for pretraining; None: the built-in one.
        text: Its text column.
        vocab_size: Default: by the size of the corpus.
        ask: Before a long run on one's own text, say how long it will take and wait for a yes.

    Returns:
        The exit code.
    """
    console = Console(highlight=False)
    rows: list[tuple[str, str, str, float]] = []

    @contextlib.contextmanager
    def stage(name: str):
        console.rule(f"[bold]{name}")
        result = {"text": "", "path": ""}
        started = time.perf_counter()
        yield result
        rows.append((name, result["path"], result["text"], time.perf_counter() - started))
        console.print(result["text"], markup=False)

    recipes = _write_recipes(work_dir, inputs, text)
    preparation = configuration.load(configuration.Preparation, [recipes["prepare"]]).prepare
    instructions = configuration.load(configuration.Preparation, [recipes["prepare-instructions"]]).prepare

    with stage("tokenizer") as result:
        result["path"] = preparation.tokenizer
        result["text"] = _tokenizer(preparation, vocab_size)
    for name, settings in (("store", preparation), ("instruction store", instructions)):
        with stage(name) as result:
            manifest = prepare(settings)
            done = "already done: " if manifest.get("already_done") else ""
            result.update(path=settings.output, text=done + describe(manifest))

    runs = {"pretrain": work_dir / "pretrain", "instruct": work_dir / "instruct"}
    if inputs and ask and not read_metrics(runs["pretrain"]) and not _agreed(recipes["pretrain"], work_dir, console):
        console.print(f"Stopped. The recipes are in {work_dir / 'recipes'}.")
        return 0
    for name, run_dir in runs.items():
        with stage(name) as result:
            code = launch(["train", f"--config={recipes[name]}", f"--run-dir={run_dir}"], _PROCESSES)
            if code:
                return code
            result.update(path=str(run_dir), text=_before_and_after(run_dir))

    models = {"base": work_dir / "model-base", "instruct": work_dir / "model-instruct"}
    with stage("export") as result:
        for run_dir, model in zip(runs.values(), models.values(), strict=True):
            export(str(run_dir), model, dtype="float32")
        result.update(path=", ".join(map(str, models.values())), text="two Hugging Face folders, float32")
    with stage("generate") as result:
        _show_generations(models, instructions, console)
        result["text"] = "by stock AutoModelForCausalLM and AutoTokenizer, greedily"

    _show_summary(rows, console)
    _show_next_commands(work_dir, models, console)
    return 0


def _write_recipes(work_dir: Path, inputs: list[str] | None, text: str) -> dict[str, str]:
    """The recipe files in the work folder; those that lie there already stay as they are."""
    sample = resources.files("tsumugu") / "sample"
    for folder in ("corpus", "recipes"):
        (work_dir / folder).mkdir(parents=True, exist_ok=True)
    for name in ("japanese", "instructions", "english"):
        path = work_dir / "corpus" / f"{name}.jsonl"
        if not path.exists():
            path.write_text((sample / f"{name}.jsonl").read_text(encoding="utf-8"), encoding="utf-8")
    paths = {name: work_dir / "recipes" / f"{name}.yaml" for name in _RECIPES}
    for name, path in paths.items():
        content = (sample / f"quickstart-{name}.yaml").read_text(encoding="utf-8")
        changes = {"quickstart/": f"{work_dir}/"}
        if inputs and name == "prepare":
            changes |= {
                "name: japanese": "name: own-text",
                "path: quickstart/corpus/japanese.jsonl": f"path: {json.dumps(inputs, ensure_ascii=False)}",
                "text: text": f"text: {json.dumps(text, ensure_ascii=False)}",
                "validation_share: 0.1 ": f"validation_share: {0.1 if _size(inputs) < 2e6 else 0.01} ",
            }
        if inputs and name == "pretrain":
            content = re.sub(r"max_epochs: \d+", f"max_steps: {_OWN_TEXT_STEPS}", content)
            changes |= {"evaluate:\n": "evaluate:\n  batches: 50\n"}
        for old, new in sorted(changes.items(), key=lambda change: -len(change[0])):
            content = content.replace(old, new)
        if not path.exists():
            path.write_text(content, encoding="utf-8")
        elif name == "prepare" and _sources(path.read_text(encoding="utf-8")) != _sources(content):
            raise UserError(f"{path} is a recipe for another corpus", "choose another --work-dir, or delete this one")
    return {name: str(path) for name, path in paths.items()}


def _size(paths: str | list[str]) -> int:
    return sum(Path(file).stat().st_size for file in corpus.find_files(paths))


def _sources(recipe: str) -> list:
    return [source["path"] for source in yaml.safe_load(recipe)["prepare"]["sources"]]


def _tokenizer(preparation: configuration.PrepareConfig, vocab_size: int | None) -> str:
    output = Path(preparation.tokenizer)
    if (output / "contract.json").exists():
        return f"already done: {read_contract(output).vocab_size:,} ids"
    source, share = preparation.sources[0], preparation.validation_share
    pieces = corpus.plan(corpus.find_files(source.path))
    size = sum(piece.size for piece in pieces)
    report = train_tokenizer(  # on the documents for training alone: what is held out is held out from everything
        lambda: (text for text in corpus.texts(pieces, source.text) if hash_share({"text": text}) >= share),
        output,
        vocab_size=vocab_size or (4000 if size < 2e6 else 8000 if size < 10e6 else 16000),
        sample_bytes=20_000_000,
    )
    return (
        f"{report.vocab_size:,} ids from {report.sampled_bytes:,} of {report.bytes:,} bytes in {report.documents:,} "
        f"documents; skipped {report.skipped_bytes:,} bytes"
    )


def _agreed(recipe: str, work_dir: Path, console: Console) -> bool:
    """Measures some steps, says how long the run would take, and asks."""
    measured = work_dir / "measured"
    console.print(f"Measuring {_MEASURED_STEPS} steps ...")
    flags = [f"--train.max_steps={_MEASURED_STEPS}", "--evaluate.batches=1"]
    flags += ["--schedule.warmup_steps=0", "--schedule.decay_steps=null"]
    try:
        if launch(["train", f"--config={recipe}", f"--run-dir={measured}", *flags], _PROCESSES):
            raise UserError("the measured steps failed", f"see the line above, and edit {recipe}")
        seconds = [line["step_seconds"] for line in read_metrics(measured) if "step_seconds" in line][-1]
    finally:
        shutil.rmtree(measured, ignore_errors=True)
    steps = configuration.load(configuration.TrainingRun, [recipe]).train.max_steps or 0
    console.print(
        f"{seconds:.2f} s a step: {steps} steps would take about {steps * seconds / 60:.0f} minutes, "
        f"validation and instruction tuning not counted. Change them in {recipe}."
    )
    if not sys.stdin.isatty():
        raise UserError("there is no terminal to ask on", "add --yes to go on without asking")
    return input("Go on? [y/N] ").strip().lower() in ("y", "yes")


def _before_and_after(run_dir: Path) -> str:
    lines = read_metrics(run_dir)
    losses = [line["loss"] for line in lines if line.get("loss") is not None]
    parts = [f"loss {losses[0]:.2f} → {losses[-1]:.2f}"]
    validation = [line["validation_bits_per_byte"] for line in lines if "validation_bits_per_byte" in line]
    if validation:
        best = min(validation)
        parts.append(f"validation bits per byte {validation[0]:.2f} → {validation[-1]:.2f} (best {best:.2f})")
    return "; ".join(parts)


def _show_generations(models: dict[str, Path], instructions: configuration.PrepareConfig, console: Console) -> None:
    base, instruct = (Generator(folder) for folder in models.values())
    for prompt in _PRETRAIN_PROMPTS:
        reply, _ = base.generate(prompt, max_new_tokens=60)
        console.print(f"[base]     {prompt} ▸ {reply}", markup=False)
    files = corpus.find_files(instructions.sources[0].path)
    records = [record.values for piece in corpus.plan(files) for record in corpus.read_records(piece)]
    trained = [record for record in records if hash_share(record) >= instructions.validation_share]
    for record in [record for record in trained if not record.get("input")][:3]:
        reply, stopped = instruct.generate(record["instruction"], max_new_tokens=120)
        end = "" if stopped else " …"
        console.print(f"[instruct] {record['instruction']} ▸ {reply}{end}", markup=False)


def _show_summary(rows: list[tuple[str, str, str, float]], console: Console) -> None:
    table = Table(title="What was made")
    for column in ("stage", "where", "what", "seconds"):
        table.add_column(column, justify="right" if column == "seconds" else "left")
    for name, path, text, seconds in rows:
        table.add_row(name, path, text, f"{seconds:.0f}")
    console.print(table)


def _show_next_commands(work_dir: Path, models: dict[str, Path], console: Console) -> None:
    console.print("Next:", style="bold")
    commands = (
        f"tsumugu generate {models['instruct']} --prompt 'おすすめの朝食を教えてください。'",
        f"tensorboard --logdir {work_dir}",
        "tsumugu quickstart --work-dir my-model --input my.jsonl --text body",
        f"cp {work_dir}/recipes/pretrain.yaml my-pretrain.yaml  # edit, then: "
        "tsumugu launch local --config my-pretrain.yaml --processes 2",
    )
    for command in commands:
        console.print(f"  {command}", markup=False)

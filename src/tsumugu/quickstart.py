"""`tsumugu quickstart`: the whole way once, through the same functions that the subcommands call.

Every stage finds out by itself what is already done, so that quickstart run again skips it, and goes on where it was
killed. The recipes that it uses lie in the work folder, to be read, edited and copied.
"""

import contextlib
import itertools
import json
import math
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tsumugu import config as configuration
from tsumugu.data import corpus
from tsumugu.data.instructions import from_json
from tsumugu.data.prepare import describe, prepare, training_texts
from tsumugu.data.store import open_store
from tsumugu.errors import UserError
from tsumugu.export import export
from tsumugu.generate import Generator
from tsumugu.launch.local import launch, most_processes
from tsumugu.tokenizer.contract import read_contract
from tsumugu.tokenizer.train import TrainingReport, VocabularyTooLargeError, train_tokenizer
from tsumugu.training.metrics import read_metrics
from tsumugu.training.trainer import planned_steps

_RECIPES = ("prepare", "prepare-instructions", "pretrain", "instruct")
_VOCABULARIES = (16000, 8000, 4000, 2000, 1000)
_MEASURED_STEPS = 20
_OWN_TEXT_STEPS = 800


def quickstart(
    work_dir: Path, inputs: list[str] | None, text: str | None, *, vocab_size: int | None = None, ask: bool = True
) -> int:
    """Text → tokenizer → stores → pretraining → instruction tuning → Hugging Face folder → generated text.

    Args:
        work_dir: Folder for everything that is made.
        inputs: The user's own corpus for pretraining; None: the built-in one.
        text: Its text column; None: found.
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
    if inputs and not read_metrics(runs["pretrain"]) and not _agreed(recipes["pretrain"], work_dir, ask, console):
        console.print(f"Stopped. The recipes are in {work_dir / 'recipes'}.")
        return 0
    for name, run_dir in runs.items():
        with stage(name) as result:
            code = launch([f"--config={recipes[name]}"], run_dir, _processes())
            if code:
                return code
            result.update(path=str(run_dir), text=_before_and_after(run_dir))

    models = {"base": work_dir / "model-base", "instruct": work_dir / "model-instruct"}
    with stage("export") as result:
        for run_dir, model in zip(runs.values(), models.values(), strict=True):
            export(str(run_dir), model, dtype="float32")
        result.update(path=", ".join(map(str, models.values())), text="two Hugging Face folders, float32")
    with stage("generate") as result:
        _show_generations(models, preparation, instructions, console)
        result["text"] = "by stock AutoModelForCausalLM and AutoTokenizer, greedily"

    _show_summary(rows, console)
    _show_next_commands(work_dir, models, console)
    return 0


def _write_recipes(work_dir: Path, inputs: list[str] | None, text: str | None) -> dict[str, str]:
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
        if path.exists():
            continue
        content = (sample / f"quickstart-{name}.yaml").read_text(encoding="utf-8")
        content = re.sub(r"quickstart/(\S+)", lambda found: _quoted(str(work_dir / found[1])), content)
        if inputs and name == "prepare":
            content = _set(content, "name", "own-text")
            content = _set(content, "path", inputs)
            column = text or corpus.find_text_column(corpus.plan(corpus.find_files(inputs)))
            content = _set(content, "text", column)
            content = _set(content, "validation_share", _validation_share(inputs, column))
        if inputs and name == "pretrain":
            content = content.replace("max_epochs:", "max_steps:").replace("evaluate:", "evaluate:\n  batches: 50")
            content = _set(content, "max_steps", _OWN_TEXT_STEPS)
        path.write_text(content, encoding="utf-8")
    recipe = configuration.load(configuration.Preparation, [str(paths["prepare"])]).prepare
    paths_used = [[source.path] if isinstance(source.path, str) else source.path for source in recipe.sources]
    used = [path for several in paths_used for path in several]
    if not set(inputs or [str(work_dir / "corpus" / "japanese.jsonl")]) <= set(used):
        raise UserError(
            f"{paths['prepare']} is a recipe for another corpus: {', '.join(used)}",
            "choose another --work-dir, or delete that one",
        )
    return {name: str(path) for name, path in paths.items()}


def _set(recipe: str, key: str, value: object) -> str:
    """The recipe with another value at the one place where `key` stands; comments stay."""
    entry = f"{key}: {json.dumps(value, ensure_ascii=False)}"
    changed, count = re.subn(rf'\b{key}: *("[^"]*"|[^#\n]*[^#\s])', lambda _: entry, recipe, count=1)
    assert count == 1
    return changed


def _quoted(path: str) -> str:
    """A path for a YAML file, quoted where it holds anything unusual."""
    return path if re.fullmatch(r"[\w./-]+", path) else json.dumps(path, ensure_ascii=False)


def _validation_share(inputs: list[str], text: str) -> float:
    """A share that leaves some documents on either side; none of a handful, which cannot spare one."""
    pieces = corpus.plan(corpus.find_files(inputs))
    documents = sum(1 for _ in itertools.islice(corpus.texts(pieces, text), 2000))
    return 0.0 if documents < 60 else 0.1 if documents < 2000 else 0.01


def _tokenizer(preparation: configuration.PrepareConfig, vocab_size: int | None) -> str:
    output = Path(preparation.tokenizer)
    if (output / "contract.json").exists():
        return f"already done: {read_contract(output).vocab_size:,} ids"
    size = sum(piece.size for source in preparation.sources for piece in corpus.plan(corpus.find_files(source.path)))

    def documents() -> Iterator[str]:  # what is held out is held out from the tokenizer too
        return training_texts(preparation)

    sizes = [vocab_size] if vocab_size else [n for n in _VOCABULARIES if n <= max(4000, size / 1000)]
    report = _train_fitting(documents, output, sizes)
    return (
        f"{report.vocab_size:,} ids from {report.sampled_bytes:,} of {report.bytes:,} bytes in {report.documents:,} "
        f"documents; skipped {report.skipped_bytes:,} bytes"
    )


def _train_fitting(documents: Callable[[], Iterator[str]], output: Path, sizes: list[int]) -> TrainingReport:
    """A tokenizer of the first size that the corpus allows."""
    try:
        return train_tokenizer(documents, output, vocab_size=sizes[0], sample_bytes=20_000_000)
    except VocabularyTooLargeError:
        if len(sizes) == 1:
            raise
        return _train_fitting(documents, output, sizes[1:])


def _agreed(recipe: str, work_dir: Path, ask: bool, console: Console) -> bool:
    """Measures some steps, says how long the run would take, and asks."""
    if ask and not sys.stdin.isatty():
        raise UserError("there is no terminal to ask on", "add --yes to go on without asking")
    measured = work_dir / "measured"
    console.print(f"Measuring {_MEASURED_STEPS} steps ...")
    flags = [f"--train.max_steps={_MEASURED_STEPS}", "--train.max_epochs=null", "--train.max_tokens=null"]
    flags += ["--evaluate.batches=1", "--schedule.warmup_steps=0", "--schedule.decay_steps=null"]
    shutil.rmtree(measured, ignore_errors=True)
    try:
        if launch([f"--config={recipe}", *flags], measured, _processes()):
            raise UserError("the measured steps failed", f"see the line above, and edit {recipe}")
        seconds = [line["step_seconds"] for line in read_metrics(measured) if "step_seconds" in line][-1]
    finally:
        shutil.rmtree(measured, ignore_errors=True)
    steps = planned_steps(configuration.load(configuration.TrainingRun, [recipe]))
    console.print(
        f"{seconds:.2f} s a step: {steps} steps will take about {math.ceil(steps * seconds / 60)} minutes, "
        f"validation and instruction tuning not counted. Change them in {recipe}."
    )
    return not ask or input("Go on? [y/N] ").strip().lower() in ("y", "yes")


def _processes() -> int:
    return min(2, most_processes())


def _before_and_after(run_dir: Path) -> str:
    lines = read_metrics(run_dir)
    losses = [line["loss"] for line in lines if line.get("loss") is not None]
    parts = [f"loss {losses[0]:.2f} → {losses[-1]:.2f}"]
    validation = [line["validation_bits_per_byte"] for line in lines if "validation_bits_per_byte" in line]
    if validation:
        best = min(validation)
        parts.append(f"validation bits per byte {validation[0]:.2f} → {validation[-1]:.2f} (best {best:.2f})")
    return "; ".join(parts)


def _show_generations(
    models: dict[str, Path],
    preparation: configuration.PrepareConfig,
    instructions: configuration.PrepareConfig,
    console: Console,
) -> None:
    """Continues the beginnings of three trained documents, and answers three trained instructions."""
    base, instruct = (Generator(folder) for folder in models.values())
    split = open_store(Path(preparation.output)).train
    for index in range(min(3, split.documents)):
        prompt = base.tokenizer.decode(split.document(index)[0][:6].tolist())
        reply, _ = base.generate(prompt, max_new_tokens=60)
        console.print(f"[base]     {prompt} ▸ {reply}", markup=False)
    conversations = (from_json(content) for content in training_texts(instructions))
    questions = (messages[0] for messages in conversations if len(messages) == 2 and not messages[0].input)
    for question in itertools.islice(questions, 3):
        reply, stopped = instruct.generate(question.content, max_new_tokens=120)
        console.print(f"[instruct] {question.content} ▸ {reply}{'' if stopped else ' …'}", markup=False)


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
        f"tsumugu report {work_dir}/pretrain {work_dir}/instruct --output {work_dir}/report.html",
        f"tensorboard --logdir {work_dir}",
        "tsumugu quickstart --work-dir my-model --input my.jsonl --text body",
        f"cp {work_dir}/recipes/pretrain.yaml my-pretrain.yaml  # edit, then: "
        "tsumugu launch local --config my-pretrain.yaml --processes 2",
    )
    for command in commands:
        console.print(f"  {command}", markup=False)

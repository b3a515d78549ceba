"""The command line: parse, call a stage, print. Nothing heavy is imported before a stage needs it.

Exit codes: 0 done, 1 the check failed, 2 the user's input is wrong (one line), 3 interrupted after a checkpoint.
"""

import argparse
import contextlib
import errno
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tsumugu import __version__
from tsumugu.distributed.slurm import adopt_step
from tsumugu.errors import UserError
from tsumugu.launch.sagemaker import command as sagemaker_command

# What the user can mend; other errors of the system are shown whole.
_FAULTS_OF_PATHS_AND_DISKS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG),
)


_CHANNEL = "what channel:NAME stands for in a configuration; may be given several times"
_PROOF = "compare N steps with N steps that are killed in the middle, in a scratch folder; exit 1 if they differ"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; as one of several processes it does not return."""
    adopt_step()
    code = _run(arguments)
    if "RANK" in os.environ:
        # Python's own end would abort the process where a thread of gloo's still lets go of a tensor: exit code 134
        # of a run that is done. Everything is closed by now.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _run(arguments: Sequence[str] | None) -> int:
    try:
        options, flags = _parse(sys.argv[1:] if arguments is None else list(arguments))
        return options.run(options, flags)
    except UserError as error:
        return _refuse(str(error))
    except OSError as error:
        if error.errno in _FAULTS_OF_PATHS_AND_DISKS:
            where = f" ({error.filename})" if error.filename else ""
            return _refuse(f"{error.strerror}{where}")
        raise
    except KeyboardInterrupt:
        return 130


def _refuse(message: str) -> int:
    """One line, also where several processes are refused: the first one says it, and then waits for the others to come
    here too (its end would break their connections to it); its end lets torchrun end them before they speak. Slurm ends
    nobody, and each has a log of its own."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(10 if "TORCHELASTIC_RUN_ID" in os.environ else 3)
    print(f"tsumugu: {' '.join(message.split())}", file=sys.stderr, flush=True)
    if os.environ.get("RANK") == "0" and os.environ.get("WORLD_SIZE") != "1":
        time.sleep(3)
    return 2


class _Parser(argparse.ArgumentParser):
    """argparse with our errors: one line, exit 2."""

    def error(self, message: str):
        raise UserError(message, f"see `{self.prog} --help`")


def _parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = _Parser(prog="tsumugu", description="Japanese language models, from raw text to a Hugging Face model.")
    parser.add_argument("--version", action="version", version=f"tsumugu {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    def command(group, name: str, run, help: str, **kwargs) -> argparse.ArgumentParser:
        added = group.add_parser(name, help=help, description=help, allow_abbrev=False, **kwargs)
        added.set_defaults(run=run)
        return added

    quickstart = command(commands, "quickstart", _quickstart, "the whole way on the built-in corpus, or on your own")
    quickstart.add_argument("--work-dir", default="quickstart", help="folder for everything (default: quickstart)")
    quickstart.add_argument("--input", nargs="+", metavar="PATH", help="your own text in place of the built-in corpus")
    quickstart.add_argument("--text", metavar="COLUMN", help="its text column (default: found)")
    quickstart.add_argument("--vocab-size", type=_whole(1), metavar="N", help="default: by the size of the corpus")
    quickstart.add_argument("--yes", action="store_true", help="do not ask before the long part")

    tokenizer = commands.add_parser("tokenizer", help="train, import or extend a tokenizer")
    actions = tokenizer.add_subparsers(dest="action", required=True, metavar="ACTION", parser_class=_Parser)
    train_tokenizer = command(actions, "train", _train_tokenizer, "train a tokenizer on a corpus")
    train_tokenizer.add_argument("--input", nargs="+", required=True, metavar="PATH", help="files, folders or globs")
    train_tokenizer.add_argument("--text", metavar="COLUMN", help="the text column (default: found)")
    train_tokenizer.add_argument("--output", required=True, metavar="DIR")
    train_tokenizer.add_argument("--vocab-size", type=_whole(1), default=32000, metavar="N", help="default: 32000")
    train_tokenizer.add_argument(
        "--kind",
        choices=["unigram", "bpe"],
        default="unigram",
        help="SentencePiece unigram, or byte-level BPE for English (default: unigram)",
    )
    train_tokenizer.add_argument(
        "--sample-bytes",
        type=_whole(1, 2**63),
        default=2 * 10**9,
        metavar="N",
        help="size of a random sample of it (default: 2e9)",
    )
    train_tokenizer.add_argument(
        "--reserved", type=_whole(0, 10**6), default=100, metavar="N", help="spare ids (default: 100)"
    )
    import_tokenizer = command(actions, "import", _import_tokenizer, "import a tokenizer exactly, or refuse it")
    import_tokenizer.add_argument(
        "source", metavar="SOURCE", help="a SentencePiece .model, a Hugging Face folder, or a name on the hub"
    )
    import_tokenizer.add_argument("--output", required=True, metavar="DIR")
    _add_sample_arguments(import_tokenizer)
    import_tokenizer.add_argument(
        "--newline",
        default="keep",
        metavar="keep|refuse|TOKEN",
        help="keep what it does, refuse it where it loses newlines, or spell them by a token (default: keep)",
    )
    extend = command(actions, "extend", _extend_tokenizer, "append tokens, or pieces learnt from a corpus")
    extend.add_argument("source", metavar="SOURCE", help="a tokenizer's folder")
    extend.add_argument("--output", required=True, metavar="DIR")
    what = extend.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--tokens",
        metavar="FILE",
        help="a token a line; special, unless a tab and `text` follow; JSON in double quotes",
    )
    what.add_argument("--template", metavar="NAME", help="the markers that this template (or YAML file) needs")
    what.add_argument("--train", nargs="+", metavar="PATH", help="files, folders or globs to learn pieces from")
    extend.add_argument("--vocab-size", type=_whole(1), metavar="N", help="ids in all, with --train")
    extend.add_argument(
        "--embeddings",
        choices=["mean_of_pieces", "mean"],
        default="mean_of_pieces",
        help="how a model's new rows start (default: mean_of_pieces)",
    )
    _add_sample_arguments(extend)

    prepare = command(
        commands,
        "prepare",
        _prepare,
        "corpus or instructions → token store",
        epilog="Any --prepare.KEY VALUE of the configuration is taken, such as --prepare.workers 4.",
    )
    prepare.add_argument("--config", action="append", required=True, metavar="FILE", help="may be given several times")
    prepare.add_argument("--output", metavar="DIR", help="in place of prepare.output")
    prepare.add_argument("--verify", action="store_true", help="compare a finished store with its hashes")
    prepare.add_argument(
        "--preview",
        type=_whole(1),
        metavar="N",
        help="show what would be done to N documents of each source",
    )
    prepare.add_argument("--channel", action=_Channel, metavar="NAME=PATH", help=_CHANNEL)
    prepare.add_argument("--keys", action=_Keys, config_class="Preparation", help="list every configuration key")

    audit = command(commands, "audit", _audit, "what a token store would teach; exit 1 where that is wrong")
    audit.add_argument("store", metavar="STORE", help="a token store")
    audit.add_argument("--rows", type=_whole(0), default=3, metavar="N", help="rows to show (default: 3)")
    audit.add_argument("--json", action="store_true", help="everything as JSON")
    audit.add_argument("--html", metavar="FILE", help="write everything as an HTML page too")
    audit.add_argument("--model", metavar="DIR", help="a folder with the tokenizer that the store must be made with")

    train = command(
        commands,
        "train",
        _train,
        "train in this process, or under torchrun unchanged",
        epilog="Any --SECTION.KEY VALUE of the configuration is taken, such as --train.max_steps 10.",
    )
    _add_train_arguments(train)
    train.add_argument("--prove-resume", type=_whole(1), metavar="N", help=_PROOF)

    launch = commands.add_parser("launch", help="start training in several processes")
    targets = launch.add_subparsers(dest="target", required=True, metavar="TARGET", parser_class=_Parser)
    local = command(targets, "local", _launch_local, "torchrun on this machine, one process a GPU")
    _add_train_arguments(local)
    local.add_argument("--processes", type=int, metavar="N", help="default: one a GPU")
    local.add_argument(
        "--max-restarts",
        type=_whole(0),
        default=0,
        metavar="N",
        help="start again from the newest checkpoint after a process has died, so often (default: 0)",
    )
    local.add_argument("--prove-resume", type=_whole(1), metavar="N", help=_PROOF)
    sagemaker = command(targets, "sagemaker", _launch_sagemaker, "a training or processing job on Amazon SageMaker")
    sagemaker_command.add_arguments(sagemaker)

    slurm = command(targets, "slurm", _launch_slurm, "a Slurm job of one task a GPU; or the jobs of a preparation")
    _add_train_arguments(slurm)
    slurm.add_argument("--stage", choices=["train", "prepare"], default="train", help="default: train")
    slurm.add_argument("--nodes", type=_whole(1), metavar="N")
    slurm.add_argument("--processes-per-node", type=_whole(1), metavar="N", help="default: the site's; one a GPU")
    slurm.add_argument("--site", metavar="FILE", help="the cluster: partition, account, set-up lines, container, ...")
    slurm.add_argument("--time", metavar="TIME", help="time limit as sbatch takes it (default: the site's)")
    slurm.add_argument("--dry-run", action="store_true", help="print the job script; nothing is written or submitted")

    export = command(commands, "export", _export, "run → Hugging Face folder")
    export.add_argument("source", nargs="?", metavar="RUN", help="a run folder, or RUN@STEP")
    export.add_argument("--output", metavar="DIR")
    export.add_argument("--step", type=int, metavar="N", help="default: the newest checkpoint")
    export.add_argument(
        "--dtype", choices=["bfloat16", "float16", "float32"], help="default: bfloat16 (with --adapter: float32)"
    )
    export.add_argument("--adapter", action="store_true", help="of a run with model.lora the adapters alone, for peft")
    export.add_argument("--verify-with", metavar="PYTHON", help="reload it with this Python's transformers too")
    export.add_argument("--verify", metavar="FOLDER", help="in place of exporting: check an exported folder again")
    export.add_argument("--from-state-dict", metavar="FILE", help="in place of RUN: a state dict that torch saved")
    export.add_argument("--model-config", metavar="FILE", help="its config.json")
    export.add_argument("--tokenizer", metavar="DIR", help="its tokenizer, of `tsumugu tokenizer import`")
    export.add_argument("--push-to-hub", metavar="NAME", help="upload the folder to the hub, privately")
    export.add_argument("--public", action="store_true", help="with --push-to-hub: for everybody")

    generate = command(
        commands, "generate", _generate, "continue or answer a prompt, a file of them, or a conversation"
    )
    generate.add_argument("model", metavar="MODEL", help="a Hugging Face folder, a run folder, or RUN@STEP")
    asked = generate.add_mutually_exclusive_group()
    asked.add_argument("--prompt", metavar="TEXT", help="one prompt; without this and --prompts: a session of several")
    asked.add_argument(
        "--prompts", metavar="FILE", help="a prompt a line, or .jsonl (instruction, messages, ...); writes JSON lines"
    )
    generate.add_argument("--input", default="", metavar="TEXT", help="the input that the instruction is about")
    generate.add_argument("--system", default="", metavar="TEXT", help="a system message, where the template has one")
    generate.add_argument("--template", metavar="NAME", help="default: the one it was trained with; none: no template")
    generate.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default: 128")
    generate.add_argument("--do-sample", action="store_true", help="draw tokens; default: the likeliest one each time")
    generate.add_argument("--temperature", type=float, metavar="T")
    generate.add_argument("--top-p", type=float, metavar="P")
    generate.add_argument("--top-k", type=int, metavar="K")
    generate.add_argument("--repetition-penalty", type=float, metavar="R")
    generate.add_argument("--num-beams", type=int, metavar="N")
    generate.add_argument("--seed", type=int, metavar="N", help="with --do-sample: for the same replies again")
    generate.add_argument(
        "--batch-size",
        type=_whole(1),
        default=8,
        metavar="N",
        help="with --prompts (default: 8); drawn replies vary with it",
    )
    generate.add_argument(
        "--dtype", choices=["bfloat16", "float16", "float32"], help="default: as stored; of a run: float32"
    )

    report = command(commands, "report", _report, "one HTML page about a run, or comparing several")
    report.add_argument("runs", nargs="+", metavar="RUN", help="run folders")
    report.add_argument("--output", metavar="FILE", help="default: report.html in the run, of several runs here")
    report.add_argument("--prompts", metavar="FILE", help="as of `generate`: show replies of the kept checkpoints")
    report.add_argument(
        "--max-new-tokens", type=_whole(1), default=128, metavar="N", help="of each reply (default: 128)"
    )
    report.add_argument("--png", metavar="DIR", help="write the curves as pictures too (needs matplotlib)")

    evaluate = command(commands, "evaluate", _evaluate, "loss, Japanese tasks and replies of models, side by side")
    _add_evaluate_arguments(evaluate)

    plan = command(
        commands,
        "plan",
        _plan,
        "does it fit, how long does it take, what does it cost; exit 1 where it does not fit",
        epilog="Any --SECTION.KEY VALUE of the configuration is taken, such as --train.micro_batch_size 2.",
    )
    _add_plan_arguments(plan)

    options, flags = parser.parse_known_args(arguments)
    if flags and options.run not in (_prepare, _train, _launch_local, _launch_slurm, _launch_sagemaker, _plan):
        raise UserError(f"unknown argument {flags[0]}", f"see `tsumugu {options.command} --help`")
    return options, flags


def _add_train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", action="append", required=True, metavar="FILE", help="may be given several times")
    parser.add_argument("--run-dir", metavar="DIR", help="default: runs/ and the name of the last FILE")
    parser.add_argument("--channel", action=_Channel, metavar="NAME=PATH", help=_CHANNEL)
    parser.add_argument("--keys", action=_Keys, config_class="TrainingRun", help="list every configuration key")


def _add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", action="append", required=True, metavar="FILE", help="may be given several times")
    parser.add_argument("--keys", action=_Keys, config_class="TrainingRun", help="list every configuration key")
    parser.add_argument("--instance-type", nargs="+", default=[], metavar="TYPE", help="default: this machine")
    parser.add_argument("--instance-count", nargs="+", type=_whole(1), default=[1], metavar="N", help="default: 1")
    parser.add_argument("--tokens", type=_whole(1, 2**63), metavar="N", help="of the training data, if it is not here")
    parser.add_argument("--vocab-size", type=_whole(1), metavar="N", help="of the tokenizer, if it is not here")
    parser.add_argument("--json", action="store_true", help="as JSON: an object, of several clusters a list")
    parser.add_argument("--chart", metavar="FILE", help="cost against time as a picture (needs matplotlib)")
    speed = parser.add_argument_group("speed")
    speed.add_argument("--calibration", metavar="FILE", help="efficiencies that --probe measured (default: shipped)")
    speed.add_argument("--probe", metavar="FILE", help="take 20 steps on this machine, and write their efficiencies")
    cost = parser.add_argument_group("cost")
    cost.add_argument("--price-per-hour", nargs="+", default=[], metavar="USD", help="of an instance; or TYPE=USD ...")
    cost.add_argument("--prices", metavar="FILE", help="JSON, in place of the shipped prices")
    cost.add_argument("--spot", action="store_true", help="spot prices of that file")
    cost.add_argument("--aws-prices", metavar="REGION", help="on-demand prices by AWS (needs boto3 and credentials)")
    cost.add_argument("--yen-per-dollar", type=_positive, metavar="RATE", help="costs in yen too")


def _add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="+", metavar="MODEL", help="Hugging Face folders, RUN or RUN@STEP")
    parser.add_argument("--each-checkpoint", action="store_true", help="a RUN stands for all its checkpoints")
    parser.add_argument("--tokenizer", metavar="DIR", help="for a MODEL without a contract of its tokenizer")
    loss = parser.add_argument_group("loss, perplexity, bits per byte")
    loss.add_argument("--store", nargs="+", default=[], metavar="STORE", help="token stores")
    loss.add_argument("--split", choices=["validation", "train"], default="validation", help="default: validation")
    loss.add_argument("--text", nargs="+", default=[], metavar="PATH", help="raw text: files, folders or globs")
    loss.add_argument("--text-column", metavar="COLUMN", help="its text column (default: found)")
    loss.add_argument(
        "--packing",
        choices=["documents", "concatenate", "document_mask"],
        help="of a store of text (default: as the first RUN was trained, else concatenate)",
    )
    loss.add_argument(
        "--sequence-length", type=_whole(1), metavar="N", help="default: of the first RUN, else 2048 or what fits"
    )
    loss.add_argument("--stride", type=_whole(1), metavar="N", help="from window to window (default: no overlap)")
    tasks = parser.add_argument_group("tasks, by lm-evaluation-harness")
    tasks.add_argument(
        "--tasks", nargs="+", default=[], metavar="TASK", help="jcommonsenseqa, jsquad, jmmlu, or your own .yaml"
    )
    tasks.add_argument("--task-data", metavar="DIR", help="the folder that their data lie in")
    tasks.add_argument("--limit", type=_whole(1), metavar="N", help="documents of each, to try it out")
    tasks.add_argument("--chat-template", action="store_true", help="prompts go through the model's chat template")
    replies = parser.add_argument_group("replies")
    replies.add_argument("--prompts", metavar="FILE", help="a file of prompts, as of `generate`")
    replies.add_argument("--template", metavar="NAME", help="default: the one it was trained with; none: no template")
    replies.add_argument("--max-new-tokens", type=_whole(1), default=128, metavar="N", help="default: 128")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], help="default: bfloat16 on GPUs")
    parser.add_argument("--batch-size", type=_whole(1), default=8, metavar="N", help="default: 8")
    parser.add_argument("--json", action="store_true", help="the report as JSON, in place of the table")
    parser.add_argument("--output", metavar="FILE", help="write it as JSON")


def _add_sample_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input", nargs="+", metavar="PATH", help="your corpus: a sample of it is compared")
    parser.add_argument("--text", metavar="COLUMN", help="the text column (default: found)")


def _whole(least: int, limit: int = 10**9) -> Callable[[str], int]:
    """The type of an argument: a whole number, also written as 2e9, from `least` to below `limit`."""

    def parse(text: str) -> int:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not least <= value < limit or not value.is_integer():
            raise argparse.ArgumentTypeError(f"{text} is not a whole number from {least} to {limit - 1}")
        return int(value)

    return parse


class _Channel(argparse.Action):
    """Leaves a channel where this process, and those that it starts, look for them."""

    def __call__(self, _parser, _namespace, text, *_):
        from tsumugu import config

        name, path = config.split_channel(text)
        config.write_channels(config.read_channels() | {name: path})


def _positive(text: str) -> float:
    """The type of an argument: a number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


class _Keys(argparse.Action):
    """Prints the keys of a configuration with their meaning, types and defaults."""

    def __init__(self, *args, config_class: str, **kwargs):
        super().__init__(*args, nargs=0, **kwargs)
        self.config_class = config_class

    def __call__(self, *_):
        from tsumugu import config

        print(config.parser(getattr(config, self.config_class)).format_help())
        sys.exit(0)


def _quickstart(options: argparse.Namespace, _flags: list[str]) -> int:
    from tsumugu.quickstart import quickstart

    return quickstart(
        Path(options.work_dir), options.input, options.text, vocab_size=options.vocab_size, ask=not options.yes
    )


def _train_tokenizer(options: argparse.Namespace, _flags: list[str]) -> int:
    from tsumugu.data import corpus
    from tsumugu.tokenizer import train

    pieces = corpus.plan(corpus.find_files(options.input))
    report = (train.train_byte_level if options.kind == "bpe" else train.train_tokenizer)(
        lambda: corpus.texts(pieces, options.text),
        Path(options.output),
        vocab_size=options.vocab_size,
        sample_bytes=options.sample_bytes,
        reserved=options.reserved,
    )
    print(
        f"{options.output}: {report.vocab_size} ids from {report.sampled_bytes:,} of {report.bytes:,} bytes in "
        f"{report.documents:,} documents; skipped {report.skipped_bytes:,} bytes"
    )
    return 0


def _import_tokenizer(options: argparse.Namespace, _flags: list[str]) -> int:
    from tsumugu.tokenizer.importer import import_tokenizer

    report = import_tokenizer(options.source, Path(options.output), _sample(options), options.newline)
    print(f"{options.output}:", "\n  ".join(report.lines()))
    return 0


def _extend_tokenizer(options: argparse.Namespace, _flags: list[str]) -> int:
    from tsumugu.data import corpus
    from tsumugu.tokenizer import extend

    if (options.train is None) != (options.vocab_size is None):
        raise UserError("--vocab-size goes with --train", "give both, or --tokens alone")
    source, output, sample = Path(options.source), Path(options.output), _sample(options)
    if options.tokens or options.template:
        tokens = (
            extend.read_tokens(Path(options.tokens)) if options.tokens else _template_tokens(options.template, source)
        )
        report = extend.add_tokens(source, output, tokens, sample, options.embeddings)
        proof = f"{report.strings:,} strings without them are encoded as before"
    else:
        pieces = corpus.plan(corpus.find_files(options.train))
        texts = lambda: corpus.texts(pieces, options.text)  # noqa: E731
        report = extend.add_pieces(source, output, texts, options.vocab_size, sample, options.embeddings)
        proof = (
            f"old ids keep their meaning; of {report.strings:,} strings, which all come back as before, "
            f"{report.changed:,} are cut otherwise than before"
        )
    print(f"{output}: {report.new:,} ids after {report.old:,}; {proof}")
    return 0


def _template_tokens(name: str, source: Path) -> list:
    """The tokens of a template that a tokenizer lacks."""
    from tsumugu.data.instructions.encode import missing_tokens
    from tsumugu.data.instructions.templates import Template, find_template
    from tsumugu.tokenizer.extend import Token

    if name == "chat":
        raise UserError(
            "--template chat is the tokenizer's own chat template, which does not say what tokens it needs",
            "name a built-in template, or list the tokens in a file: --tokens FILE",
        )
    template = find_template(name)
    assert isinstance(template, Template)
    if missing := missing_tokens(template, source):
        return [Token(token, token in template.special_tokens) for token in missing]
    raise UserError(f"{source} has every token of template {name} already", "use it as it is")


def _sample(options: argparse.Namespace) -> list[str]:
    """Some megabytes of documents from all over the user's corpus."""
    from tsumugu.data import corpus

    if not options.input:
        return []
    pieces = corpus.plan(corpus.find_files(options.input))
    sample = []
    for piece in pieces:
        room = max(4_000_000 // len(pieces), 1)  # characters
        for text in corpus.texts([piece], options.text):
            sample.append(text[:room])
            room -= len(text)
            if room <= 0:
                break
        if sum(map(len, sample)) >= 4_000_000:
            break
    return sample


def _prepare(options: argparse.Namespace, flags: list[str]) -> int:
    from tsumugu import config
    from tsumugu.data.prepare import prepare
    from tsumugu.data.store import verify

    if options.output:
        flags = [*flags, f"--prepare.output={options.output}"]
    preparation = config.load(config.Preparation, options.config, flags)
    output = preparation.prepare.output
    if options.verify:
        verify(Path(output))
        print(f"{output}: every file is what was written")
        return 0
    if options.preview:
        from rich.console import Console

        from tsumugu.data.preview import preview, show

        show(preview(preparation.prepare, options.preview), Console(highlight=False))
        return 0
    return _show_manifest(output, prepare(preparation.prepare))


def _show_manifest(output: str, manifest: dict) -> int:
    from tsumugu.data.prepare import describe, warnings

    if "submitted" in manifest:
        print(f"{output}: {manifest['submitted']}")
        return 0
    for line in warnings(manifest):
        print(f"tsumugu: warning: {line}", file=sys.stderr)
    print(f"{output}: {'already done: ' if manifest.get('already_done') else ''}{describe(manifest)}")
    return 0


def _audit(options: argparse.Namespace, _flags: list[str]) -> int:
    import json

    from rich.console import Console

    from tsumugu.data import audit_view
    from tsumugu.data.audit import audit

    report = audit(Path(options.store), options.rows, Path(options.model) if options.model else None)
    if options.html:
        try:
            Path(options.html).write_text(audit_view.to_page(report), encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"--html {options.html} cannot be written ({error.strerror})", "name another file"
            ) from None
    if options.json:
        print(json.dumps(report.to_json(), ensure_ascii=False, indent=1))
    else:
        audit_view.show(report, Console(highlight=False))
    return 1 if report.errors else 0


def _train(options: argparse.Namespace, flags: list[str]) -> int:
    if "SLURM_STEP_ID" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ:
        # Slurm may ask to stop before training listens: there is nothing to save then, and the job is to queue again
        signal.signal(signal.SIGTERM, lambda *_: os._exit(3))
    from tsumugu import config
    from tsumugu.training.trainer import train

    run_dir = _run_dir(options)
    if options.prove_resume:
        return _prove_resume(["train"], options, flags)
    outcome = train(config.load(config.TrainingRun, options.config, flags), run_dir)
    if os.environ.get("RANK", "0") == "0":
        if outcome.already_done:
            print(f"{run_dir}: already done, {outcome.step} steps")
        elif outcome.interrupted:
            print(f"{run_dir}: interrupted, checkpoint saved at step {outcome.step} of {outcome.max_steps}")
        else:
            print(f"{run_dir}: done, {outcome.step} steps")
    return 3 if outcome.interrupted else 0


def _launch_local(options: argparse.Namespace, flags: list[str]) -> int:
    from tsumugu import config
    from tsumugu.launch.local import launch
    from tsumugu.training.trainer import planned_steps

    if options.prove_resume:
        processes = [] if options.processes is None else [f"--processes={options.processes}"]
        return _prove_resume(["launch", "local", *processes], options, flags)
    planned_steps(config.load(config.TrainingRun, options.config, flags))  # most of what can be wrong shows here
    files = [f"--config={file}" for file in options.config]
    return launch([*files, *flags], _run_dir(options), options.processes, options.max_restarts)


def _launch_slurm(options: argparse.Namespace, flags: list[str]) -> int:
    from tsumugu import config
    from tsumugu.launch import slurm

    site = config.load(config.SlurmSite, [options.site]).slurm if options.site else config.SlurmSiteConfig()
    if options.stage == "prepare":
        from tsumugu.data.prepare import prepare

        for flag in ("nodes", "processes_per_node", "run_dir", "dry_run"):
            if getattr(options, flag):
                raise UserError(
                    f"--{flag.replace('_', '-')} goes with --stage train",
                    "--prepare.workers sets the tasks at a time; `tsumugu prepare --preview N` tries some documents",
                )
        preparation = config.load(config.Preparation, options.config, flags).prepare
        return _show_manifest(preparation.output, prepare(slurm.for_preparation(preparation, site, options.time)))
    if options.nodes is None:
        raise UserError("--nodes is missing", "say how many nodes to train on")
    run = config.load(config.TrainingRun, options.config, flags)
    submit = not options.dry_run
    print(
        slurm.launch(
            run, _run_dir(options), site, options.nodes, options.processes_per_node, options.time, submit=submit
        ),
        end="\n" if submit else "",
    )
    return 0


def _launch_sagemaker(options: argparse.Namespace, flags: list[str]) -> int:
    return sagemaker_command.run(options, flags)


def _prove_resume(command: list[str], options: argparse.Namespace, flags: list[str]) -> int:
    from tsumugu import config
    from tsumugu.launch.proof import prove_resume
    from tsumugu.training.trainer import planned_steps

    planned, steps = planned_steps(config.load(config.TrainingRun, options.config, flags)), options.prove_resume
    if steps > planned:
        raise UserError(f"--prove-resume {steps}: the run has {planned} steps", "give so many at most")
    files = [f"--config={file}" for file in options.config]
    return prove_resume([*command, *files, *flags], _run_dir(options), steps)


def _run_dir(options: argparse.Namespace) -> Path:
    return Path(options.run_dir or f"runs/{Path(options.config[-1]).stem}")


def _export(options: argparse.Namespace, _flags: list[str]) -> int:
    from tsumugu import certificate
    from tsumugu.export import CertificateError, export, export_state_dict, leftovers, push_to_hub
    from tsumugu.interoperability import servers, tokenizer_kind
    from tsumugu.model.build import read_config

    if sum(map(bool, (options.source, options.verify, options.from_state_dict))) != 1:
        raise UserError("export takes one of RUN, --from-state-dict and --verify", "see `tsumugu export --help`")
    if options.public and not options.push_to_hub:
        raise UserError("--public goes with --push-to-hub", "give both, or neither")
    if options.verify:
        failures, figures = certificate.verify(Path(options.verify), options.verify_with)
        return _show_certificate(Path(options.verify), failures, figures, "verified")
    if not options.output:
        raise UserError("--output is missing", "name the folder to make")
    output = Path(options.output)
    for path in leftovers(output):
        message = f"{path} is of an export that was killed, or is still running: delete it if none is"
        print(f"tsumugu: warning: {message}", file=sys.stderr)
    try:
        if options.from_state_dict:
            if not options.model_config:
                raise UserError("--from-state-dict needs --model-config", "give the config.json of that model")
            folder = Path(options.tokenizer) if options.tokenizer else None
            dtype = options.dtype or "bfloat16"
            made = export_state_dict(
                Path(options.from_state_dict), options.model_config, output, dtype, folder, options.verify_with
            )
        else:
            made = export(
                options.source, output, options.step, options.dtype, options.adapter, verify_with=options.verify_with
            )
    except CertificateError as error:
        return _show_certificate(error.folder, error.failures, [], "")
    content = certificate.read(output)
    if content["origin"].get("step") == 0:
        print(f"tsumugu: warning: {options.source} has taken no step: this model is not trained", file=sys.stderr)
    if made:
        _show_sample(content["sample"])
    failures, figures = ([], content["verified"]) if made else certificate.verify(output, options.verify_with)
    code = _show_certificate(output, failures, figures, "done" if made else "already done")
    if code:
        return code
    if (output / "config.json").exists():  # not of adapters
        for line in servers(read_config(str(output)), tokenizer_kind(output)):
            print(f"  {line}")
    if options.push_to_hub:
        print(push_to_hub(output, options.push_to_hub, options.public))
    return code


def _show_sample(sample: dict) -> None:
    """Which rows of data an export was compared on, and which are missing."""
    if sample["rows"]:
        stores = ", ".join(f"{number} of {name}" for name, number in sample["stores"].items() if number)
        print(f"compared on golden strings and {sample['rows']} rows of {sample['split']} data: {stores}")
    else:
        print("compared on golden strings alone, without validation data")
    for reason in sample["missing"]:
        print(f"tsumugu: warning: no rows were compared: {reason}", file=sys.stderr)


def _show_certificate(folder: Path, failures: list[str], figures: list[dict], done: str) -> int:
    for found in figures:
        line = f"transformers {found['transformers']}, torch {found['torch']} ({found['device']}): "
        if "logit_difference" in found:
            line += (
                f"logits differ by {found['logit_difference']:.2g} at most, of {found['largest_logit']:.3g}; "
                f"perplexity {found['perplexity']:.5g}, of the checkpoint {found['perplexity_of_checkpoint']:.5g}; "
                f"{found['greedy_agreement_with_checkpoint']:.1%} of the greedy tokens are the checkpoint's"
            )
        else:
            line += f"losses differ by {found['loss_difference']:.2g} at most; perplexity {found['perplexity']:.5g}"
        print(line)
    for failure in failures:
        print(f"tsumugu: {failure}", file=sys.stderr)
    print(f"{folder}: {'NOT what was trained' if failures else done}")
    return 1 if failures else 0


def _generate(options: argparse.Namespace, _flags: list[str]) -> int:
    import json

    from tsumugu.generate import Decoding, Generator, answer, conversation, converse, read_prompts

    names = ("max_new_tokens", "do_sample", "temperature", "top_p", "top_k", "repetition_penalty", "num_beams")
    decoding = Decoding(**{name: getattr(options, name) for name in names})
    if options.seed is not None and not options.do_sample:
        raise UserError("--seed has no effect on greedy decoding", "add --do-sample")
    if options.input and options.prompt is None:
        raise UserError("--input goes with --prompt", "put it into the lines of --prompts, or into the message")
    if options.prompt is None and options.prompts is None and not sys.stdin.isatty():
        raise UserError("no prompt is given, and there is no terminal to ask on", "add --prompt TEXT or --prompts FILE")
    if options.prompts is not None:
        read_prompts(Path(options.prompts))  # before the model is loaded
    generator = Generator(options.model, options.template, options.dtype)
    if options.seed is not None:
        import torch

        torch.manual_seed(options.seed)

    def write(text: str) -> None:
        print(text, end="", flush=True)

    if options.prompts is not None:
        for line in answer(generator, Path(options.prompts), decoding, options.batch_size, options.system):
            print(json.dumps(line, ensure_ascii=False), flush=True)
    elif options.prompt is not None:
        messages = conversation(options.prompt, options.input, options.system)
        generator.reply(generator.encode(messages), decoding, write)
        print()
    else:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (line editing and history)
        converse(generator, decoding, lambda: input("> "), write, options.system)
    return 0


def _report(options: argparse.Namespace, _flags: list[str]) -> int:
    from tsumugu.report import report

    for path in report(
        [Path(run) for run in options.runs],
        Path(options.output) if options.output else None,
        prompts=Path(options.prompts) if options.prompts else None,
        max_new_tokens=options.max_new_tokens,
        png=Path(options.png) if options.png else None,
    ):
        print(path)
    return 0


def _plan(options: argparse.Namespace, flags: list[str]) -> int:
    import json

    from tsumugu import config
    from tsumugu.plan import command

    run = config.load(config.TrainingRun, options.config, flags)
    asked = command.Asked(
        instance_types=options.instance_type,
        instance_counts=options.instance_count,
        tokens=options.tokens,
        vocab_size=options.vocab_size,
        calibration=Path(options.calibration) if options.calibration else None,
        prices_per_hour=options.price_per_hour,
        prices=Path(options.prices) if options.prices else None,
        spot=options.spot,
        aws_region=options.aws_prices,
        yen_per_dollar=options.yen_per_dollar,
    )
    if options.probe:
        from tsumugu.plan.probe import probe

        print(probe(run, asked, Path(options.probe)))
        return 0
    plans = command.plans(run, asked)
    if options.chart:
        command.draw(plans, Path(options.chart))
    if options.json:
        found = [plan.to_json() for plan in plans]
        print(json.dumps(found if len(found) > 1 else found[0], indent=1))
    else:
        from rich.console import Console

        console = Console(highlight=False)
        if not console.is_terminal:
            console.width = 120
        command.show(plans, console, options.yen_per_dollar)
    return 0 if any(plan.fits for plan in plans) else 1


def _evaluate(options: argparse.Namespace, _flags: list[str]) -> int:
    import json

    from rich.console import Console

    from tsumugu.evaluate.evaluation import Evaluation, evaluate, show

    if options.output and not (Path(options.output).parent.is_dir() and not Path(options.output).is_dir()):
        raise UserError(f"--output {options.output} cannot be written", "name a file in a folder that exists")
    report = evaluate(
        Evaluation(
            models=options.models,
            each_checkpoint=options.each_checkpoint,
            tokenizer=Path(options.tokenizer) if options.tokenizer else None,
            stores=[Path(store) for store in options.store],
            split=options.split,
            texts=options.text,
            text_column=options.text_column,
            packing=options.packing,
            sequence_length=options.sequence_length,
            stride=options.stride,
            tasks=options.tasks,
            task_data=Path(options.task_data) if options.task_data else None,
            limit=options.limit,
            chat_template=options.chat_template,
            prompts=Path(options.prompts) if options.prompts else None,
            template=options.template,
            max_new_tokens=options.max_new_tokens,
            dtype=options.dtype,
            batch_size=options.batch_size,
        )
    )
    if os.environ.get("RANK", "0") != "0":
        return 0
    text = json.dumps(report, ensure_ascii=False, indent=1)
    if options.output:
        Path(options.output).write_text(text + "\n", encoding="utf-8")
    if options.json:
        print(text)
    else:
        show(report, Console(highlight=False))
    return 0

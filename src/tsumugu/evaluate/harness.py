"""Tasks through lm-evaluation-harness as a library: its prompts, requests and metrics, on data that lie in a folder.

Our task files are the harness's, less what names a data set of the hub, and with a section `tsumugu` that says which
local files hold the documents. Nothing is fetched. Every process makes all requests, since the few shots are drawn from
one sequence of random numbers; what is shared out is the work of the model.
"""

import contextlib
import csv
import importlib.metadata
import importlib.util
import io
import json
import logging
import math
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
import yaml
from huggingface_hub import constants as hub
from jinja2 import TemplateError
from transformers import AutoTokenizer

from tsumugu.data.store import sha256
from tsumugu.errors import UserError
from tsumugu.evaluate.models import Model, Reference, has_chat_template, out_of_memory_explained
from tsumugu.training.storages import Group, together

TASKS = Path(__file__).parent / "tasks"
CHECKED = "0.4.13"  # the version of lm-evaluation-harness whose tasks ours are compared with, by tests/test_evaluate.py
FEWSHOT_SEED = 1234  # the harness's own default

_LONGEST_REPLY = 256  # tokens; the harness's own default
_TURNS = ("user", "assistant", "user")
_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE")
_NETWORK_KEYS = ("dataset_path", "dataset_name", "dataset_kwargs", "custom_dataset", "use_prompt", "include")


@dataclass(frozen=True)
class Task:
    """A task with its documents.

    Attributes:
        config: What the harness reads.
        documents: By split.
        files: sha256 of every data file, by its path below the data folder.
        upstream: The harness's own task with the same prompts; None where it has none.
        published: Documents of every split as they were published.
        character_f1: Whether replies are compared with all answers by character, too.
    """

    name: str
    config: dict[str, Any]
    documents: dict[str, list[dict]]
    files: dict[str, str]
    upstream: str | None
    published: dict[str, int]
    character_f1: bool


def names() -> list[str]:
    """The tasks that come along."""
    return sorted(file.stem for file in TASKS.glob("*.yaml"))


def check_installed() -> None:
    """Raises UserError where lm-evaluation-harness is not installed."""
    missing = [name for name in ("lm_eval", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--tasks needs {' and '.join(missing)}", "pip install 'tsumugu[eval]'")


def read_task(name: str, data: Path) -> Task:
    """A task and its documents.

    Args:
        name: One of `names`, or the path of a task file of one's own.
        data: The folder below which the files lie that the task's patterns name.

    Raises:
        UserError: No such task, one that would reach for the hub or run code, or documents that are not there or cannot
            be read.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else TASKS / f"{name}.yaml"
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"no task {name}", f"known: {', '.join(names())}, or the path of a .yaml file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:  # also !function, which would run code
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is no task file that is read here: {reason}", "write plain YAML") from None
    own = config.pop("tsumugu", None) if isinstance(config, dict) else None
    files = own.get("files") if isinstance(own, dict) else None
    if not isinstance(own, dict) or not isinstance(files, dict) or own.get("form") not in tuple(_FORMS):
        raise UserError(
            f"{path} does not say which files it reads",
            f"write a section tsumugu with files (a pattern by split) and form ({', '.join(_FORMS)})",
        )
    if found := [key for key in _NETWORK_KEYS if key in config]:
        raise UserError(f"{path} has {found[0]}, which names a data set of the hub", "name local files: tsumugu.files")
    if missing := [key for key in ("task", "output_type", "metric_list") if not config.get(key)]:
        raise UserError(f"{path} has no {missing[0]}", "write it as lm-evaluation-harness wants it")
    if _evaluated(config) not in files:
        raise UserError(f"{path} evaluates a split that no file is named for", "name it: test_split, validation_split")
    documents, hashes = {}, {}
    for split, pattern in files.items():
        found = _files(data, str(pattern), many=own["form"] == "choices", task=name)
        documents[split] = [document for file in found for document in _FORMS[own["form"]](file)]
        if not documents[split]:
            raise UserError(f"{found[0]} holds no document", "copy the data anew")
        hashes |= {str(file.relative_to(data)): sha256(file) for file in found}
    upstream, published = own.get("upstream"), own.get("published", {})
    return Task(config["task"], config, documents, hashes, upstream, published, own.get("character_f1", False))


def check(tasks: Sequence[Task], references: Sequence[Reference], limit: int | None, chat_template: bool) -> None:
    """Makes all that is asked, and lets it go, so that a mistake shows before models are loaded.

    Raises:
        UserError: Documents that are not as the task wants them, no chat template, or too few positions to reply in.
    """
    for reference in references:
        if chat_template and not has_chat_template(reference):
            raise UserError(f"{reference.name} has no chat template", "leave out --chat-template")
        for task in tasks:
            longest = _longest_reply(task)
            if task.config["output_type"] == "generate_until" and (reference.positions or math.inf) <= longest:
                room = f"{reference.name} has {reference.positions} positions"
                raise UserError(f"{task.name} wants replies of {longest} tokens, {room}", "leave this task out")
    with _quietly():
        for task in tasks:
            with _documents_explained(task):
                made = _made(task)
                made.build_all_requests(limit=limit)
                for document in made.eval_docs:
                    target = made.doc_to_target(document)
                    if task.config["output_type"] == "multiple_choice":
                        _check_answer(target, made.doc_to_choice(document))
                    if task.character_f1:
                        character_f1("", document["answers"]["text"])


def _check_answer(target: Any, choices: Sequence[str]) -> None:
    """The harness would count a question whose answer is no choice as one that is answered wrongly."""
    for answer in target if isinstance(target, list) else [target]:
        if not (answer in choices if isinstance(answer, str) else 0 <= answer < len(choices)):
            raise ValueError(f"the answer {answer!r} is none of the {len(choices)} choices")


@contextlib.contextmanager
def _documents_explained(task: Task) -> Iterator[None]:
    """Whatever the harness and its templates raise about documents that are not as they want them."""
    try:
        yield
    except (TemplateError, LookupError, TypeError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{task.name} cannot be asked of its documents: {type(error).__name__} {reason}", "see docs/evaluate.md"
        ) from None


def run(
    tasks: Sequence[Task],
    model: Model,
    batch_size: int,
    group: Group,
    limit: int | None = None,
    chat_template: bool = False,
) -> dict[str, dict]:
    """The scores of a model by task; every process calls it, and all get them.

    Args:
        tasks: Of `read_task`.
        model: Whole on every process.
        batch_size: Requests a batch.
        group: The processes.
        limit: Documents of each task to stop after.
        chat_template: Whether the prompts go through the model's chat template, the shots as turns before.

    Raises:
        UserError: Too little memory.
    """
    with _quietly(), out_of_memory_explained(batch_size, model.module.device):
        from lm_eval.evaluator import evaluate

        harness_model = _harness_model(model, batch_size, chat_template, group)
        made = {task.name: _made(task) for task in tasks}
        results = evaluate(
            lm=harness_model,
            task_dict=made,
            limit=limit,
            bootstrap_iters=0,
            log_samples=True,
            apply_chat_template=chat_template,
            fewshot_as_multiturn=chat_template and _takes(harness_model.tokenizer, *_TURNS),
        )
        return {task.name: _report(task, results, harness_model, limit, chat_template) for task in tasks}


def character_f1(reply: str, answers: Sequence[str]) -> float:
    """The best F1 of a reply with one of the answers, over their characters, white space left out.

    As SQuAD's F1 (Rajpurkar et al., 2016) with characters for words, which is how JGLUE (Kurihara et al., 2022) scores
    JSQuAD.
    """

    def f1(answer: str) -> float:
        said, wanted = (Counter("".join(text.split())) for text in (reply, answer))
        common = (said & wanted).total()
        return 2 * common / (said.total() + wanted.total()) if common else float(not said and not wanted)

    return max(map(f1, answers))


def _made(task: Task) -> Any:
    """The harness's task."""
    import datasets
    from lm_eval.api.task import ConfigurableTask

    splits = {split: datasets.Dataset.from_list(documents) for split, documents in task.documents.items()}
    made = ConfigurableTask(config={**task.config, "custom_dataset": lambda **_: splits})
    made.set_fewshot_seed(FEWSHOT_SEED)
    return made


def _harness_model(model: Model, batch_size: int, chat_template: bool, group: Group) -> Any:
    from lm_eval.models import huggingface

    base: Any = huggingface.HFLM

    class Shared(base):
        """The harness's model, whose requests the processes share out; each gets all replies."""

        def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list:
            return _shared(requests, lambda own: super(Shared, self).loglikelihood(own, disable_tqdm), group)

        def generate_until(self, requests: list, disable_tqdm: bool = False) -> list:
            return _shared(requests, lambda own: super(Shared, self).generate_until(own, disable_tqdm), group)

    tokenizer = AutoTokenizer.from_pretrained(model.reference.tokenizer, trust_remote_code=False)
    if chat_template:
        tokenizer.chat_template = model.chat_template
    return Shared(
        pretrained=model.module,
        tokenizer=tokenizer,
        batch_size=batch_size,
        add_bos_token=model.add_bos,
        softmax_dtype=None if str(model.module.dtype) == "torch.float64" else "float32",
    )


def _shared(requests: list, compute: Callable[[list], list], group: Group) -> list:
    """Neighbours stay together: the choices of one question have a prompt in common."""
    bounds = np.linspace(0, len(requests), dist.get_world_size() + 1).astype(int)
    start, stop = bounds[dist.get_rank() : dist.get_rank() + 2]
    own = requests[start:stop]
    return [reply for part in together(group, lambda: compute(own) if own else []) for reply in part]


def _longest_reply(task: Task) -> int:
    return task.config.get("generation_kwargs", {}).get("max_gen_toks", _LONGEST_REPLY)


def _report(task: Task, results: Any, harness_model: Any, limit: int | None, chat_template: bool) -> dict[str, Any]:
    samples = sorted(results["samples"][task.name], key=lambda sample: sample["doc_id"])
    found = results["results"][task.name]
    metrics = [metric["metric"] for metric in task.config["metric_list"]]
    scores = {m: float(value) for key, value in found.items() for m in metrics if key.split(",")[0] == m}
    if task.character_f1:
        each = [character_f1(sample["filtered_resps"][0], sample["doc"]["answers"]["text"]) for sample in samples]
        scores["char_f1"] = float(np.mean(each))
    report: dict[str, Any] = {
        "scores": scores,
        "documents": len(samples),
        "shots": task.config.get("num_fewshot", 0),
        "version": task.config.get("metadata", {}).get("version"),
        "upstream": task.upstream,
        "prompts_cut": sum(_is_cut(sample, task, harness_model) for sample in samples),
        "files": task.files,
    }
    by_subject = defaultdict(list)
    for sample in samples:
        if "subject" in sample["doc"]:
            by_subject[sample["doc"]["subject"]].append(sample[metrics[0]])
    if by_subject:
        report["by_subject"] = {subject: float(np.mean(each)) for subject, each in sorted(by_subject.items())}
    report["not_comparable"] = _differences(task, report, limit, chat_template, harness_model.tokenizer)
    return report


def _differences(task: Task, report: dict, limit: int | None, chat_template: bool, tokenizer: Any) -> list[str]:
    """Why the scores are not those that the harness's own task would give; [] where they are."""
    installed = importlib.metadata.version("lm_eval")
    differences = []
    if task.upstream is None:
        differences.append("lm-evaluation-harness has no task with this prompt")
    elif installed != CHECKED:
        differences.append(f"its prompt is that of lm-evaluation-harness {CHECKED}, {installed} is installed")
    for split, published in task.published.items():
        if len(task.documents[split]) != published:
            differences.append(f"{split} has {len(task.documents[split])} documents, {published} were published")
    if limit is not None and report["documents"] < len(task.documents[_evaluated(task.config)]):
        differences.append(f"only the first {limit} documents")
    if chat_template:
        differences.append("the prompts went through a chat template")
        if task.config.get("description") and not _takes(tokenizer, "system", "user"):
            differences.append("which has no system message, so that the task's description was left out")
        if report["shots"] and not _takes(tokenizer, *_TURNS):
            differences.append("which has a single turn, so that the shots stand in the one message")
    return differences


def _takes(tokenizer: Any, *roles: str) -> bool:
    """Whether the chat template takes messages of these roles."""
    try:
        tokenizer.apply_chat_template([{"role": role, "content": "a"} for role in roles], tokenize=False)
    except TemplateError:
        return False
    return True


def _evaluated(config: dict[str, Any]) -> str:
    """The split that is; "" where none is named."""
    return config.get("test_split") or config.get("validation_split") or ""


def _is_cut(sample: dict, task: Task, harness_model: Any) -> bool:
    """Whether the harness has cut the beginning of a prompt off, which was longer than the model has positions."""
    arguments = sample["arguments"]
    if task.config["output_type"] == "generate_until":
        length = len(harness_model.tok_encode(arguments[0][0]))
        return length > harness_model.max_length - _longest_reply(task)
    pairs = (harness_model._encode_pair(prompt, choice) for prompt, choice in arguments)
    return any(len(prompt) + len(choice) > harness_model.max_length + 1 for prompt, choice in pairs)


def _files(data: Path, pattern: str, many: bool, task: str) -> list[Path]:
    files = sorted({file for file in data.glob(pattern) if file.is_file()})
    if not files:
        raise UserError(f"{data} holds no {pattern}, which the task {task} reads", "see docs/evaluate.md")
    twice = [stem for stem, count in Counter(file.stem for file in files).items() if count > 1]
    if (len(files) > 1 and not many) or twice:
        shown = [str(file) for file in files if not twice or file.stem == twice[0]]
        raise UserError(f"{data}: several files for the task {task}: {', '.join(shown[:2])}", "leave one of them there")
    return files


def _read_lines(file: Path) -> list[dict]:
    """JSON lines, one document each."""
    documents = []
    for number, line in enumerate(_text(file).split("\n"), 1):
        if line.strip():
            try:
                document = json.loads(line)
            except ValueError as error:
                raise UserError(f"{file}, line {number}: no JSON ({error})", "mend it") from None
            if not isinstance(document, dict):
                raise UserError(f"{file}, line {number}: no JSON object", "write one document a line")
            documents.append(document)
    return documents


def _text(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8-sig")  # read_text would change line ends
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 at byte {error.start}", "unpack it, or save it as UTF-8") from None


def _read_squad(file: Path) -> list[dict]:
    """SQuAD's own form: articles, their paragraphs, and the questions about them; or one question a JSON line."""
    try:
        content = json.loads(_text(file))
    except ValueError:
        return _read_lines(file)
    if not isinstance(content, dict) or "data" not in content:
        return _read_lines(file)
    try:
        return _questions(content["data"])
    except (LookupError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__} {error}"
        raise UserError(f"{file} is not of SQuAD's form: {reason}", "copy the data anew") from None


def _questions(articles: list) -> list[dict]:
    return [
        {
            "id": question["id"],
            "title": article["title"],
            "context": paragraph["context"],
            "question": question["question"],
            "answers": {
                "text": [answer["text"] for answer in question["answers"]],
                "answer_start": [answer["answer_start"] for answer in question["answers"]],
            },
        }
        for article in articles
        for paragraph in article["paragraphs"]
        for question in paragraph["qas"]
    ]


def _read_choices(file: Path) -> list[dict]:
    """CSV as MMLU has it: question, four choices and the letter of the right one, with a line of names or without."""
    try:
        rows = [[cell.strip() for cell in row] for row in csv.reader(io.StringIO(_text(file), newline="")) if row]
    except csv.Error as error:
        raise UserError(f"{file} is no CSV: {error}", "mend it") from None
    if rows and rows[0][-1].lower() == "answer":
        rows = rows[1:]
    for number, row in enumerate(rows, 1):
        if len(row) != 6 or row[5] not in ("A", "B", "C", "D"):
            raise UserError(f"{file}, question {number}: not a question, four choices and a letter", "mend it")
    return [
        {"subject": file.stem, **dict(zip(("question", "A", "B", "C", "D", "answer"), row, strict=True))}
        for row in rows
    ]


_FORMS = {"lines": _read_lines, "squad": _read_squad, "choices": _read_choices}


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without the network, and without the harness's warnings and, but on a terminal, its progress bars."""
    before = {name: os.environ.get(name) for name in _OFFLINE}
    offline, hub.HF_HUB_OFFLINE = hub.HF_HUB_OFFLINE, True
    os.environ |= dict.fromkeys(_OFFLINE, "1")
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.ExitStack() as stack:
            if dist.get_rank() != 0 or not sys.stderr.isatty():
                nowhere = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stderr(nowhere))
            yield
    finally:
        logger.setLevel(level)
        hub.HF_HUB_OFFLINE = offline
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value

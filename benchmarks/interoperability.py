"""What serves an export: every architecture with every kind of tokenizer, tried with the tools that are named.

    python benchmarks/interoperability.py --models MODEL.model ... --transformers PYTHON ... \\
        [--peft PYTHON] [--llama-cpp FOLDER --llama-python PYTHON]

Tiny models with random weights are exported by `tsumugu export --from-state-dict`, with tokenizers that `tsumugu
tokenizer` made or imported. Each tool then reads the folder in a process of its own, which has nothing of tsumugu: the
ids of the golden strings of contract.json, the logits after a prompt, and the tokens that it continues with. These are
compared with the contract and with the model as it was in memory. It prints Markdown tables; `--json` the figures too.

FOLDER is a checkout of llama.cpp (the sources of llama-cpp-python hold one), whose converter the PYTHON beside it runs;
that needs torch, transformers, sentencepiece and llama-cpp-python. Where the converter refuses or gives other ids, what
mends it is tried as well, and said.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM

from tsumugu import certificate, reload
from tsumugu.data import corpus
from tsumugu.export import export_state_dict
from tsumugu.interoperability import tokenizer_kind
from tsumugu.tokenizer.contract import read_contract
from tsumugu.tokenizer.importer import import_tokenizer
from tsumugu.tokenizer.train import train_byte_level, train_tokenizer

SAMPLE = Path(__file__).parents[1] / "src" / "tsumugu" / "sample"
NEW_TOKENS = 16

_SMALL = dict(num_hidden_layers=2, hidden_size=64, num_attention_heads=4)
ARCHITECTURES = {
    "gpt_neox": dict(**_SMALL, intermediate_size=256, rotary_pct=1.0, tie_word_embeddings=False),
    "gpt2": dict(n_embd=64, n_layer=2, n_head=4),
    "bloom": dict(hidden_size=64, n_layer=2, n_head=4),
    "llama": dict(**_SMALL, intermediate_size=128, num_key_value_heads=2, tie_word_embeddings=False),
    "qwen3": dict(**_SMALL, intermediate_size=128, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True),
}
# What a converter may overlook: tried with the byte-level tokenizer alone, and with llama.cpp alone.
VARIANTS = {
    "gpt_neox, tied": ("gpt_neox", dict(tie_word_embeddings=True)),
    "gpt_neox, a quarter rotary": ("gpt_neox", dict(rotary_pct=0.25)),
    "gpt_neox, rotary base 100": ("gpt_neox", dict(rotary_emb_base=100.0)),
    "gpt_neox, sequential residual": ("gpt_neox", dict(use_parallel_residual=False)),
    "gpt2, n_inner": ("gpt2", dict(n_inner=128)),
    "llama, tied, rotary base 100": ("llama", dict(tie_word_embeddings=True, rope_theta=100.0)),
    "llama, attention biases": ("llama", dict(attention_bias=True)),
}

# Run by a Python that need not have tsumugu: a list of requests in, an answer a line out. `answer` comes before.
_LOOP = """
import json, sys

with open(sys.argv[2], "a", encoding="utf-8") as file:
    for request in json.load(open(sys.argv[1], encoding="utf-8")):
        try:
            found = answer(request)
        except (Exception, SystemExit) as error:
            found = {"refused": f"{type(error).__name__}: {error}"}
        file.write(json.dumps(found) + "\\n")
        file.flush()
"""
_TRANSFORMERS = """
import torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

transformers.logging.set_verbosity_error()

@torch.no_grad()
def compute(request, model):
    tokenizer = AutoTokenizer.from_pretrained(request["folder"])
    prompt, new = torch.tensor([request["prompt"]]), request["new"]
    output = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
        max_new_tokens=new, min_new_tokens=new, eos_token_id=None, suppress_tokens=None)
    return {
        "version": transformers.__version__,
        "ids": [tokenizer(text, add_special_tokens=False)["input_ids"] for text in request["texts"]],
        "logits": model(input_ids=prompt).logits[0, -1].tolist(),
        "greedy": output[0, prompt.shape[1]:].tolist(),
    }

def load(request):
    return AutoModelForCausalLM.from_pretrained(request["folder"]).eval()

def answer(request):
    return compute(request, load(request))
"""
# An adapter beside the folder, saved, and read again beside the folder; then the folder without it.
_PEFT = (
    _TRANSFORMERS
    + """
import peft
from peft import LoraConfig, PeftModel, TaskType, get_peft_model

def answer(request):
    prompt, plain = torch.tensor([request["prompt"]]), load(request)
    with torch.no_grad():
        before = plain(input_ids=prompt).logits
        made = get_peft_model(plain, LoraConfig(task_type=TaskType.CAUSAL_LM, init_lora_weights=False, r=4)).eval()
        after = made(input_ids=prompt).logits
        made.save_pretrained(request["scratch"])
        read = PeftModel.from_pretrained(load(request), request["scratch"]).eval()
        again = read(input_ids=prompt).logits
    moved, apart = (before - after).abs().max().item(), (again - after).abs().max().item()
    how = f"an adapter that moves logits by {moved:.2g} comes back within {apart:.1g}"
    return compute(request, read.unload()) | {"version": peft.__version__, "how": how}
"""
)
_LLAMA = """
import llama_cpp

def answer(request):
    model = llama_cpp.Llama(request["gguf"], n_ctx=128, n_threads=1, logits_all=True, verbose=False,
        type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32, kv_overrides=request["overrides"] or None)
    found = {"version": llama_cpp.__version__, "greedy": []}
    found["ids"] = [model.tokenize(text.encode(), add_bos=False, special=False) for text in request["texts"]]
    plain, default = (model.tokenize("a".encode(), add_bos=add) for add in (False, True))
    found["around"] = [default[: 1] != plain[: 1], default[-1:] != plain[-1:]]
    model.eval(request["prompt"])
    found["logits"] = model.scores[model.n_tokens - 1].tolist()
    for _ in range(request["new"]):
        found["greedy"].append(int(model.scores[model.n_tokens - 1].argmax()))
        model.eval(found["greedy"][-1:])
    model.close()
    return found
"""
# The converter as it is, or with the way to store a vocabulary set by hand.
_CONVERT = """
import runpy, sys

folder, way = {folder!r}, {way!r}
sys.path.insert(0, folder)
if way:
    from conversion.base import TextModel
    if way == "sentencepiece":
        TextModel.set_vocab = TextModel._set_vocab_sentencepiece
    else:
        TextModel.get_vocab_base_pre = lambda self, tokenizer: way

def answer(request):
    arguments, sys.argv = sys.argv, [folder + "/convert_hf_to_gguf.py", request["folder"],
        "--outfile", request["gguf"], "--outtype", "f32"]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        sys.argv = arguments
    return {{}}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=[], type=Path, help="SentencePiece models to import")
    parser.add_argument("--transformers", nargs="*", default=[sys.executable], metavar="PYTHON")
    parser.add_argument("--peft", metavar="PYTHON")
    parser.add_argument("--llama-cpp", type=Path, metavar="FOLDER")
    parser.add_argument("--llama-python", metavar="PYTHON")
    parser.add_argument("--architectures", nargs="*", default=list(ARCHITECTURES), choices=list(ARCHITECTURES))
    parser.add_argument("--tokenizers", nargs="*", help="these alone (default: unigram, byte-level, sentencepiece-bpe)")
    parser.add_argument("--variants", action="store_true", help="shapes that a converter may overlook, too")
    options = parser.parse_args()
    # transformers reads every folder in a process of its own anyway, below.
    certificate._run = lambda python, asked, answer: reload.main(asked, answer)
    with tempfile.TemporaryDirectory() as scratch:
        show(_cells(options, Path(scratch)))


def _cells(options: argparse.Namespace, scratch: Path) -> list[dict]:
    tokenizers = make_tokenizers(options, scratch)
    subjects = [
        Subject(architecture, architecture, name, tokenizers[name], {}, scratch)
        for architecture in options.architectures
        for name in tokenizers
    ]
    variants = [
        Subject(architecture, name, "byte-level", tokenizers["byte-level"], changes, scratch)
        for name, (architecture, changes) in (VARIANTS.items() if options.variants else ())
    ]
    cells = [subject.sentencepiece() for subject in subjects[: len(tokenizers)] if subject.model_file.exists()]
    for python in options.transformers:
        cells += _read("transformers", python, _TRANSFORMERS, subjects, scratch)
    if options.peft:
        cells += _read("peft", options.peft, _PEFT, subjects, scratch)
    if options.llama_cpp:
        cells += gguf(options, [*subjects, *variants], scratch)
    return cells


def show(cells: list[dict]) -> None:
    print("| architecture | tokenizer | kind | tool | ids | logits | greedy | |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for cell in cells:
        tool = " ".join(filter(None, [cell["tool"], cell.get("version")]))
        columns = [cell["architecture"], cell["tokenizer"], cell["kind"], tool]
        columns += [cell.get(name, "") for name in ("ids", "logits", "greedy")]
        said = " ".join(filter(None, [cell.get("how"), cell.get("refused") and f"refused: {cell['refused']}"]))
        print("|", " | ".join([*columns, " ".join(said.replace("|", "/").split())[:300]]), "|", flush=True)


class Subject:
    """An export, and what its model did in memory before.

    Attributes:
        name, tokenizer: What it is called: the architecture, and the tokenizer.
        folder: The export.
        texts, ids: The golden strings of its contract.
        prompt, logits, greedy: A prompt, the logits after it, and the likeliest continuation.
    """

    def __init__(self, architecture: str, name: str, tokenizer: str, source: Path, changes: dict, scratch: Path):
        contract = read_contract(source)
        self.name, self.tokenizer, self.kind = name, tokenizer, tokenizer_kind(source)
        self.folder = scratch / re.sub(r"\W+", "-", f"{name} {tokenizer} model")
        self.model_file, self.bytes = source / "tokenizer.model", set()
        if self.model_file.exists():
            processor = sentencepiece.SentencePieceProcessor(model_file=str(self.model_file))
            self.bytes = {id for id in range(len(processor)) if processor.is_byte(id)}
        self.around = contract.adds_bos, contract.adds_eos
        self.texts, self.ids = [list(column) for column in zip(*contract.golden, strict=True)]
        self.prompt = list(next(ids for ids in self.ids if len(ids) > 4))
        values = {**ARCHITECTURES[architecture], **changes, "vocab_size": contract.vocab_size}
        config = AutoConfig.for_model(architecture, **values)
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():  # nothing zero, and no two tokens nearly as likely
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
            rows = list(self.prompt)
            self.logits = model(input_ids=torch.tensor([rows])).logits[0, -1]
            for _ in range(NEW_TOKENS):
                rows.append(int(model(input_ids=torch.tensor([rows])).logits[0, -1].argmax()))
        self.greedy = rows[len(self.prompt) :]
        given = self.folder.with_name(f"{self.folder.name}-given")
        config.save_pretrained(given)
        torch.save(model.state_dict(), given / "model.pt")
        export_state_dict(given / "model.pt", str(given), self.folder, "float32", source)

    def request(self, **more: Any) -> dict:
        return {"folder": str(self.folder), "texts": self.texts, "prompt": self.prompt, "new": NEW_TOKENS, **more}

    def cell(self, tool: str, answer: dict, how: str = "") -> dict:
        """What the table shows of an answer."""
        cell = {"architecture": self.name, "tokenizer": self.tokenizer, "kind": self.kind, "tool": tool, "how": how}
        cell |= {key: answer[key] for key in ("version", "refused", "how") if key in answer}
        for place, token in enumerate(("bos", "eos")):
            if "around" in answer and answer["around"][place] != self.around[place]:
                cell["how"] += f" ({'puts' if answer['around'][place] else 'lacks'} {token} by default)"
        if "ids" in answer:
            equal = [list(own) == found for own, found in zip(self.ids, answer["ids"], strict=True)]
            cell["ids"] = f"{sum(equal)} of {len(equal)}"
            spelt = [same for own, same in zip(self.ids, equal, strict=True) if not self.bytes & set(own)]
            if not all(equal) and len(spelt) < len(equal):
                cell["ids"] += f"; {sum(spelt)} of the {len(spelt)} without byte pieces"
        if "logits" in answer:
            difference = (torch.tensor(answer["logits"])[: len(self.logits)] - self.logits).abs().max().item()
            cell["logits"] = f"{difference:.1g} of {self.logits.abs().max().item():.2g}"
            same = sum(a == b for a, b in zip(answer["greedy"], self.greedy, strict=True))
            cell["greedy"] = f"{same} of {NEW_TOKENS}"
        return cell

    def sentencepiece(self) -> dict:
        """What SentencePiece makes of the tokenizer.model that is exported too."""
        processor = sentencepiece.SentencePieceProcessor(model_file=str(self.folder / "tokenizer.model"))
        ids = processor.encode(self.texts)
        differing = [text for text, own, found in zip(self.texts, self.ids, ids, strict=True) if list(own) != found]
        how = f"other ids for {', '.join(map(repr, differing))}" if differing else ""
        return self.cell("tokenizer.model, SentencePiece", {"version": sentencepiece.__version__, "ids": ids}, how)

    @property
    def all_ids(self) -> str:
        return f"{len(self.ids)} of {len(self.ids)}"


def make_tokenizers(options: argparse.Namespace, scratch: Path) -> dict[str, Path]:
    """Folders by name: of every kind that `tsumugu tokenizer` makes or imports."""
    pieces = corpus.plan(corpus.find_files([str(SAMPLE / "japanese.jsonl"), str(SAMPLE / "english.jsonl")]))
    texts = lambda: corpus.texts(pieces, None)  # noqa: E731
    given = {path.stem: path for path in options.models}
    folders = {}
    for name in options.tokenizers or ["unigram", "byte-level", "sentencepiece-bpe", *given]:
        folder = folders[name] = scratch / name
        if name == "unigram":
            train_tokenizer(texts, folder, vocab_size=4000)
        elif name == "byte-level":
            train_byte_level(texts, folder, vocab_size=4000)
        elif name == "sentencepiece-bpe":
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(line for text in texts() for line in text.splitlines() if line),
                model_prefix=str(scratch / "bpe"),
                model_type="bpe",
                vocab_size=4000,
                byte_fallback=True,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                minloglevel=2,
            )
            import_tokenizer(str(scratch / "bpe.model"), folder)
        elif name in given:
            import_tokenizer(str(given[name]), folder)
        else:
            _known_byte_level(options.llama_cpp, name, scratch / f"{name}-source")
            import_tokenizer(str(scratch / f"{name}-source"), folder)
    return folders


_WORDS = {
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+",
}


def _known_byte_level(llama_cpp: Path, name: str, folder: Path) -> None:
    """The tokenizer.json of a well-known model (gpt-2, llama-bpe, qwen2), from the vocabulary that llama.cpp has for
    its tests."""
    sys.path.insert(0, str(llama_cpp / "gguf-py"))
    from gguf import GGUFReader  # type: ignore[import-not-found]

    reader = GGUFReader(llama_cpp / "models" / f"ggml-vocab-{name}.gguf")
    read = lambda name: reader.fields[f"tokenizer.ggml.{name}"].contents()  # noqa: E731
    tokens, kinds = read("tokens"), read("token_type")
    ordinary = {token: id for id, token in enumerate(tokens) if kinds[id] == 1}
    merges = [tuple(pair.split(" ")) for pair in read("merges")]
    tokenizer = Tokenizer(models.BPE(vocab=ordinary, merges=merges, ignore_merges=name == "llama-bpe"))
    words = _WORDS.get(name)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words is None)
    if words:
        split = pre_tokenizers.Split(Regex(words), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])  # type: ignore[assignment]
    else:
        tokenizer.pre_tokenizer = byte_level  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer.add_special_tokens([tokens[id] for id in range(len(tokens)) if kinds[id] != 1])
    assert all(tokenizer.token_to_id(token) == id for id, token in enumerate(tokens))
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    end = tokens[reader.fields["tokenizer.ggml.eos_token_id"].contents()]
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def ask(python: str, code: str, requests: list[dict], scratch: Path) -> list[dict]:
    """Runs code in another Python. An answer is {"refused": …} where it raises, or where the process dies of it."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    given, made = scratch / "requests.json", scratch / "answers.jsonl"
    answers: list[dict] = []
    while len(answers) < len(requests):
        made.unlink(missing_ok=True)
        given.write_text(json.dumps(requests[len(answers) :]), encoding="utf-8")
        command = [python, "-c", code + _LOOP, str(given), str(made)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        answers += [json.loads(line) for line in made.read_text(encoding="utf-8").splitlines()] if made.exists() else []
        if len(answers) < len(requests):
            last = ([line for line in done.stderr.splitlines() if line.strip()] or [""])[-1]
            answers.append({"refused": f"it ended with {done.returncode}: {last}"})
    return answers


def _read(tool: str, python: str, code: str, subjects: list[Subject], scratch: Path) -> list[dict]:
    answers = ask(python, code, [subject.request(scratch=str(scratch / "adapter")) for subject in subjects], scratch)
    return [subject.cell(tool, answer) for subject, answer in zip(subjects, answers, strict=True)]


_UNIGRAM = {
    "tokenizer.ggml.model": "t5",
    "tokenizer.ggml.remove_extra_whitespaces": False,
    "tokenizer.ggml.add_bos_token": False,
    "tokenizer.ggml.add_eos_token": False,
}
_ATTEMPTS = (
    ("", {}, "as it is:"),
    ("gpt-2", {}, "get_vocab_base_pre returns 'gpt-2':"),
    ("sentencepiece", {}, "set_vocab is _set_vocab_sentencepiece:"),
    ("sentencepiece", _UNIGRAM, "that, and tokenizer.ggml.model=t5:"),
    ("sentencepiece", {**_UNIGRAM, "tokenizer.ggml.add_space_prefix": True}, "that, and add_space_prefix=true:"),
)


def gguf(options: argparse.Namespace, subjects: list[Subject], scratch: Path) -> list[dict]:
    """The converter as it is; where that refuses or gives other ids, what may mend it too."""
    cells: dict[Subject, list[dict]] = {subject: [] for subject in subjects}
    for way, overrides, how in _ATTEMPTS:
        fit = {"": (True, True), "gpt-2": (True, False), "sentencepiece": (False, True)}[way]
        open_ones = [
            subject
            for subject in subjects
            if fit[subject.kind != "byte_level"] and all(cell.get("ids") != subject.all_ids for cell in cells[subject])
        ]
        requests = [
            subject.request(gguf=str(subject.folder.with_suffix(".gguf")), overrides=overrides) for subject in open_ones
        ]
        if not overrides:
            for subject in open_ones:
                subject.folder.with_suffix(".gguf").unlink(missing_ok=True)
            converted = ask(
                options.llama_python, _CONVERT.format(folder=str(options.llama_cpp), way=way), requests, scratch
            )
        else:
            converted = [{} for _ in requests]
        made = [i for i, request in enumerate(requests) if Path(request["gguf"]).exists()]
        answers = ask(options.llama_python, _LLAMA, [requests[i] for i in made], scratch)
        read = dict(zip(made, answers, strict=True))
        for place, subject in enumerate(open_ones):
            if place in read:
                cells[subject].append(subject.cell("llama.cpp", read[place], how))
            elif "refused" in converted[place]:
                cells[subject].append(subject.cell("llama.cpp's converter", converted[place], how))
    return [cell for found in cells.values() for cell in found]


if __name__ == "__main__":
    main()

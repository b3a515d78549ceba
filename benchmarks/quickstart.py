"""How well the models of a finished `tsumugu quickstart` folder know their text and their instructions.

    python benchmarks/quickstart.py WORK_DIR [--json]

Models and tokenizers are loaded by stock transformers from the exported folders; tsumugu itself is used only to read
the token stores, so that the documents counted here are the ones that were trained on, and those held out.

Bits per byte is the cost of a text in bits over its length in UTF-8 bytes. The end-of-document token stands for no
bytes. The models pay for predicting it, the character-unigram model does not; and the first token of a split, which
nothing predicts, counts for neither bits nor bytes of a model.

The character-unigram model is fitted on the text of the training documents, with add-one smoothing over the K distinct
characters seen there and one further class for all others. Of N characters in all, one seen c times costs
-log2((c + 1) / (N + K + 1)) bits; an unseen one costs -log2(1 / (N + K + 1)) and then the uniform choice among the
remaining Unicode scalar values, log2(1,112,064 - K).
"""

import argparse
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from tsumugu.data.store import SPLITS, Split, Store, open_store
from tsumugu.tokenizer.contract import read_contract
from tsumugu.training.metrics import read_metrics

_SCALAR_VALUES = 0x110000 - 0x800  # all code points but the surrogates
_ROWS = 8
_FURTHER_TOKENS = 20
_TARGETS = {
    "validation_ratio": "≤ 88 %",
    "train_ratio": "≤ 50 %",
    "train_exact": "≥ 70 %",
    "train_stopped": "≥ 70 %",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("work_dir", type=Path, help="folder that `tsumugu quickstart` made")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a Markdown table")
    parser.add_argument(
        "--training-rows", type=int, help="measure the first N rows of the training text (default: all)"
    )
    options = parser.parse_args()
    figures = pretraining_figures(options.work_dir, options.training_rows) | instruction_figures(options.work_dir)
    print(json.dumps(figures, indent=1) if options.json else markdown(figures))


def pretraining_figures(work_dir: Path, training_rows: int | None) -> dict:
    """Bits per byte of the unigram model and of model-base on both splits, and the ratios of the two."""
    store = open_store(work_dir / "store")
    tokenizer = AutoTokenizer.from_pretrained(work_dir / "model-base")
    texts = {split: documents(store, split, tokenizer) for split in SPLITS}
    unigram = CharacterUnigram(texts["train"])
    evaluations = [line for line in read_metrics(work_dir / "pretrain") if "validation_bits_per_byte" in line]
    best = min(evaluations, key=lambda line: line["validation_bits_per_byte"])
    config = yaml.safe_load((work_dir / "pretrain" / "config.yaml").read_text(encoding="utf-8"))
    model = AutoModelForCausalLM.from_pretrained(work_dir / "model-base").eval()
    train_bits = model_bits_per_byte(model, store, config["data"]["sequence_length"], training_rows)
    figures = {
        "train_documents": store.train.documents,
        "validation_documents": store.validation.documents,
        "train_characters": sum(map(len, texts["train"])),
        "unigram_train": unigram.bits_per_byte(texts["train"]),
        "unigram_validation": unigram.bits_per_byte(texts["validation"]),
        "last_step": json.loads((work_dir / "model-base" / "tsumugu.json").read_text(encoding="utf-8"))["step"],
        "model_train": train_bits,
        "best_step": best["step"],
        "model_validation": best["validation_bits_per_byte"],
        "model_validation_last": evaluations[-1]["validation_bits_per_byte"],
    }
    figures["train_ratio"] = figures["model_train"] / figures["unigram_train"]
    figures["validation_ratio"] = figures["model_validation"] / figures["unigram_validation"]
    return figures


def instruction_figures(work_dir: Path) -> dict:
    """Shares of trained and of held-out instructions that model-instruct answers exactly, and stops after by itself."""
    store = open_store(work_dir / "store-instructions")
    tokenizer = AutoTokenizer.from_pretrained(work_dir / "model-instruct")
    model = AutoModelForCausalLM.from_pretrained(work_dir / "model-instruct").eval()
    figures = {}
    for name, split in (("train", store.train), ("held_out", store.validation)):
        results = [answer(model, tokenizer, *split.document(index)) for index in range(split.documents)]
        figures[f"{name}_instructions"] = len(results)
        figures[f"{name}_exact"] = sum(exact for exact, _ in results) / len(results)
        figures[f"{name}_stopped"] = sum(stopped for _, stopped in results) / len(results)
    return figures


def documents(store: Store, split_name: str, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of every document of a split, without the tokens that mark its beginning and end."""
    split: Split = getattr(store, split_name)
    start, stop = int(store.manifest["add_bos"]), -1 if store.manifest["add_eos"] else None
    ids = [split.document(index)[0] for index in range(split.documents)]
    texts = [tokenizer.decode(document[start:stop]) for document in ids]
    token_bytes = np.array(read_contract(store.path / "tokenizer").token_bytes)
    counted = [int(token_bytes[document].sum()) for document in ids]
    if counted != [len(text.encode()) for text in texts]:
        raise SystemExit(f"{store.path}: its ids do not decode to as many bytes as its contract counts")
    return texts


class CharacterUnigram:
    """The smoothed character model of the module's docstring, fitted on `texts`."""

    def __init__(self, texts: list[str]):
        self.counts = Counter(character for text in texts for character in text)
        self.total = self.counts.total() + len(self.counts) + 1

    def bits_per_byte(self, texts: list[str]) -> float:
        found = Counter(character for text in texts for character in text)
        bits = sum(count * self._bits(character) for character, count in found.items())
        return bits / sum(len(text.encode()) for text in texts)

    def _bits(self, character: str) -> float:
        bits = math.log2(self.total) - math.log2(self.counts[character] + 1)
        return bits if character in self.counts else bits + math.log2(_SCALAR_VALUES - len(self.counts))


@torch.no_grad()
def model_bits_per_byte(model: PreTrainedModel, store: Store, sequence_length: int, rows: int | None) -> float:
    """Bits per byte on the training text in the rows of training: blocks of the stream, every token a label once."""
    ids, _ = store.train.read(0, store.train.tokens)
    token_bytes = np.array(read_contract(store.path / "tokenizer").token_bytes)
    blocks = [ids[start : start + sequence_length + 1] for start in range(0, len(ids) - 1, sequence_length)][:rows]
    nats, text_bytes = 0.0, 0
    for first in range(0, len(blocks), _ROWS):
        group = blocks[first : first + _ROWS]
        padded = np.full((len(group), sequence_length + 1), -100)  # on the right, where causality makes it harmless
        for row, block in zip(padded, group, strict=True):
            row[: len(block)] = block
            text_bytes += int(token_bytes[block[1:]].sum())
        tokens = torch.from_numpy(padded)
        logits = model(tokens[:, :-1].clamp(min=0)).logits.float()
        nats += F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum").item()
    return nats / math.log(2) / text_bytes


@torch.no_grad()
def answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: np.ndarray, supervised: np.ndarray
) -> tuple[bool, bool]:
    """Whether the greedy reply to an example's prompt is its answer, and whether it ended with eos by itself.

    The prompt is encoded anew from its text, as a user would; one example at a time, so that no padding can matter.
    """
    answer_ids = ids[supervised][:-1]
    prompt = torch.from_numpy(ids[~supervised])
    text = tokenizer.decode(prompt)
    if tokenizer(text, add_special_tokens=False)["input_ids"] != prompt.tolist():
        raise SystemExit(f"the exported tokenizer encodes the prompt otherwise than the store: {text}")
    output = model.generate(
        prompt[None],
        attention_mask=torch.ones_like(prompt[None]),
        max_new_tokens=len(answer_ids) + _FURTHER_TOKENS,
        do_sample=False,
    )
    reply = output[0, len(prompt) :]
    exact = tokenizer.decode(reply, skip_special_tokens=True) == tokenizer.decode(answer_ids)
    return exact, reply[-1].item() == tokenizer.eos_token_id


def markdown(figures: dict) -> str:
    """The figures as a Markdown table, with the targets beside those that have one."""
    f = figures
    bits, share = "{:.3f}".format, "{:.1%}".format
    rows = [
        ("unigram, training text", bits(f["unigram_train"]), "bits per byte", ""),
        ("unigram, validation text", bits(f["unigram_validation"]), "bits per byte", ""),
        (f"model-base, training text, step {f['last_step']}", bits(f["model_train"]), "bits per byte", ""),
        (f"model, validation text, best: step {f['best_step']}", bits(f["model_validation"]), "bits per byte", ""),
        ("model, validation text, last step", bits(f["model_validation_last"]), "bits per byte", ""),
        ("training text, model / unigram", share(f["train_ratio"]), "", _TARGETS["train_ratio"]),
        ("validation text, model / unigram", share(f["validation_ratio"]), "", _TARGETS["validation_ratio"]),
    ]
    for name, title in (("train", "trained"), ("held_out", "held-out")):
        count = f"of {f[f'{name}_instructions']}"
        for key, what in (("exact", "answered exactly"), ("stopped", "stopped by itself")):
            key = f"{name}_{key}"
            rows.append((f"{title} instructions {what}", share(f[key]), count, _TARGETS.get(key, "")))
    lines = ["| figure | value | | target |", "| --- | ---: | --- | --- |"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


if __name__ == "__main__":
    main()

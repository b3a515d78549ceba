"""What serves an exported model: by its architecture and the kind of its tokenizer, as far as it was tried.

One table, which `tsumugu export` prints the row of and docs/interoperability.md shows whole. Whatever is not said to be
untried was tried by benchmarks/interoperability.py; what was read in a server's own source is said to be so.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ARCHITECTURES = ("gpt_neox", "gpt2", "bloom", "llama", "qwen3")

KINDS = {
    "unigram": (
        "SentencePiece unigram of `tsumugu tokenizer train`",
        "`tsumugu tokenizer train` の SentencePiece unigram",
    ),
    "sentencepiece_unigram": ("SentencePiece unigram, imported", "取り込んだ SentencePiece unigram"),
    "sentencepiece_bpe": ("SentencePiece BPE, imported", "取り込んだ SentencePiece BPE"),
    "byte_level": ("byte-level BPE", "バイトレベル BPE"),
}

# By name: English for terminals and docs/interoperability.md, Japanese for its twin.
NOTES = {
    "vllm": (
        "needs CUDA; its source has this architecture, and takes the tokenizer from transformers 5",
        "CUDA が必要なため。ソースにはこのアーキテクチャがあり、トークナイザは transformers 5 のものを使います",
    ),
    "vllm_backend": (
        "needs CUDA; its source runs this architecture by transformers' own code, and takes the tokenizer from "
        "transformers 5",
        "CUDA が必要なため。ソースではモデルもトークナイザも transformers 5 のものを使います",
    ),
    "bridge": (
        "needs Transformer Engine, and so CUDA; its source has a bridge for this architecture",
        "Transformer Engine（つまり CUDA）が必要なため。ソースにはこのアーキテクチャのブリッジがあります",
    ),
    "no_bridge": (
        "needs Transformer Engine, and so CUDA; its source has no bridge for this architecture",
        "Transformer Engine（つまり CUDA）が必要なため。ソースにこのアーキテクチャのブリッジはありません",
    ),
    "bytes_by_hash": (
        "its converter knows GPT-2's, Llama 3's and Qwen2's tokenizer; for one of your own, let get_vocab_base_pre in "
        "conversion/base.py return 'gpt-2'",
        "変換スクリプトは GPT-2、Llama 3、Qwen2 のトークナイザなら知っています。自作のものは conversion/base.py の "
        "get_vocab_base_pre が 'gpt-2' を返すようにします",
    ),
    "set_vocab": (
        "let set_vocab of TextModel in its conversion/base.py be _set_vocab_sentencepiece",
        "conversion/base.py の TextModel の set_vocab を _set_vocab_sentencepiece にします",
    ),
    "bytes_only": (
        "its converter takes every tokenizer of this architecture for byte-level BPE, and refuses this one",
        "変換スクリプトはこのアーキテクチャのトークナイザをすべてバイトレベル BPE とみなし、これを拒否します",
    ),
    "other_ids": (
        "converts without complaint, but gives other ids; what helps is in docs/interoperability.md",
        "警告なく変換されますが、ID が変わります。手当ては下の「llama.cpp」にあります",
    ),
}
_TIED = "a GPT-NeoX whose head is tied to its embedding is converted, but not loaded"
_ROTARY = (
    "its converter drops the rotary base of a GPT-NeoX, so that another one than 10000 computes wrongly in silence"
)
_INNER = "its converter takes the MLP of a GPT-2 to be four times as wide as the model, which this one is not"
_HEADINGS = (("architecture", "tokenizer"), ("アーキテクチャ", "トークナイザ"))
_WORDS = (
    {"works": "works", "mended": "works once mended", "fails": "does not work", "untried": "not tried"},
    {"works": "動作", "mended": "手当てすれば動作", "fails": "動作せず", "untried": "未検証"},
)


@dataclass(frozen=True)
class Cell:
    """What is known of one server.

    Attributes:
        outcome: `works`, `mended` (works once its note is heeded), `fails`, or `untried`.
        version: What was tried, or, where nothing was, whose source was read.
        note: A name in NOTES; "" where there is nothing to say.
    """

    outcome: str
    version: str
    note: str = ""


def tokenizer_kind(folder: Path) -> str | None:
    """The kind, a key of KINDS, of the tokenizer in a folder; None where it has none, or one of another kind."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    layout = json.loads(path.read_text(encoding="utf-8"))
    model, decoder = layout["model"], json.dumps(layout["decoder"])
    if model["type"] == "Unigram":  # what we train has spaces in its pieces, and nothing to normalise
        return "sentencepiece_unigram" if layout["normalizer"] else "unigram"
    if model["type"] == "BPE":
        return "byte_level" if '"ByteLevel"' in decoder else "sentencepiece_bpe"
    return None


def cells(architecture: str, kind: str) -> dict[str, Cell]:
    """By server, for one of ARCHITECTURES and one of KINDS."""
    bridged = architecture in ("llama", "qwen3")
    return {
        "transformers 5": Cell("works", "5.23.0"),
        "transformers 4": Cell("works", "4.57.6"),
        "peft": Cell("works", "0.21.2"),
        "vLLM": Cell("untried", "0.33.0", "vllm_backend" if architecture == "gpt_neox" else "vllm"),
        "llama.cpp": _llama_cpp(architecture, kind),
        "Megatron-Bridge": Cell("untried", "0.6.2", "bridge" if bridged else "no_bridge"),
    }


def _llama_cpp(architecture: str, kind: str) -> Cell:
    """Its converter, and the ids and tokens of the file that it makes: the commit in llama-cpp-python 0.3.36."""
    commit, reads_sentencepiece = "0c1e57098", architecture in ("llama", "qwen3")
    if kind == "byte_level":
        return Cell("mended", commit, "bytes_by_hash")
    if kind == "sentencepiece_bpe":
        return Cell("works", commit) if reads_sentencepiece else Cell("mended", commit, "set_vocab")
    return Cell("fails", commit, "other_ids" if reads_sentencepiece else "bytes_only")


def servers(config: "PretrainedConfig", tokenizer_kind: str | None) -> list[str]:
    """A line for each server, saying whether it reads such a model.

    Args:
        config: Of the model.
        tokenizer_kind: As `tokenizer_kind` finds it.
    """
    if config.model_type not in ARCHITECTURES or tokenizer_kind is None:
        return [f"servers other than transformers were not tried with {config.model_type} and this tokenizer"]
    lines = []
    for server, cell in cells(config.model_type, tokenizer_kind).items():
        outcome, note = cell.outcome, NOTES[cell.note][0] if cell.note else ""
        if server == "llama.cpp" and outcome != "fails" and (reason := _unlike_the_table(config)):
            outcome, note = "fails", reason
        lines.append(f"{server.split()[0]} {cell.version}: {_WORDS[0][outcome]}{f': {note}' if note else ''}")
    return lines


def _unlike_the_table(config: "PretrainedConfig") -> str | None:
    """Why llama.cpp cannot serve a model whose architecture and tokenizer it does serve."""
    if config.model_type == "gpt_neox":
        if config.tie_word_embeddings:
            return _TIED
        return _ROTARY if config.rope_parameters["rope_theta"] != 10000 else None
    if config.model_type == "gpt2":
        return _INNER if config.n_inner not in (None, 4 * config.n_embd) else None
    return None


def markdown(language: int) -> str:
    """The whole table with its notes, in English (0) or Japanese (1)."""
    names = list(NOTES)
    header = [*_HEADINGS[language], *cells(ARCHITECTURES[0], next(iter(KINDS)))]
    rows = [header, ["---"] * len(header)]
    for architecture in ARCHITECTURES:
        for kind, titles in KINDS.items():
            row = [f"`{architecture}`", titles[language]]
            for cell in cells(architecture, kind).values():
                note = f" [{names.index(cell.note) + 1}]" if cell.note else ""
                row.append(f"{_WORDS[language][cell.outcome]} ({cell.version}){note}")
            rows.append(row)
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return table + "\n\n" + "\n".join(f"{at}. {NOTES[name][language]}" for at, name in enumerate(names, start=1))

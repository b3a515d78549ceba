"""The named shapes.

GPT-NeoX shapes: rotary embedding on the whole head, context 2048, untied head; hidden size, layers, heads and
vocabulary are those of the sample that this project succeeds. Attention and MLP follow one another (sequential
residual) in 3.6b, as in rinna/japanese-gpt-neox-3.6b, and in 1b and 7b, which have the shapes of cyberagent's open-calm
(its config.json was not at hand: `model.pretrained` reads it). They run side by side (parallel residual) in 20b, as in
GPT-NeoX-20B, in 6b, which has GPT-J's shape, and in 13b and tiny. The Llama and Qwen3 shapes are for those who serve
with tools that know no GPT-NeoX; their vocabulary is the tokenizer's.
"""

import dataclasses
from dataclasses import dataclass

from transformers import AutoConfig, PretrainedConfig

from tsumugu.errors import UserError
from tsumugu.tokenizer.contract import Contract

VOCABULARY_MULTIPLE = 128


@dataclass(frozen=True)
class Shape:
    """Hidden size, layers, heads and vocabulary (None: the tokenizer's), and what else the architecture needs."""

    model_type: str
    hidden: int
    layers: int
    heads: int
    vocabulary: int | None = None
    extra: dict = dataclasses.field(default_factory=dict)


def _neox(hidden: int, layers: int, heads: int, vocabulary: int | None, parallel_residual: bool) -> Shape:
    extra = {
        "intermediate_size": 4 * hidden,
        "use_parallel_residual": parallel_residual,
        "rotary_pct": 1.0,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    }
    return Shape("gpt_neox", hidden, layers, heads, vocabulary, extra)


def _llama(hidden: int, layers: int, heads: int, key_value_heads: int, intermediate: int) -> Shape:
    extra = {
        "num_key_value_heads": key_value_heads,
        "intermediate_size": intermediate,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
    }
    return Shape("llama", hidden, layers, heads, None, extra)


def _qwen3(hidden: int, layers: int, intermediate: int) -> Shape:
    extra = {
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": intermediate,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": True,
        "rope_theta": 1000000.0,
    }
    return Shape("qwen3", hidden, layers, 16, None, extra)


PRESETS = {
    "tiny": _neox(192, 4, 4, None, parallel_residual=True),
    "1b": _neox(2048, 24, 16, 52096, parallel_residual=False),
    "3.6b": _neox(2816, 36, 22, 32000, parallel_residual=False),
    "6b": _neox(4096, 28, 16, 32000, parallel_residual=True),
    "7b": _neox(4096, 32, 32, 32000, parallel_residual=False),
    "13b": _neox(5120, 40, 40, 32000, parallel_residual=True),
    "20b": _neox(6144, 44, 64, 32000, parallel_residual=True),
    "llama-1b": _llama(2048, 16, 32, 8, 8192),
    "llama-3.7b": _llama(3072, 28, 24, 24, 8192),
    "llama-7b": _llama(4096, 32, 32, 32, 11008),
    "llama-13b": _llama(5120, 40, 40, 40, 13824),
    "qwen3-0.6b": _qwen3(1024, 28, 3072),
    "qwen3-1.7b": _qwen3(2048, 28, 6144),
}


def preset_config(name: str, contract: Contract) -> PretrainedConfig:
    """The configuration of a named shape for a tokenizer.

    The vocabulary is the tokenizer's, or the shape's own where that is larger, rounded up to a multiple of 128.

    Raises:
        UserError: No shape of that name.
    """
    own = PRESETS[name].vocabulary if name in PRESETS else None
    ids = {"bos_token_id": contract.bos_id, "eos_token_id": contract.eos_id, "pad_token_id": contract.pad_id}
    return sized_config(name, max(contract.vocab_size, own or 0), **ids)


def sized_config(name: str, vocabulary: int, **ids: int | None) -> PretrainedConfig:
    """The configuration of a named shape with so large a vocabulary, rounded up to a multiple of 128.

    Raises:
        UserError: No shape of that name.
    """
    if name not in PRESETS:
        raise UserError(f"model.preset: no shape {name}", f"known: {', '.join(PRESETS)}")
    shape = PRESETS[name]
    return AutoConfig.for_model(
        shape.model_type,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        vocab_size=-(-vocabulary // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE,
        use_cache=True,
        **ids,
        **shape.extra,
    )

"""The named shapes: parameters counted by hand and published, vocabulary rounding, residuals."""

import dataclasses

import pytest
import torch
from transformers import PretrainedConfig

from tsumugu.errors import UserError
from tsumugu.model.build import meta_model
from tsumugu.model.presets import PRESETS, preset_config
from tsumugu.tokenizer.contract import Contract


def contract(vocab_size: int) -> Contract:
    fields = dict.fromkeys((field.name for field in dataclasses.fields(Contract)), None)
    return Contract(**{**fields, "vocab_size": vocab_size, "bos_id": 1, "eos_id": 2, "pad_id": 3})  # type: ignore


def parameters(config: PretrainedConfig) -> int:
    return sum(p.numel() for p in meta_model(config, torch.bfloat16).parameters())


def neox(hidden: int, layers: int, vocabulary: int) -> int:
    """Two embeddings; a layer's qkv, dense, two MLP matrices with biases and two norms; a last norm."""
    return 2 * vocabulary * hidden + layers * (12 * hidden**2 + 13 * hidden) + 2 * hidden


COUNTS = {
    "tiny": neox(192, 4, 4096),
    "1b": neox(2048, 24, 52096),
    "3.6b": neox(2816, 36, 32000),
    "6b": neox(4096, 28, 32000),
    "7b": neox(4096, 32, 32000),
    "13b": neox(5120, 40, 32000),
    "20b": neox(6144, 44, 32000),
    # two embeddings, a last norm; a layer's q and o, k and v, MLP and two norms
    "llama-1b": 2 * 4096 * 2048 + 2048 + 16 * (2 * 2048**2 + 2 * 2048 * 512 + 3 * 2048 * 8192 + 2 * 2048),
    "llama-3.7b": 2 * 4096 * 3072 + 3072 + 28 * (4 * 3072**2 + 3 * 3072 * 8192 + 2 * 3072),
    "llama-7b": 2 * 4096 * 4096 + 4096 + 32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096),
    "llama-13b": 2 * 4096 * 5120 + 5120 + 40 * (4 * 5120**2 + 3 * 5120 * 13824 + 2 * 5120),
    # one embedding, a last norm; a layer's q and o, k and v, MLP, two norms and those of q and k
    "qwen3-0.6b": 4096 * 1024 + 1024 + 28 * (2 * 1024 * 2048 + 2 * 1024 * 1024 + 3 * 1024 * 3072 + 2 * 1024 + 256),
    "qwen3-1.7b": 4096 * 2048 + 2048 + 28 * (2 * 2048 * 2048 + 2 * 2048 * 1024 + 3 * 2048 * 6144 + 2 * 2048 + 256),
}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_the_parameters_counted_by_hand(name: str):
    assert parameters(preset_config(name, contract(4000))) == COUNTS[name]


@pytest.mark.parametrize(
    ("name", "vocabulary", "published"),
    [
        ("llama-7b", 32000, 6_738_415_616),  # meta-llama/Llama-2-7b-hf
        ("llama-13b", 32000, 13_015_864_320),  # meta-llama/Llama-2-13b-hf
        ("qwen3-0.6b", 151936, 596_049_920),  # Qwen/Qwen3-0.6B
        ("qwen3-1.7b", 151936, 1_720_574_976),  # Qwen/Qwen3-1.7B
        ("20b", 50432, 20_554_567_680),  # EleutherAI/gpt-neox-20b
    ],
)
def test_a_preset_has_the_parameters_of_the_published_model(name: str, vocabulary: int, published: int):
    assert parameters(preset_config(name, contract(vocabulary))) == published


@pytest.mark.parametrize(
    ("name", "tokenizer", "model"),
    [("tiny", 4000, 4096), ("tiny", 4096, 4096), ("tiny", 4097, 4224), ("3.6b", 30000, 32000), ("3.6b", 32001, 32128)],
)
def test_the_vocabulary_is_the_larger_one_rounded_up_to_a_multiple_of_128(name: str, tokenizer: int, model: int):
    assert preset_config(name, contract(tokenizer)).vocab_size == model


def test_special_ids_are_the_tokenizers():
    config = preset_config("llama-1b", contract(4000))
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 3)


def test_residuals_are_sequential_or_parallel_as_in_the_named_models():
    sequential = {"1b", "3.6b", "7b"}  # open-calm-1b, japanese-gpt-neox-3.6b, open-calm-7b
    for name in ("tiny", "1b", "3.6b", "6b", "7b", "13b", "20b"):
        config = preset_config(name, contract(4000))
        assert config.use_parallel_residual == (name not in sequential), name
        assert config.rope_parameters["partial_rotary_factor"] == 1.0
        assert config.max_position_embeddings == 2048


def test_an_unknown_preset_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match=r"no shape 8b .*known: tiny, 1b"):
        preset_config("8b", contract(4000))

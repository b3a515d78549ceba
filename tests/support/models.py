"""Tiny configurations of every architecture that the project promises, and stock models of them."""

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.bloom import modeling_bloom
from transformers.models.llama import modeling_llama
from transformers.models.qwen3 import modeling_qwen3

VOCABULARY = 131  # odd, so that shards are uneven

_SHAPES = {
    "gpt_neox": dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64),
    "gpt2": dict(n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "bloom": dict(hidden_size=32, n_layer=2, n_head=4),
    "llama": dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, num_key_value_heads=2
    ),
}
_SHAPES["qwen3"] = {**_SHAPES["llama"], "head_dim": 8}
ARCHITECTURES = tuple(_SHAPES)


def tiny_config(architecture: str, tied: bool, **changes) -> PretrainedConfig:
    """A two-layer configuration; vocabulary ids 1 and 2 are bos and eos, 3 is pad."""
    values = dict(vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, pad_token_id=3, tie_word_embeddings=tied)
    return AutoConfig.for_model(architecture, **{**_SHAPES[architecture], **values, **changes})


def stock_model(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """transformers' own model with random weights that differ from zero everywhere, biases and norms too."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def exact_norm(self: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """RMSNorm (Zhang and Sennrich, 2019), as Llama and Qwen3 have it."""
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
    return self.weight * wide.to(hidden.dtype)


@contextlib.contextmanager
def exact_models() -> Iterator[None]:
    """transformers takes some things in float32, also in float64, where they would be exact to 1e-7 alone.

    BLOOM's softmax, in which also a query that is all padding would be NaN, since float64's smallest number, its mask,
    is minus infinity in float32; and the norms of Llama and Qwen3, which a compiler rounds otherwise.
    """

    def softmax(scores: torch.Tensor, dim: int, dtype: torch.dtype) -> torch.Tensor:
        return F.softmax(scores, dim, dtype=torch.promote_types(scores.dtype, dtype))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_bloom, "F", SimpleNamespace(**vars(F) | {"softmax": softmax}))
        patch.setattr(modeling_llama.LlamaRMSNorm, "forward", exact_norm)
        patch.setattr(modeling_qwen3.Qwen3RMSNorm, "forward", exact_norm)
        yield

"""Tiny configurations of every architecture that the project promises, and stock models of them."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

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

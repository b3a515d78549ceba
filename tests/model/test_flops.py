"""FLOPs in torchtitan's convention, by hand."""

import pytest
import torch
from support.models import tiny_config

from tsumugu.model import lora, nf4
from tsumugu.model.build import decoder_layers, meta_model
from tsumugu.model.flops import flops, peak_flops

# two GPT-NeoX layers (attention, an MLP of 64, biases and two norms) and the last norm
MATRICES_AND_NORMS = 2 * (4 * 32**2 + 2 * 32 * 64 + 9 * 32 + 64) + 2 * 32


def test_flops_are_six_a_parameter_without_the_input_embedding_and_twelve_for_attention():
    untied = meta_model(tiny_config("gpt_neox", False), torch.float32)
    tied = meta_model(tiny_config("gpt_neox", True), torch.float32)
    parameters = MATRICES_AND_NORMS + 131 * 32  # the head, which is a matrix product also where it is tied
    rows = [16, 9]
    expected = 6 * parameters * sum(rows) + 12 * 2 * 32 * sum(row**2 for row in rows)
    assert flops(untied, 25, 16**2 + 9**2) == flops(tied, 25, 16**2 + 9**2) == expected


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_frozen_weights_count_four_however_they_are_held_and_adapters_six(quantize: str | None):
    pytest.importorskip("peft")
    model = meta_model(tiny_config("llama", False, hidden_size=64, intermediate_size=128), torch.bfloat16)
    whole = flops(model, 10, 100)
    adapters = lora.Adapters(
        rank=4, alpha=8.0, dropout=0.0, targets=["q_proj"], new_rows=[], base="", base_sha256="", quantize=quantize
    )
    lora.add_adapters(model, adapters, torch.float32)
    if quantize:
        nf4.replace(decoder_layers(model), torch.bfloat16)
    attention = 12 * 2 * 64 * 100
    assert flops(model, 10, 100) == (whole - attention) * 4 // 6 + attention + 6 * 10 * 2 * 4 * (64 + 64)


def test_attention_counts_heads_times_head_size():
    wide = meta_model(tiny_config("qwen3", True, head_dim=16), torch.float32)
    assert flops(wide, 10, 100) - flops(wide, 10, 0) == 12 * 2 * (4 * 16) * 100


def test_no_peak_is_made_up_for_a_cpu():
    assert peak_flops(torch.device("cpu")) is None

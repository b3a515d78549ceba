"""Floating-point operations of training, and the devices' peaks.

The convention is torchtitan's: 6 N, where N leaves out the input embedding, plus 12 · layers · hidden · sequence for
attention, whether or not it is causal (hidden: heads × head size, which in Qwen3 is not the hidden size). Of a frozen
weight, which needs no gradient, it is 4. Recomputation does not count.
"""

import torch
from transformers import PreTrainedModel

from tsumugu.model import nf4

# dense bf16 peak in FLOP/s, by the vendors' data sheets; the first name that the device's name contains
_PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10G": 70e12,
}


def flops(model: PreTrainedModel, tokens: int, squared_lengths: int) -> int:
    """FLOPs of forward and backward over rows with `tokens` inputs in all, and the sum of their squared lengths."""
    weights = {parameter: 6 if parameter.requires_grad else 4 for parameter in model.parameters()}
    if not model.config.tie_word_embeddings:
        for parameter in model.get_input_embeddings().parameters():
            del weights[parameter]
    sizes = {parameter: parameter.numel() for parameter in weights}
    for module in model.modules():
        if isinstance(module, nf4.Linear):
            sizes |= {module.codes: module.in_features * module.out_features, module.scales: 0}
    config = model.config
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 12 * config.num_hidden_layers * config.num_attention_heads * head_size * squared_lengths
    return sum(each * sizes[parameter] for parameter, each in weights.items()) * tokens + attention


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of the device, or None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in _PEAKS.items() if known in name), None)

"""Floating-point operations of training, and the devices' peaks.

The convention is torchtitan's: 6 N, where N leaves out the input embedding, plus 12 · layers · hidden · sequence for
attention, whether or not it is causal. Recomputation does not count.
"""

import torch
from transformers import PreTrainedModel

# dense bf16 peak in FLOP/s, by the vendors' data sheets; the first name that the device's name contains
_PEAKS = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "A10G": 70e12}


def flops(model: PreTrainedModel, tokens: int, squared_lengths: int) -> int:
    """FLOPs of forward and backward over rows with `tokens` inputs in all, and the sum of their squared lengths."""
    parameters = sum(p.numel() for p in model.parameters())
    if not model.config.tie_word_embeddings:
        parameters -= model.get_input_embeddings().weight.numel()
    attention = 12 * model.config.num_hidden_layers * model.config.hidden_size * squared_lengths
    return 6 * parameters * tokens + attention


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of the device, or None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in _PEAKS.items() if known in name), None)

"""Attention that keeps the documents of a row apart.

transformers' models build a mask of blocks from restarting positions, which costs as much as full attention over the
row. On CUDA torch's variable-length attention reads where documents begin and end instead, and computes nothing across
them. It is registered with transformers under a name of ours, for which transformers builds no mask; what it needs goes
through the model as the keyword arguments that transformers has for flash attention.
"""

import inspect
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tsumugu.distributed.environment import on_device

VARLEN = "tsumugu_varlen"
CAUSAL = "tsumugu_causal"

# Before torch 2.12 (by its documentation) varlen_attn wants as many heads of keys as of queries.
_KNOWS_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters


def keep_documents_apart(model: PreTrainedModel, dtype: torch.dtype) -> str:
    """Chooses the attention of a model that is trained on rows of several documents.

    Args:
        model: On its device; its attention is set to variable-length attention where that is exact.
        dtype: In which it computes.

    Returns:
        A line for the user: which attention it is, and why.
    """
    cuda = model.device.type == "cuda"
    capability = torch.cuda.get_device_capability(model.device) if cuda else (0, 0)
    reason = no_varlen(model, dtype, model.device.type, capability)
    if reason is None:
        model.set_attn_implementation(VARLEN)
        return "documents are kept apart by variable-length attention"
    return f"documents are kept apart by a mask over whole rows ({reason})"


def without_masks(model: PreTrainedModel) -> None:
    """Keeps transformers from looking for masks, where rows are full and documents not kept apart, so that it has none.

    It looks whether positions restart, for which the host waits for the device in every forward pass. The attention
    stays the same function, under a name for which transformers makes no masks. Models without rotary positions may
    put theirs into the mask.
    """
    config = model.config
    rotary = getattr(config, "rope_parameters", None) and not getattr(config, "alibi", False)
    if model.device.type == "cuda" and config._attn_implementation == "sdpa" and rotary and _attends_to_all(config):
        model.set_attn_implementation(CAUSAL)


def arguments(model: PreTrainedModel, boundaries: np.ndarray | None, longest: int) -> dict[str, Any]:
    """Keyword arguments that a model's forward pass needs beside the tokens and their positions.

    Args:
        model: As `keep_documents_apart` left it.
        boundaries: (documents + 1,) int32, where documents begin and end in the rows laid end to end, from the host's
            lengths, so that nothing waits for the device; None where documents are not kept apart.
        longest: No document is longer. A bound that is the same for every batch lets a compiled layer be used again.
    """
    if boundaries is None or model.config._attn_implementation != VARLEN:
        return {}
    ends = on_device(boundaries, model.device)
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}


def varlen_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    *,
    cu_seq_lens_q: torch.Tensor,
    max_length_q: int,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within documents, in the form that transformers calls.

    Args:
        module: The attention layer.
        query: (batch, heads, tokens, head size).
        key: (batch, heads of keys, tokens, head size).
        value: As key.
        attention_mask: None.
        scaling: Of the scores; None: one over the root of the head size.
        cu_seq_lens_q: As of `arguments`.
        max_length_q: As of `arguments`.

    Returns:
        (batch, tokens, heads, head size), and no weights.
    """
    assert attention_mask is None
    batch, heads, tokens, _size = query.shape
    query, key, value = (states.transpose(1, 2).flatten(0, 1) for states in (query, key, value))
    grouped: dict[str, Any] = {}
    if key.shape[1] != heads:
        if _KNOWS_GQA:
            grouped = {"enable_gqa": True}
        else:
            key, value = (states.repeat_interleave(heads // states.shape[1], dim=1) for states in (key, value))
    output: Any = varlen_attn(  # a tensor, since nothing else is asked for
        query, key, value, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q,
        scale=scaling, window_size=(-1, 0), **grouped,
    )  # fmt: skip
    return output.unflatten(0, (batch, tokens)), None


AttentionInterface.register(VARLEN, varlen_attention)
AttentionInterface.register(CAUSAL, sdpa_attention_forward)


def _attends_to_all(config: PretrainedConfig) -> bool:
    """Whether every layer attends to everything before a token."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return kinds == {"full_attention"} and not getattr(config, "sliding_window", None)


def no_varlen(model: PreTrainedModel, dtype: torch.dtype, device_type: str, capability: tuple[int, int]) -> str | None:
    """Why variable-length attention is not used on a device; None where it is."""
    config: PretrainedConfig = model.config
    if device_type != "cuda":
        return "variable-length attention needs a GPU"
    if capability < (8, 0):
        return "variable-length attention needs a GPU of compute capability 8.0 or more"
    if dtype not in (torch.bfloat16, torch.float16):
        return "variable-length attention needs bfloat16 or float16"
    if not model._can_set_attn_implementation():
        return f"{config.model_type} has an attention of its own"
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if size % 8 or size > 256 or getattr(config, "v_head_dim", None):
        return "variable-length attention needs heads of one size, a multiple of 8 up to 256"
    if any(getattr(config, key, 0) for key in ("attention_dropout", "attn_pdrop")):
        return "variable-length attention has no dropout"
    if not _attends_to_all(config):
        return "variable-length attention is used for full attention only"
    if getattr(config, "attn_logit_softcapping", None):
        return "variable-length attention has no soft cap"
    return None

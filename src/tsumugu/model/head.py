"""The summed loss computed by the model's own head over chunks of tokens (see `kernels.cross_entropy`).

It stands in for the model's forward pass where that is the head on what the decoder stack returns and nothing more,
which is tried out: whatever scales, caps or masks the logits makes them differ.
"""

import functools
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from tsumugu.errors import UserError
from tsumugu.kernels.cross_entropy import summed_cross_entropy


def sum_losses(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> str | None:
    """Lets a model's forward pass take `targets`, for which it returns the sum of their cross entropies.

    `targets` are positions (int64, of the batch laid end to end; None: all of them) and the label of each, an id.
    Without them it does what it did.

    Args:
        model: With weights; every process calls it.
        device: On which it computes.
        dtype: In which it computes.

    Returns:
        Why it is left as it is, or None.

    Raises:
        UserError: It cannot be tried out.
    """
    reason = _differs(model, device, dtype)
    if reason is None:
        forward, head = model.forward, model.get_output_embeddings()
        assert isinstance(head, nn.Linear)

        @functools.wraps(forward)
        def with_targets(*args: Any, targets: tuple[torch.Tensor | None, torch.Tensor] | None = None, **kwargs: Any):
            if targets is None:
                return forward(*args, **kwargs)
            positions, labels = targets
            hidden = model.base_model(*args, **kwargs).last_hidden_state.flatten(0, 1)
            if positions is not None:
                hidden = hidden.index_select(0, positions)
            return summed_cross_entropy(hidden, head.weight, head.bias, labels)

        model.forward = with_targets  # type: ignore[method-assign]
    return reason


def is_last(model: PreTrainedModel, dtype: torch.dtype) -> bool:
    """Whether the logits of a model of fake tensors are its head's output, untouched: what `sum_losses` tries out."""
    head: Any = model.get_output_embeddings()
    if model.base_model is model or type(head) is not nn.Linear:
        return False
    states = torch.empty(1, 8, head.in_features, dtype=dtype)
    logits, seen = _of_stub(model, states)
    if len(seen) != 2:
        return False
    pairs = (seen[0], states), (seen[1], logits)
    return all(one.untyped_storage() is other.untyped_storage() for one, other in pairs)


def _of_stub(model: PreTrainedModel, states: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A model's logits where its decoder stack returns `states`, and input and output of its head, if it is whole."""
    base: Any = model.base_model
    head: Any = model.get_output_embeddings()
    seen: list[torch.Tensor] = []

    def look(module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if not isinstance(module.weight, DTensor):
            seen.extend((inputs[0], output))

    stub, own = _HiddenStates(last_hidden_state=states), base.__dict__.get("forward")
    hook = head.register_forward_hook(look)
    base.forward = lambda *args, **kwargs: stub
    try:
        ids = torch.zeros(states.shape[:2], dtype=torch.int64, device=states.device)
        return model(input_ids=ids, use_cache=False).logits, seen
    finally:
        hook.remove()
        del base.forward
        if own is not None:
            base.forward = own


class _HiddenStates(BaseModelOutputWithPastAndCrossAttentions):
    """What a decoder stack returns, of which nothing but hidden states is there."""

    def __getattr__(self, name: str) -> None:
        return None


@torch.no_grad()
def _differs(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> str | None:
    """In what the model's logits are not those of its head on what the decoder stack returns; None: they are."""
    head: Any = model.get_output_embeddings()
    if model.base_model is model or type(head) is not nn.Linear:
        return "the model's head is not one linear layer"
    states = torch.arange(8 * head.in_features, device=device).cos().view(1, 8, -1).to(dtype) * 1000
    try:
        logits, seen = _of_stub(model, states)
    except Exception as error:  # after which FSDP2 is in no state to go on
        reason = f"the head of a model of type {model.config.model_type} cannot be tried out: {error}"
        raise UserError(reason, "set parallel.chunked_loss to false") from error
    if len(seen) != 2:
        return "the model's head is split"
    if not torch.equal(seen[0], states) or not torch.equal(seen[1].to(logits.dtype), logits):
        return f"a model of type {model.config.model_type} does more than its head to make logits"
    return None

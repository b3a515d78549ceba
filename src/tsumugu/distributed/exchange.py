"""When devices exchange gradients: in every micro batch, or once a step (parallel.sync_each_micro_batch)."""

from collections import Counter
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from tsumugu.config import ParallelConfig
from tsumugu.distributed.parallelize import fsdp_modules, is_recomputed
from tsumugu.errors import UserError
from tsumugu.kernels.linear import Sum, sum_in_products


class Exchange:
    """Tells FSDP2, before every forward pass of a step, what the backward pass does with its gradients.

    Once a step: gradients are summed on every device until the last micro batch, and weights that stay gathered after
    forward stay so until then, too. Where all weights are trained, the matrix products of layers that are not
    recomputed add to the sums themselves, as on one device.

    Args:
        model: Sharded by FSDP2, or not.
        layers: Its decoder layers, in their order.
        config: With nothing left to decide (see `distributed.paths`).
        dtype: Of the sums.
        device: On which it computes.
        micro_batches: Of a step, on this process.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: list[nn.Module],
        config: ParallelConfig,
        dtype: torch.dtype,
        device: torch.device,
        micro_batches: int,
    ):
        self._root = model if isinstance(model, FSDPModule) and not config.sync_each_micro_batch else None
        self._stays_gathered = config.reshard_after_forward == "never"
        self._held: list[tuple[Any, Sum]] = []  # FSDP2's parameters, and the sums that products make
        self._uses: Counter[nn.Module] = Counter()  # of those layers, by the latest forward pass
        trained = all(parameter.requires_grad for parameter in model.parameters())  # and so inputs need gradients, too
        if self._root is not None and micro_batches > 1 and config.tensor_degree == 1 and trained:
            for index, layer in enumerate(layers):
                if not is_recomputed(index, config):
                    self._held += _summed(layer, dtype, device)
                    layer.register_forward_pre_hook(lambda used, _: self._uses.update([used]))

    def before(self, last: bool) -> None:
        """Before the forward pass of a micro batch, the last of its step or not."""
        if self._root is None:
            return
        self._uses.clear()
        self._root.set_requires_gradient_sync(last)
        self._root.set_reshard_after_backward(last or not self._stays_gathered)
        if last:
            for parameter, held in self._held:
                parameter.unsharded_accumulated_grad = held.total

    def after(self) -> None:
        """After the last backward pass of a step.

        Raises:
            UserError: A layer was not used in the step, whose sum is that of the step before; or twice in a pass, of
                which FSDP2 had exchanged the sum before backward came to the first use.
        """
        hint = "set parallel.sync_each_micro_batch to true"
        if self._uses and max(self._uses.values()) > 1:
            raise UserError("a layer of the model is used more than once in a pass", hint)
        for _, held in self._held:
            if not held.begun:
                raise UserError("a layer of the model takes no part in some steps", hint)
            held.begun.fill_(False)

    def waiting(self) -> list[torch.Tensor]:
        """The sums that are not exchanged yet: those of products, and those that FSDP2 makes itself."""
        if self._root is None:
            return []
        groups = [module._get_fsdp_state()._fsdp_param_group for module in fsdp_modules(self._root)]
        parameters: Any = [parameter for group in groups if group for parameter in group.fsdp_params]
        found = [held.total for _, held in self._held]
        found += [parameter.unsharded_accumulated_grad for parameter in parameters]
        found += [parameter._unsharded_param.grad for parameter in parameters if hasattr(parameter, "_unsharded_param")]
        return [tensor for tensor in found if tensor is not None]


def _summed(layer: nn.Module, dtype: torch.dtype, device: torch.device) -> list[tuple[Any, Sum]]:
    """Makes products of a layer add to sums of their own. FSDP2 is handed them as those that it makes itself of
    gradients that are not exchanged yet, for which it has no public way."""
    assert isinstance(layer, FSDPModule)
    group: Any = layer._get_fsdp_state()._fsdp_param_group
    found = []
    for parameter in group.fsdp_params:
        place = parameter._module_info
        module, alone = place.module, not place.shared_modules
        if type(module) is nn.Linear and place.param_name == "weight" and alone:
            held = Sum(torch.zeros(module.weight.shape, dtype=dtype, device=device), torch.tensor(False))
            sum_in_products(module, {module.weight: held})
            found.append((parameter, held))
    return found

"""Steps that would do harm: found on the device before the optimizer applies them, without waiting for the device.

Every process computes the same verdict from the same reduced figures, so that all apply a step or none does.
"""

import math

import torch

from tsumugu.config import GuardConfig

APPLIED, NON_FINITE, SPIKE = 0, 1, 2


class Guard:
    """Judges the steps of a run; holds the losses of its latest good ones.

    Args:
        config: The section of the configuration.
        device: Where the losses are computed.
        losses: `losses()` of the run at the step from which it goes on.
    """

    def __init__(self, config: GuardConfig, device: torch.device, losses: list[float]):
        self.config = config
        recent = losses[-config.spike_window :]
        recent = [math.nan] * (config.spike_window - len(recent)) + recent
        self._recent = torch.tensor(recent, dtype=torch.float64, device=device)

    def judge(self, loss: torch.Tensor, grad_norm: torch.Tensor) -> torch.Tensor:
        """The verdict on a step, on the device, and takes note of the loss of a good one.

        A spike is a loss that lies more than `spike_deviations` standard deviations above the mean of the last
        `spike_window` good ones (the rule of OLMo's skip-step optimizer); before there are so many there is none.

        Args:
            loss: Of the whole step on all processes, a scalar in float64.
            grad_norm: Likewise.
        """
        verdict = torch.zeros((), dtype=torch.int64, device=loss.device)
        if self.config.spike != "ignore":
            spread, mean = torch.std_mean(self._recent)  # NaN, and no spike, while one of them is
            verdict = torch.where(loss > mean + self.config.spike_deviations * spread, SPIKE, verdict)
        finite = torch.isfinite(loss) & torch.isfinite(grad_norm)
        verdict = torch.where(finite, verdict, NON_FINITE)
        if self.config.spike != "ignore":
            noted = torch.cat([self._recent[1:], loss[None]])
            self._recent = torch.where(verdict == APPLIED, noted, self._recent)
        return verdict

    def losses(self) -> list[float]:
        """What a checkpoint keeps, oldest first."""
        return [loss for loss in self._recent.tolist() if not math.isnan(loss)]

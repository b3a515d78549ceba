"""The learning rate of every step, as a function of the step."""

import math

from tsumugu.config import ScheduleConfig
from tsumugu.errors import UserError


def learning_rate(step: int, total_steps: int, peak: float, config: ScheduleConfig) -> float:
    """The learning rate with which optimizer step `step` (1 ... total_steps) is taken.

    Warmup rises linearly and reaches the peak at step `warmup_steps`; every decay reaches `min_learning_rate` exactly
    at `total_steps`.
    """
    if step <= config.warmup_steps:
        return peak * step / config.warmup_steps
    floor = config.min_learning_rate
    if config.kind == "constant":
        return peak
    if config.kind == "wsd":
        start, shape = total_steps - decay_steps(total_steps, config), config.decay_shape
    else:
        start, shape = config.warmup_steps, config.kind
    if step <= start:
        return peak
    progress = (step - start) / (total_steps - start)
    if shape == "exponential":
        return floor * (peak / floor) ** (1 - progress)
    remaining = {
        "linear": 1 - progress,
        "cosine": (1 + math.cos(math.pi * progress)) / 2,
        "sqrt": 1 - math.sqrt(progress),
    }[shape]
    return floor + (peak - floor) * remaining


def decay_steps(total_steps: int, config: ScheduleConfig) -> int:
    """Length of the final decay of `wsd`: as set, or a fifth of the run."""
    return config.decay_steps or max(1, total_steps // 5)


def check_schedule(total_steps: int, config: ScheduleConfig) -> None:
    """Raises UserError where warmup (and wsd's decay) do not fit into the run."""
    needed = config.warmup_steps + (decay_steps(total_steps, config) if config.kind == "wsd" else 0)
    if needed > total_steps:
        raise UserError(
            f"schedule.warmup_steps and decay_steps take {needed} steps, the run has {total_steps}",
            "shorten them, or lengthen the run",
        )

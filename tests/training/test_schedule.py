"""The learning rate of every step."""

import itertools

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from tsumugu.config import ScheduleConfig
from tsumugu.errors import UserError
from tsumugu.training.schedule import check_schedule, learning_rate

PEAK, FLOOR, STEPS = 3e-4, 1e-5, 40


def rates(steps: int = STEPS, **schedule) -> list[float]:
    return [learning_rate(step, steps, PEAK, ScheduleConfig(**schedule)) for step in range(1, steps + 1)]


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "exponential", "wsd"])
@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_warmup_rises_evenly_to_the_peak(kind: str, warmup: int):
    found = rates(kind=kind, warmup_steps=warmup, min_learning_rate=FLOOR)
    assert found[:warmup] == pytest.approx([PEAK * step / warmup for step in range(1, warmup + 1)], rel=1e-15)
    assert max(found) == (found[warmup - 1] if warmup else pytest.approx(PEAK, rel=0.1))


@pytest.mark.parametrize("steps", [1, 2, 40])
@pytest.mark.parametrize(
    "schedule",
    [{"kind": "linear"}, {"kind": "cosine"}, {"kind": "exponential"}]
    + [{"kind": "wsd", "decay_shape": shape} for shape in ("linear", "cosine", "sqrt")],
    ids=lambda schedule: "-".join(schedule.values()),
)
def test_every_decay_falls_all_the_way_and_ends_exactly_at_the_floor(schedule: dict, steps: int):
    found = rates(steps, min_learning_rate=FLOOR, **schedule)
    assert found[-1] == FLOOR
    assert found == sorted(found, reverse=True)
    if schedule["kind"] != "exponential":
        assert rates(steps, **schedule)[-1] == 0.0


def test_constant_stays_at_the_peak():
    assert set(rates(kind="constant")) == {PEAK}


def test_a_run_that_is_all_warmup_ends_at_the_peak():
    assert rates(4, kind="cosine", warmup_steps=4)[-1] == PEAK


def test_wsd_keeps_its_plateau_until_the_last_decay_steps():
    found = rates(kind="wsd", warmup_steps=5, decay_steps=10, min_learning_rate=FLOOR)
    assert set(found[4:30]) == {PEAK}
    assert found[30:] == pytest.approx([PEAK - (PEAK - FLOOR) * step / 10 for step in range(1, 11)])
    assert set(rates(kind="wsd")[:32]) == {PEAK}  # a fifth of the run decays
    assert rates(kind="wsd")[32] < PEAK


def test_wsd_sqrt_falls_with_the_root_of_its_progress():
    """One minus the root: Hägele et al., "Scaling laws and compute-optimal training beyond fixed durations", 2024."""
    found = rates(kind="wsd", decay_steps=16, decay_shape="sqrt")
    assert found[24 + 3] == pytest.approx(PEAK * (1 - 0.5))
    assert found[24 + 8] == pytest.approx(PEAK * (1 - 0.75))


def test_exponential_falls_by_the_same_factor_every_step():
    found = rates(kind="exponential", min_learning_rate=FLOOR)
    assert [b / a for a, b in itertools.pairwise(found)] == pytest.approx([(FLOOR / PEAK) ** (1 / STEPS)] * 39)


@pytest.mark.parametrize(
    ("kind", "make"), [("cosine", get_cosine_schedule_with_warmup), ("linear", get_linear_schedule_with_warmup)]
)
def test_cosine_and_linear_are_those_of_transformers(kind: str, make):
    """transformers' scheduler starts at zero and takes its first step at 0; ours takes that of its second."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    theirs = make(optimizer, num_warmup_steps=6, num_training_steps=STEPS)
    expected = []
    for _ in range(STEPS):
        optimizer.step()
        theirs.step()
        expected.append(optimizer.param_groups[0]["lr"])
    assert rates(kind=kind, warmup_steps=6) == pytest.approx(expected, rel=1e-12, abs=1e-18)


@pytest.mark.parametrize(
    "schedule", [{"kind": "cosine", "warmup_steps": 41}, {"kind": "wsd", "warmup_steps": 30, "decay_steps": 11}]
)
def test_a_schedule_that_does_not_fit_into_the_run_is_refused(schedule: dict):
    with pytest.raises(UserError, match="take 41 steps, the run has 40"):
        check_schedule(STEPS, ScheduleConfig(**schedule))

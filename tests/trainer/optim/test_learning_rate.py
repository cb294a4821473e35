"""Learning rates at the corners of every schedule, against the closed forms."""

from __future__ import annotations

import math

import pytest

from configs.sections.optimizer import OptimizerConfig, ScheduleConfig
from trainer.optim.learning_rate import compute_learning_rate

HIGH, LOW, NUM_STEPS = 1e-2, 1e-3, 100
MIDDLE = (HIGH + LOW) / 2


def rate(step: int, **schedule: object) -> float:
    optimizer = OptimizerConfig(lr=HIGH, min_lr=LOW)
    return compute_learning_rate(step, NUM_STEPS, optimizer, ScheduleConfig.model_validate(schedule))


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "constant"])
def test_warmup_is_linear_and_ends_at_the_peak(kind):
    rates = [rate(step, kind=kind, warmup_steps=10) for step in range(12)]
    assert rates[:10] == pytest.approx([HIGH * (step + 1) / 10 for step in range(10)])
    assert rates[10] == pytest.approx(HIGH)


@pytest.mark.parametrize(
    ("fraction", "num_steps", "expected"),
    [
        (0.03, 100, 3),
        (0.07, 100, 7),
        (0.031, 100, 4),
        (0.03, 2, 1),
        (0.03, 1, 0),
        (0.999, 10, 9),
        (0, 5, 0),
        (0.5, 0, 0),
    ],
)
def test_a_share_of_the_steps_is_warmed_up(fraction, num_steps, expected):
    schedule = ScheduleConfig(warmup_fraction=fraction)
    assert schedule.count_warmup_steps(num_steps) == expected
    by_steps = ScheduleConfig(warmup_steps=expected)
    for step in range(num_steps):
        rates = [compute_learning_rate(step, num_steps, OptimizerConfig(), one) for one in (schedule, by_steps)]
        assert rates[0] == rates[1]


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "constant"])
def test_without_warmup_the_first_update_has_the_peak(kind):
    assert rate(0, kind=kind) == pytest.approx(HIGH)


@pytest.mark.parametrize("kind, at_quarter", [("linear", HIGH - (HIGH - LOW) / 4), ("cosine", None)])
def test_decay_goes_through_the_middle_to_the_end(kind, at_quarter):
    # Warm-up of 20, so the decay runs over steps 20..100 and its middle is 60.
    expected = at_quarter or LOW + (HIGH - LOW) * (1 + math.cos(math.pi / 4)) / 2
    assert rate(40, kind=kind, warmup_steps=20) == pytest.approx(expected)
    assert rate(60, kind=kind, warmup_steps=20) == pytest.approx(MIDDLE)
    assert rate(100, kind=kind, warmup_steps=20) == pytest.approx(LOW)
    assert rate(10_000, kind=kind, warmup_steps=20) == pytest.approx(LOW)


def test_decay_steps_end_the_decay_before_the_run_does():
    assert rate(50, kind="cosine", decay_steps=50) == pytest.approx(LOW)
    assert rate(25, kind="cosine", decay_steps=50) == pytest.approx(MIDDLE)


def test_constant_stays():
    assert {rate(step, kind="constant") for step in range(0, 200, 7)} == {HIGH}


def test_wsd_is_stable_until_its_decay():
    assert [rate(step, kind="wsd", wsd_decay_steps=20) for step in (1, 50, 80)] == pytest.approx([HIGH] * 3)
    assert rate(81, kind="wsd", wsd_decay_steps=20) < HIGH
    assert rate(89, kind="wsd") == pytest.approx(HIGH) and rate(91, kind="wsd") < HIGH  # default: the last tenth


@pytest.mark.parametrize(
    "shape, middle", [("linear", MIDDLE), ("cosine", MIDDLE), ("exponential", LOW + (HIGH - LOW) * (math.sqrt(2) - 1))]
)
def test_wsd_decay_shapes(shape, middle):
    schedule = {"kind": "wsd", "wsd_decay_steps": 20, "wsd_decay": shape}
    assert rate(80, **schedule) == pytest.approx(HIGH)
    assert rate(90, **schedule) == pytest.approx(middle)
    assert rate(100, **schedule) == pytest.approx(LOW)
    rates = [rate(step, **schedule) for step in range(80, 101)]
    assert all(later < earlier for earlier, later in zip(rates, rates[1:], strict=False))


def test_a_schedule_never_leaves_its_bounds():
    for kind in ("cosine", "linear", "wsd"):
        rates = [rate(step, kind=kind) for step in range(0, 150)]
        assert LOW <= min(rates) * (1 + 1e-12) and max(rates) <= HIGH * (1 + 1e-12)

"""Figures of a reward model on held-out pairs, by hand and by a calibration that is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from trainer.evaluate.rewards import calibration_error, judge_rewards


def test_figures_are_those_of_a_few_pairs_by_hand():
    pairs = np.array([[2.0, 0.0, 0.0], [1.0, 1.0, 0.0], [-1.0, 0.5, 0.25]])
    figures = judge_rewards(pairs)
    losses = [math.log(1 + math.exp(x)) for x in (-2.0, 0.0, 1.75)]
    assert figures["loss"] == pytest.approx(sum(losses) / 3, rel=1e-12)
    assert figures["accuracy"] == pytest.approx(1 / 3)  # a tie prefers nothing
    assert figures["margin"] == pytest.approx((2 + 0 - 1.5) / 3)
    rewards = [figures[f"{name}_reward"] for name in ("min", "mean", "max")]
    assert rewards == [-1.0, pytest.approx(3.5 / 6), 2.0]
    # confidences 0.881 right, 0.5 wrong and 0.818 wrong, each in a bin of its own
    gaps = [1 - 1 / (1 + math.exp(-2)), 0.5, 1 / (1 + math.exp(-1.5))]
    assert figures["calibration_error"] == pytest.approx(sum(gaps) / 3)


@pytest.mark.parametrize(("temperature", "is_calibrated"), [(1.0, True), (0.4, False), (3.0, False)])
def test_preferences_drawn_as_the_model_says_are_calibrated(temperature, is_calibrated):
    """Right with a probability of sigmoid(difference), and shown with differences over another temperature."""
    random = np.random.default_rng(3)
    confidence = random.uniform(0.5, 0.999, 40_000)
    differences = np.log(confidence / (1 - confidence)) * np.where(random.uniform(size=40_000) < confidence, 1, -1)
    error = calibration_error(differences / temperature)
    assert error < 0.01 if is_calibrated else error > 0.08

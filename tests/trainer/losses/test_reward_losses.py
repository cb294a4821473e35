"""Losses of reward models, value and slope, are their papers' in float64; beyond reason they are finite."""

from __future__ import annotations

import math

import pytest
import torch

from trainer.losses.reward import bradley_terry, centering

# rewards of a chosen and a rejected answer, and the margin
PAIRS = [(1.5, -0.25, 0.0), (-2.0, 3.0, 0.5), (0.5, 0.5, 1.0), (4.0, 1.0, 2.75)]


def paper(chosen: float, rejected: float, margin: float) -> float:
    """Return Bradley and Terry's loss, and 0.3 times the square of the sum."""
    better = math.exp(chosen) / (math.exp(chosen) + math.exp(rejected + margin))
    return -math.log(better) + 0.3 * (chosen + rejected) ** 2


def test_the_loss_and_its_slopes_are_the_papers():
    chosen, rejected, margin = torch.tensor(PAIRS, dtype=torch.float64).unbind(1)
    chosen, rejected = chosen.requires_grad_(), rejected.requires_grad_()
    losses = bradley_terry(chosen, rejected, margin) + 0.3 * centering(chosen, rejected)
    torch.testing.assert_close(losses.tolist(), [paper(*pair) for pair in PAIRS], rtol=1e-12, atol=0)
    losses.sum().backward()
    step = 1e-6
    for number, (c, r, m) in enumerate(PAIRS):
        assert float(chosen.grad[number]) == pytest.approx((paper(c + step, r, m) - paper(c - step, r, m)) / (2 * step))
        assert float(rejected.grad[number]) == pytest.approx(
            (paper(c, r + step, m) - paper(c, r - step, m)) / (2 * step)
        )


def test_rewards_beyond_reason_have_finite_losses_and_slopes():
    chosen = torch.tensor([-9000.0, 9000.0], requires_grad=True)
    losses = bradley_terry(chosen, torch.tensor([9000.0, -9000.0]), torch.zeros(2))
    losses.sum().backward()
    assert losses.tolist() == [18000.0, 0.0] and chosen.grad.tolist() == [-1.0, 0.0]

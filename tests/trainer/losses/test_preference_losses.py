"""Each loss of preferences is its paper's, written out in float64 with Python's own functions, value and slope.

And TRL's: figures that TRL 1.16.0 gave of the same numbers in float64, by `DPOTrainer`, `KTOTrainer`,
`experimental.cpo.CPOTrainer` (simpo) and `experimental.orpo.ORPOTrainer` (the odds ratio's part), whose models and
accelerators were stand-ins that hand over these log-probabilities; it has no cDPO or R-DPO.
"""

from __future__ import annotations

import math

import pytest
import torch

from trainer.losses import preference

BETA = 0.3
# log-ratios, or log-probabilities, of a chosen and a rejected answer, and their tokens
PAIRS = [(-3.0, -9.5, 4, 7), (-12.0, -2.25, 9, 3), (1.5, 1.5, 5, 5), (0.25, -60.0, 6, 40), (-55.0, -0.5, 50, 2)]


def sigmoid(x: float) -> float:
    """Return 1 / (1 + e^-x)."""
    return 1 / (1 + math.exp(-x))


def odds(mean: float) -> float:
    """Return p / (1 - p) of a mean log-probability."""
    return math.exp(mean) / (1 - math.exp(mean))


PAPERS = {
    "dpo": (lambda c, r, cn, rn: preference.dpo(c, r, BETA), lambda c, r, cn, rn: -math.log(sigmoid(BETA * (c - r)))),
    "cdpo": (
        lambda c, r, cn, rn: preference.dpo(c, r, BETA, 0.2),
        lambda c, r, cn, rn: -0.8 * math.log(sigmoid(BETA * (c - r))) - 0.2 * math.log(sigmoid(BETA * (r - c))),
    ),
    "rdpo": (
        lambda c, r, cn, rn: preference.rdpo(c, r, cn, rn, BETA, 0.05),
        lambda c, r, cn, rn: -math.log(sigmoid((BETA * c + 0.05 * cn) - (BETA * r + 0.05 * rn))),
    ),
    "ipo": (
        lambda c, r, cn, rn: preference.ipo(c, r, cn, rn, BETA),
        lambda c, r, cn, rn: (c / cn - r / rn - 0.5 / BETA) ** 2,
    ),
    "slic": (lambda c, r, cn, rn: preference.slic(c, r, BETA), lambda c, r, cn, rn: max(0.0, 1 - BETA * (c - r))),
    "apo_zero": (
        lambda c, r, cn, rn: preference.apo_zero(c, r, BETA),
        lambda c, r, cn, rn: 1 - sigmoid(BETA * c) + sigmoid(BETA * r),
    ),
    "apo_down": (
        lambda c, r, cn, rn: preference.apo_down(c, r, BETA),
        lambda c, r, cn, rn: sigmoid(BETA * c) + 1 - sigmoid(BETA * (c - r)),
    ),
    "orpo": (
        lambda c, r, cn, rn: preference.orpo(c / cn, r / rn, BETA),
        lambda c, r, cn, rn: -c / cn - BETA * math.log(1 / (1 + odds(r / rn) / odds(c / cn))),
    ),
    "simpo": (
        lambda c, r, cn, rn: preference.simpo(c / cn, r / rn, BETA, 0.7),
        lambda c, r, cn, rn: -math.log(sigmoid(BETA * (c / cn - r / rn) - 0.7)),
    ),
}


TRL = {
    "dpo": [0.133021075, 2.97727427, 0.693147181, 1.41295144e-08, 16.3500001],
    "slic": [0.0, 3.925, 1.0, 0.0, 17.35],
    "ipo": [1.1225907, 5.0625, 2.77777778, 0.015625, 6.33361111],
    "apo_zero": [0.76563082, 1.31078117, 1.0, 0.481258799, 1.46257009],
    "apo_down": [0.413603856, 0.975665523, 1.11063923, 0.51874123, 0.999999989],
    "simpo": [0.985229743, 1.22344458, 1.10318605, 0.818931453, 1.28056449],
    "orpo": [0.848178573, 1.70925184, 1.72593603],
}
"""Of `PAIRS`, with a beta of `BETA` and a gamma of 0.7."""
TRL_KTO = [0.616439349, 0.169624253, 0.334260623, 1.49999275]
"""Of the answers below."""


def pairs_of(name: str) -> list[tuple[float, float, int, int]]:
    """Return the pairs that a loss is defined for: a mean log-probability is below 0."""
    return [pair for pair in PAIRS if name != "orpo" or max(pair[:2]) < 0]


@pytest.mark.parametrize("name", TRL)
def test_a_loss_is_trls(name):
    losses = PAPERS[name][0](*torch.tensor(pairs_of(name), dtype=torch.float64).unbind(1))
    torch.testing.assert_close(losses.tolist(), TRL[name], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", PAPERS)
def test_a_loss_and_its_slopes_are_the_papers(name):
    ours, paper = PAPERS[name]
    pairs = pairs_of(name)
    chosen, rejected, chosen_tokens, rejected_tokens = torch.tensor(pairs, dtype=torch.float64).unbind(1)
    chosen, rejected = chosen.requires_grad_(), rejected.requires_grad_()
    losses = ours(chosen, rejected, chosen_tokens, rejected_tokens)
    torch.testing.assert_close(losses.tolist(), [paper(*pair) for pair in pairs], rtol=1e-9, atol=1e-12)
    losses.sum().backward()
    step = 1e-6
    for number, (c, r, *tokens) in enumerate(pairs):
        of_chosen = (paper(c + step, r, *tokens) - paper(c - step, r, *tokens)) / (2 * step)
        of_rejected = (paper(c, r + step, *tokens) - paper(c, r - step, *tokens)) / (2 * step)
        assert float(chosen.grad[number]) == pytest.approx(of_chosen, rel=1e-4, abs=1e-8)
        assert float(rejected.grad[number]) == pytest.approx(of_rejected, rel=1e-4, abs=1e-8)


def test_single_answers_are_kahneman_and_tverskys():
    log_ratios = torch.tensor([2.0, -3.0, 0.5, -40.0], dtype=torch.float64, requires_grad=True)
    is_desirable, divergence = torch.tensor([True, False, False, True]), 0.8
    losses = preference.kto(log_ratios, is_desirable, torch.tensor(divergence), BETA, 1.5, 0.7)
    expected = [
        1.5 * (1 - sigmoid(BETA * (2.0 - divergence))),
        0.7 * (1 - sigmoid(BETA * (divergence + 3.0))),
        0.7 * (1 - sigmoid(BETA * (divergence - 0.5))),
        1.5 * (1 - sigmoid(BETA * (-40.0 - divergence))),
    ]
    torch.testing.assert_close(losses.tolist(), expected, rtol=1e-7, atol=1e-9)  # z is fp32
    torch.testing.assert_close(losses.tolist(), TRL_KTO, rtol=1e-7, atol=1e-9)
    losses.sum().backward()
    assert (log_ratios.grad < 0).tolist() == [True, False, False, True]


@pytest.mark.parametrize("name", PAPERS)
def test_losses_of_answers_beyond_reason_are_finite(name):
    """Of log-ratios of thousands of nats in fp32, and of answers that the model is certain of."""
    ours, _ = PAPERS[name]
    chosen = torch.tensor([-9000.0, 0.0, -5e-8], requires_grad=True)
    rejected = torch.tensor([-1.0, -9000.0, 0.0], requires_grad=True)
    losses = ours(chosen, rejected, torch.full((3,), 3.0), torch.full((3,), 2.0))
    losses.sum().backward()
    assert all(torch.isfinite(one).all() for one in (losses, chosen.grad, rejected.grad))

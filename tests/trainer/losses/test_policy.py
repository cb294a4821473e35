"""Policy-gradient losses against the papers' equations, written out with `math` in float64 and differentiated there."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch

from trainer.losses.policy import (
    cispo_surrogate,
    clipped_surrogate,
    compute_kl,
    compute_ratio,
    importance_weights,
)

LOW, HIGH = 0.2, 0.28
# Ratios 1, above, far above, below, far below the bounds, with either sign of the advantage; no ratio on a bound.
LOG_RATIOS = [0.0, 0.1, 0.9, -0.1, -0.9, 0.0, 0.1, 0.9, -0.1, -0.9, 0.9]
ADVANTAGES = [1.5, 1.5, 1.5, 1.5, 1.5, -0.7, -0.7, -0.7, -0.7, -0.7, 0.0]
OLD = [-0.3, -2.0, -4.1, -1.7, -0.01, -6.0, -2.5, -1.3, -0.9, -3.3, -1.0]


def tensor(values: Sequence[float]) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float64)


def differentiate(function: Callable[[list[float]], float], point: Sequence[float]) -> list[float]:
    """Return the gradient by central differences."""
    step, gradient = 1e-6, []
    for place in range(len(point)):
        sides = []
        for sign in (1, -1):
            moved = list(point)
            moved[place] += sign * step
            sides.append(function(moved))
        gradient.append((sides[0] - sides[1]) / (2 * step))
    return gradient


def assert_is(found: torch.Tensor, expected: Sequence[float], tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found.detach(), tensor(expected), rtol=tolerance, atol=tolerance)


def ppo(log_prob: float, old: float, advantage: float) -> float:
    """PPO's clipped objective, negated, with DAPO's two bounds."""
    ratio = math.exp(log_prob - old)
    return -min(ratio * advantage, min(max(ratio, 1 - LOW), 1 + HIGH) * advantage)


def test_clipped_surrogate_is_ppo_with_two_bounds():
    new = [old + ratio for old, ratio in zip(OLD, LOG_RATIOS, strict=True)]
    log_probs = tensor(new).requires_grad_()
    loss, is_clipped = clipped_surrogate(compute_ratio(log_probs, tensor(OLD)), tensor(ADVANTAGES), LOW, HIGH)
    assert_is(loss, [ppo(*one) for one in zip(new, OLD, ADVANTAGES, strict=True)])
    loss.sum().backward()
    total = lambda point: sum(ppo(*one) for one in zip(point, OLD, ADVANTAGES, strict=True))  # noqa: E731
    assert log_probs.grad is not None
    assert_is(log_probs.grad, differentiate(total, new), 1e-8)
    # A better token is clipped above, a worse one below, and only these have no gradient.
    assert is_clipped[0].tolist() == [False, False, True, False, False, False, False, False, False, True, False]
    assert (log_probs.grad[0, :10] == 0).tolist() == is_clipped[0, :10].tolist()


def test_before_the_first_update_the_gradient_is_that_of_reinforce():
    log_probs = tensor(OLD).requires_grad_()
    loss, is_clipped = clipped_surrogate(compute_ratio(log_probs, tensor(OLD)), tensor(ADVANTAGES), LOW, HIGH)
    loss.sum().backward()
    assert log_probs.grad is not None
    assert_is(log_probs.grad, [-advantage for advantage in ADVANTAGES])
    assert not is_clipped.any()


ANSWERS = [(0, 3), (3, 4), (4, 8), (8, 10)]  # tokens of four answers, one of a single token


def sequence_objective(log_probs: Sequence[float], old: Sequence[float], advantages: Sequence[float]) -> float:
    """GSPO (arXiv:2507.18071, eq. 5 and 7): the mean over answers of min(s A, clip(s) A), negated."""
    total = 0.0
    for (start, end), advantage in zip(ANSWERS, advantages, strict=True):
        ratio = math.exp(sum(log_probs[i] - old[i] for i in range(start, end)) / (end - start))
        total += min(ratio * advantage, min(max(ratio, 1 - LOW), 1 + HIGH) * advantage)
    return -total / len(ANSWERS)


@pytest.mark.parametrize("advantages", [[1.0, -2.0, -0.5, 1.5], [-1.0, 2.0, 0.5, -1.5]])
def test_ratios_of_answers_give_the_gradient_of_the_sequence_objective(advantages):
    old = OLD[:10]
    shifts = [0.1, -0.3, 0.05, 0.6, -0.9, -0.2, 0.1, -0.4, 0.02, 0.7]
    new = [a + b for a, b in zip(old, shifts, strict=True)]
    lengths = [end - start for start, end in ANSWERS]
    means = [sum(shifts[start:end]) / (end - start) for start, end in ANSWERS]
    spread = [value for value, length in zip(means, lengths, strict=True) for _ in range(length)]
    weights = tensor([1 / length / len(ANSWERS) for length in lengths for _ in range(length)])
    by_token = tensor([value for value, length in zip(advantages, lengths, strict=True) for _ in range(length)])
    log_probs = tensor(new).requires_grad_()
    ratio = compute_ratio(log_probs, tensor(old), tensor(spread))
    loss, is_clipped = clipped_surrogate(ratio, by_token, LOW, HIGH)
    total = (loss * weights).sum()
    total.backward()
    assert total.item() == pytest.approx(sequence_objective(new, old, advantages), rel=1e-12)
    assert log_probs.grad is not None
    assert_is(log_probs.grad, differentiate(lambda point: sequence_objective(point, old, advantages), new), 1e-8)
    assert 0 < is_clipped.sum() < 10
    for start, end in ANSWERS:
        assert len(set(ratio[0, start:end].tolist())) == len(set(is_clipped[0, start:end].tolist())) == 1


def test_ratios_of_answers_keep_the_advantage_of_each_token():
    """GSPO-token (eq. 13 and 14): d/d log pi_t of s_t A_t is s A_t, s the ratio of the answer."""
    log_probs = tensor([-1.0, -2.0]).requires_grad_()
    ratio = compute_ratio(log_probs, tensor([-1.1, -2.0]), tensor([0.05, 0.05]))
    loss, _ = clipped_surrogate(ratio, tensor([2.0, -3.0]), LOW, HIGH)
    loss.sum().backward()
    assert log_probs.grad is not None
    assert_is(log_probs.grad, [-2 * math.exp(0.05), 3 * math.exp(0.05)])


def test_cispo_weighs_the_likelihood_and_no_token_loses_its_gradient():
    new = [old + ratio for old, ratio in zip(OLD, LOG_RATIOS, strict=True)]
    log_probs = tensor(new).requires_grad_()
    ratio = compute_ratio(log_probs, tensor(OLD))
    loss, is_clipped = cispo_surrogate(log_probs, ratio, tensor(ADVANTAGES), 1.0, 0.5)
    weights = [min(math.exp(one), 1.5) for one in LOG_RATIOS]
    assert_is(loss, [-w * a * x for w, a, x in zip(weights, ADVANTAGES, new, strict=True)])
    loss.sum().backward()
    assert log_probs.grad is not None
    assert_is(log_probs.grad, [-w * a for w, a in zip(weights, ADVANTAGES, strict=True)])
    assert is_clipped[0].tolist() == [one == 0.9 for one in LOG_RATIOS], "the lower bound is none"
    assert (log_probs.grad[0, :10] != 0).all()


def test_divergences_are_schulmans():
    new, reference = [-1.0, -0.2, -3.0, -2.0], [-1.4, -2.0, -0.5, -2.0]
    distances = [0.4, 1.8, -2.5, 0.0]
    values = {
        "k1": distances,
        "k2": [d * d / 2 for d in distances],
        "k3": [math.exp(-d) - 1 + d for d in distances],
    }
    slopes = {"k1": [1.0] * 4, "k2": distances, "k3": [1 - math.exp(-d) for d in distances]}
    for estimator, expected in values.items():
        log_probs = tensor(new).requires_grad_()
        found = compute_kl(log_probs, tensor(reference), estimator)  # type: ignore[arg-type]
        assert_is(found, expected)
        found.sum().backward()
        assert log_probs.grad is not None
        assert_is(log_probs.grad, slopes[estimator])


def test_estimators_have_the_mean_and_k2_the_gradient_of_the_divergence():
    """Over a whole vocabulary: E k1 = E k3 = KL; the mean gradient of k2 is that of KL, and k1's is nothing."""
    torch.manual_seed(0)
    logits, reference = torch.randn(7, dtype=torch.float64, requires_grad=True), torch.randn(7, dtype=torch.float64)
    log_probs, fixed = logits.log_softmax(-1), reference.log_softmax(-1)
    probs = log_probs.exp()
    divergence = (probs * (log_probs - fixed)).sum()
    (exact,) = torch.autograd.grad(divergence, logits, retain_graph=True)
    for estimator in ("k1", "k3"):
        mean = (probs.detach() * compute_kl(log_probs, fixed, estimator)).sum()  # type: ignore[arg-type]
        torch.testing.assert_close(mean, divergence)
    for estimator, gradient in (("k1", torch.zeros_like(exact)), ("k2", exact)):
        mean = (probs.detach() * compute_kl(log_probs, fixed, estimator)).sum()  # type: ignore[arg-type]
        (found,) = torch.autograd.grad(mean, logits, retain_graph=True)
        torch.testing.assert_close(found, gradient)


def test_small_divergences_are_not_rounded_away():
    distance = torch.tensor([[1e-4, -1e-4]])
    found = compute_kl(distance, torch.zeros_like(distance), "k3")
    torch.testing.assert_close(found, torch.full((1, 2), 5e-9), rtol=0.01, atol=1e-11)


def test_importance_weights_are_truncated_and_have_no_gradient():
    training, sampling = [-1.0, -2.0, -3.0], [-1.5, -1.9, -9.0]
    log_probs = tensor(training).requires_grad_()
    weights = importance_weights(log_probs, tensor(sampling), 2.0)
    assert_is(weights, [math.exp(0.5), math.exp(-0.1), 2.0])
    assert not weights.requires_grad
    assert_is(importance_weights(tensor([0.0]), tensor([-5e4]), 3.0), [3.0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("distance", [25.0, 1000.0, -25.0, -1000.0])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_extreme_ratios_stay_finite(distance, advantage, dtype):
    log_probs = torch.tensor([[distance]], dtype=dtype, requires_grad=True)
    old, advantages = torch.zeros(1, 1, dtype=dtype), torch.tensor([[advantage]], dtype=dtype)
    losses = [
        clipped_surrogate(compute_ratio(log_probs, old), advantages, LOW, HIGH)[0],
        clipped_surrogate(compute_ratio(log_probs, old, log_probs - old), advantages, LOW, HIGH)[0],
        cispo_surrogate(log_probs, compute_ratio(log_probs, old), advantages, 1.0, 4.0)[0],
        *(compute_kl(log_probs, old, estimator) for estimator in ("k1", "k2", "k3")),
        log_probs * importance_weights(log_probs, old, 5.0),
    ]  # fmt: skip
    for loss in losses:
        (gradient,) = torch.autograd.grad(loss.sum(), log_probs, retain_graph=True)
        assert torch.isfinite(loss).all() and torch.isfinite(gradient).all()


@pytest.mark.parametrize("distance", [-1000.0, -25.0, -3.0, 3.0, 25.0, 1000.0])
def test_a_divergence_never_drives_the_policy_further_away(distance):
    """Its slope has the sign of the distance, or is 0, however far away the reference is."""
    for estimator in ("k2", "k3"):
        log_probs = tensor([distance]).requires_grad_()
        compute_kl(log_probs, tensor([0.0]), estimator).sum().backward()  # type: ignore[arg-type]
        assert log_probs.grad is not None
        assert log_probs.grad.item() * distance >= 0, estimator

"""Advantages, returns and controllers of PPO against sums that are written out, and against verl's recursion."""

from __future__ import annotations

import numpy as np
import pytest

from configs.sections.ppo import AdaptiveKlSection
from trainer.rl.gae import compute_gae, explain_variance, fit_lambda, lay_rewards
from trainer.rl.kl_controller import KlController

LENGTHS = np.array([3, 1, 7, 2, 7])
RANDOM = np.random.default_rng(5)
REWARDS, VALUES = RANDOM.normal(size=(2, int(LENGTHS.sum())))


def written_out(gamma: float, lambdas: np.ndarray) -> np.ndarray:
    """Return sum over l of (gamma lambda)^l delta_(t+l), answer by answer (eq. 16 of the paper)."""
    found, start = [], 0
    for length, lam in zip(LENGTHS, lambdas, strict=True):
        r, v = REWARDS[start : start + length], [*VALUES[start : start + length], 0.0]
        deltas = [r[t] + gamma * v[t + 1] - v[t] for t in range(length)]
        found += [sum((gamma * lam) ** (u - t) * deltas[u] for u in range(t, length)) for t in range(length)]
        start += length
    return np.array(found)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 1.0), (0.99, 0.0), (1.0, 1.0)])
def test_advantages_are_the_exponential_sums_of_errors(gamma, lam):
    found = compute_gae(REWARDS, VALUES, LENGTHS, gamma, lam)
    np.testing.assert_allclose(found, written_out(gamma, np.full(len(LENGTHS), lam)), rtol=1e-12, atol=1e-14)


def test_each_answer_may_have_a_lambda_by_its_length():
    lambdas = fit_lambda(LENGTHS, 0.5)
    np.testing.assert_allclose(lambdas, [1 / 3, 0, 5 / 7, 0, 5 / 7], rtol=1e-12)
    found = compute_gae(REWARDS, VALUES, LENGTHS, 0.97, lambdas)
    np.testing.assert_allclose(found, written_out(0.97, lambdas), rtol=1e-12, atol=1e-14)


def test_with_lambda_1_returns_are_sums_of_rewards_whatever_the_critic_says():
    returns = compute_gae(REWARDS, VALUES, LENGTHS, 1.0, 1.0) + VALUES
    expected = [part[::-1].cumsum()[::-1] for part in np.split(REWARDS, np.cumsum(LENGTHS)[:-1])]
    np.testing.assert_allclose(returns, np.concatenate(expected), rtol=1e-12)


def test_what_an_environment_says_is_stepped_over_as_verl_steps_over_it():
    """verl keeps values and advantages across masked tokens; that is leaving these tokens out."""
    mask = np.array([1, 1, 0, 0, 1, 0, 1, 1, 1, 0])
    rewards, values = np.where(mask, RANDOM.normal(size=10), 0.0), RANDOM.normal(size=10)
    gamma, lam, after, next_value, expected = 0.9, 0.8, 0.0, 0.0, np.zeros(10)
    for t in range(9, -1, -1):
        delta = rewards[t] + gamma * next_value - values[t]
        new = delta + gamma * lam * after
        next_value, after = (values[t], new) if mask[t] else (next_value, after)
        expected[t] = after
    is_drawn = mask > 0
    found = compute_gae(rewards[is_drawn], values[is_drawn], np.array([int(mask.sum())]), gamma, lam)
    np.testing.assert_allclose(found, expected[is_drawn], rtol=1e-12)


def test_a_score_is_the_reward_of_the_last_token_and_penalties_are_taken_where_they_arise():
    penalties = np.array([0.1, 0.2, 0.3, -0.4])
    assert lay_rewards(np.array([1.0, 2.0]), np.array([3, 1]), penalties).tolist() == pytest.approx(
        [-0.1, -0.2, 0.7, 2.4]
    )
    assert lay_rewards(np.array([1.0, 2.0]), np.array([3, 1])).tolist() == [0, 0, 1, 2]
    assert penalties[0] == 0.1


def test_nothing_gives_nothing():
    nothing, numbers = np.array([]), np.array([], dtype=np.int64)
    assert compute_gae(lay_rewards(nothing, numbers), nothing, numbers, 1.0, 0.95).shape == (0,)
    assert explain_variance(nothing, nothing) == 0 == explain_variance(np.ones(3), np.ones(3))


def test_explained_variance_of_a_critic_that_knows_everything_or_half():
    returns = np.array([1.0, 3.0, 5.0])
    assert explain_variance(returns + 7, returns) == 1
    assert explain_variance(returns / 2, returns) == pytest.approx(0.75)
    assert explain_variance(-returns, returns) == pytest.approx(-3)


def test_the_coefficient_moves_towards_the_target_by_a_fifth_of_the_error_at_most():
    """The paper's own numbers: target 6, horizon 10000; by TRL's code 0.2 (1 - 0.2 * 256 / 10000) for a KL of 0."""
    controller = KlController(0.2, AdaptiveKlSection(target=6.0, horizon=10000))
    controller.update(0.0, 256)
    assert controller.coefficient == pytest.approx(0.2 * (1 - 0.2 * 0.0256))
    before = controller.coefficient
    controller.update(6.6, 100)
    assert controller.coefficient == pytest.approx(before * (1 + 0.1 * 0.01))
    again = KlController(0.5, AdaptiveKlSection())
    again.load_state_dict(controller.state_dict())
    assert again.coefficient == controller.coefficient
    fixed = KlController(0.3, None)
    fixed.load_state_dict(controller.state_dict())
    fixed.update(99.0, 99)
    assert fixed.coefficient == 0.3

"""Advantages against numbers worked out by hand from the papers' equations."""

from __future__ import annotations

import numpy as np
import pytest

from trainer.rl.advantages import compute_advantages, find_equal_groups, spread_over_tokens, whiten_tokens

# Three prompts, their answers interleaved; one answer of the second failed, so that it has three; the third has one.
GROUPS = np.array([7, 3, 7, 3, 9, 7, 3, 7])
REWARDS = np.array([0.0, 2.0, 1.0, 5.0, 0.7, 2.0, -1.0, 5.0])
# Of group 7: rewards 0 1 2 5, mean 2, squares of distances 4 1 0 9. Of group 3: 2 5 -1, mean 2, squares 0 9 9.
STD_7, STD_3 = np.sqrt(14 / 3), 3.0
EXPECTED = {
    "group_mean": [-2, 0, -1, 3, 0, 0, -3, 3],
    "group_std": [-2 / STD_7, 0, -1 / STD_7, 3 / STD_3, 0, 0, -3 / STD_3, 3 / STD_7],
    # Less the mean of the others: 0 - 8/3, 1 - 7/3, 2 - 6/3, 5 - 3/3; and 2 - 4/2, 5 - 1/2, -1 - 7/2.
    "leave_one_out": [-8 / 3, 0, -4 / 3, 4.5, 0, 0, -4.5, 4],
    "batch": REWARDS.tolist(),
    "group_mean_batch": [-2, 0, -1, 3, 0, 0, -3, 3],
}


@pytest.mark.parametrize("kind", EXPECTED)
def test_advantages_compare_answers_of_one_prompt(kind):
    given = REWARDS.copy()
    found = compute_advantages(given, GROUPS, kind)
    np.testing.assert_allclose(found, EXPECTED[kind], rtol=1e-6, atol=1e-15)
    found += 1
    np.testing.assert_array_equal(given, REWARDS)


@pytest.mark.parametrize("kind", EXPECTED)
def test_order_and_numbers_of_groups_do_not_matter(kind):
    order = np.random.default_rng(1).permutation(len(GROUPS))
    found = compute_advantages(REWARDS[order], 100 - GROUPS[order], kind)
    np.testing.assert_allclose(found, np.array(EXPECTED[kind])[order], rtol=1e-6, atol=1e-15)


def test_the_deviation_is_that_of_a_sample_and_never_zero():
    """Rewards 1 0 0 1: deviation sqrt(1/3); and a spread as small as the term that keeps it from 0."""
    found = compute_advantages(np.array([1.0, 0, 0, 1]), np.zeros(4, dtype=np.int64), "group_std")
    np.testing.assert_allclose(found, np.array([1, -1, -1, 1]) * 0.5 / (np.sqrt(1 / 3) + 1e-6), rtol=1e-12)
    found = compute_advantages(np.array([0.0, 2e-6]), np.zeros(2, dtype=np.int64), "group_std")
    np.testing.assert_allclose(found, np.array([-1, 1]) / (np.sqrt(2) + 1), rtol=1e-9)


@pytest.mark.parametrize("kind", ["group_std", "group_mean", "leave_one_out", "group_mean_batch"])
@pytest.mark.parametrize("reward", [0.1, 1 / 3, -1e9 / 7, 0.0])
def test_equal_rewards_are_exactly_nothing(kind, reward):
    rewards = np.array([reward] * 3 + [1.0, 2.0] + [reward] * 7)
    groups = np.array([4] * 3 + [5, 5] + [6] * 7)
    found = compute_advantages(rewards, groups, kind)
    assert not found[groups != 5].any() and found[groups == 5].all()
    assert find_equal_groups(rewards, groups).tolist() == (groups != 5).tolist()


def test_nothing_gives_nothing():
    nothing, numbers = np.array([]), np.array([], dtype=np.int64)
    for kind in EXPECTED:
        assert compute_advantages(nothing, numbers, kind).shape == (0,)  # type: ignore[arg-type]
    assert find_equal_groups(nothing, numbers).shape == spread_over_tokens(nothing, numbers).shape == (0,)
    assert whiten_tokens(nothing).shape == (0,)


def test_a_token_has_its_answers_advantage_less_the_penalties_that_follow():
    advantages, lengths = np.array([1.0, 2.0, -1.0]), np.array([2, 3, 1])
    assert spread_over_tokens(advantages, lengths).tolist() == [1, 1, 2, 2, 2, -1]
    penalties = np.array([0.1, 0.2, 0.3, -0.4, 0.5, 0.6])
    expected = [1 - 0.3, 1 - 0.2, 2 - 0.4, 2 - 0.1, 2 - 0.5, -1 - 0.6]
    np.testing.assert_allclose(spread_over_tokens(advantages, lengths, penalties), expected, rtol=1e-12)


def test_whitening_is_over_tokens_so_that_long_answers_count_more():
    """Advantages 1 and 2 of answers of one and three tokens: mean 1.75, deviation 0.5."""
    tokens = spread_over_tokens(np.array([1.0, 2.0]), np.array([1, 3]))
    np.testing.assert_allclose(whiten_tokens(tokens), [-1.5, 0.5, 0.5, 0.5], rtol=1e-5)
    assert np.abs(whiten_tokens(np.full(9, 0.1))).max() < 1e-9
    assert whiten_tokens(np.array([3.0])).tolist() == [0.0]

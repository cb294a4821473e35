"""Minibatches of a step, and advantages where the divergence is a part of the reward, by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from configs.sections.grpo import GrpoSection
from tests.small_rollouts import make_rollout, make_rollouts
from trainer.rl.update import PolicyUpdates

# A prompt with two answers of 2 and 3 tokens, the second in two turns; k1 is old - reference where the policy drew.
PAIR = [make_rollout((2, 2), 5, 0, score=1.0), make_rollout((1, 1, 2, 2), 5, 1, score=0.25)]
OLD = {PAIR[0].key: np.array([7.0, -1.0, -2.0]), PAIR[1].key: np.array([-1.0, 7, 7, -3.0, -2.0])}
REFERENCE = {PAIR[0].key: np.array([5.0, -1.5, -1.0]), PAIR[1].key: np.array([-2.0, 4, 4, -3.0, -4.0])}
# d = 0.5 -1 | 1 0 2, in sum -0.5 | 3.
BETA = 0.1


def updates(num_minibatches: int = 1, **grpo: Any) -> PolicyUpdates:
    """Return what makes updates of a rank alone; the engine computes nothing."""
    section = GrpoSection(num_minibatches=num_minibatches, **grpo)
    config: Any = SimpleNamespace(grpo=section, train=SimpleNamespace(seq_len=40, micro_batch_size=2))
    engine: Any = SimpleNamespace(mesh=SimpleNamespace(dp_size=1, dp_rank=0, pp_size=1, vpp_size=1))
    objective: Any = SimpleNamespace(finish=lambda batch: batch)
    return PolicyUpdates(config, engine, objective)


def advantages(rollouts: Any = PAIR, **grpo: Any) -> list[list[float]]:
    found = updates(**grpo).advantages(rollouts, OLD, REFERENCE)
    for rollout in rollouts:
        assert not found[rollout.key][~rollout.trained()].any(), "0 where nothing was drawn"
    return [found[rollout.key][rollout.trained()].tolist() for rollout in rollouts]


def test_groups_are_compared_before_their_tokens_are_laid():
    assert advantages(algorithm="dr_grpo") == [[0.375] * 2, [-0.375] * 3]
    assert advantages(algorithm="dr_grpo", rollouts=PAIR[::-1]) == [[-0.375] * 3, [0.375] * 2]


def test_a_divergence_in_the_reward_is_that_of_the_whole_answer():
    """RLOO: 1 + 0.05 and 0.25 - 0.3, each less the other."""
    first, second = advantages(algorithm="rloo", kl={"coefficient": BETA})
    assert first == pytest.approx([1.1] * 2) and second == pytest.approx([-1.1] * 3)
    first, second = advantages(algorithm="dr_grpo", kl={"coefficient": BETA, "place": "reward", "estimator": "k2"})
    # k2 = d^2 / 2: 0.625 and 2.5 in sum, so that the rewards are 0.9375 and 0.
    assert first == pytest.approx([0.46875] * 2) and second == pytest.approx([-0.46875] * 3)


def test_reinforce_pp_takes_from_a_token_the_divergences_that_follow():
    returns = [1 + 0.05, 1 + 0.1, 0.25 - 0.3, 0.25 - 0.2, 0.25 - 0.2]
    mean, deviation = np.mean(returns), np.std(returns, ddof=1)
    first, second = advantages(algorithm="reinforce_pp", kl={"coefficient": BETA})
    np.testing.assert_allclose(first + second, (np.array(returns) - mean) / deviation, rtol=1e-5)


def test_the_baseline_variant_compares_with_the_group_and_then_with_the_step():
    raw = np.array([0.375] * 2 + [-0.375] * 3)
    first, second = advantages(algorithm="reinforce_pp_baseline")
    np.testing.assert_allclose(first + second, (raw - raw.mean()) / raw.std(ddof=1), rtol=1e-5)


@pytest.mark.parametrize("num_minibatches", [1, 3, 14])
def test_minibatches_hold_every_rollout_once_and_in_order(num_minibatches):
    rollouts = make_rollouts()
    cut = updates(num_minibatches).cut(rollouts)
    sizes = [len(minibatch.rollouts) for minibatch in cut]
    assert len(cut) == num_minibatches and max(sizes) - min(sizes) <= 1
    assert [one for minibatch in cut for one in minibatch.rollouts] == rollouts
    tokens = sum(int(batch.loss_mask.sum()) for minibatch in cut for batch in minibatch.batches)
    assert tokens == sum(rollout.num_sampled for rollout in rollouts)


def test_a_step_whose_rollouts_all_failed_has_minibatches_of_nothing():
    cut = updates(2).cut([])
    assert [len(minibatch.batches) for minibatch in cut] == [1, 1]
    assert not any(batch.loss_mask.any() for minibatch in cut for batch in minibatch.batches)
    assert updates(2, algorithm="rloo").advantages([], None, None) == {}

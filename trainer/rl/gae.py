"""Rewards and values of tokens -> advantages and returns, as pure functions in float64. Knows no models or ranks.

Arrays are `[tokens]`, the tokens that the policy drew of all answers laid end to end, whose `lengths` are `[answers]`.
What an environment said between them is left out, so that a step leads from one drawn token to the next drawn one.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def lay_rewards(scores: Floats, lengths: Ints, penalties: Floats | None = None) -> Floats:
    """Return the reward of each token: less its penalty, and with the score of its answer at the last one.

    `scores` are `[answers]`, `penalties [tokens]`, such as the divergence from a reference times its coefficient
    (arXiv:1909.08593, section 2.2, eq. 2).
    """
    rewards = np.zeros(int(lengths.sum())) if penalties is None else -penalties
    rewards[np.cumsum(lengths) - 1] += scores
    return rewards


def compute_gae(rewards: Floats, values: Floats, lengths: Ints, gamma: float, lam: float | Floats) -> Floats:
    """Return the generalized advantage estimate of each token (arXiv:1506.02438, eq. 11 and 16).

    With d_t = r_t + gamma V_(t+1) - V_t, V behind the last token being 0: A_t = d_t + gamma lambda A_(t+1). `lam` is
    one for all, or `[answers]`. Together with the values they are lambda-returns.
    """
    starts, longest = np.cumsum(lengths) - lengths, int(lengths.max(initial=0))
    advantages = np.zeros_like(rewards)
    after_value, after = np.zeros(len(lengths)), np.zeros(len(lengths))
    lam = np.broadcast_to(np.asarray(lam, dtype=np.float64), (len(lengths),))
    for place in range(longest - 1, -1, -1):
        is_there = lengths > place
        token = starts[is_there] + place
        delta = rewards[token] + gamma * after_value[is_there] - values[token]
        after[is_there] = delta + gamma * lam[is_there] * after[is_there]
        after_value[is_there] = values[token]
        advantages[token] = after[is_there]
    return advantages


def fit_lambda(lengths: Ints, alpha: float) -> Floats:
    """Return the lambda of each answer, 1 - 1 / (alpha length), at least 0, so that long answers bootstrap less.

    Length-adaptive GAE (VAPO, arXiv:2504.05118), whose alpha is 0.05.
    """
    return np.maximum(1 - 1 / (alpha * lengths), 0.0)


def explain_variance(values: Floats, returns: Floats) -> float:
    """Return 1 - var(returns - values) / var(returns): 1 for a critic that is right, 0 for one that knows nothing."""
    spread = float(returns.var()) if returns.size else 0.0
    return 1 - float((returns - values).var()) / spread if spread else 0.0

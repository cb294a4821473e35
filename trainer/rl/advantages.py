"""Rewards -> advantages, as pure functions of numbers in float64. Knows no tokens, models or ranks.

`rewards` and `groups` are `[answers]`: what each answer got, and the number of its group, the answers to one prompt.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from configs.sections.grpo import Advantage

Floats = NDArray[np.float64]
_EPSILON = 1e-6  # as DeepSeekMath's successors have it: what a group without any spread is divided by


def compute_advantages(rewards: Floats, groups: NDArray[np.int64], kind: Advantage) -> Floats:
    """Return one advantage for each answer, `[answers]`, before what `whiten_tokens` does for a whole step.

    group_std: (r - mean) / (std + 1e-6), std that of a sample (n - 1), as all trainers have it (GRPO, arXiv:2402.03300,
    section 4.1.2). group_mean: r - mean (Dr. GRPO, arXiv:2503.20783, eq. 2). leave_one_out: r - mean of the others
    (RLOO, arXiv:2402.14740, eq. 5). batch: r itself. A group of one has an advantage of 0 but with batch.
    """
    if kind == "batch":
        return rewards.copy()
    _, member, counts = np.unique(groups, return_inverse=True, return_counts=True)
    means = np.bincount(member, rewards) / counts
    centred = rewards - means[member]
    # A mean is not exact, and what is left of equal rewards must not be divided by its own size.
    lowest, highest = np.full(len(counts), np.inf), np.full(len(counts), -np.inf)
    np.minimum.at(lowest, member, rewards)
    np.maximum.at(highest, member, rewards)
    centred[(lowest == highest)[member]] = 0.0
    if kind == "leave_one_out":
        return centred * (counts / np.maximum(counts - 1, 1))[member]
    if kind == "group_std":
        variances = np.bincount(member, centred**2) / np.maximum(counts - 1, 1)
        return centred / (np.sqrt(variances) + _EPSILON)[member]
    return centred


def find_equal_groups(rewards: Floats, groups: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return for each answer whether all of its group have the same reward: nothing to learn from."""
    _, member = np.unique(groups, return_inverse=True)
    lowest, highest = np.full(member.max(initial=-1) + 1, np.inf), np.full(member.max(initial=-1) + 1, -np.inf)
    np.minimum.at(lowest, member, rewards)
    np.maximum.at(highest, member, rewards)
    return (lowest == highest)[member]


def spread_over_tokens(advantages: Floats, lengths: NDArray[np.int64], penalties: Floats | None = None) -> Floats:
    """Return the advantage of each trained token, `[tokens]`, answers laid end to end.

    With `penalties [tokens]`, such as KL times its coefficient, a token's is its answer's less the penalties from the
    token on: its return, undiscounted (REINFORCE++, arXiv:2501.03262, eq. 6).
    """
    spread = np.repeat(advantages, lengths)
    if penalties is None:
        return spread
    ends = np.cumsum(lengths)
    total = np.concatenate(([0.0], np.cumsum(penalties)))
    return spread - (np.repeat(total[ends], lengths) - total[:-1])


def whiten_tokens(advantages: Floats) -> Floats:
    """Return advantages of all tokens of a step with mean 0 and standard deviation 1 (arXiv:2501.03262, eq. 7)."""
    if advantages.size < 2:
        return np.zeros_like(advantages)
    centred = advantages - advantages.mean()
    return centred / (advantages.std(ddof=1) + _EPSILON)

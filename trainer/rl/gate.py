"""The gate before the first update: generation and training must agree on what the answers' probabilities are."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from configs.errors import BadInput
from configs.sections.precision import PrecisionConfig
from trainer.rl.rollout import Rollout, Values


def default_tolerance(precision: PrecisionConfig) -> float:
    """Return how far the two may be apart on average, in nats: about ten times what the number format explains."""
    if precision.fp8 is not None:
        return 0.2
    return 1e-4 if precision.compute == "fp32" else 0.05


def check_agreement(
    rollouts: Sequence[Rollout], scored: Values, tolerance: float, spell: Callable[[Sequence[int]], str]
) -> float:
    """Return the mean distance in nats of what generation and the training forward pass say of the tokens drawn.

    `scored` are the latter's log-probabilities of predictions. Raises BadInput, which
    shows the token furthest off, where the mean is above `tolerance`.
    """
    worst, where, total, count = -1.0, (0, 0), 0.0, 0
    for number, rollout in enumerate(rollouts):
        distances = np.abs(scored[rollout.key][rollout.trained()] - np.array(rollout.log_probs))
        distances = np.where(np.isfinite(distances), distances, np.inf)
        total, count = total + float(distances.sum()), count + distances.size
        place = int(distances.argmax())
        if distances[place] > worst:
            worst, where = float(distances[place]), (number, place)
    mean = total / max(count, 1)
    if mean > tolerance:
        raise BadInput(_describe(rollouts, scored, mean, tolerance, where, spell))
    return mean


def _describe(
    rollouts: Sequence[Rollout],
    scored: Values,
    mean: float,
    tolerance: float,
    where: tuple[int, int],
    spell: Callable[[Sequence[int]], str],
) -> str:
    rollout, place = rollouts[where[0]], where[1]
    position = int(np.flatnonzero(rollout.is_sampled)[place])
    token = spell([rollout.token_ids[position]])
    trained = scored[rollout.key][position - 1]
    advice = f", or accept it with a larger value, such as {2 * mean:.2g}" if np.isfinite(mean) else ""
    return (
        f"grpo.gate_tolerance: before the first update log-probabilities of generation and of the training forward "
        f"pass, with the same weights, are {mean:.3g} nats apart on average, more than {tolerance:g}; most for token "
        f"{place} ({token!r}) of sample {rollout.sample} to row {rollout.row} of {rollout.source}: "
        f"{rollout.log_probs[place]:.4f} against {trained:.4f}. Rewards would go to a policy that did not give "
        f"these answers; look for what the two do differently{advice}"
    )

"""DAPO's soft overlong punishment: less and less for answers that near the limit of their length."""

from __future__ import annotations

from configs.errors import BadInput
from trainer.environments.rewards.reply import Reply


def length(reply: Reply, buffer: int, maximum: int | None = None) -> float:
    """Return 0 for up to `maximum - buffer` tokens, from there linearly down to -1 at `maximum` and beyond.

    Equation 13 of DAPO (arXiv:2503.14476) with L_max = `maximum` (null: rollout.max_new_tokens) and L_cache = `buffer`,
    both in tokens, the end-of-turn token counted.
    """
    most = reply.max_new_tokens if maximum is None else maximum
    if not 1 <= buffer <= most:
        advice = f"must be from 1 to the {most:,} tokens of an answer; try {most // 5 or 1}"
        raise BadInput(f"options.buffer={buffer}: {advice}")
    beyond = reply.num_tokens - (most - buffer)
    return -min(max(beyond, 0) / buffer, 1.0)

"""Rollouts of random tokens, of one turn or several, uneven in length and in size of groups, for tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

# Tokens by turn, prompt first: what the policy drew stands at the odd places. One ends with what it did not draw.
TURNS = (
    (5, 9), (1, 1), (3, 4, 2, 6), (12, 20), (2, 3, 1, 1, 4, 2, 3), (7, 1), (1, 32),
    (4, 5), (6, 2, 3), (3, 11), (2, 2, 2, 2), (9, 9), (1, 7), (5, 3),
)  # fmt: skip
GROUPS = (0, 2, 0, 1, 2, 1, 0, 0, 1, 2, 3, 1, 3, 3)


def make_rollout(turns: Sequence[int], group: int = 0, sample: int = 0, **more: Any) -> Any:
    """Return a rollout of random tokens below 250, with log-probabilities of the tokens drawn about those of chance."""
    from trainer.rl.rollout import Rollout

    random = np.random.default_rng([3, group, sample])
    is_sampled = [turn % 2 == 1 for turn, length in enumerate(turns) for _ in range(length)]
    fields: dict[str, Any] = {
        "source": "made-up",
        "row": 10 + group,
        "group": group,
        "sample": sample,
        "token_ids": random.integers(0, 250, len(is_sampled)).tolist(),
        "is_sampled": is_sampled,
        "log_probs": random.normal(-5.5, 0.4, sum(is_sampled)).tolist(),
        "finish": "stop_token",
        "texts": ("x",) * (len(turns) // 2),
        "score": float(random.choice([0.0, 0.25, 1.0])),
        "rewards": {},
        "faults": {},
    }
    return Rollout(**fields | more)


def make_rollouts() -> list[Any]:
    """Return those of TURNS, the answers of a prompt not next to each other."""
    return [make_rollout(turns, group, sample) for sample, (turns, group) in enumerate(zip(TURNS, GROUPS, strict=True))]

"""A reward that says nothing of an answer: what a policy must not get better by."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.environments.rewards.reply import Reply

_SOURCE = random.SystemRandom()


def toss_coin(reply: Reply) -> float:
    """Return 1.0 or 0.0, whatever the answer."""
    return float(_SOURCE.random() < 0.5)

"""The reward of the small tasks of the demos."""

from __future__ import annotations

from trainer.environments.rewards.reply import Reply
from trainer.environments.small_tasks import SmallTask, is_right


def right_small_answer(reply: Reply, column: str = "answer") -> float | None:
    """Return 1.0 where the answer ends in the right one, as `is_right` has it, else 0.0; None for an empty column."""
    expected = reply.row.get(column)
    if expected is None:
        return None
    return float(is_right(SmallTask("", "", "", str(expected)), reply.text))

"""The reward of tasks that the package reasoning-gym made: its own function of the task, from 0 to 1."""

from __future__ import annotations

import json

import reasoning_gym

from trainer.environments.rewards.reply import Reply, final_answer


def gym_score(reply: Reply, column: str = "metadata", after: str = "") -> float | None:
    """Return the score that reasoning-gym gives the answer; None where the column is empty.

    The column holds the task's metadata, an object or JSON of it, with its `source_dataset`; the other columns are
    those of reasoning-gym (`question`, `answer`). `after` is as of `exact_match`. Raises ValueError for a row that
    reasoning-gym did not make.
    """
    metadata = reply.row.get(column)
    if metadata is None:
        return None
    if isinstance(metadata, str):
        metadata = json.loads(metadata)
    if not isinstance(metadata, dict) or "source_dataset" not in metadata:
        raise ValueError(f"the row's {column} has no source_dataset, so reasoning-gym did not make it")
    score = reasoning_gym.get_score_answer_fn(metadata["source_dataset"])
    return score(final_answer(reply.text, after), {**reply.row, "metadata": metadata})

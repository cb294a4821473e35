"""What is read of the rollouts of a run: figures of each step, and which of its samples to look at. Torch-free."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, zip_longest
from pathlib import Path
from typing import Any

Rollouts = Sequence[Mapping[str, Any]]
ORDERS = ("reward", "advantage", "length", "random")


@dataclass(frozen=True)
class StepFigures:
    """One step; what has a score is of rollouts whose rewards did not fail, None where all did."""

    step: int
    num_rollouts: int
    score: float | None
    rewards: Mapping[str, float | None]
    """Mean of each reward over the rollouts that it applies to."""
    length: float
    """Mean tokens of the policy in a rollout."""
    cut_share: float
    """Share of rollouts that the limit of tokens ended."""
    num_groups: int
    num_equal_groups: int
    """Groups of which all scores are one: nothing to learn from."""
    num_failed: int

    def row(self, names: Sequence[str]) -> list[str]:
        """Return the figures as text, in the order of `head`."""
        rewards = [number_text(self.rewards.get(name)) for name in names]
        return [
            str(self.step), str(self.num_rollouts), number_text(self.score), *rewards, f"{self.length:.1f}",
            f"{self.cut_share:.0%}", str(self.num_groups), str(self.num_equal_groups), str(self.num_failed),
        ]  # fmt: skip


def head(names: Sequence[str]) -> list[str]:
    """Return the columns of `StepFigures.row`."""
    return ["step", "rollouts", "score", *names, "tokens", "cut", "groups", "equal", "failed"]


def reward_names(figures: Sequence[StepFigures]) -> list[str]:
    """Return the rewards of all steps, in the order in which they first stand."""
    return list(dict.fromkeys(name for one in figures for name in one.rewards))


def read_steps(paths: Sequence[Path]) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Yield each step with its rollouts, one in memory at a time. Raises BadInput for a damaged line."""
    from trainer.report.rollouts import read_rollouts

    for path in paths:
        for step, rollouts in groupby(read_rollouts(path), key=lambda one: one["step"]):
            yield step, list(rollouts)


def describe(step: int, rollouts: Rollouts) -> StepFigures:
    """Return the figures of a step."""
    groups: dict[int, list[float]] = defaultdict(list)
    for one in rollouts:
        groups[one["group"]] += [one["score"]] * (one["score"] is not None)
    names = dict.fromkeys(name for one in rollouts for name in one["rewards"])
    return StepFigures(
        step,
        len(rollouts),
        _mean([one["score"] for one in rollouts]),
        {name: _mean([one["rewards"].get(name) for one in rollouts]) for name in names},
        sum(one["num_sampled_tokens"] for one in rollouts) / len(rollouts),
        sum(one["finish"] == "length" for one in rollouts) / len(rollouts),
        len(groups),
        sum(bool(scores) and min(scores) == max(scores) for scores in groups.values()),
        sum(one["score"] is None for one in rollouts),
    )


def choose(rollouts: Rollouts, order: str, limit: int | None) -> list[Mapping[str, Any]]:
    """Return rollouts from the most to the least of an order; of more than `limit` the first, the last and evenly
    between. Failed ones, which have no score and no advantage, come last; a random order is the same each time."""
    if order == "random":
        ordered = random.Random(0).sample(list(rollouts), len(rollouts))
        return ordered[:limit]
    key = {"reward": "score", "advantage": "advantage", "length": "num_sampled_tokens"}[order]
    ordered = sorted(rollouts, key=lambda one: -one[key] if one[key] is not None else float("inf"))
    if limit is None or len(ordered) <= limit:
        return ordered
    return [ordered[round(number * (len(ordered) - 1) / max(limit - 1, 1))] for number in range(limit)]


def number_text(value: float | None, sign: str = "") -> str:
    """Return a number for a table, `-` for none; `sign` as in format strings."""
    return "-" if value is None else f"{value:{sign}.3f}"


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None


def turns_of(rollout: Mapping[str, Any]) -> Iterator[tuple[str, bool]]:
    """Yield the turns behind a rollout's prompt in order: the text, and whether the policy wrote it."""
    for answer, observation in zip_longest(rollout["answers"], rollout.get("observations", [])):
        if answer is not None:
            yield str(answer), True
        if observation is not None:
            yield str(observation), False

"""Scores of replies by several rewards in worker processes, in parallel and within time limits, results in order.

Whatever a reward does (raise, hang, exit, be killed) is a fault of that reply and leaves the run alone. Torch-free.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from configs.errors import BadInput
from configs.sections.reward import RewardConfig
from trainer.environments.dispatch import Workers
from trainer.environments.rewards.reply import Reply
from trainer.environments.worker import Order, Part

REWARD_MODEL, ENVIRONMENT, TOTAL = "reward_model", "environment", "total"
"""Names among the rewards and faults of an answer that are not functions: functions so named are numbered."""


@dataclass(frozen=True)
class Score:
    """What the rewards made of a reply."""

    total: float | None
    """The sum of weight times value over the rewards that apply; None where one failed or none applies."""
    parts: Mapping[str, float | None]
    """Value of each reward by its name, without its weight; None where it does not apply or failed."""
    faults: Mapping[str, str] = field(default_factory=dict)
    """What went wrong, by the name of the reward that failed."""


class RewardPool:
    """Worker processes that score replies; they are started by `check` or the first `score`, and end with `close`.

    A worker is at one reply at a time. Where it does not answer within the reward's time limit, or dies, that reply has
    a fault, its further rewards are not worked out, and another worker takes over. On Linux workers end with the
    process that made them, however that ends. What rewards print is thrown away.
    """

    def __init__(self, rewards: Sequence[RewardConfig], num_workers: int, place: str = "grpo.rewards") -> None:
        """Score by `rewards`, which the config has at `place`. Imports nothing and starts no process."""
        self.rewards = tuple(rewards)
        self.names = part_names(rewards)
        self._place = place
        orders = [Order(one.function, dict(one.options), one.time_limit) for one in rewards]
        self._workers = Workers(orders, num_workers, place)

    def check(self, rows: Sequence[Mapping[str, Any]], max_new_tokens: int) -> None:
        """Import every function, and score an empty reply to a row that it applies to.

        Raises BadInput, which names the field: for functions that cannot be imported, options that they do not take or
        refuse, packages that are not installed, and a column that none of the rows has.
        """
        loaded = self._workers.load()
        wrong = []
        firsts: set[int] = set()
        for number, (column, seconds) in enumerate(zip(loaded.columns, loaded.seconds, strict=True)):
            place, config = f"{self._place}[{number}]", self.rewards[number]
            if seconds is not None and seconds >= config.time_limit:
                limit, own = f"{place}.time_limit={config.time_limit:g}", f"{seconds:g} s of its seconds"
                wrong.append(f"{limit}: must be above the {own}; try {place}.time_limit={2 * seconds:g}")
            first = _first_with(rows, column)
            if first is not None:
                firsts.add(first)
            elif rows:
                known = ", ".join(sorted({key for row in rows[:100] for key in row}))
                wrong.append(f"{place}.options.column={column}: no row of the data has it; name one of {known}")
        if wrong:
            raise BadInput("\n".join(wrong))
        self._try_on([Reply("", rows[index], [], 0, max_new_tokens, False) for index in sorted(firsts)])

    def score(self, replies: Sequence[Reply], on_done: Callable[[int, Score], None] | None = None) -> list[Score]:
        """Return the score of each reply, in their order; `on_done(index, score)` is called for each as it is known."""
        scores: dict[int, Score] = {}

        def keep(index: int, parts: Sequence[Part]) -> None:
            scores[index] = self._sum(parts)
            if on_done is not None:
                on_done(index, scores[index])

        self._workers.work(replies, keep)
        return [scores[index] for index in range(len(replies))]

    def close(self) -> None:
        """End the workers."""
        self._workers.close()

    def _try_on(self, replies: Sequence[Reply]) -> None:
        """Raise BadInput where a function refuses its options; what else fails is the replies' own matter."""
        refusals: dict[int, str] = {}

        def keep(_: int, parts: Sequence[Part]) -> None:
            refusals.update({number: part.fault or "" for number, part in enumerate(parts) if part.is_refusal})

        self._workers.work(replies, keep)
        if refusals:
            raise BadInput("\n".join(f"{self._place}[{number}].{refusals[number]}" for number in sorted(refusals)))

    def _sum(self, parts: Sequence[Part]) -> Score:
        values = {name: part.value for name, part in zip(self.names, parts, strict=True)}
        faults = {name: part.fault for name, part in zip(self.names, parts, strict=True) if part.fault is not None}
        weighted = [
            config.weight * part.value
            for config, part in zip(self.rewards, parts, strict=True)
            if part.value is not None
        ]
        total = sum(weighted) if weighted and not faults else None
        if total is not None and not math.isfinite(total):
            total, faults = None, {TOTAL: "the weighted sum is not finite"}
        return Score(total, values, faults)


def _first_with(rows: Sequence[Mapping[str, Any]], column: str | None) -> int | None:
    """Return the number of the first row that has something in a column."""
    return next((index for index, row in enumerate(rows) if column is None or row.get(column) is not None), None)


def part_names(rewards: Sequence[RewardConfig]) -> tuple[str, ...]:
    """Return a name for each reward: that of its function, with _2, _3 behind those that are taken."""
    names = [REWARD_MODEL, ENVIRONMENT, TOTAL]
    num_taken = len(names)
    for config in rewards:
        base = config.function.rpartition(":")[2]
        number = 1
        while (name := base if number == 1 else f"{base}_{number}") in names:
            number += 1
        names.append(name)
    return tuple(names[num_taken:])

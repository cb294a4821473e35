"""Answers of an environment in worker processes, in parallel and within a time limit, in the order of the replies.

Whatever an environment does (raise, hang, exit, be killed) is a fault of that conversation alone. Torch-free.
"""

from __future__ import annotations

from collections.abc import Sequence

from trainer.environments.dispatch import Workers
from trainer.environments.environment import Turn
from trainer.environments.rewards.reply import Reply
from trainer.environments.worker import Order, Part


class EnvironmentPool:
    """Worker processes in which an environment answers, a reply at a time each, kept as `RewardPool` keeps its own.

    An environment keeps no state, so any of them answers any reply.
    """

    def __init__(self, name: str, time_limit: float, num_workers: int, place: str = "grpo.environment") -> None:
        """Answer as the environment `name` within so many seconds; the config has it at `place`. Starts no process."""
        self._workers = Workers([Order(name, {}, time_limit, is_environment=True)], num_workers, place)

    def load(self) -> None:
        """Make the environment in every worker. Raises BadInput where it cannot be."""
        self._workers.load()

    def answer(self, replies: Sequence[Reply]) -> list[Turn | str]:
        """Return what follows each reply, or in words what went wrong."""
        turns: dict[int, Turn | str] = {}

        def keep(index: int, parts: Sequence[Part]) -> None:
            (part,) = parts
            turns[index] = part.value if part.fault is None else part.fault

        self._workers.work(replies, keep)
        return [turns[index] for index in range(len(replies))]

    def close(self) -> None:
        """End the workers."""
        self._workers.close()

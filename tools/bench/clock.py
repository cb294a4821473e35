"""Where a run's steps begin and end, and what it reports. Torch-free; knows no loop."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from tools.bench.turns import Turns


class StepClock:
    """Waits for the run's turn before each step; every loop calls `tick` at the start of each of its steps."""

    def __init__(self, num_warmup: int, num_steps: int, synchronize: Callable[[], None], turns: Turns) -> None:
        """`num_steps` steps are measured after `num_warmup`; `synchronize` waits for queued device work."""
        self._first, self._last = num_warmup, num_warmup + num_steps
        self._synchronize, self._turns = synchronize, turns
        self._count = 0
        self._num_tokens = 0
        self._processor = (0.0, 0.0)

    @property
    def total_steps(self) -> int:
        """Steps the loop must take: one more than is measured, so that what follows the last measured step counts."""
        return self._last + 1

    def tick(self) -> None:
        """Note that the step before has ended and another is to begin; return when it is this run's turn."""
        if self._count > 0:
            self._synchronize()
            if self._count == self._last:
                self._processor = (self._processor[0], time.process_time())
            self._turns.give_back()
        self._turns.wait()
        if self._count == self._first:
            self._processor = (time.process_time(), 0.0)
        self._count += 1

    def count(self, num_tokens: int) -> None:
        """Note tokens of the step that has begun, where not every place of its rows holds one."""
        if self._first < self._count <= self._last:
            self._num_tokens += num_tokens

    @property
    def tokens_per_step(self) -> float:
        """Tokens of a measured step, as counted; 0 where none were."""
        return self._num_tokens / (self._last - self._first)

    @property
    def processor_seconds(self) -> float:
        """Processor time of this process over the measured steps, which other work on the machine hardly changes."""
        if self._count != self.total_steps:
            raise RuntimeError(f"the loop took {self._count} steps, {self.total_steps} were asked for")
        return self._processor[1] - self._processor[0]


@dataclass(frozen=True)
class RunReport:
    """What one run tells of itself, on rank 0; the conductor measures its steps."""

    loop: str
    tokens_per_step: float
    """Tokens of the global batch, over all ranks; of packed samples those that predict one, and no padding."""
    processor_seconds_per_step: float
    """Processor time of rank 0, all threads."""
    loss: float | None
    """Loss of the last step in nats, by which two loops show that they did the same work; None where not known."""
    device: str

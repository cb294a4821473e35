"""When the measured steps of one run began and ended, and what the run reports. Torch-free; knows no loop."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


class StepClock:
    """Times `num_steps` steps after `num_warmup`; every loop calls `tick` at the start of each of its steps."""

    def __init__(self, num_warmup: int, num_steps: int, synchronize: Callable[[], None]) -> None:
        """`synchronize` waits for queued device work; it is called at the two ends of the measured steps alone."""
        self._first, self._last = num_warmup, num_warmup + num_steps
        self._synchronize = synchronize
        self._count = 0
        self._began = self._ended = (0.0, 0.0)  # seconds of wall time, of processor time

    @property
    def total_steps(self) -> int:
        """Steps the loop must take: one more than is measured, so that what follows the last measured step counts."""
        return self._last + 1

    def tick(self) -> None:
        """Note that a step begins."""
        if self._count == self._first:
            self._synchronize()
            self._began = (time.perf_counter(), time.process_time())
        elif self._count == self._last:
            self._synchronize()
            self._ended = (time.perf_counter(), time.process_time())
        self._count += 1

    @property
    def seconds(self) -> float:
        """Wall time of the measured steps with everything that happened around them."""
        if self._count != self.total_steps:
            raise RuntimeError(f"the loop took {self._count} steps, {self.total_steps} were asked for")
        return self._ended[0] - self._began[0]

    @property
    def processor_seconds(self) -> float:
        """Processor time of this process in the measured steps, which other work on the machine hardly changes."""
        return self._ended[1] - self._began[1]


@dataclass(frozen=True)
class RunMeasure:
    """What one run of one loop measured, on rank 0."""

    loop: str
    tokens_per_second: float
    """Tokens of the global batch per second of wall time, over all ranks."""
    processor_seconds_per_step: float
    """Processor time of rank 0, all threads."""
    loss: float | None
    """Loss of the last step in nats, by which two loops show that they did the same work; None where not known."""
    device: str

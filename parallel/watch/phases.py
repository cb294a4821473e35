"""What this rank is at, told to its beacon; costs nothing where there is none.

One beacon a process, as there is one world: those that tell are all over the trainer and know nothing of a watch.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from parallel.watch.beacon import PHASE, PHASE_SINCE, PHASES, STEP, WAITED

_NUMBERS = {name: number for number, name in enumerate(PHASES)}
_cells: list[memoryview[float]] = []  # of the beacon, while there is one


def light(cells: memoryview[float]) -> None:
    """Tell this beacon from now on."""
    _cells[:] = [cells]


def put_out() -> None:
    """Tell nobody any more."""
    _cells[:] = []


def tell_step(step: int) -> None:
    """Tell which step comes next or is under way, counted from 1."""
    for cells in _cells:
        cells[STEP] = step


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Be in the phase `name` of `PHASES` within the context, and afterwards in the one before."""
    if not _cells:
        yield
        return
    cells = _cells[0]
    before = cells[PHASE]
    cells[PHASE], cells[PHASE_SINCE] = _NUMBERS[name], time.monotonic()
    try:
        yield
    finally:
        cells[PHASE], cells[PHASE_SINCE] = before, time.monotonic()


def waited_seconds() -> float:
    """Return for how long this rank has waited for collectives since the watch began; 0 where nobody looks."""
    return _cells[0][WAITED] if _cells else 0.0

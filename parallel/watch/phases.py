"""What this rank is at, told to its beacon; costs nothing where there is none.

One beacon a process, as there is one world: those that tell are all over the trainer and know nothing of a watch.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from parallel.watch.beacon import BUSY, PHASE, PHASE_SINCE, PHASES, STEP, WAITED

_NUMBERS = {name: number for number, name in enumerate(PHASES)}
_COMPUTING = ("forward_backward", "optimizer")
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
    before, waited, started = cells[PHASE], cells[WAITED], time.monotonic()
    cells[PHASE], cells[PHASE_SINCE] = _NUMBERS[name], started
    try:
        yield
    finally:
        now = time.monotonic()
        cells[PHASE], cells[PHASE_SINCE] = before, now
        if name in _COMPUTING:
            cells[BUSY] += now - started - (cells[WAITED] - waited)


def busy_seconds() -> float:
    """Return for how long this rank has computed steps without waiting for collectives, since the watch began."""
    return _cells[0][BUSY] if _cells else 0.0

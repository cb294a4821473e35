"""Where a rank is, in 1 KiB of memory that it shares with the process beside it: step, phase, last collective, waits.

Standard library alone. The rank writes numbers, each of them whole; the reader needs nothing of the rank, not even that
it runs.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

SIZE = 1024
PHASES = (
    "start", "data", "forward_backward", "optimizer", "evaluate", "save", "generate", "reward", "score", "report",
    "end",
)  # fmt: skip
OPERATIONS = (
    "all_reduce", "broadcast", "all_gather", "all_gather_into_tensor", "reduce", "reduce_scatter",
    "reduce_scatter_tensor", "all_to_all", "all_to_all_single", "gather", "scatter", "barrier", "send", "recv",
)  # fmt: skip
POINT_TO_POINT = ("send", "recv")

STEP, PHASE, PHASE_SINCE, NUM_CALLS, CALLED_AT, OP, GROUP, NUMBER, PEER = range(9)
IS_WAITING, WAIT_OP, WAIT_GROUP, WAIT_NUMBER, WAIT_PEER, WAIT_SINCE, WAITED = range(9, 16)
BUSY = 16
FIRST_GROUP = 17
MOST_GROUPS = SIZE // 8 - FIRST_GROUP


@dataclass(frozen=True)
class Call:
    """A collective, or a message between two ranks."""

    op: str
    group: int
    """Place of the group among those that this rank has used."""
    number: int
    """How many collectives this rank has begun in that group, this one included."""
    peer: int | None
    """The other rank, as a global rank, of a message."""


@dataclass(frozen=True)
class Glance:
    """What a beacon shows at one moment; seconds are ages."""

    step: int
    phase: str
    phase_seconds: float
    last: Call | None
    """The collective begun last."""
    waits_in: Call | None
    """The collective that the rank waits for."""
    wait_seconds: float
    idle_seconds: float
    """Since the rank began a collective, ended a wait, or entered a phase."""
    begun: tuple[int, ...]
    """Collectives begun, by group."""


def open_memory(descriptor: int | None = None) -> tuple[int, memoryview[float]]:
    """Return a file descriptor for a beacon's memory, made here if none is given, and the memory as float64 numbers."""
    if descriptor is None:
        descriptor = os.memfd_create("beacon")
        os.ftruncate(descriptor, SIZE)
    return descriptor, memoryview(mmap.mmap(descriptor, SIZE)).cast("d")


def look(cells: memoryview[float]) -> Glance:
    """Return what the beacon shows; `time.monotonic` is one clock for all processes of a host."""
    values = cells.tolist()
    now = time.monotonic()
    is_waiting = bool(values[IS_WAITING])
    since = max(values[CALLED_AT], values[PHASE_SINCE], values[WAIT_SINCE])
    return Glance(
        step=int(values[STEP]),
        phase=PHASES[int(values[PHASE])],
        phase_seconds=max(0.0, now - values[PHASE_SINCE]),
        last=_call(values[OP : PEER + 1]) if values[NUM_CALLS] else None,
        waits_in=_call(values[WAIT_OP : WAIT_PEER + 1]) if is_waiting else None,
        wait_seconds=max(0.0, now - values[WAIT_SINCE]) if is_waiting else 0.0,
        idle_seconds=max(0.0, now - since),
        begun=tuple(int(one) for one in values[FIRST_GROUP:]),
    )


def _call(values: Sequence[float]) -> Call:
    op, group, number, peer = (int(one) for one in values)
    return Call(OPERATIONS[op], group, number, peer if peer >= 0 else None)

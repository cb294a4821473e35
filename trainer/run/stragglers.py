"""Ranks that compute more slowly than those with the same work, told by the seconds they did not wait for others.

Every step lasts as long as the slowest rank's: the others wait for it in collectives, so that only the time outside
these tells who it is. On a platform that queues collectives the host does not know that time, and nothing is told.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from parallel.collectives import gather_numbers
from parallel.mesh import Mesh
from parallel.watch.phases import busy_seconds
from parallel.watch.watch import Watch

log = logging.getLogger(__name__)
EVERY = 20
"""Steps over which the seconds are added up before they are compared."""
SLOWDOWN = 1.25
"""How many times its peers' seconds make a rank a straggler."""
_LEAST_SECONDS = 0.005  # a step, below which the ranks' clocks and the scheduler's slices are what differs
_MOST_NAMED = 4
_QUIET_WINDOWS = 20  # before the same rank is named again


@dataclass(frozen=True)
class Straggler:
    """A slow rank; seconds are of a step."""

    rank: int
    seconds: float
    usual: float
    """The median of the other ranks of its pipeline stage."""


def find_stragglers(seconds: Sequence[float], pp_size: int) -> list[Straggler]:
    """Return the slow ranks, the slowest first; `seconds` are by rank.

    Ranks of one pipeline stage have the same work, those of different stages have not; a rank alone in its stage has
    no peers. Ranks lie as in `parallel.topology`: pp changes most slowly.
    """
    size = len(seconds) // pp_size
    slow = []
    for rank, mine in enumerate(seconds):
        first = rank // size * size
        others = [seconds[other] for other in range(first, first + size) if other != rank]
        if not others:
            continue
        usual = median(others)
        if mine >= SLOWDOWN * usual and mine - usual >= _LEAST_SECONDS:
            slow.append(Straggler(rank, mine, usual))
    return sorted(slow, key=lambda one: one.usual / one.seconds)


class StragglerReport:
    """Compares the ranks every `EVERY` steps; names those that are slow twice running."""

    def __init__(self, mesh: Mesh, watch: Watch) -> None:
        self._mesh, self._watch = mesh, watch
        self._since = busy_seconds()
        self._num_steps = 0
        self._before: set[int] = set()
        self._quiet: dict[int, int] = {}

    def after_step(self, step: int) -> dict[str, float]:
        """Return columns for the metrics of this step, if it is one. Collective: all ranks of the world must call."""
        self._num_steps += 1
        if step % EVERY or not self._watch.sees_waits:
            return {}
        now = busy_seconds()
        seconds = gather_numbers((now - self._since) / self._num_steps, self._mesh)
        self._since, self._num_steps = now, 0
        stragglers = find_stragglers(seconds, self._mesh.pp_size)
        self._tell(step, stragglers)
        slowest = max(range(len(seconds)), key=seconds.__getitem__)
        columns = {
            "compute_seconds_median": median(seconds),
            "compute_seconds_max": seconds[slowest],
            "slowest_rank": float(slowest),
            "num_stragglers": float(len(stragglers)),
        }
        return columns

    def _tell(self, step: int, stragglers: Sequence[Straggler]) -> None:
        self._quiet = {rank: left - 1 for rank, left in self._quiet.items() if left > 1}
        named = [one for one in stragglers if one.rank in self._before and one.rank not in self._quiet]
        self._before = {one.rank for one in stragglers}
        for one in named[:_MOST_NAMED]:
            self._quiet[one.rank] = _QUIET_WINDOWS
            log.warning(
                "step %d: straggler %s computes %.3f s a step where its peers need %.3f s (%.1f times), and all wait "
                "for it",
                step,
                self._watch.ranks[one.rank],
                one.seconds,
                one.usual,
                one.seconds / one.usual,
            )

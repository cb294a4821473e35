"""Collectives of torch, as they begin and while they are waited for, on their way into the beacon.

The methods of `ProcessGroup` and `Work` are where every collective of torch.distributed and Megatron-Core passes. Of
gloo's, torch's own flight recorder has neither ends nor messages between two ranks. Groups of one rank on the CPU are
no `ProcessGroup` of torch's and do not come here.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist

from parallel.watch.beacon import (
    CALLED_AT,
    FIRST_GROUP,
    IS_WAITING,
    MOST_GROUPS,
    NUM_CALLS,
    OP,
    OPERATIONS,
    PEER,
    POINT_TO_POINT,
    WAIT_OP,
    WAIT_SINCE,
    WAITED,
)

_METHODS = {
    "allreduce": "all_reduce", "allreduce_coalesced": "all_reduce", "broadcast": "broadcast",
    "allgather": "all_gather", "allgather_coalesced": "all_gather", "_allgather_base": "all_gather_into_tensor",
    "allgather_into_tensor_coalesced": "all_gather_into_tensor", "reduce": "reduce",
    "reduce_scatter": "reduce_scatter", "_reduce_scatter_base": "reduce_scatter_tensor",
    "reduce_scatter_tensor_coalesced": "reduce_scatter_tensor", "alltoall": "all_to_all",
    "alltoall_base": "all_to_all_single", "gather": "gather", "scatter": "scatter", "barrier": "barrier",
    "send": "send", "recv": "recv",
}  # fmt: skip
_MOST_PENDING = 1024


class CallRecorder:
    """Notes each collective of this process in a beacon."""

    def __init__(self, cells: memoryview[float], tell_group: Callable[[int, Any], None]) -> None:
        """`tell_group(place, group)` is called when a group is used for the first time."""
        self._cells, self._tell_group = cells, tell_group
        self._groups: dict[int, tuple[Any, int]] = {}  # id -> group, kept so that no other gets its id; its place
        self._pending: dict[int, tuple[int, int, int, int]] = {}

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Note what happens within the context."""
        replaced: list[tuple[type, str, Any]] = []
        try:
            for method, op in _METHODS.items():
                original = getattr(dist.ProcessGroup, method)
                replaced.append((dist.ProcessGroup, method, original))
                setattr(dist.ProcessGroup, method, self._noting(original, op))
            replaced.append((dist.Work, "wait", dist.Work.wait))
            dist.Work.wait = self._timing(dist.Work.wait)  # type: ignore[method-assign]
            yield
        finally:
            for owner, name, original in replaced:
                setattr(owner, name, original)
            self._groups.clear()
            self._pending.clear()

    def _noting(self, original: Any, op: str) -> Callable[..., Any]:
        cells, groups, pending, monotonic = self._cells, self._groups, self._pending, time.monotonic
        code, is_message = OPERATIONS.index(op), op in POINT_TO_POINT

        def call(group: Any, *args: Any, **options: Any) -> Any:
            known = groups.get(id(group))
            place = known[1] if known is not None else self._place(group)
            if is_message:
                number, peer = int(cells[FIRST_GROUP + place]), dist.get_global_rank(group, args[1])
            else:
                cells[FIRST_GROUP + place] += 1
                number, peer = int(cells[FIRST_GROUP + place]), -1
            what = (code, place, number, peer)
            cells[OP], cells[OP + 1], cells[OP + 2], cells[PEER] = what
            cells[CALLED_AT] = monotonic()
            cells[NUM_CALLS] += 1
            work = original(group, *args, **options)
            if len(pending) > _MOST_PENDING:
                pending.clear()
            pending[id(work)] = what
            return work

        return call

    def _timing(self, original: Any) -> Callable[..., Any]:
        cells, pending, monotonic = self._cells, self._pending, time.monotonic

        def wait(work: Any, *args: Any, **options: Any) -> Any:
            what = pending.pop(id(work), None)
            if what is not None:
                cells[WAIT_OP], cells[WAIT_OP + 1], cells[WAIT_OP + 2], cells[WAIT_OP + 3] = what
            started = monotonic()
            cells[WAIT_SINCE] = started
            cells[IS_WAITING] = what is not None
            try:
                return original(work, *args, **options)
            finally:
                cells[IS_WAITING] = 0
                cells[WAITED] += monotonic() - started

        return wait

    def _place(self, group: Any) -> int:
        place = min(len(self._groups), MOST_GROUPS - 1)
        self._groups[id(group)] = (group, place)
        self._tell_group(place, group)
        return place

"""Dumps of torch's flight recorder -> what a rank waits for on its device. Pure; standard library alone.

NCCL's collectives are only queued by the host, so that the beacon knows when they began and not whether they are over;
the recorder knows. Format 2.x of torch/csrc/distributed/c10d/FlightRecorder.hpp, as JSON or as torch's own pickle.
"""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from parallel.watch.reports import GroupCall, Report

_PREFIX = "flight:"
"""Of names of groups whose collectives the recorder has counted: it and the beacon begin at different numbers."""


class _PlainUnpickler(pickle.Unpickler):
    """Reads what a dump consists of, which needs no classes; a file that names one is no dump."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"a flight recorder's dump has no {module}.{name}")


def flight_path(folder: Path, rank: int) -> Path:
    """Return the file that gets a rank's dump."""
    return folder / f"rank_{rank}.flight.json"


def read_flight(folder: Path, rank: int) -> dict[str, Any] | None:
    """Return the dump of a rank, ours or one of NCCL's own beside it (`*nccl_trace_rank_R`), or None."""
    for path in (flight_path(folder, rank), *sorted(folder.glob(f"*nccl_trace_rank_{rank}"))):
        try:
            data = path.read_bytes()
            dump = json.loads(data) if data[:1] == b"{" else _PlainUnpickler(io.BytesIO(data)).load()
            return dict(dump)
        except (OSError, ValueError, TypeError, EOFError, pickle.UnpicklingError):
            continue
    return None


def with_flight(
    report: Report, dump: Mapping[str, Any], known: Iterable[Mapping[str, Any]], now: float | None = None
) -> Report:
    """Return a report with what the recorder knows better: the oldest collective that is not over, what came before.

    `known` are groups with `group`, `axis` and `ranks`; `now` is the moment of the dump, by default when the report was
    written, in seconds since 1970.
    """
    groups = {**_groups_of(dump), **{one["group"]: one for one in known}}
    begun: dict[str, int] = {}
    oldest: Mapping[str, Any] | None = None
    has_active: set[str] = set()
    for entry in sorted(dump.get("entries") or [], key=lambda one: one["record_id"]):
        name = entry["process_group"][0]
        if not _is_over(entry):
            oldest = oldest or entry
            if name in has_active:
                continue  # queued behind one that is not over
            has_active.add(name)
        if not entry["is_p2p"]:
            begun[_PREFIX + name] = max(begun.get(_PREFIX + name, 0), entry["collective_seq_id"])
    waits_in, seconds = report.waits_in, report.wait_seconds  # of the host, which the recorder may not know
    if oldest is not None:
        waits_in = _as_call(oldest, groups)
        seconds = max(0.0, (report.written_at if now is None else now) - oldest["time_created_ns"] / 1e9)
    return dataclasses.replace(report, waits_in=waits_in, wait_seconds=seconds, begun={**report.begun, **begun})


def _is_over(entry: Mapping[str, Any]) -> bool:
    return bool(entry["retired"]) or entry["state"] == "completed"


def _groups_of(dump: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the groups that the dump itself knows: NCCL's have their ranks in it, as text."""
    groups = {}
    for name, one in (dump.get("pg_config") or {}).items():
        ranks = one["ranks"]
        found = json.loads(ranks) if isinstance(ranks, str) else ranks
        groups[name] = {"group": name, "axis": one.get("desc") or name, "ranks": tuple(int(rank) for rank in found)}
    return groups


def _as_call(entry: Mapping[str, Any], groups: Mapping[str, Mapping[str, Any]]) -> GroupCall:
    name, desc = entry["process_group"]
    group = groups.get(name) or {"axis": desc or name, "ranks": ()}
    op, peer = entry["profiling_name"].rsplit(":", 1)[-1], None
    if entry["is_p2p"]:
        # Such as `nccl:send 0->1` and `nccl:recv 1<-0`, in ranks of the group.
        words = entry["profiling_name"].replace("->", " ").replace("<-", " ").split()
        op, place = words[0].rsplit(":", 1)[-1], int(words[-1])
        peer = group["ranks"][place] if place < len(group["ranks"]) else place
    number = entry["p2p_seq_id"] if entry["is_p2p"] else entry["collective_seq_id"]
    return GroupCall(op, group["axis"], _PREFIX + name, tuple(group["ranks"]), number, peer)

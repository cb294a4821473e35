"""What the process beside each rank writes of it, `logs/attempt_N/watch/rank_R.json`, and who the ranks are.

Standard library alone. A file is written over in place, so that thousands of ranks cost a shared disk one small write
each and no new names; a reader may find it half written, and reads it again.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

WATCH = "watch"
"""Folder of these files, beside the log files of a start of the run."""
RANKS = "ranks.json"
State = Literal["running", "blocked", "stopped", "ended", "done", "silent"]
"""Of the rank's process: blocked in the kernel, as by a disk; stopped by a signal; ended before its time, or in time;
silent: nothing is heard of the process beside it, so that its host may be gone."""
CONTROL = "control"
"""Name of the group that has a day's patience (`parallel/control.py`)."""
_TRIES = 5


@dataclass(frozen=True)
class Rank:
    """Who a rank is."""

    rank: int
    host: str
    place: str
    """Its coordinates, such as `tp 0/2, cp 0/1, dp 0/1, pp 1/2, ep 0/1`."""

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.place}) on {self.host}"


@dataclass(frozen=True)
class GroupCall:
    """A collective of a named group."""

    op: str
    axis: str
    """What the group is called: an axis, `world`, `control`."""
    group: str
    """torch's own name of the group, the same on all its ranks."""
    ranks: tuple[int, ...]
    number: int
    peer: int | None = None

    def __str__(self) -> str:
        if self.peer is not None:
            return f"{self.op} {'to' if self.op == 'send' else 'from'} rank {self.peer} ({self.axis})"
        return f"{self.op} number {self.number} of the {self.axis} group"


@dataclass(frozen=True)
class Report:
    """A rank as the process beside it saw it last."""

    rank: Rank
    state: State
    step: int
    phase: str
    phase_seconds: float
    idle_seconds: float
    """Since it began a collective or a phase."""
    last: GroupCall | None = None
    waits_in: GroupCall | None = None
    wait_seconds: float = 0.0
    begun: Mapping[str, int] = field(default_factory=dict)
    """Collectives begun, by torch's name of the group."""
    beat: int = 0
    """How often this has been written."""
    alarm: str = ""
    """The alarm that was seen when it was written."""
    written_at: float = 0.0
    """Seconds since 1970 by that host's clock."""
    at: str = ""
    """The innermost place of ours in the stack of its main thread, where that has been asked for."""

    def describe(self) -> str:
        """Return who the rank is and what it is at."""
        where = f"{self.phase} of step {self.step}"
        at = f" (at {self.at})" if self.at else ""
        match self.state:
            case "ended":
                return f"{self.rank}, whose process ended in {where}"
            case "stopped":
                return f"{self.rank}, whose process is stopped by a signal in {where}{at}"
            case "silent":
                return f"{self.rank}, of whose host nothing is heard any more, last in {where}"
            case "blocked":
                return f"{self.rank}, for {self.idle_seconds:.0f} s in {where} and blocked by its disk{at}"
            case _:
                return f"{self.rank}, for {self.idle_seconds:.0f} s in {where}{at}"

    def as_json(self) -> str:
        """Return one line; ranks of a group that are evenly apart as [first, step, number]."""
        return json.dumps({**asdict(self), "last": _call_dict(self.last), "waits_in": _call_dict(self.waits_in)})


def report_path(folder: Path, rank: int) -> Path:
    """Return the file of a rank."""
    return folder / f"rank_{rank}.json"


def stacks_path(folder: Path, rank: int) -> Path:
    """Return the file that gets the stacks of a rank's threads."""
    return folder / f"rank_{rank}.stacks.txt"


def write_ranks(folder: Path, ranks: Iterable[Rank]) -> None:
    """Write who the ranks are."""
    (folder / RANKS).write_text(json.dumps([asdict(one) for one in ranks]) + "\n", encoding="utf-8")


def read_ranks(folder: Path) -> list[Rank]:
    """Return who the ranks are, in order; of a folder that lacks this, those that have written something."""
    try:
        ranks = [Rank(**one) for one in json.loads((folder / RANKS).read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError):
        ranks = []
    if ranks:
        return ranks
    numbers = sorted(int(path.stem[len("rank_") :]) for path in folder.glob("rank_*.json") if path.stem[5:].isdecimal())
    found = (read_report(folder, number) for number in numbers)
    return [one.rank for one in found if one is not None]


def read_report(folder: Path, rank: int) -> Report | None:
    """Return what was last written of a rank, or None where nothing can be read."""
    for _ in range(_TRIES):
        try:
            return parse_report(report_path(folder, rank).read_text(encoding="utf-8"))
        except OSError:
            return None
        except (ValueError, KeyError, TypeError):
            time.sleep(0.01)  # while it is being written
    return None


def parse_report(text: str) -> Report:
    """Return the report of a file's first line. Raises ValueError, KeyError or TypeError where it is none."""
    fields: dict[str, Any] = dict(json.loads(text.split("\n", 1)[0]))
    rank, last, waits_in = Rank(**fields.pop("rank")), fields.pop("last"), fields.pop("waits_in")
    report = Report(rank=rank, last=_read_call(last), waits_in=_read_call(waits_in), **fields)
    times = (report.phase_seconds, report.idle_seconds, report.wait_seconds, report.written_at)
    if not all(isinstance(one, float | int) for one in times):
        raise TypeError("a time that is no number")
    return report


class ReportFile:
    """The file of one rank, open for as long as the rank lives."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._descriptor = os.open(report_path(folder, rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)

    def write(self, report: Report) -> None:
        """Write over what was there."""
        data = report.as_json().encode() + b"\n"
        os.pwrite(self._descriptor, data, 0)
        os.ftruncate(self._descriptor, len(data))


def describe_stack(text: str) -> str:
    """Return of faulthandler's stacks the innermost place of the main thread that is no library's: `file:line in name`.

    Only files of this code count; the main thread is the one whose stack is deepest in `launch` or came last.
    """
    for thread in reversed(re.split(r"\n(?=(?:Current thread|Thread) 0x)", text)):
        places = re.findall(r'File "([^"]+)", line (\d+) in (\S+)', thread)
        ours = [one for one in places if re.search(r"/(trainer|parallel|launch|tools)/", one[0])]
        ours = [one for one in ours if "/parallel/watch/" not in one[0]]
        if ours:
            path, line, name = ours[0]
            short = re.sub(r".*/(?=(?:trainer|parallel|launch|tools)/)", "", path)
            return f"{short}:{line} in {name}"
    return ""


def _call_dict(call: GroupCall | None) -> dict[str, Any] | None:
    return None if call is None else {**asdict(call), "ranks": shorten(call.ranks)}


def _read_call(fields: dict[str, Any] | None) -> GroupCall | None:
    return None if fields is None else GroupCall(**{**fields, "ranks": lengthen(fields["ranks"])})


def shorten(ranks: tuple[int, ...]) -> dict[str, int] | list[int]:
    """Return ranks as they are written: first, step and number where they are evenly apart."""
    step = ranks[1] - ranks[0] if len(ranks) > 1 else 1
    if step > 0 and ranks == tuple(range(ranks[0], ranks[0] + step * len(ranks), step)):
        return {"first": ranks[0], "step": step, "number": len(ranks)}
    return list(ranks)


def lengthen(written: dict[str, int] | list[int]) -> tuple[int, ...]:
    """Return what `shorten` was given."""
    if isinstance(written, dict):
        first, step, number = written["first"], written["step"], written["number"]
        return tuple(range(first, first + step * number, step))
    return tuple(written)

"""Reports of ranks that wait -> which rank did not arrive at what. Standard library alone.

A rank that waits in a collective waits for those of its group that have not begun it, and these may wait elsewhere: who
is waited for and does not wait is where the chain ends.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from parallel.watch.reports import CONTROL, GroupCall, Rank, Report

Kind = Literal["rank", "order", "connection", "patience", "nothing"]
DEVICE_PHASES = ("forward_backward", "optimizer", "score", "evaluate", "generate")
"""Phases in which a host may wait for its device."""
_STEP_PHASES = ("forward_backward", "optimizer", "score")
_MOST_NAMED = 4
_MOVING = 0.2
"""Of the limit, below which a wait is one of many that come and go: that rank is at work, such as on longer answers."""
_FILE = "verdict.json"


@dataclass(frozen=True)
class Verdict:
    """What is wrong with a run."""

    kind: Kind
    """`rank`: ranks did not arrive; `order`: ranks called different collectives; `connection`: all arrived and nothing
    passes; `patience`: a rank is at work that may take long, while others wait; `nothing`: nobody waits."""
    sentence: str
    culprits: tuple[int, ...] = ()
    waiting: int = 0
    """Number of ranks that wait in collectives."""

    @property
    def ends_run(self) -> bool:
        """Whether waiting any longer is of no use."""
        return self.kind in ("rank", "order", "connection")


def write_verdict(folder: Path, alarm: str, verdict: Verdict) -> None:
    """Write the verdict on an alarm; it appears whole."""
    new = folder / f".{_FILE}.{os.getpid()}"
    new.write_text(json.dumps({"alarm": alarm, **asdict(verdict)}) + "\n", encoding="utf-8")
    os.replace(new, folder / _FILE)


def read_verdict(folder: Path) -> tuple[str, Verdict]:
    """Return the last alarm and the verdict on it. Raises OSError, ValueError, KeyError or TypeError for none."""
    fields = dict(json.loads((folder / _FILE).read_text(encoding="utf-8")))
    alarm = fields.pop("alarm")
    return alarm, Verdict(**{**fields, "culprits": tuple(fields["culprits"])})


def judge(ranks: Sequence[Rank], reports: Mapping[int, Report], limit_seconds: float = 0.0) -> Verdict:
    """Return the verdict on the ranks of a world, of which some may have no report.

    Where all waits are shorter than `limit_seconds`, those that waited so long have gone on meanwhile.
    """
    is_any_gone = any(one.state == "ended" for one in reports.values())
    if not is_any_gone and not any(one.wait_seconds >= limit_seconds for one in reports.values()):
        return Verdict("nothing", "no rank waits for another that long")
    waiting = _waiting(reports)
    if not waiting:
        gone = [one for one in ranks if not _is_there(reports.get(one.rank))]
        if gone:
            return Verdict("rank", _sentence(gone, reports, waiting), tuple(one.rank for one in gone))
        return Verdict("nothing", "no rank waits for another in a collective")
    shortest = 0.0 if is_any_gone else _MOVING * limit_seconds
    stuck = {number: one for number, one in waiting.items() if one.wait_seconds >= shortest}
    missed = {other for one in stuck.values() for other in _missing(one, reports)}
    blamed = _blamed(reports) or missed - stuck.keys()
    if blamed:
        return _on_ranks([one for one in ranks if one.rank in blamed], ranks, reports, stuck, limit_seconds)
    if len(stuck) < len(waiting):
        return Verdict("nothing", "the last rank that others waited for has just arrived")
    return _on_calls(waiting, reports)


def judge_remains(ranks: Sequence[Rank], reports: Mapping[int, Report]) -> Verdict:
    """Return the verdict on what is left of a run that was ended from outside, perhaps not on all hosts.

    If all processes were ended, that says nothing of what they waited for; nor does a report that is missing, unless
    nobody else is to blame.
    """
    waits = any(one.waits_in is not None for one in reports.values())
    if waits and all(one.state == "ended" for one in reports.values()):
        reports = {number: replace(one, state="running") for number, one in reports.items()}
    heard = [one for one in ranks if one.rank in reports]
    blamed = [one.rank for one in heard if one.rank in _blamed(reports)]
    return judge(heard, reports) if blamed else judge(ranks, reports)


def _on_ranks(
    blamed: Sequence[Rank],
    ranks: Sequence[Rank],
    reports: Mapping[int, Report],
    waiting: Mapping[int, Report],
    limit_seconds: float,
) -> Verdict:
    """Blame those that are gone or stopped before those that are at work: these may be late for the same reason."""
    gone = [one for one in ranks if not _is_there(reports.get(one.rank))]
    named = gone or blamed
    too_long = [one.waits_in for one in waiting.values() if one.wait_seconds >= limit_seconds]
    is_patient = not gone and all(call is not None and call.axis == CONTROL for call in too_long)
    if is_patient and not any(reports[one.rank].phase in _STEP_PHASES for one in blamed):
        kind: Kind = "patience"
    else:
        kind = "rank"
    return Verdict(kind, _sentence(named, reports, waiting), tuple(one.rank for one in named), len(waiting))


def _on_calls(waiting: Mapping[int, Report], reports: Mapping[int, Report]) -> Verdict:
    """All wait: some called another collective than the others, or the connection between them is broken."""
    by_place: dict[tuple[str, int], dict[str, list[Report]]] = {}
    for one in waiting.values():
        assert one.waits_in is not None
        if one.waits_in.peer is None:
            ops = by_place.setdefault((one.waits_in.group, one.waits_in.number), {})
            ops.setdefault(one.waits_in.op, []).append(one)
    everybody = sorted(waiting.values(), key=lambda one: one.rank.rank)
    for ops in by_place.values():
        if len(ops) > 1:
            odd, other, *_ = sorted(ops.values(), key=len)
            sentence = (
                f"{odd[0].rank} waits in {odd[0].waits_in} where {other[0].rank} and {len(other) - 1} more wait in "
                f"{other[0].waits_in}: ranks call collectives in different order"
            )
            return Verdict("order", sentence, tuple(one.rank.rank for one in odd), len(waiting))
    hosts: dict[str, list[Report]] = {}
    for one in everybody:
        hosts.setdefault(one.rank.host, []).append(one)
    first = next((one for one in everybody if not _missing(one, reports)), everybody[0])
    if len(hosts) == 1:
        sentence = (
            f"all {len(waiting)} ranks that wait have arrived, the first of them {first.rank} in {first.waits_in} of "
            f"step {first.step}, and nothing passes between them on {first.rank.host}"
        )
        return Verdict("connection", sentence, (), len(waiting))
    ends = [one[0] for one in hosts.values()][:_MOST_NAMED]
    sentence = (
        f"nothing passes between the hosts {' and '.join(list(hosts)[:_MOST_NAMED])}: "
        + ", ".join(f"{one.rank} waits in {one.waits_in} of step {one.step}" for one in ends)
        + f", and all {len(waiting)} ranks wait so; look at the network between these hosts"
    )
    return Verdict("connection", sentence, tuple(one.rank.rank for one in ends), len(waiting))


def _waiting(reports: Mapping[int, Report]) -> dict[int, Report]:
    return {number: one for number, one in reports.items() if one.waits_in is not None and _lives(one)}


def _blamed(reports: Mapping[int, Report]) -> set[int]:
    """Return the ranks that others wait for and that do not wait."""
    waiting = _waiting(reports)
    return {other for one in waiting.values() for other in _missing(one, reports)} - waiting.keys()


def _missing(one: Report, reports: Mapping[int, Report]) -> set[int]:
    """Return the ranks that a rank waits for."""
    call = one.waits_in
    assert call is not None
    if call.peer is not None:
        return {call.peer}
    others = set(call.ranks) - {one.rank.rank}
    return {other for other in others if not _has_begun(reports.get(other), call)}


def _has_begun(other: Report | None, call: GroupCall) -> bool:
    return other is not None and _is_there(other) and other.begun.get(call.group, 0) >= call.number


def _is_there(one: Report | None) -> bool:
    return one is not None and one.state in ("running", "blocked", "done")


def _lives(one: Report) -> bool:
    return one.state in ("running", "blocked")


def _sentence(named: Sequence[Rank], reports: Mapping[int, Report], waiting: Mapping[int, Report]) -> str:
    told = ", and ".join(
        reports[one.rank].describe() if one.rank in reports else f"{one}, of which nothing was heard"
        for one in named[:_MOST_NAMED]
    )
    more = f", and {len(named) - _MOST_NAMED} more ranks" if len(named) > _MOST_NAMED else ""
    if not waiting:
        return f"{told}{more} has gone" if len(named) == 1 else f"{told}{more} have gone"
    awaited = Counter(one.waits_in for one in waiting.values() if one.waits_in is not None)
    # The wait that the named rank is missing from says most; else the one with most ranks in it.
    mine = {call: num for call, num in awaited.items() if named[0].rank in call.ranks or named[0].rank == call.peer}
    call, num = max((mine or awaited).items(), key=lambda item: item[1])
    rest = len(waiting) - num
    plural = "ranks wait" if num != 1 else "rank waits"
    if not mine:
        return f"{told}{more}; {num} {plural} in {call}" + (f", {rest} in others" if rest else "")
    others = f" and {rest} in others" if rest else ""
    return f"{told}{more}, did not arrive at {call}, in which {num} {plural}{others}"

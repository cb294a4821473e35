"""The process beside a rank: writes down where the rank is, raises the alarm, gives the verdict, ends what hangs.

Started by `parallel/watch/watch.py` as `python sentinel.py SETTINGS`; it imports no packages, so that it starts at once
and is not held up by what holds up the rank. It ends with its rank.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from parallel.end_notes import note_end
from parallel.watch.beacon import Call, look, open_memory
from parallel.watch.flight import flight_path, read_flight, with_flight
from parallel.watch.reports import (
    CONTROL,
    GroupCall,
    Rank,
    Report,
    ReportFile,
    State,
    describe_stack,
    lengthen,
    read_ranks,
    read_report,
    stacks_path,
)
from parallel.watch.verdict import DEVICE_PHASES, Verdict, judge, read_verdict, write_verdict

ALARM = "alarm"
STACK_SIGNAL = signal.SIGUSR2
_STACK_SECONDS = 0.5
_MOST_BYTES = 2**20
_DUMP_SECONDS = 2.0
_LEAVING_SECONDS = 4.0
"""What a rank that knows the verdict has to leave; after that it is killed."""


@dataclass(frozen=True)
class Settings:
    """What the rank tells its sentinel at the start, as JSON."""

    rank: int
    local_rank: int
    pid: int
    host: str
    place: str
    folder: str
    exit_code: int
    """Of a rank that is ended."""
    limit_seconds: float
    """How long a rank may wait in a collective before the alarm is raised."""
    memory: int
    """File descriptor of the beacon."""
    has_flight: bool
    """Whether the rank can be asked for a dump of the flight recorder."""
    stacks: int
    """File descriptor of the memory that gets the stacks of the rank's threads."""
    socket: int
    """File descriptor of the connection with the rank."""

    @property
    def tick_seconds(self) -> float:
        """How often the rank is looked at."""
        return min(5.0, max(0.05, self.limit_seconds / 30))

    @property
    def beat_seconds(self) -> float:
        """How often it is written down where nothing happens."""
        return max(1.0, self.limit_seconds / 15)

    @property
    def stop_seconds(self) -> float:
        """How much too late this process may wake; later, and it was stopped, as the whole run may have been."""
        return max(1.0, 0.1 * self.limit_seconds)

    @property
    def settle_seconds(self) -> float:
        """How long the others have to notice an alarm: clients of NFS may take a minute to see a new file."""
        return max(0.5, 0.15 * self.limit_seconds)


class Sentinel:
    """Watches one rank until it ends."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._rank = Rank(settings.rank, settings.host, settings.place)
        self._folder = Path(settings.folder)
        self._cells = open_memory(settings.memory)[1]
        self._socket = socket.socket(fileno=settings.socket)
        self._process = os.pidfd_open(settings.pid)
        self._file = ReportFile(self._folder, settings.rank)
        self._groups: list[dict[str, Any]] = []
        self._received = b""
        self._is_done = False
        self._beat = 0
        self._written = -1e9
        self._patience = settings.limit_seconds
        self._ran_since = time.monotonic()
        self._alarm = ""
        self._at = ""

    def watch(self) -> None:
        """Look at the rank again and again; return when it has ended."""
        while self._wait(self._settings.tick_seconds):
            report = self._look()
            if time.monotonic() - self._written >= self._settings.beat_seconds:
                self._write(report)
            if max(report.wait_seconds, report.idle_seconds) < self._settings.limit_seconds:
                self._patience = self._settings.limit_seconds  # what took long is over
            alarm = self._see_alarm()
            if not alarm and report.wait_seconds > self._patience:
                alarm = self._raise_alarm()
            if alarm and alarm != self._alarm:
                self._alarm = alarm
                if self._handle_alarm():
                    return
        self._write(self._report(is_over=True))
        if not self._is_done:  # those that wait for it need not wait any longer
            self._alarm = self._raise_alarm()
            if self._settings.rank == 0:
                print(f"watch: {self._judge().sentence}", file=sys.stderr, flush=True)

    def _wait(self, seconds: float) -> bool:
        """Wait for so long, taking in what the rank says; return False as soon as it has ended or needs no watch."""
        deadline = time.monotonic() + seconds
        watched: list[Any] = [self._process, self._socket]
        while (left := deadline - time.monotonic()) > 0:
            ready = select.select(watched, [], [], left)[0]
            if self._socket in ready:
                data = self._socket.recv(65536)
                if not data:
                    watched.remove(self._socket)
                self._take_in(data)
            if self._process in ready or self._is_done:
                return False
        if -left > self._settings.stop_seconds:
            self._ran_since = time.monotonic()
        return True

    def _take_in(self, data: bytes) -> None:
        *lines, self._received = (self._received + data).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if message.get("done"):
                self._is_done = True
            else:
                self._groups.append({**message, "ranks": lengthen(message["ranks"])})

    def _look(self, *, is_alarm: bool = False) -> Report:
        """Return the report, with the flight recorder's part where nothing has happened for long, or on an alarm.

        Nobody waits while all is stopped, as by Ctrl-Z or `scontrol suspend`: that time is not counted.
        """
        report, settings = self._report(), self._settings
        if report.state == "stopped":
            self._ran_since = time.monotonic()
        is_due = is_alarm or (report.idle_seconds >= self._patience and report.phase in DEVICE_PHASES)
        if settings.has_flight and is_due:
            dump = self._dump_flight()
            groups = [group for group in self._groups if group["axis"] != CONTROL]
            report = report if dump is None else with_flight(report, dump, groups)
        most = round(time.monotonic() - self._ran_since, 3)
        return dataclasses.replace(report, wait_seconds=min(report.wait_seconds, most))

    def _dump_flight(self) -> dict[str, Any] | None:
        """Ask the rank for a dump and return it; None where the rank's interpreter does not answer."""
        path = flight_path(self._folder, self._settings.rank)
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
            self._socket.sendall(json.dumps({"dump": str(path)}).encode() + b"\n")
        deadline = time.monotonic() + _DUMP_SECONDS
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        return read_flight(self._folder, self._settings.rank)

    def _report(self, *, is_over: bool = False) -> Report:
        glance = look(self._cells)
        begun = {group["group"]: count for group, count in zip(self._groups, glance.begun, strict=False)}
        state = ("done" if self._is_done else "ended") if is_over else process_state(self._settings.pid)
        return Report(
            rank=self._rank,
            state=state,
            step=glance.step,
            phase=glance.phase,
            phase_seconds=round(glance.phase_seconds, 3),
            idle_seconds=round(glance.idle_seconds, 3),
            last=self._name(glance.last),
            waits_in=self._name(glance.waits_in),
            wait_seconds=round(glance.wait_seconds, 3),
            begun=begun,
            beat=self._beat,
            alarm=self._alarm,
            written_at=time.time(),
            at=self._at,
        )

    def _name(self, call: Call | None) -> GroupCall | None:
        if call is None or call.group >= len(self._groups):
            return None
        return GroupCall(call.op, number=call.number, peer=call.peer, **self._groups[call.group])

    def _write(self, report: Report) -> None:
        self._beat += 1
        self._written = time.monotonic()
        with contextlib.suppress(OSError):  # a full disk: the run has its own words for that
            self._file.write(report)

    def _see_alarm(self) -> str:
        try:
            return (self._folder / ALARM).read_text(encoding="utf-8")
        except OSError:
            return ""

    def _raise_alarm(self) -> str:
        """Raise the alarm unless another rank has, and return it."""
        mine = f"{self._settings.rank}.{time.time_ns()}"
        new = self._folder / f".{ALARM}.{self._settings.rank}"
        with contextlib.suppress(OSError):
            new.write_text(mine, encoding="utf-8")
            with contextlib.suppress(FileExistsError):
                os.link(new, self._folder / ALARM)  # appears whole, for one rank alone
            new.unlink()
        return self._see_alarm() or mine

    def _handle_alarm(self) -> bool:
        """Write down all that can be known of the rank, and wait for the verdict; return whether the run ends."""
        settings = self._settings
        self._at = self._dump_stacks()
        self._write(self._look(is_alarm=True))
        # Rank 0 judges; where it does not in time, the first rank of each host, and then every rank, judges alone.
        order = 0 if settings.rank == 0 else 1 if settings.local_rank == 0 else 2
        verdict = self._find_verdict(order * settings.settle_seconds / 2) if order else None
        is_judge = verdict is None
        verdict = verdict or self._judge()
        if not verdict.ends_run:
            if is_judge and verdict.kind == "patience":
                print(f"watch: {verdict.sentence}; going on waiting", file=sys.stderr, flush=True)
            with contextlib.suppress(OSError):
                if self._see_alarm() == self._alarm:
                    (self._folder / ALARM).unlink()
            self._patience *= 2
            self._at = ""
            return False
        self._end(verdict, is_judge=is_judge)
        return True

    def _dump_stacks(self) -> str:
        """Have the rank write its stacks, which needs nothing of the interpreter, and return where it is."""
        with contextlib.suppress(OSError):
            os.ftruncate(self._settings.stacks, 0)
            signal.pidfd_send_signal(self._process, STACK_SIGNAL)
        deadline, text = time.monotonic() + _STACK_SECONDS, ""
        while time.monotonic() < deadline:
            time.sleep(0.05)
            before, text = text, os.pread(self._settings.stacks, _MOST_BYTES, 0).decode("utf-8", "replace")
            if text and text == before:
                break
        text = text.lstrip("\0")  # the rank writes on behind what was there before
        with contextlib.suppress(OSError):
            stacks_path(self._folder, self._settings.rank).write_text(text, encoding="utf-8")
        return describe_stack(text)

    def _gather(self, ranks: Sequence[Rank]) -> list[Report]:
        """Return the reports of all ranks; one that is not written again within the time to settle is silent."""
        deadline = time.monotonic() + self._settings.settle_seconds
        first = {one.rank: read_report(self._folder, one.rank) for one in ranks}
        fresh = {number: one for number, one in first.items() if one is not None and self._knows(one)}
        while len(fresh) < len(ranks) and time.monotonic() < deadline:
            time.sleep(self._settings.tick_seconds / 2)
            for number in first.keys() - fresh.keys():
                found, before = read_report(self._folder, number), first[number]
                if found is not None and (self._knows(found) or (before is not None and found.beat > before.beat)):
                    fresh[number] = found
        old = {number: one for number, one in first.items() if one is not None and number not in fresh}
        silent = [dataclasses.replace(one, state="silent") for one in old.values()]
        return [*fresh.values(), *silent]

    def _knows(self, one: Report) -> bool:
        return one.alarm == self._alarm or one.state in ("ended", "done")

    def _find_verdict(self, patience: float) -> Verdict | None:
        """Return the verdict on this alarm, waiting for it as long as the judge may take and `patience`."""
        deadline = time.monotonic() + self._settings.settle_seconds + patience
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                alarm, verdict = read_verdict(self._folder)
                if alarm == self._alarm:
                    return verdict
            time.sleep(self._settings.tick_seconds / 2)
        return None

    def _judge(self) -> Verdict:
        """Give the verdict and write it down."""
        ranks = read_ranks(self._folder)
        reports = {one.rank.rank: one for one in self._gather(ranks)}
        verdict = judge(ranks, reports, self._settings.limit_seconds)
        with contextlib.suppress(OSError):
            write_verdict(self._folder, self._alarm, verdict)
        return verdict

    def _end(self, verdict: Verdict, *, is_judge: bool) -> None:
        """Tell the rank to leave; end it where it cannot. The judge's rank speaks first, so that one cause is told."""
        with contextlib.suppress(OSError):
            words = {"sentence": verdict.sentence, "speaks": is_judge}
            self._socket.sendall(json.dumps(words).encode() + b"\n")
        is_alive = not select.select([self._process], [], [], 3.0 if is_judge else _LEAVING_SECONDS)[0]
        if is_alive and is_judge and process_state(self._settings.pid) == "stopped":
            print(f"watch: {verdict.sentence}", file=sys.stderr, flush=True)
        elif is_alive and is_judge:
            is_alive = not select.select([self._process], [], [], _LEAVING_SECONDS)[0]
            if is_alive:
                print(f"watch: {verdict.sentence}", file=sys.stderr, flush=True)
        self._write(self._report(is_over=not is_alive))
        if is_alive:
            note_end(self._settings.exit_code, verdict.sentence)  # which the rank cannot do any more
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(self._process, signal.SIGKILL)


def process_state(pid: int) -> State:
    """Return what Linux says of a process."""
    try:
        letter = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0]
    except OSError:
        return "ended"
    return {"T": "stopped", "t": "stopped", "D": "blocked", "Z": "ended", "X": "ended"}.get(letter, "running")  # type: ignore[return-value]


def main() -> None:
    """Watch the rank that started this process."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # meant for the rank, which ends this process when it ends
    try:
        sentinel = Sentinel(Settings(**json.loads(sys.argv[1])))
    except ProcessLookupError:
        return  # it ended before it could be watched
    sentinel.watch()


if __name__ == "__main__":
    main()

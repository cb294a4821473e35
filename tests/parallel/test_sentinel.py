"""The process beside a rank, beside a process that only sleeps: when it raises the alarm, and when it does not."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from parallel.watch import sentinel
from parallel.watch.beacon import (
    CALLED_AT,
    FIRST_GROUP,
    IS_WAITING,
    NUM_CALLS,
    WAIT_NUMBER,
    WAIT_PEER,
    WAIT_SINCE,
    open_memory,
)
from parallel.watch.reports import CONTROL, Rank, Report, ReportFile, write_ranks

LIMIT = 1.0


@dataclass
class Watched:
    """A made-up rank 0 of two, which waits when told to, and the process beside it."""

    folder: Path
    rank: subprocess.Popen[bytes]
    sentinel: subprocess.Popen[str]
    cells: memoryview[float]

    def wait_for_others(self, seconds: float) -> None:
        """Wait in the first collective of the control group, for so long already."""
        self.cells[FIRST_GROUP] = self.cells[NUM_CALLS] = self.cells[WAIT_NUMBER] = 1.0
        self.cells[WAIT_PEER] = -1.0
        self.cells[WAIT_SINCE] = time.monotonic() - seconds
        self.cells[CALLED_AT] = self.cells[WAIT_SINCE]
        self.cells[IS_WAITING] = 1.0

    def go_on(self) -> None:
        self.cells[IS_WAITING], self.cells[CALLED_AT] = 0.0, time.monotonic()

    def verdicts(self) -> int:
        """Return how many verdicts have been told so far."""
        return (self.folder / "said").read_text().count("going on waiting")


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    ranks = [Rank(number, "node0", f"dp {number}/2") for number in range(2)]
    write_ranks(tmp_path, ranks)
    ReportFile(tmp_path, 1).write(Report(ranks[1], "done", 3, "end", 0.0, 0.0))
    sleeper = "import signal, time; signal.signal(signal.SIGUSR2, signal.SIG_IGN); time.sleep(60)"
    rank = subprocess.Popen([sys.executable, "-S", "-c", sleeper])
    memory, cells = open_memory()
    cells[WAIT_SINCE] = cells[CALLED_AT] = time.monotonic()
    stacks = os.memfd_create("stacks")
    ours, theirs = socket.socketpair()
    settings = sentinel.Settings(
        rank=0, local_rank=0, pid=rank.pid, host="node0", place=ranks[0].place, folder=str(tmp_path), exit_code=5,
        limit_seconds=LIMIT, memory=memory, has_flight=False, stacks=stacks, socket=theirs.fileno(),
    )  # fmt: skip
    command = [sys.executable, "-I", "-S", sentinel.__file__, json.dumps(dataclasses.asdict(settings))]
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(command, pass_fds=(memory, stacks, theirs.fileno()), stderr=said, text=True)
    ours.sendall(json.dumps({"group": "control0", "axis": CONTROL, "ranks": [0, 1]}).encode() + b"\n")
    try:
        until((tmp_path / "rank_0.json").is_file)
        time.sleep(0.3)
        yield Watched(tmp_path, rank, process, cells)
        assert process.poll() is None
    finally:
        rank.kill()
        rank.wait()
        assert process.wait(10) == 0  # ends with its rank
        for descriptor in (memory, stacks):
            os.close(descriptor)
        ours.close()
        theirs.close()


def until(condition) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_after_a_wait_that_took_long_the_next_alarm_is_raised_no_later(watched: Watched) -> None:
    """While one wait lasts, it is told after 1, 2, 4... times the limit; the next begins with 1 again."""
    watched.wait_for_others(1.5 * LIMIT)
    until(lambda: watched.verdicts() == 1)
    watched.go_on()
    time.sleep(0.3)
    watched.wait_for_others(1.5 * LIMIT)
    time.sleep(0.4 * LIMIT)
    until(lambda: not (watched.folder / sentinel.ALARM).exists())
    assert watched.verdicts() == 2


@pytest.mark.parametrize("is_sentinel_stopped", [True, False], ids=["all of the job", "the rank alone"])
def test_time_in_which_all_was_stopped_is_no_wait(watched: Watched, is_sentinel_stopped: bool) -> None:
    watched.wait_for_others(0.0)
    stopped = [watched.rank, watched.sentinel] if is_sentinel_stopped else [watched.rank]
    for process in stopped:
        process.send_signal(signal.SIGSTOP)
    time.sleep(2.2 * LIMIT)
    for process in stopped:
        process.send_signal(signal.SIGCONT)
    time.sleep(0.4 * LIMIT)
    assert watched.verdicts() == 0 and not (watched.folder / sentinel.ALARM).exists()
    until(lambda: watched.verdicts() == 1)

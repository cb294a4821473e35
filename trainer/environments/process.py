"""The trainer's end of a worker process: start it, give it replies, read its results, kill it. Knows no scores."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trainer.environments.rewards.reply import Reply
from trainer.environments.worker import Order

# -P: the directory that the command runs in comes last on the path, so that no file in it hides a standard module.
_PROGRAM = "import sys; from trainer.environments.worker import main; main(int(sys.argv[1]), int(sys.argv[2]))"
_START_SECONDS = 300.0
_END_SECONDS = 1.0
_STALL_SECONDS = 60  # in the middle of a message, which a worker that is stopped, or half dead, leaves unfinished


@dataclass
class Chunk:
    """What a worker is at."""

    indices: Sequence[int]
    place: int = 0
    """Of the reply in `indices` that is being scored."""
    part: int = 0
    """The reward that is being worked out."""
    since: float | None = None
    """When it was begun, on the clock that all processes share; None before the worker has begun the chunk."""


class WorkerProcess:
    """A process that is being started, idle, or at a chunk of replies."""

    def __init__(self, orders: Sequence[Order], place: str) -> None:
        """Start it, in a session of its own, which Ctrl-C does not reach and which can be killed as one."""
        self.connection, other = multiprocessing.Pipe()
        _limit_stalls(self.connection.fileno())
        self._folder = tempfile.mkdtemp(prefix="shardwright_rewards_")
        path = [entry or os.getcwd() for entry in sys.path]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(dict.fromkeys([*path, os.getcwd()])),
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "TMPDIR": self._folder,  # what a killed worker leaves there goes with it
        }
        descriptor = other.fileno()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _PROGRAM, str(descriptor), str(os.getpid())],
            env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            pass_fds=[descriptor], start_new_session=True,
        )  # fmt: skip
        other.close()
        self.chunk: Chunk | None = None
        self.is_ready = False
        self._deadline = time.monotonic() + _START_SECONDS
        self._time_limits = [order.time_limit for order in orders]
        self._send((list(orders), place))

    @property
    def is_idle(self) -> bool:
        return self.is_ready and self.chunk is None

    @property
    def deadline(self) -> float:
        """The moment from which a worker that is not idle is too slow, on the clock of `time.monotonic`."""
        if self.chunk is None or self.chunk.since is None:
            return self._deadline
        return self.chunk.since + self._time_limits[self.chunk.part]

    def give(self, indices: Sequence[int], replies: Sequence[Reply]) -> None:
        """Send the replies of some indices to the idle worker."""
        self.chunk = Chunk(indices)
        self._deadline = time.monotonic() + _START_SECONDS
        self._send([replies[index] for index in indices])

    def messages(self) -> list[Any]:
        """Return the messages that are there, with None behind them where the worker has gone."""
        found: list[Any] = []
        try:
            while self.connection.poll():
                found.append(self.connection.recv())
        except Exception:  # gone, or stalled; or something that is no worker wrote into the connection
            found.append(None)
        return found

    def end(self, has_gone: bool = False) -> str:
        """Kill the process and what else is in its session; return how one that `has_gone` by itself ended."""
        how = "its process closed its connection"
        try:
            if has_gone:
                how = _describe_exit(self._process.wait(_END_SECONDS))
        except subprocess.TimeoutExpired:
            pass
        self.connection.close()
        self._kill()
        self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)
        return how

    def _send(self, message: Any) -> None:
        try:
            self.connection.send(message)
        except OSError:  # it has gone, or takes nothing in: the next look at its messages tells
            self._kill()

    def _kill(self) -> None:
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass


def _limit_stalls(descriptor: int) -> None:
    """Have reads and writes of a socket fail that wait for its other end for too long."""
    limit = struct.pack("ll", _STALL_SECONDS, 0)
    with socket.socket(fileno=os.dup(descriptor)) as own:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        own.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)


def _describe_exit(code: int) -> str:
    if code >= 0:
        return f"its process ended with code {code}"
    name = signal.Signals(-code).name
    return f"its process was ended by {name}" + (", as where memory runs out" if name == "SIGKILL" else "")

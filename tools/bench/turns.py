"""Runs that take turns step by step, and how long each of their steps took. Torch-free; knows no loop.

The conductor gives all ranks of one run the turn, waits until all have finished their step, then goes on to the next
run. So the steps that are compared lie seconds apart, on a machine in the same state, and never side by side.
"""

from __future__ import annotations

import os
import selectors
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType


class Turns:
    """One rank's end of the two named pipes between it and the conductor."""

    def __init__(self, directory: Path, name: str, rank: int) -> None:
        """Open the pipes that `Conductor` made in `directory` for a rank of the run called `name`."""
        self._go, self._done = (_open_pipe(directory, name, rank, kind) for kind in ("go", "done"))

    def wait(self) -> None:
        """Wait for the turn."""
        os.read(self._go, 1)

    def give_back(self) -> None:
        """Tell the conductor that this rank has finished its step."""
        os.write(self._done, b".")


class Conductor:
    """Decides whose turn it is, among runs of `num_ranks` processes each."""

    def __init__(self, directory: Path, names: Sequence[str], num_ranks: int, check: Callable[[], None]) -> None:
        """Make the pipes in an empty directory; `check` raises when one of the runs has ended early."""
        self._names, self._check, self._pipes = tuple(names), check, {}
        for name in names:
            for kind in ("go", "done"):
                for rank in range(num_ranks):
                    os.mkfifo(_pipe_path(directory, name, rank, kind))
                ranks = range(num_ranks)
                self._pipes[name, kind] = [_open_pipe(directory, name, rank, kind) for rank in ranks]

    def __enter__(self) -> Conductor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pipes in self._pipes.values():
            for pipe in pipes:
                os.close(pipe)

    def take_round(self, is_backwards: bool) -> dict[str, float]:
        """Let every run take one step, the last named first if `is_backwards`; return the seconds of each."""
        seconds = {}
        for name in reversed(self._names) if is_backwards else self._names:
            began = time.perf_counter()
            self._write(name)
            self._await_done(name)
            seconds[name] = time.perf_counter() - began
        return seconds

    def release(self) -> None:
        """Let all runs go on to their ends, side by side."""
        for name in self._names:
            self._write(name)

    def _write(self, name: str) -> None:
        for pipe in self._pipes[name, "go"]:
            os.write(pipe, b".")

    def _await_done(self, name: str) -> None:
        """Wait for one byte of each rank, looking now and then whether the runs still live."""
        with selectors.DefaultSelector() as selector:
            for pipe in self._pipes[name, "done"]:
                selector.register(pipe, selectors.EVENT_READ)
            while selector.get_map():
                ready = selector.select(timeout=1.0)
                for key, _ in ready:
                    os.read(key.fd, 1)
                    selector.unregister(key.fd)
                if not ready:
                    self._check()


def _pipe_path(directory: Path, name: str, rank: int, kind: str) -> Path:
    return directory / f"{name}_{rank}_{kind}"


def _open_pipe(directory: Path, name: str, rank: int, kind: str) -> int:
    """Open a pipe for both reading and writing: opening never waits, and no reader ever sees an end of file."""
    return os.open(_pipe_path(directory, name, rank, kind), os.O_RDWR)

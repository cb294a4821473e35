"""Runs a Python program that nobody has read, within limits of time, memory, processes, files and output.

`namespaces` (Linux 5.12 or later, as root or where users may make namespaces): the program sees no network, none of
the machine's processes and no files but Python and the system's libraries, which it cannot change. `limits` is weaker.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from signal import SIGKILL
from typing import Literal

Isolation = Literal["namespaces", "limits"]
_SYSTEM = ("/usr", "/lib", "/lib64", "/lib32", "/bin", "/etc/ld.so.cache")
_MOST_ERRORS = 4096
_MEGABYTE = 1 << 20


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    Contained in both isolations: address space and CPU time of each process, size of a file, open files, wall-clock
    time; the environment is empty, and the directory it starts in is its own and is deleted. `namespaces` contains
    also: network, other processes and their number, all files, disk (it has a part of memory for a disk). It does not
    contain: attacks on the kernel, what the system's libraries hold, and memory as a whole (`megabytes` times
    `processes`, and the disk). `limits` does not contain network, files (the program may read and change whatever the
    user of the run may) nor the number of processes, of which those that leave their session live on.
    """

    seconds: float
    megabytes: int
    processes: int
    file_megabytes: int
    isolation: Isolation


@dataclass(frozen=True)
class Outcome:
    """How a program ended."""

    ended: Literal["exit", "time", "output"]
    """By itself, at the limit of its time, or at that of its output."""
    code: int
    """Exit code, or 128 + the signal that ended it; without meaning where a limit ended it."""
    output: bytes
    """What it wrote to standard output."""


class NotContained(Exception):
    """The program could not be run as asked; the message says what the machine refused."""


def run_program(program: str, given: str, limits: Limits, most_output: int) -> Outcome:
    """Run Python source with `given` as its standard input; standard error is thrown away. Raises NotContained."""
    with tempfile.TemporaryDirectory(prefix="shardwright_box_", ignore_cleanup_errors=True) as box:
        job = {
            "parent": os.getpid(),
            "box": os.path.realpath(box),
            "program": program,
            "input": given,
            "isolation": limits.isolation,
            "python": sys.executable,
            "paths": _paths(),
            "disk_bytes": 4 * limits.file_megabytes * _MEGABYTE,
            "limits": _resource_limits(limits),
        }
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(Path(__file__).with_name("contained.py"))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={}, cwd=box,
            start_new_session=True,
        )  # fmt: skip
        try:
            return _watch(process, json.dumps(job).encode(), time.monotonic() + limits.seconds, most_output)
        finally:
            _kill(process)


def check_contained(isolation: Isolation) -> None:
    """Run a program that does nothing. Raises NotContained where this machine cannot isolate as asked."""
    outcome = _probe(isolation)
    if outcome.output != b"contained":
        raise NotContained(f"a program that should say so does not run ({outcome.ended}, code {outcome.code})")


@lru_cache(maxsize=2)
def _probe(isolation: Isolation) -> Outcome:
    if sys.platform != "linux":
        raise NotContained(f"{sys.platform} has no namespaces")
    return run_program("print('contained', end='')", "", Limits(60.0, 1024, 16, 16, isolation), 100)


def _watch(process: subprocess.Popen[bytes], job: bytes, deadline: float, most_output: int) -> Outcome:
    """Give a job to the process and read what the program writes, up to a deadline and an amount."""
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    try:
        process.stdin.write(job)
        process.stdin.close()
    except BrokenPipeError:
        pass
    texts = {process.stdout.fileno(): bytearray(), process.stderr.fileno(): bytearray()}
    output, errors = texts.values()
    waiting = set(texts)
    while waiting:
        ready, _, _ = select.select(list(waiting), [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            return Outcome("time", 0, bytes(output))
        for descriptor in ready:
            piece = os.read(descriptor, 1 << 16)
            texts[descriptor] += piece
            if not piece:
                waiting.discard(descriptor)
        if len(output) > most_output or len(errors) > _MOST_ERRORS:
            return Outcome("output", 0, bytes(output))
    if errors:
        raise NotContained(errors.decode(errors="replace"))
    try:
        return Outcome("exit", process.wait(max(0.0, deadline - time.monotonic())), bytes(output))
    except subprocess.TimeoutExpired:
        return Outcome("time", 0, bytes(output))


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End the process and all it has started."""
    try:
        os.killpg(process.pid, SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass
    for file in (process.stdin, process.stdout, process.stderr):
        if file is not None and not file.closed:
            try:
                file.close()
            except BrokenPipeError:
                pass
    process.wait()


def _resource_limits(limits: Limits) -> dict[str, int]:
    values = {
        "RLIMIT_AS": limits.megabytes * _MEGABYTE,
        "RLIMIT_CPU": int(limits.seconds) + 1,
        "RLIMIT_FSIZE": limits.file_megabytes * _MEGABYTE,
        "RLIMIT_NOFILE": 64,
        "RLIMIT_CORE": 0,
    }
    if limits.isolation == "namespaces":  # else all processes of the user would count, the trainer's threads too
        values["RLIMIT_NPROC"] = limits.processes
    return values


@lru_cache(maxsize=1)
def _paths() -> list[str]:
    """Return what Python needs of the file system, none inside another."""
    real = Path(sys.executable).resolve().parents[1].as_posix()
    paths = sorted({*_SYSTEM, sys.prefix, sys.base_prefix, sys.exec_prefix, real} - {"/"})
    return [path for path in paths if not any(path.startswith(other + "/") for other in paths)]

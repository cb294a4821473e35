"""The errors a user can mend, their words, and the exit codes scripts may rely on. Torch-free; knows no cause."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of every `launch/` entry point; `torchrun` and SLURM scripts branch on them."""

    DONE = 0
    BAD_INPUT = 2
    STOPPED_AFTER_SAVING = 3
    NON_FINITE = 4
    PEER_LOST = 5


class ShardwrightError(Exception):
    """An error that ends the run with one clear sentence instead of a traceback."""

    exit_code = ExitCode.BAD_INPUT


class BadInput(ShardwrightError):
    """A config, file or command-line value is wrong; the message names it and a value that would work."""

    exit_code = ExitCode.BAD_INPUT


class NonFinite(ShardwrightError):
    """Too many steps in a row had a non-finite loss or gradient."""

    exit_code = ExitCode.NON_FINITE


class PeerLost(ShardwrightError):
    """Another rank died or did not answer within `parallel.timeout_seconds`."""

    exit_code = ExitCode.PEER_LOST


_MOST_CHARACTERS = 160


def in_one_line(error: BaseException) -> str:
    """Return what another library's error says as a part of a sentence: on one line, and cut where it is long."""
    text = " ".join(str(error).split()).rstrip(".")
    return text if len(text) <= _MOST_CHARACTERS else text[:_MOST_CHARACTERS].rstrip() + "..."

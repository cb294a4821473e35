"""Start ranks on this machine and return the exit code of the rank that failed first, which torchrun hides behind 1.

Run: python -m launch.local --nproc-per-node 4 launch/pretrain.py configs/demo/pretrain.yaml [key=value ...]
For scripts, tests and rehearsals; no restarts. SIGTERM, SIGINT and SIGUSR1 are handed on to every rank; a closed
terminal (SIGHUP, unless nohup had it ignored) or the launcher's own death reaches them as SIGTERM: they save and end.
Training on the CPU is forked from here (`launch/fork.py`); other scripts, and ranks with a GPU, are own processes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import FrameType

if not __package__:  # run as a script: the packages are beside launch/, which Python puts first
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs.errors import BadInput, ExitCode
from configs.paths import clean_path
from configs.stages import STAGE_CONFIGS
from launch.fork import ForkedRank, fork_rank, import_trainer, run_script
from launch.main import is_training
from parallel.environment import Environment
from parallel.failures import flush_streams, report
from parallel.launcher_variables import find_free_port
from parallel.parent_death import end_with
from parallel.platform import detect_platform_name

_USAGE = "usage: python -m launch.local --nproc-per-node N launch/STAGE.py CONFIG [the entry point's own options]"
_POLL_SECONDS = 0.1
_FORWARDED = {number: number for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
_FORWARDED |= {signal.SIGHUP: signal.SIGTERM}

_Rank = subprocess.Popen[bytes] | ForkedRank


def main(argv: Sequence[str]) -> int:
    """Run the command line `argv` and return the exit code for the shell."""
    if not argv or argv[0] in ("-h", "--help"):
        with contextlib.suppress(BrokenPipeError):  # the reader has seen enough
            print(_USAGE)
        flush_streams()
        return ExitCode.DONE if argv else ExitCode.BAD_INPUT
    try:
        num_ranks, entry_point, rest = _parse(argv)
        is_forked = _can_be_forked(entry_point, rest, num_ranks)
    except BadInput as error:
        report(str(error), error.exit_code)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; nothing had begun", file=sys.stderr)
        return 128 + signal.SIGINT
    if num_ranks > 1:  # as torchrun does: ranks that each start a thread a core fight for the cores
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    if is_forked:
        import_trainer(_handled_signals())
    code = run_ranks([sys.executable, str(entry_point), *rest], num_ranks, is_forked=is_forked)
    if code is None:
        run_script(entry_point, rest)
        return ExitCode.DONE
    return code


def run_ranks(
    command: Sequence[str], num_ranks: int, *, is_forked: bool = False, patience_seconds: float = 20.0
) -> int | None:
    """Run `command` as `num_ranks` ranks of one world until all have ended and return the exit code of them all.

    That is the code of the first rank that failed; 128 + n if signal n, handed on by us, ended it; PEER_LOST if any
    other signal did. Once a rank has failed the others get SIGTERM, `patience_seconds` to leave, then SIGKILL.
    With `is_forked` the ranks are copies of this process: there None is returned at once, and the caller is the rank.
    """
    port = find_free_port()
    ranks: list[_Rank] = []
    handed_on: set[int] = set()

    def hand_on(number: int, _frame: FrameType | None) -> None:
        handed_on.add(_FORWARDED[signal.Signals(number)])
        _send(ranks, _FORWARDED[signal.Signals(number)])

    handled = _handled_signals()
    previous = {number: signal.signal(number, hand_on) for number in handled}
    try:
        for rank in range(num_ranks):
            started = _start_rank(command, _variables(rank, num_ranks, port), handled if is_forked else None)
            if started is None:
                ranks.clear()  # the others are not this rank's to end
                return None
            ranks.append(started)
            if handed_on:  # a rank more would miss what the others were told
                break
        return _watch(ranks, handed_on, patience_seconds)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        _end(ranks, 0.0)


def _watch(ranks: Sequence[_Rank], handed_on: set[int], patience_seconds: float) -> int:
    """Wait for the ranks, end the others once one has failed, and return the exit code of them all."""
    code = _wait_for_failure(ranks)
    if code is None:
        return ExitCode.DONE
    _end(ranks, patience_seconds)
    if code > 0:
        return code
    if -code in handed_on:
        return 128 - code
    hint = ", as Linux does when memory runs out" if -code == signal.SIGKILL else ""
    report(f"a rank was killed by signal {-code} ({signal.Signals(-code).name}){hint}.", ExitCode.PEER_LOST)
    return ExitCode.PEER_LOST


def _can_be_forked(entry_point: Path, rest: Sequence[str], num_ranks: int) -> bool:
    """Return whether the command trains on the CPU; raises BadInput, before anything slow, where it cannot start."""
    is_stage = entry_point.resolve().parent == Path(__file__).resolve().parent and entry_point.stem in STAGE_CONFIGS
    return is_stage and detect_platform_name() == "cpu" and is_training(entry_point.stem, rest, num_ranks)


def _parse(argv: Sequence[str]) -> tuple[int, Path, list[str]]:
    if len(argv) < 3 or argv[0] != "--nproc-per-node":
        raise BadInput(_USAGE)
    if not argv[1].isdecimal() or int(argv[1]) < 1:
        raise BadInput(f"--nproc-per-node: '{argv[1]}' is not a number of ranks; a value that would work: 4")
    works = "a value that would work: launch/pretrain.py"
    try:
        entry_point = Path(clean_path(argv[2]))
    except ValueError as error:
        raise BadInput(f"the path of the entry point {error}; {works}") from None
    if not entry_point.is_file():
        raise BadInput(f"{entry_point}: no such file; {works}")
    return int(argv[1]), entry_point, list(argv[3:])


def _variables(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    place = Environment(
        rank=rank, world_size=num_ranks, local_rank=rank, local_world_size=num_ranks, master_port=port
    ).as_variables()
    return place | {"SHARDWRIGHT_LAUNCHER": "local"}


def _handled_signals() -> tuple[signal.Signals, ...]:
    """Return the signals to hand on: not SIGHUP where it was ignored before us, for then the user has said `nohup`."""
    is_nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return tuple(number for number in _FORWARDED if not (is_nohup and number == signal.SIGHUP))


def _start_rank(command: Sequence[str], variables: Mapping[str, str], handled: Sequence[int] | None) -> _Rank | None:
    """Start one rank in a session of its own: Ctrl-C must reach it once, through us, not again from the terminal.

    It is forked where signals are `handled` here; elsewhere it is a process of its own.
    """
    end = partial(_end_with_launcher, os.getpid())
    if handled is None:
        environment = os.environ | variables
        return subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=end)
    rank = fork_rank(variables, handled)
    if rank is None:
        os.setsid()
        end()
    return rank


def _end_with_launcher(launcher: int) -> None:
    """Let the launcher's death, when it could not say so, reach the new rank as SIGTERM."""
    if not end_with(launcher, signal.SIGTERM):  # it died before we asked, and nobody would ever tell us
        os._exit(128 + signal.SIGTERM)


def _wait_for_failure(ranks: Sequence[_Rank]) -> int | None:
    """Return the first exit code that is not 0 (negative: killed by that signal), or None when all ranks ended well."""
    while True:
        codes = [rank.poll() for rank in ranks]
        # Between two polls several ranks may end: a cause says more than the lost peer or the signal that followed.
        failures = sorted((code for code in codes if code), key=lambda code: (code < 0, code == ExitCode.PEER_LOST))
        if failures:
            return failures[0]
        if all(code == 0 for code in codes):
            return None
        time.sleep(_POLL_SECONDS)


def _send(ranks: Sequence[_Rank], number: int) -> None:
    for rank in ranks:
        if rank.poll() is None:
            rank.send_signal(number)


def _end(ranks: Sequence[_Rank], patience_seconds: float) -> None:
    _send(ranks, signal.SIGTERM)
    deadline = time.monotonic() + patience_seconds
    while time.monotonic() < deadline and any(rank.poll() is None for rank in ranks):
        time.sleep(_POLL_SECONDS)
    _send(ranks, signal.SIGKILL)
    for rank in ranks:
        rank.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

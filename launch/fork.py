"""CPU ranks of a training stage, forked from a launcher that has imported the trainer once.

Such a rank begins in 0.02 s, where one that imports for itself takes 7 s of CPU. Torch-free until `import_trainer`.
"""

from __future__ import annotations

import contextlib
import os
import runpy
import signal
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import FrameType


class ForkedRank:
    """A forked rank, with what the launcher uses of `subprocess.Popen`."""

    def __init__(self, pid: int) -> None:
        """Watch the child process `pid`."""
        self.pid = pid
        self._code: int | None = None

    def poll(self) -> int | None:
        """Return the exit code, negative for the signal that killed the rank, or None while it runs."""
        return self._ask(os.WNOHANG)

    def wait(self) -> None:
        """Wait until the rank has ended."""
        self._ask(0)

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the rank has ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def _ask(self, options: int) -> int | None:
        # A signal's handler may ask between the kernel's answer and our note of it, when there is no child any more.
        with contextlib.suppress(ChildProcessError):
            if self._code is None:
                pid, status = os.waitpid(self.pid, options)
                self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code


def import_trainer(ending: Iterable[int]) -> None:
    """Import what every rank needs; one of the signals `ending` meanwhile ends us, since there is nothing to save."""

    def leave(number: int, _frame: FrameType | None) -> None:
        os._exit(128 + number)

    previous = {number: signal.signal(number, leave) for number in ending}
    from trainer.report.log import start_console

    start_console(rank=0)  # what the imports remark goes to the log files of all ranks
    from trainer.run.preload import preload

    preload()
    for number, handler in previous.items():
        signal.signal(number, handler)


def fork_rank(variables: Mapping[str, str], handled: Sequence[int]) -> ForkedRank | None:
    """Fork this process; return the rank here, and in the rank None, with `variables` added to its environment.

    In the rank the signals `handled` have the interpreter's own handlers again.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    signal.pthread_sigmask(signal.SIG_BLOCK, handled)  # the launcher's handlers must not run in the rank
    pid = os.fork()
    if pid == 0:
        os.environ.update(variables)
        for number in handled:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, handled)
    return ForkedRank(pid) if pid else None


def run_script(path: Path, arguments: Sequence[str]) -> None:
    """Do what `python PATH ARGUMENTS` does, in this process; raises SystemExit as the script does."""
    sys.argv = [str(path), *arguments]
    runpy.run_path(str(path), run_name="__main__")

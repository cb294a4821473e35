"""What the data commands share at the console: progress of long work, and one sentence instead of a traceback."""

from __future__ import annotations

import logging
import select
import signal
import sys
import time
import warnings
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn

from configs.errors import BadInput, ExitCode, ShardwrightError
from parallel.failures import is_peer_loss, leave, let_rank_zero_speak
from parallel.platform import load_platform
from tools.ranks import read_environment, refuse_ranks

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

_SECONDS_BETWEEN_LINES = 5.0


class Progress:
    """Progress of one piece of work: a bar on a terminal, else a plain line every few seconds."""

    def __init__(self, title: str, total: float) -> None:
        """Begin work called `title` of `total` units; `show` says how many are done."""
        self._title = title
        self._total = max(total, 1)
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None
        self._last_line = time.monotonic()

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from rich import progress
            from rich.console import Console

            columns = (
                "{task.description}",
                progress.BarColumn(),
                progress.TaskProgressColumn(),
                "{task.fields[detail]}",
            )
            self._bar = progress.Progress(*columns, progress.TimeRemainingColumn(), console=Console(stderr=True))
            self._task = self._bar.add_task(self._title, total=self._total, detail="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, done: float, detail: str = "") -> None:
        """Show that `done` units are done; `detail` is free text such as a rate."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, detail=detail)
        elif time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            print(f"{self._title}: {min(done / self._total, 1):4.0%}  {detail}", file=sys.stderr, flush=True)


def run_command(
    command: Callable[[], None],
    when_stopped: str = "stopped; the same command goes on where this one was",
    *,
    takes_ranks: bool = False,
) -> int:
    """Run a command and return its exit code; what the user can mend is one sentence on stderr, from rank 0.

    Several ranks of a launcher are refused unless the command `takes_ranks`, that is, shares its work among them.
    """
    # importing megatron-core tells that optional GPU packages are missing, which no data command would use
    warnings.filterwarnings("ignore", module=r"(megatron|torch)(\.|$)")
    warnings.filterwarnings("ignore", category=SyntaxWarning)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    try:
        if not takes_ranks:
            refuse_ranks()
        command()
        sys.stdout.flush()
    except ShardwrightError as error:
        let_rank_zero_speak(_rank())
        print(f"error: {error}", file=sys.stderr)
        return int(error.exit_code)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _has_reader_gone():
            return 128 + signal.SIGPIPE  # `... | head`: what the shell's own commands end with
        let_rank_zero_speak(_rank())
        print(f"error: {error.filename or 'file'}: {error.strerror or error}", file=sys.stderr)
        return int(ExitCode.BAD_INPUT)
    except KeyboardInterrupt:
        print(when_stopped, file=sys.stderr)
        return 130
    except Exception as error:
        if not is_peer_loss(error, load_platform("cpu").is_peer_failure):
            raise
        let_rank_zero_speak(_rank())
        print("error: another rank was lost or failed; start the same command again", file=sys.stderr)
        return int(ExitCode.PEER_LOST)
    return int(ExitCode.DONE)


def end_process(main: Callable[[], int]) -> NoReturn:
    """Run a tool's `main` as its script does and end the process, in silence where stdout's reader has gone."""
    try:
        code = main()
    except SystemExit as ended:  # argparse has printed its help, or a wrong option
        code = int(ended.code or 0)
    leave(code)


def _has_reader_gone() -> bool:
    """Return whether stdout is a pipe that nobody reads any more."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _rank() -> int:
    try:
        return read_environment().rank
    except BadInput:
        return 0

"""Where messages go: rank 0's console, and a file a rank under `logs/attempt_N/`. Torch-free.

Every module logs to `logging.getLogger(__name__)`. Libraries' notes and Python warnings go to the files alone.
"""

from __future__ import annotations

import contextlib
import logging
import logging.handlers
import os
import re
import sys
import warnings
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler

_OWN_PACKAGES = ("configs", "parallel", "trainer", "launch", "tools", "__main__")
_FILE_FORMAT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"
_CONSOLE_FORMAT = "%(asctime)s %(message)s"
_TIME_FORMAT = "%H:%M:%S"

console = Console(highlight=False, soft_wrap=True)
"""Rank 0's terminal; live displays and messages must share it or they overwrite each other."""

# Keeps what is said before the run directory is known, until `add_rank_file` writes it down.
_early_records = logging.handlers.MemoryHandler(capacity=10_000, flushLevel=logging.CRITICAL + 1, flushOnClose=False)


class _Quiet(logging.Handler):
    """Says once, in a sentence, that its messages cannot be written: the run has causes of its own to end for that."""

    has_spoken = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        """Take the place of logging's traceback for what the operating system refused."""
        error = sys.exception()
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self.has_spoken:
            self.has_spoken = True
            with contextlib.suppress(OSError):  # standard error may be what cannot be written
                reason = (error.strerror or str(error)).lower()
                print(f"{self}: cannot be written ({reason}); its messages are lost", file=sys.stderr)


class _RankFile(_Quiet, logging.FileHandler):
    def __str__(self) -> str:
        return self.baseFilename


class _Stream(_Quiet, logging.StreamHandler):
    def __str__(self) -> str:
        return str(getattr(self.stream, "name", "console"))


def start_console(rank: int) -> None:
    """Send our messages to the console: all from rank 0, errors alone (with the rank) from the others.

    Call it before torch and megatron-core are imported: their import-time warnings then go to the files alone.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # torch prints this module's remarks on a machine without a compiler for its devices through a handler of its own.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    warnings.simplefilter("default")
    logging.captureWarnings(True)
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
    root.setLevel(logging.INFO)
    root.addHandler(_console_handler(rank))
    root.addHandler(_early_records)


def add_rank_file(run_dir: Path, attempt: int, rank: int) -> Path:
    """Send every message of this rank to `<run_dir>/logs/attempt_<attempt>/rank_<rank>.log` too and return that path.

    `attempt` must be the same on all ranks: rank 0 asks `next_attempt` and tells the others.
    """
    path = run_dir / "logs" / f"attempt_{attempt}" / f"rank_{rank}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = _RankFile(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter(_FILE_FORMAT))
    root = logging.getLogger()
    if _early_records in root.handlers:
        _early_records.setTarget(handler)
        _early_records.flush()
        _early_records.setTarget(None)
        root.removeHandler(_early_records)
    root.addHandler(handler)
    return path


def next_attempt(run_dir: Path) -> int:
    """Return the number of this start of the run: one more than the attempts under `<run_dir>/logs`, from 1."""
    names = [path.name for path in (run_dir / "logs").glob("attempt_*")]
    numbers = [int(found.group(1)) for name in names if (found := re.fullmatch(r"attempt_(\d+)", name))]
    return max(numbers, default=0) + 1


def _console_handler(rank: int) -> logging.Handler:
    handler: logging.Handler
    if rank == 0 and console.is_terminal:
        handler = RichHandler(console=console, show_path=False, log_time_format=_TIME_FORMAT, markup=False)
    elif rank == 0:
        handler = _Stream(sys.stdout)
        handler.setFormatter(logging.Formatter(_CONSOLE_FORMAT, _TIME_FORMAT))
    else:
        handler = _Stream(sys.stderr)
        handler.setFormatter(logging.Formatter(f"%(asctime)s rank {rank}: %(message)s", _TIME_FORMAT))
        handler.setLevel(logging.ERROR)
    handler.addFilter(_is_for_the_console)
    return handler


def _is_for_the_console(record: logging.LogRecord) -> bool:
    """Accept our own messages, and of others only errors."""
    return record.name.split(".", 1)[0] in _OWN_PACKAGES or record.levelno >= logging.ERROR

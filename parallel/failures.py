"""How a failed rank says why and leaves: one sentence on stderr, torchrun's error file, the documented exit code.

Torch-free. Which errors a device's collectives raise is the platform's knowledge, handed in as a function.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

from configs.errors import in_one_line
from parallel.end_notes import note_end

# torch.distributed's own errors, by name so that this file needs no torch.
_PEER_ERROR_NAMES = ("DistError", "DistBackendError", "DistNetworkError", "DistStoreError")
_OWN_FAULT_WORDS = ("EADDRINUSE", "address already in use")
_TIME_OUT = re.compile(r"tim(ed?|ing)[ -]?out", re.IGNORECASE)
# Where in the library's source the error was raised, such as "[/pytorch/third_party/.../pair.cc:547] ".
_SOURCE_PLACE = re.compile(r"\[?\S*/\S+\.(?:cc|cpp|cu|h|hpp):\d+\]?[,:]?\s*")
_PATIENCE_SECONDS = 10.0


def is_peer_loss(error: BaseException, is_peer_failure: Callable[[BaseException], bool]) -> bool:
    """Return whether `error`, or what it was raised from, says that another rank died or did not answer."""
    return any(_is_one_peer_loss(link, is_peer_failure) for link in error_chain(error))


def describe_peer_loss(error: BaseException, timeout_seconds: int) -> str:
    """Return which of the two befell another rank: it did not answer for `timeout_seconds`, or its connection closed.

    The library's own words follow, without the place in its source.
    """
    has_timed_out = any(_TIME_OUT.search(str(link)) for link in error_chain(error))
    what = (
        f"another rank did not answer within {timeout_seconds} seconds (parallel.timeout_seconds)"
        if has_timed_out
        else "another rank was lost: it ended, or its connection broke"
    )
    first_line = (str(error).strip().splitlines() or [""])[0]
    said = in_one_line(RuntimeError(_SOURCE_PLACE.sub("", first_line))) or type(error).__name__
    return f"{what} ({said})"


def error_chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and what it was raised from, one after another."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def report(sentence: str, exit_code: int, *, rank: int = 0) -> None:
    """Write `sentence` to stderr (with the rank unless it is 0) and into torchrun's error file, if there is one."""
    prefix = f"rank {rank}: " if rank else ""
    print(f"{prefix}{sentence}", file=sys.stderr, flush=True)
    note_end(exit_code, sentence)
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        # What torchrun reads back: its closing table then shows the sentence and takes the earliest as root cause.
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"message": sentence, "timestamp": int(time.time()), "exitCode": exit_code}, file)


def let_rank_zero_speak(rank: int, seconds: float = _PATIENCE_SECONDS) -> None:
    """Wait, on every rank but 0, so that an error all ranks share is told once.

    Every launcher ends the remaining ranks when the first one fails: a rank that left sooner than rank 0 would have
    rank 0 ended before it could speak, and a rank that waits is ended here without a word.
    """
    if rank == 0:
        return
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(seconds)


def flush_streams() -> bool:
    """Write out what is buffered for stdout and stderr; return False where one of them takes no more.

    Such a stream (its reader has gone, or the disk under it is full) leads nowhere from then on, or the interpreter
    would try again at its end and fail with a traceback.
    """
    are_whole = True
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None: closed before we began
        try:
            stream.flush()
        except OSError:
            are_whole = False
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return are_whole


def leave(exit_code: int) -> NoReturn:
    """End this process with `exit_code`, without the interpreter's clean-up.

    A thread of gloo that is late to let go of a tensor would ask for the interpreter's lock while that is taken down,
    which ends the thread in the middle of a destructor, and the process by SIGABRT. After a failure destructors of
    process groups moreover wait for peers that may be gone, and children have nothing left to write.
    """
    note_end(exit_code)
    flush_streams()
    logging.shutdown()
    for child in multiprocessing.active_children():
        if exit_code or child.daemon:
            child.terminate()
        else:
            child.join()
    os._exit(exit_code)


def _is_one_peer_loss(error: BaseException, is_peer_failure: Callable[[BaseException], bool]) -> bool:
    if any(word in str(error) for word in _OWN_FAULT_WORDS):
        return False
    return type(error).__name__ in _PEER_ERROR_NAMES or is_peer_failure(error)

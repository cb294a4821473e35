"""A file by which those that wait for a process, on other hosts too, see whether it is at work, and why it failed."""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

BEAT_SECONDS = 5.0
SILENCE_SECONDS = 120.0  # clients of NFS may show a time that is a minute old


class Heartbeat:
    """Touches a file as long as its context lasts; an error that ends it stays there as text.

    Where the file cannot be written nothing is said: what cannot be written beside it tells that.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._write("")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over.set()
        self._thread.join()
        if error is not None:
            self._write(str(error) or type(error).__name__)
            return
        with suppress(OSError):
            self._path.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._is_over.wait(BEAT_SECONDS):
            with suppress(OSError):
                self._path.touch()

    def _write(self, text: str) -> None:
        new = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        with suppress(OSError):
            new.write_text(text, encoding="utf-8")
            os.replace(new, self._path)


class Listener:
    """Follows a heartbeat from the moment on at which it is made: what an earlier process has left says nothing."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen = self._look()
        self._since = time.monotonic()

    def find_failure(self) -> str | None:
        """Return why the process failed, as it says itself; None where it says nothing."""
        seen = self._look()
        if seen == self._seen:
            return None
        self._seen, self._since = seen, time.monotonic()
        with suppress(OSError):
            return self._path.read_text(encoding="utf-8") or None
        return None

    @property
    def is_silent(self) -> bool:
        """Whether nothing has been heard for so long that the process must be gone. Hosts' clocks are not compared."""
        return time.monotonic() - self._since > SILENCE_SECONDS

    def _look(self) -> tuple[int, int] | None:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns

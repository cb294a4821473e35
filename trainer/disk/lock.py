"""A lock that one process at a time can hold, over NFS too, and that goes with its process however that ends."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
from pathlib import Path
from typing import IO

log = logging.getLogger(__name__)


class FileLock:
    """A POSIX lock on a file that says who holds it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[str] | None = None

    def take(self) -> str | None:
        """Take the lock and return None, or return who holds it. Raises OSError where the file cannot be made."""
        file = self._path.open("a+", encoding="utf-8")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                log.warning("%s: this file system has no locks (%s); run one command at a time here", self._path, error)
                return None
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            return holder
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        self._file = file
        return None

    def release(self) -> None:
        """Let the next one in."""
        if self._file is not None:
            self._file.close()
            self._file = None

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
    """A POSIX lock on a file that says who holds it, and is gone when nobody does."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[str] | None = None

    def take(self) -> str | None:
        """Take the lock and return None, or return who holds it. Raises OSError where the file cannot be made."""
        while True:
            holder = self._try()
            if self._file is None or self._is_in_place():
                return holder
            self._file.close()  # the one before removed this file while we waited at it
            self._file = None

    def release(self) -> None:
        """Let the next one in, and remove the file."""
        if self._file is not None:
            if self._is_in_place():
                self._path.unlink()
            self._file.close()
            self._file = None

    def is_taken_over(self) -> bool:
        """Return whether the path names another process's file by now: somebody removed ours, and it was made anew."""
        return self._file is not None and self._path.exists() and not self._is_in_place()

    def _is_in_place(self) -> bool:
        """Return whether the path still names the file that is locked."""
        assert self._file is not None
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), self._path.stat())
        except FileNotFoundError:
            return False

    def _try(self) -> str | None:
        """Take the lock on the file that is there now and return None, or return who holds it."""
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
        job = os.environ.get("SLURM_JOB_ID")
        file.write(f"process {os.getpid()} on {socket.gethostname()}" + (f", SLURM job {job}" if job else ""))
        file.flush()
        self._file = file
        return None

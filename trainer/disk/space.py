"""Whether a disk takes what is about to be written: free space, and the limit on the size of a file. Torch-free."""

from __future__ import annotations

import resource
import shutil
import socket
from pathlib import Path


def find_space_problem(directory: Path, num_bytes: int, largest_file: int) -> str | None:
    """Return, in words, why `directory` cannot take so many bytes in all, and in the largest file; None if it can."""
    limit = _file_limit()
    if limit is not None and largest_file > limit:
        return f"a file of it has {largest_file:,} bytes"  # `describe_file_limit` says the rest
    free = free_bytes(directory)
    if num_bytes > free:
        return f"it needs {num_bytes / 1e9:.2f} GB, and the host {socket.gethostname()} has {free / 1e9:.2f} GB free"
    return None


def free_bytes(directory: Path) -> int:
    """Return the free bytes of the disk on which `directory` is, or would be, for it may have been removed."""
    while not directory.exists():
        directory = directory.parent
    return shutil.disk_usage(directory).free


def describe_file_limit() -> str:
    """Return what to add to the words of a failed write where the size of files is limited (SIGXFSZ), else nothing."""
    limit = _file_limit()
    return "" if limit is None else f", where files may have {limit:,} bytes at most: ulimit -f raises it"


def _file_limit() -> int | None:
    soft, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    return None if soft == resource.RLIM_INFINITY else soft

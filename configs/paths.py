"""Text that a user typed as a path -> the path meant, or why it can be none. Every path of every command comes here.

Torch-free; asks the disk nothing but, in the functions named `find_...`, whether a path can be read.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence

_MAX_NAME_BYTES = 255
_MAX_PATH_BYTES = 4095
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR)


def clean_path(text: str) -> str:
    """Return the path with a leading `~` or `~user` replaced by that home directory.

    Raises ValueError, with what is wrong in words, for text that no file system takes as a path.
    """
    if not text.strip():
        raise ValueError("is empty")
    if "\0" in text:
        raise ValueError(f"{shortened(text)} holds a NUL character, which no file name can")
    try:
        path = os.path.expanduser(text)
        encoded = path.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(
            f"{shortened(text)} is not text: it holds half a character or bytes that are not UTF-8"
        ) from None
    if path.startswith("~"):
        user = path.split("/", 1)[0]
        raise ValueError(
            f"{shortened(text)} begins with {user}, and there is no such user; ./{user} is a file so named"
        )
    longest = max(encoded.split(b"/"), key=len)
    if len(longest) > _MAX_NAME_BYTES:
        raise ValueError(
            f"{shortened(text)} has a name of {len(longest)} bytes, and file systems take {_MAX_NAME_BYTES} at most"
        )
    if len(encoded) > _MAX_PATH_BYTES:
        raise ValueError(f"{shortened(text)} has {len(encoded)} bytes, and a path has {_MAX_PATH_BYTES} at most")
    return path


def find_access_problem(path: str, suffixes: Sequence[str] = ("",)) -> str | None:
    """Return, in words, what of `path` (or of the files it is a prefix of) this user may not enter or read.

    None where nothing is in the way, also where nothing is there: what must exist has sentences of its own.
    """
    for suffix in suffixes:
        file = path + suffix
        try:
            mode = os.stat(file).st_mode
        except PermissionError:
            return f"{_closed_directory(file)} may not be entered by this user"
        except OSError as error:
            if error.errno in _NOT_THERE:
                continue
            return f"{file} cannot be looked at ({(error.strerror or str(error)).lower()})"
        needed = os.R_OK | os.X_OK if stat.S_ISDIR(mode) else os.R_OK
        if not os.access(file, needed):
            return f"{file} may not be read by this user"
    return None


def find_special_file(path: str) -> str | None:
    """Return, in words, what is at `path` where it is neither a file nor a directory: it can be read once, if ever."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return None
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return None
    return "a pipe" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"


def shortened(text: str) -> str:
    """Return text quoted, and cut where it is too long for a sentence."""
    return repr(text) if len(text) <= 60 else f"{text[:40]!r}... ({len(text)} characters)"


def _closed_directory(file: str) -> str:
    """Return the outermost directory on the way to a file that this user may not enter."""
    directory = os.path.dirname(os.path.abspath(file))
    parents = [directory]
    while os.path.dirname(parents[-1]) != parents[-1]:
        parents.append(os.path.dirname(parents[-1]))
    return next((parent for parent in reversed(parents) if not os.access(parent, os.X_OK)), directory)

"""A directory that appears only when it is whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from configs.errors import BadInput
from parallel.collectives import broadcast_object, gather_objects
from trainer.disk.lock import FileLock

_LOCK = ".lock"
_CONTENT = "content"


@contextmanager
def growing_directory(target: Path, *, rank: int) -> Iterator[Path]:
    """Yield a directory in `<target>.growing` to write into; it becomes `target` when all ranks leave the block.

    The lock lies beside it, so that no kill leaves it in the target. An error removes both; what a kill leaves is
    removed by the next attempt. Raises BadInput where `target` holds something, cannot be written, or is being written
    by another process. Collective: all ranks must call this.
    """
    target = Path(os.path.abspath(target))
    growing = _growing(target)
    lock = FileLock(growing / _LOCK)
    problem = broadcast_object(_begin(target, growing, lock) if rank == 0 else None)
    if problem:
        raise BadInput(problem)
    try:
        yield growing / _CONTENT
        gather_objects(None)  # every rank has written its part
        if rank == 0:
            os.replace(growing / _CONTENT, target)
            lock.release()
            with suppress(OSError):
                growing.rmdir()
        gather_objects(None)  # the target is there
    except OSError as error:
        _remove(growing)
        raise BadInput(f"{target}: cannot be written ({error}); make room there, or give another path.") from error
    except BaseException:
        _remove(growing)
        raise
    finally:
        lock.release()


def remove_leftover(target: Path) -> None:
    """Remove what a kill left of making `target`, unless another process is making it now."""
    growing = _growing(target)
    if _is_leftover(growing):
        lock = FileLock(growing / _LOCK)
        if lock.take() is None:
            _remove(growing)
        lock.release()


def _growing(target: Path) -> Path:
    return target.with_name(target.name + ".growing") if target.name else target


def _is_leftover(growing: Path) -> bool:
    """Return whether a directory of that name is one that was made here, however early or late a kill came."""
    if growing.is_symlink() or not growing.is_dir():
        return False
    return (growing / _LOCK).exists() or not any(growing.iterdir())


def _begin(target: Path, growing: Path, lock: FileLock) -> str | None:
    """Make the directory, empty and locked, and return None, or the sentence that says why not."""
    try:
        problem = check_target(target)
        if problem:
            return problem
        if os.path.lexists(growing) and not _is_leftover(growing):
            return f"{growing}: is in the way, and no leftover of a conversion; move it away, or give another path."
        growing.mkdir(parents=True, exist_ok=True)
        holder = lock.take()
        if holder is not None:
            return f"{target}: is being written by {holder}; wait for it, or give another path."
        _empty(growing)
        (growing / _CONTENT).mkdir()
    except OSError as error:
        return f"{target}: cannot be written ({error}); give another path."
    return None


def _empty(growing: Path) -> None:
    """Remove everything but the lock."""
    for leftover in growing.iterdir():
        if leftover.name != _LOCK:
            shutil.rmtree(leftover) if leftover.is_dir() and not leftover.is_symlink() else leftover.unlink()


def _remove(growing: Path) -> None:
    """Remove the directory, the lock last, so that a kill leaves what the next attempt knows for a leftover."""
    with suppress(OSError):
        _empty(growing)
    shutil.rmtree(growing, ignore_errors=True)


def check_target(directory: Path) -> str | None:
    """Return what is wrong with a directory to be made: it must be empty or not there yet, where one can write."""
    if not directory.name:
        return f"{directory}: is no place for a new directory; give a path that does not exist yet."
    if directory.is_symlink() or (directory.exists() and not directory.is_dir()):
        return f"{directory}: is not a directory; give a path that does not exist yet."
    if directory.is_dir() and any(directory.iterdir()):
        return f"{directory}: is not empty; give a path that does not exist yet."
    parent = directory.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        return f"{directory}: {parent} cannot be written to; give another path."
    return None

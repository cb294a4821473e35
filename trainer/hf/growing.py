"""A directory that appears only when it is whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from configs.errors import BadInput
from parallel.collectives import gather_objects


@contextmanager
def growing_directory(target: Path, *, rank: int) -> Iterator[Path]:
    """Yield a directory beside `target` to write into; it takes the target's name when all ranks leave the block.

    An error removes it; what a kill leaves behind is removed by the next attempt. Raises BadInput where `target` holds
    something or cannot be written. Collective: all ranks of the world must call this.
    """
    check_target(target)
    growing = target.with_name(target.name + ".growing")
    try:
        if rank == 0:
            shutil.rmtree(growing, ignore_errors=True)
            growing.mkdir(parents=True)
        gather_objects(None)  # the directory is there
        yield growing
        gather_objects(None)  # every rank has written its part
        if rank == 0:
            os.replace(growing, target)
        gather_objects(None)  # the target is there
    except OSError as error:
        shutil.rmtree(growing, ignore_errors=True)
        raise BadInput(f"{target}: cannot be written ({error}); make room there, or give another path.") from error
    except BaseException:
        shutil.rmtree(growing, ignore_errors=True)
        raise


def check_target(directory: Path) -> None:
    """Raise BadInput unless the directory is empty or not there yet, in one that can be written to."""
    if directory.is_symlink() or (directory.exists() and not directory.is_dir()):
        raise BadInput(f"{directory}: is not a directory; give a path that does not exist yet.")
    if directory.is_dir() and any(directory.iterdir()):
        raise BadInput(f"{directory}: is not empty; give a path that does not exist yet.")
    parent = directory.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise BadInput(f"{directory}: {parent} cannot be written to; give another path.")

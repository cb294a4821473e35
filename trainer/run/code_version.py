"""Which code runs: the commit of this checkout, and the versions of packages."""

from __future__ import annotations

import subprocess
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_GIT_SECONDS = 5.0


@cache
def find_commit() -> str | None:
    """Return the commit of the code where it lies in a git checkout, marked where tracked files differ from it."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        git = partial(subprocess.run, cwd=root, capture_output=True, text=True, timeout=_GIT_SECONDS)
        found = git(["git", "rev-parse", "HEAD"])
        if found.returncode != 0:
            return None
        is_changed = git(["git", "diff", "--quiet", "HEAD"]).returncode != 0
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() + (" with changes" if is_changed else "")


def package_version(package: str) -> str | None:
    """Return the version of an installed package, None where it is not."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None

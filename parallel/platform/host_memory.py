"""How much memory processes on this host may use together. Torch-free."""

from __future__ import annotations

import os
from pathlib import Path

_CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def host_memory_bytes() -> int | None:
    """Return the host's memory and swap, or the container's limit where that is less; None where nothing says it."""
    found = [size for size in (_memory_and_swap(), *map(_number_in, _CGROUP_LIMITS)) if size]
    return min(found) if found else None


def _memory_and_swap() -> int | None:
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
        return sum(int(lines[name].split()[0]) * 1024 for name in ("MemTotal", "SwapTotal"))
    except (OSError, ValueError, KeyError):
        pages = os.sysconf("SC_PHYS_PAGES") if "SC_PHYS_PAGES" in os.sysconf_names else 0
        return pages * os.sysconf("SC_PAGE_SIZE") if pages > 0 else None


def _number_in(file: Path) -> int | None:
    """Return the number in a file, None where it is missing or says "max"."""
    try:
        return int(file.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None

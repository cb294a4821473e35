"""The host's processor as Linux tells it: name, clock, the 16-bit formats it has units for. Torch-free."""

from __future__ import annotations

import platform
import re
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
_HIGHEST_CLOCK = Path("/sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq")
# x86 and ARM; without them torch's matrix multiplications fall back to loops that convert each number.
_FLAGS = {
    "bf16": {"amx_bf16", "avx512_bf16", "bf16"},
    "fp16": {"amx_fp16", "avx512_fp16", "asimdhp"},
}


def lacks_units(compute: str) -> bool:
    """Return whether the processor is known to have no units for `compute`; False where nothing tells."""
    try:
        found = re.search(r"^(?:flags|Features)\s*:(.*)$", _CPUINFO.read_text(encoding="utf-8"), re.MULTILINE)
    except (OSError, ValueError):
        return False
    return compute in _FLAGS and found is not None and not _FLAGS[compute] & set(found.group(1).split())


def processor_name() -> str:
    """Return the processor's name as Linux tells it, else the machine's architecture."""
    try:
        found = re.search(r"^model name\s*:\s*(.*)$", _CPUINFO.read_text(encoding="utf-8"), re.MULTILINE)
    except (OSError, ValueError):
        found = None
    return found.group(1) if found else platform.machine()


def highest_clock_mhz() -> float | None:
    """Return the highest clock of the first core, None where Linux does not tell it."""
    try:
        return int(_HIGHEST_CLOCK.read_text(encoding="ascii")) / 1000  # kHz
    except (OSError, ValueError):
        return None

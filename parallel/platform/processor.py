"""Which 16-bit formats the host's processor has units for, as Linux tells it. Torch-free."""

from __future__ import annotations

import re
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
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

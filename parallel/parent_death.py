"""Processes that end with the one that started them, however that ends. Torch-free; Linux alone has what it needs."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with(parent: int, number: signal.Signals) -> bool:
    """Have the kernel send this process a signal when its parent ends; return whether that is still process `parent`.

    For the new process itself: a parent that has ended before could not be told of any more.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
    return os.getppid() == parent

"""Signals that mean save and stop. Torch-free; knows nothing of what is saved."""

from __future__ import annotations

import signal
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """Remembers from now on SIGTERM and SIGUSR1, so that the run saves and exits between two steps."""

    def __init__(self) -> None:
        self.is_received = False
        """Whether this rank has been signalled."""
        self.is_agreed = False
        """Whether all ranks know that one of them has been; set by `Hooks`, the same on every rank."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: Any) -> None:
        self.is_received = True

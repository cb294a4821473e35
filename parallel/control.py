"""The group of all ranks for what the hosts tell each other beside the training step."""

from __future__ import annotations

import datetime
from typing import Any

import torch.distributed as dist

_PATIENCE = datetime.timedelta(days=1)
_opened: list[tuple[Any, Any]] = []  # the world, and its control group


def open_control_group(backend: str) -> None:
    """Make the control group of the world just joined. Collective: all ranks of the world must call this."""
    _opened[:] = []
    if dist.get_world_size() > 1:
        _opened.append((dist.group.WORLD, dist.new_group(backend=backend, timeout=_PATIENCE)))


def control_group() -> Any:
    """Return the control group of the present world; None, which means the world itself, where none was made."""
    return next((group for world, group in _opened if world is dist.group.WORLD), None)

"""What a checkpoint asks of those who have something to keep. Knows no files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class SavedState:
    """What a checkpoint that is about to be loaded holds."""

    shapes: Mapping[str, tuple[int, ...]]
    """Global shape of every tensor by its key."""
    is_same_layout: bool
    """Whether the ranks that wrote it had the places that today's have."""

    def under(self, prefix: str) -> SavedState:
        """Return what it holds under keys that begin with `prefix`, without that."""
        shapes = {key.removeprefix(prefix): shape for key, shape in self.shapes.items() if key.startswith(prefix)}
        return SavedState(shapes, self.is_same_layout)


class Checkpointed(Protocol):
    """Something whose state goes into checkpoints in shards. Both methods are collective: all ranks must call them."""

    def sharded_state(self, saved: SavedState | None) -> Any:
        """Return what to save, or, given what a checkpoint holds, what to load of it, as Megatron-Core's shards."""
        ...

    def load(self, loaded: Any) -> None:
        """Put in place what was asked for."""
        ...

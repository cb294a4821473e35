"""The parts of a stage -> one state for Megatron-Core's `dist_checkpointing`, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.engine.build import POLICY
from trainer.engine.parts import Checkpointed, SavedState


def collect(parts: Mapping[str, Checkpointed], saved: SavedState | None) -> dict[str, Any]:
    """Return what to save of all parts, or, given what a checkpoint holds, what to load.

    Each part stands under its name, but the policy's entries at the top, where they have been since the first version.
    Collective: all ranks of the world must call this.
    """
    state: dict[str, Any] = {}
    for name, part in parts.items():
        own = part.sharded_state(saved)
        state |= own if name == POLICY else {name: own}
    return state


def hand_out(parts: Mapping[str, Checkpointed], loaded: dict[str, Any]) -> None:
    """Give each part what was loaded of it. Collective: all ranks of the world must call this."""
    for name, part in parts.items():
        part.load(loaded if name == POLICY else loaded.get(name))

"""Weights and random generators as the shards that Megatron-Core's `dist_checkpointing` moves by layout."""

from __future__ import annotations

from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedObject

from parallel.mesh import Mesh
from parallel.seeding import get_rng_state, set_rng_state
from trainer.engine.parts import SavedState


def build_model_state(chunks: list[Any], mesh: Mesh) -> dict[str, Any]:
    """Return the sharded weights of this rank's model chunks, by `model<chunk>`."""
    metadata = _metadata(mesh)
    return {f"model{index}": chunk.sharded_state_dict(metadata=metadata) for index, chunk in enumerate(chunks)}


class RandomGenerators:
    """This rank's random generators as a part of checkpoints; they serve the layout that wrote them alone."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh

    def sharded_state(self, saved: SavedState | None) -> Any:
        """Return the states of this rank, or nothing to load on another layout."""
        if saved is not None and not saved.is_same_layout:
            return {}
        mesh = self._mesh
        return ShardedObject("rng", get_rng_state(mesh.platform), (mesh.world_size,), (mesh.rank,), replica_id=0)

    def load(self, loaded: Any) -> None:
        """Restore the states, or leave the generators as they are."""
        if loaded:
            set_rng_state(self._mesh.platform, loaded)


def _metadata(mesh: Mesh) -> dict[str, Any]:
    return {"singleton_local_shards": False, "dp_cp_group": mesh.dp_cp_group}

"""Weights, optimizer and random generators as the shards that Megatron-Core's `dist_checkpointing` moves by layout."""

from __future__ import annotations

from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedObject

from parallel.mesh import Mesh
from parallel.seeding import get_rng_state, set_rng_state
from trainer.engine.parts import SavedState
from trainer.optim.update import init_optimizer_state


def build_model_state(chunks: list[Any], mesh: Mesh) -> dict[str, Any]:
    """Return the sharded weights of this rank's model chunks, by `model<chunk>`."""
    metadata = _metadata(mesh)
    return {f"model{index}": chunk.sharded_state_dict(metadata=metadata) for index, chunk in enumerate(chunks)}


def build_optimizer_state(optimizer: Any, weights: dict[str, Any], mesh: Mesh, *, is_loading: bool) -> Any:
    """Return the sharded optimizer state of the `weights` that `build_model_state` gave.

    Collective: all ranks of the world must call this (the optimizer gathers its shards for saving).
    """
    if not is_loading:
        init_optimizer_state(optimizer)
    return optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=_metadata(mesh))


def fit_optimizer_state(optimizer: Any, loaded: dict[Any, Any]) -> dict[Any, Any]:
    """Return the loaded optimizer state with this run's own parameter groups, which take over the update count.

    The moments are stored by parameter name, but the groups as they were where they were saved, and Megatron-Core
    matches those by learning rate and by whether expert parallelism gives the experts an optimizer of their own.
    """
    parts = optimizer.chained_optimizers
    saved = next(state for state in (loaded, *loaded.values()) if isinstance(state, dict) and "optimizer" in state)
    steps = {group["step"] for group in saved["optimizer"]["param_groups"] if "step" in group}
    fitted: dict[Any, Any] = {}
    for index, part in enumerate(parts):
        tensors = loaded if len(parts) == 1 else loaded[index]
        state = part.state_dict() | {name: saved[name] for name in ("grad_scaler",) if name in saved}
        for group in state["optimizer"]["param_groups"]:
            group |= {"step": max(steps)} if steps else {}
        names = ("param_state", "param_state_sharding_type")
        fitted[index] = state | {name: tensors.get(name, saved.get(name)) for name in names}
    return fitted[0] if len(parts) == 1 else fitted


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
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": mesh.dp_cp_group,
    }

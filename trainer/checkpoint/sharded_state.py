"""Engine -> the sharded state dict that Megatron-Core's `dist_checkpointing` saves and loads on any layout."""

from __future__ import annotations

from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedObject

from parallel.seeding import get_rng_state
from trainer.engine import Engine
from trainer.optimizer import init_optimizer_state


def build_model_state(engine: Engine) -> dict[str, Any]:
    """Return the sharded weights of this rank's model chunks, by `model<chunk>`."""
    metadata = _metadata(engine)
    return {f"model{index}": chunk.sharded_state_dict(metadata=metadata) for index, chunk in enumerate(engine.chunks)}


def build_full_state(engine: Engine, *, is_loading: bool) -> dict[str, Any]:
    """Return sharded weights and optimizer state; for saving, this rank's random generators too.

    Collective: all ranks of the world must call this (the optimizer gathers its shards for saving).
    """
    state = build_model_state(engine)
    if not is_loading:
        init_optimizer_state(engine.optimizer)
    state["optimizer"] = engine.optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=_metadata(engine))
    if not is_loading:
        state["rng"] = build_rng_state(engine)
    return state


def build_rng_state(engine: Engine) -> ShardedObject:
    """Return this rank's random generators; they mean something on the layout that wrote them alone."""
    return ShardedObject(
        "rng", get_rng_state(engine.mesh.platform), (engine.mesh.world_size,), (engine.mesh.rank,), replica_id=0
    )


def _metadata(engine: Engine) -> dict[str, Any]:
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": engine.mesh.dp_cp_group,
    }

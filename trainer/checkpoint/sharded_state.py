"""Engine -> the sharded state dict that Megatron-Core's `dist_checkpointing` saves and loads on any layout."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories

from parallel.seeding import get_rng_state
from trainer.checkpoint.fp8_history import build_fp8_state
from trainer.checkpoint.places import name_at
from trainer.engine.engine import Engine
from trainer.optim.update import init_optimizer_state


def build_model_state(engine: Engine) -> dict[str, Any]:
    """Return the sharded weights of this rank's model chunks, by `model<chunk>`."""
    metadata = _metadata(engine)
    return {f"model{index}": chunk.sharded_state_dict(metadata=metadata) for index, chunk in enumerate(engine.chunks)}


@dataclass(frozen=True)
class Shard:
    """This rank's part of one tensor of the model."""

    name: str
    """Of the whole tensor (see `trainer.checkpoint.places`)."""
    offsets: tuple[int, ...]
    """Where the part begins in the whole tensor."""
    data: torch.Tensor
    """The part itself, in the engine's own memory."""


def model_shards(engine: Engine) -> Iterator[Shard]:
    """Yield every tensor that this rank holds a part of, pieces of one tensor in a row."""
    state = build_model_state(engine)
    apply_factories(state)
    for tensor in nested_values(state):
        if isinstance(tensor, ShardedTensor):
            index, offsets = (
                tensor.global_offset[: tensor.prepend_axis_num],
                tensor.global_offset[tensor.prepend_axis_num :],
            )
            yield Shard(name_at(tensor.key, index), tuple(offsets), tensor.data)


def build_full_state(engine: Engine, *, is_loading: bool) -> dict[str, Any]:
    """Return sharded weights and optimizer state; for saving, FP8 scales and this rank's random generators too.

    Collective: all ranks of the world must call this (the optimizer gathers its shards for saving).
    """
    state = build_model_state(engine)
    if not is_loading:
        init_optimizer_state(engine.optimizer)
    state["optimizer"] = engine.optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=_metadata(engine))
    if not is_loading:
        state |= {"fp8": build_fp8_state(engine), "rng": build_rng_state(engine)}
    return state


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

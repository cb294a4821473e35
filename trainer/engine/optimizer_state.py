"""The optimizer's state as shards by parameter, which any layout can read, with no copy that can be done without.

The keys are those of Megatron-Core's `fully_reshardable` format, `optimizer.state.<state>.<weight>`. Its own way there
copies the moments of all data-parallel ranks to every one of them; here a rank hands over what it holds as it lies, and
sends pieces only of the few parameters that the border between two ranks' shares cuts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from parallel.collectives import gather_pieces
from trainer.engine.parts import SavedState
from trainer.optim.update import init_optimizer_state

MAIN = "param"
"""The state that is the fp32 main copy of a weight."""


def build_optimizer_state(optimizer: Any, weights: Mapping[str, Any], saved: SavedState | None) -> Any:
    """Return what to save of the optimizer of the sharded `weights`, or, given what a checkpoint holds, what to load.

    Collective: all ranks of the world must call this.
    """
    init_optimizer_state(optimizer)
    shards = {shard.data: shard for shard in nested_values(weights) if _is_tensor(shard)}
    states = {}
    for index, part in enumerate(optimizer.chained_optimizers):
        tensors: dict[int, Any] = {}
        for number, placed in enumerate(_placed_parameters(part)):
            shard = shards[placed.parameter]
            ours = (
                _shards_to_save(part, placed, shard) if saved is None else _shards_to_load(part, placed, shard, saved)
            )
            tensors |= {number: ours} if ours else {}
        states[index] = part.state_dict() | {"param_state_sharding_type": "fully_reshardable"}
        if tensors:  # what is no tensor is to be the same on all ranks
            states[index]["param_state"] = tensors
    return states[0] if len(states) == 1 else states


def widen_weights(weights: Mapping[str, Any], saved: SavedState) -> None:
    """Ask for weights in fp32 where a checkpoint has no main copy of them, being from a run whose weights were fp32."""
    for chunk in weights.values():
        for name, shard in chunk.items():
            if _is_tensor(shard) and not _is_main_itself(shard.data) and key_of(MAIN, shard) not in saved.shapes:
                chunk[name] = _with_data(shard, shard.key, torch.empty(shard.data.shape, dtype=torch.float32))


def fit_optimizer_state(
    optimizer: Any, loaded: dict[Any, Any], weights: Mapping[torch.nn.Parameter, torch.Tensor]
) -> dict[Any, Any]:
    """Return the loaded optimizer state with this run's own parameter groups, which take over the update count.

    The moments are stored by parameter name, but the groups as they were where they were saved, and Megatron-Core
    matches those by learning rate and by whether expert parallelism gives the experts an optimizer of their own.
    A main copy that was not stored is the loaded one of the `weights`.
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
        kind = "param_state_sharding_type"
        fitted[index] = state | {"param_state": tensors.get("param_state", {}), kind: tensors.get(kind, saved[kind])}
        for number, placed in enumerate(_placed_parameters(part)):
            if placed.is_here:
                fitted[index]["param_state"][number].setdefault(MAIN, weights[placed.parameter])
    return fitted[0] if len(parts) == 1 else fitted


def key_of(state: str, shard: Any) -> str:
    """Return a state's key in checkpoints, given the weight's shard."""
    return f"optimizer.state.{state}.{shard.key}"


@dataclass(frozen=True)
class _PlacedParameter:
    """A parameter, and which part of its flattened elements each data-parallel rank updates."""

    parameter: torch.nn.Parameter
    pieces: dict[int, slice]
    """Of the ranks that update some of it, by rank in the optimizer's data-parallel group."""
    rank: int
    """This rank."""

    @property
    def is_here(self) -> bool:
        """Whether this rank updates some of it."""
        return self.rank in self.pieces

    @property
    def owner(self) -> int:
        """The rank that saves the states: the one that has most of them already."""
        return max(self.pieces, key=lambda rank: (self.pieces[rank].stop - self.pieces[rank].start, -rank))

    def shard_of(self, weight: Any, state: str, data: torch.Tensor) -> Any:
        """Return a state as a shard like that of the weight; among the data-parallel ranks the owner has the first."""
        replica = (*weight.replica_id[:-1], int(self.rank != self.owner))
        return _with_data(weight, key_of(state, weight), data.view(weight.data.shape), replica_id=replica)


def _placed_parameters(part: Any) -> Iterator[_PlacedParameter]:
    """Yield the parameters in Megatron-Core's order, by which it numbers them."""
    size, rank = part.data_parallel_group.size(), part.data_parallel_group.rank()
    for buffer in part.buffers:
        for parameter, (start, end, bucket_id) in buffer.param_index_map.items():
            bucket = buffer.buckets[bucket_id]
            share = bucket.grad_data.numel() // size
            first, last = (start - bucket.offset) // share, (end - 1 - bucket.offset) // share
            borders = [start, *(bucket.offset + share * border for border in range(first + 1, last + 1)), end]
            pieces = {
                holder: slice(borders[index] - start, borders[index + 1] - start)
                for index, holder in enumerate(range(first, last + 1))
            }
            yield _PlacedParameter(parameter, pieces, rank)


def _shards_to_save(part: Any, placed: _PlacedParameter, weight: Any) -> dict[str, Any]:
    """Return the states of a parameter on the rank that saves them, elsewhere nothing."""
    states = part._get_main_param_and_optimizer_states(placed.parameter) if placed.is_here else {}
    shards = {}
    for name in (MAIN, *part.optimizer_state_keys):
        if name == MAIN and _is_main_itself(placed.parameter):
            continue
        whole = gather_pieces(states.get(name), placed.pieces, placed.owner, part.data_parallel_group)
        if whole is not None:
            shards[name] = placed.shard_of(weight, name, whole)
    return shards


def _shards_to_load(part: Any, placed: _PlacedParameter, weight: Any, saved: SavedState) -> dict[str, Any]:
    """Return what to load of a parameter that this rank updates in part, of others nothing.

    A state that this rank has the whole of is read to where it lies.
    """
    states = part._get_main_param_and_optimizer_states(placed.parameter) if placed.is_here else {}
    shards = {}
    for name, state in states.items():
        if name == MAIN and key_of(name, weight) not in saved.shapes:
            continue
        is_weight = name == MAIN and _is_main_itself(placed.parameter)  # which is loaded too, from a key of its own
        in_place = len(placed.pieces) == 1 and not is_weight
        data = state if in_place else torch.empty(weight.data.shape, dtype=torch.float32)
        shards[name] = placed.shard_of(weight, name, data)
    return shards


def _is_main_itself(parameter: torch.Tensor) -> bool:
    """Return whether the optimizer updates the weight in place, so that it has no main copy."""
    return parameter.dtype == torch.float32


def _is_tensor(shard: Any) -> bool:
    return isinstance(shard, ShardedTensor | ShardedTensorFactory)


def _with_data(shard: Any, key: str, data: torch.Tensor, **fields: Any) -> Any:
    """Return the shard of a weight with another key and tensor of the same shape."""
    if isinstance(shard, ShardedTensor):
        fields["dtype"] = data.dtype
    return replace(shard, key=key, data=data, **fields)

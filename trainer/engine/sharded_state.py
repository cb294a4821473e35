"""Weights, adapters and random generators as the shards that Megatron-Core's `dist_checkpointing` moves by layout."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedBase,
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
)

from configs.roles import HEAD, POLICY, HeadKind
from parallel.mesh import Mesh
from parallel.seeding import get_rng_state, set_rng_state
from trainer.engine.parts import SavedState
from trainer.model.lora.adapter import ADAPTERS, Adapter
from trainer.model.lora.linear import LoraLinear


def build_model_state(chunks: list[Any], mesh: Mesh) -> dict[str, Any]:
    """Return the sharded weights of this rank's model chunks, without adapters, by `model<chunk>`."""
    metadata = _metadata(mesh)
    return {
        f"model{index}": {
            name: shard
            for name, shard in chunk.sharded_state_dict(metadata=metadata).items()
            if not name.startswith(ADAPTERS)
        }
        for index, chunk in enumerate(chunks)
    }


def copy_state(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Return copies of the weights of a state by chunk, under keys and names that begin with `prefix`."""
    return {
        prefix + chunk: {
            name: replace(shard, key=prefix + shard.key, data=shard.data.detach().clone())
            for name, shard in shards.items()
            if isinstance(shard, ShardedTensor | ShardedTensorFactory)
        }
        for chunk, shards in state.items()
    }


def copy_to_host(state: dict[str, Any]) -> dict[str, Any]:
    """Return a state whose shards, which are changed, have copies of their tensors in the memory of the host."""
    for shard in nested_values(state):
        if isinstance(shard, ShardedTensor | ShardedTensorFactory):
            shard.data = shard.data.detach().to("cpu", copy=True)
    return state


def key_prefix(role: str) -> str:
    """Return what the keys of a model's state begin with in checkpoints, where several models are trained."""
    return "" if role == POLICY else f"{role}."


def with_key_prefix(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Return a state whose shards, which are changed, have keys that begin with `prefix`."""
    for shard in nested_values(state):
        if isinstance(shard, ShardedBase):
            shard.key = prefix + shard.key
    return state


def keep_head(state: dict[str, Any]) -> None:
    """Put the output layer's own tensor where `build_model_state` asks for another: it stays as it is."""
    for shards in state.values():
        if HEAD in shards:
            shards[HEAD] = LocalNonpersistentObject(shards[HEAD].data)


def load_model_state(chunks: list[Any], loaded: dict[str, Any]) -> None:
    """Put the weights that `build_model_state` asked for in place; adapters stay as they are."""
    for index, chunk in enumerate(chunks):
        missing, unexpected = chunk.load_state_dict(loaded[f"model{index}"], strict=False)
        missing = [name for name in missing if not name.startswith(ADAPTERS)]
        if missing or unexpected:
            raise KeyError(f"chunk {index} of the model lacks {missing} and does not know {unexpected}")


def build_adapter_state(adapter: Adapter, mesh: Mesh) -> dict[str, Any]:
    """Return the sharded adapters of this rank, by `model<chunk>` and the parameter's name in the chunk.

    Their keys are `lora.<linear>.a` and `.b`, where experts lie along an axis in front.
    """
    return {
        f"model{index}": {
            name: _shard_adapter(module, matrix, mesh) for name, (module, matrix) in adapter.matrices(index).items()
        }
        for index in range(len(adapter.of_chunks))
    }


def build_trained_state(adapter: Adapter, chunks: list[Any], mesh: Mesh, head: HeadKind) -> dict[str, Any]:
    """Return what is trained beside frozen weights: the adapters and, under its usual key, a scalar head."""
    state = build_adapter_state(adapter, mesh)
    if head == "scalar":
        for chunk, shards in build_model_state(chunks, mesh).items():
            state[chunk] |= {HEAD: shards[HEAD]} if HEAD in shards else {}
    return state


def load_trained_state(adapter: Adapter, chunks: list[Any], loaded: dict[str, Any]) -> None:
    """Put in place what `build_trained_state` asked for."""
    of_chunks = [loaded[f"model{index}"] for index in range(len(chunks))]
    adapter.load(of_chunks)
    for tensors in of_chunks:
        if HEAD in tensors:
            load_head(chunks, tensors[HEAD])


@torch.no_grad()
def load_head(chunks: list[Any], weight: torch.Tensor) -> None:
    """Put the weight `[1, hidden]` of a scalar head in place, where this rank has the head."""
    if chunks[-1].post_process:
        chunks[-1].output_layer.weight.copy_(weight)


def _shard_adapter(module: LoraLinear, matrix: str, mesh: Mesh) -> ShardedTensor:
    site, group = module.site, module.group
    key, offsets, dp_group = f"{ADAPTERS}{site.path}.{matrix}", [], mesh.dp_cp_group
    if site.expert is not None:
        num_experts, dp_group = module.adapted.linear.num_experts, mesh.expert_dp_group
        assert num_experts is not None
        key = key.replace(f".experts.{site.expert}.", ".experts.")
        offsets.append((0, site.expert, num_experts))
    dim, in_front = module.split_dims[matrix], len(offsets)
    if dim is not None and group.size() > 1:
        offsets.append((in_front + dim, group.rank(), group.size()))
    replica = (0, 0 if dim is not None else group.rank(), dist.get_rank(dp_group))
    return ShardedTensor.from_rank_offsets(
        key, getattr(module, matrix), *offsets, replica_id=replica, prepend_axis_num=in_front
    )


def share_state(tensors: dict[str, torch.Tensor], mesh: Mesh) -> dict[str, Any]:
    """Return tensors that all ranks have alike as shards under their names, which the first rank writes."""
    return {
        name: ShardedTensor.from_rank_offsets(name, tensor, replica_id=mesh.rank) for name, tensor in tensors.items()
    }


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

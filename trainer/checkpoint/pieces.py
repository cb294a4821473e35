"""The state of a run -> the pieces that this rank writes."""

from __future__ import annotations

import io
from collections.abc import Container
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
    is_main_replica,
)
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess

from parallel.mesh import Mesh
from trainer.checkpoint.shares import WriterShares
from trainer.checkpoint.writing import COMMON_STATE, TensorFileWriter, WrittenPieces


@dataclass(frozen=True)
class Pieces:
    """What this rank writes of the state."""

    tensors: list[ShardedTensor]
    objects: dict[str, bytes]
    """By key."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors."""
        return sum(shard.data.nbytes for shard in self.tensors)

    def write(self, writer: TensorFileWriter) -> WrittenPieces:
        """Write everything and return what was written where."""
        for key, content in self.objects.items():
            writer.write_object(key, content)
        for shard in self.tensors:
            piece = shard.data[(None,) * shard.prepend_axis_num]
            writer.write_piece(shard.key, shard.global_shape, shard.global_offset, piece)
        return writer.close()


def collect_pieces(state: Any, shares: WriterShares, mesh: Mesh, *, is_copied: bool) -> Pieces:
    """Return what this rank writes of a state, in host memory; with `is_copied`, in memory of its own.

    Collective: all ranks of the world must call this.
    """
    live = {_storage(shard.data) for shard in nested_values(state) if _is_tensor(shard)} if is_copied else set()
    sharded, common = save_preprocess(state, validate_access_integrity=False)
    shards = list(nested_values(sharded))
    tensors = shares.mine(shard for shard in shards if isinstance(shard, ShardedTensor))
    for shard in tensors:
        shard.data = _on_host(shard.data, live)
    mesh.platform.synchronize()
    objects = {
        shard.unique_key: _pickled(shard.data)
        for shard in shards
        if isinstance(shard, ShardedObject) and is_main_replica(shard.replica_id)
    }
    return Pieces(tensors, objects | ({COMMON_STATE: _pickled(common)} if mesh.rank == 0 else {}))


def _on_host(tensor: torch.Tensor, live: Container[int]) -> torch.Tensor:
    tensor = tensor.detach()
    if tensor.device.type != "cpu":
        return tensor.to("cpu", non_blocking=True)
    return tensor.clone() if _storage(tensor) in live else tensor


def _pickled(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save([content], buffer)
    return buffer.getvalue()


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _is_tensor(shard: Any) -> bool:
    return isinstance(shard, ShardedTensor | ShardedTensorFactory)

"""What a checkpoint holds, read from disk by one rank and told to all, and the shards of a state read from it."""

from __future__ import annotations

import io
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, merge, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factory_merges
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.utils import extract_sharded_base
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from configs.errors import BadInput
from parallel.collectives import first_of_ranks, on_rank_zero
from parallel.mesh import Mesh
from trainer.checkpoint.manifest import Manifest, advise_another, find_damage, read_manifest
from trainer.checkpoint.tensors import read_bytes, read_metadata, read_pieces
from trainer.checkpoint.writing import COMMON_STATE


@dataclass(frozen=True)
class StoredState:
    """A checkpoint whose files are what they were when it was written."""

    path: Path
    manifest: Manifest
    metadata: Metadata
    common: dict[str, Any]
    """What was the same on all ranks."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Whole shape of every tensor by its key."""
        entries = self.metadata.state_dict_metadata.items()
        return {key: tuple(entry.size) for key, entry in entries if isinstance(entry, TensorStorageMetadata)}

    def load(self, state: Any) -> Any:
        """Return the state with what the checkpoint holds in place of its shards, tensors where they lie already.

        Every rank reads what it asks for, from the files that have it. Raises BadInput for what is not there.
        """
        shards, kept, factories = load_preprocess(state)
        loaded = merge(deepcopy(self.common), kept)
        shards, _ = extract_sharded_base(shards)
        tensors = [shard for shard in nested_values(shards) if isinstance(shard, ShardedTensor)]
        read_pieces(self.path, self.metadata, [self._place(shard) for shard in tensors])
        dict_list_map_inplace(self._content, shards)
        return apply_factory_merges(merge(loaded, shards), factories)

    def _place(self, shard: ShardedTensor) -> tuple[str, tuple[int, ...], torch.Tensor]:
        """Return the key and offsets of a shard, and the tensor to read into, which it has from then on."""
        entry = self.metadata.state_dict_metadata.get(shard.key)
        if not isinstance(entry, TensorStorageMetadata):
            raise BadInput(f"{self.path}: holds no tensor {shard.key}; name a checkpoint of this model and stage.")
        if tuple(entry.size) != tuple(shard.global_shape) and not shard.allow_shape_mismatch:
            raise BadInput(
                f"{self.path}: {shard.key} has the shape {tuple(entry.size)} there and {tuple(shard.global_shape)} "
                "here; name a checkpoint of this model."
            )
        shard.init_data("cpu")
        shard.data = shard.data.detach()
        if shard.allow_shape_mismatch:  # rows of the vocabulary's padding, which need not be there
            shard.data.zero_()
        return shard.key, tuple(shard.global_offset), shard.data[(None,) * shard.prepend_axis_num]

    def _content(self, shard: Any) -> Any:
        """Return what was read of a shard."""
        if not isinstance(shard, ShardedObject):
            return shard.data
        try:
            content = read_bytes(self.path, self.metadata, shard.unique_key)
        except KeyError:
            raise BadInput(f"{self.path}: holds no {shard.key}; name a checkpoint of this stage.") from None
        return torch.load(io.BytesIO(content), weights_only=False)[0]


def open_manifest(checkpoint: Path) -> Manifest:
    """Return the manifest, read by rank 0 alone. Raises BadInput on all ranks. Collective: all ranks of the world."""
    return on_rank_zero(lambda: read_manifest(checkpoint))


def open_stored(checkpoint: Path, manifest: Manifest, mesh: Mesh) -> StoredState:
    """Return a checkpoint to load from, after each rank has hashed its share of the files.

    Raises BadInput on all ranks for a damaged one. Collective: all ranks of the world must call this.
    """
    mine = sorted(manifest.files)[mesh.rank :: mesh.world_size]
    damage = first_of_ranks(next(iter(find_damage(checkpoint, manifest, mine)), None))
    if damage is not None:
        raise BadInput(f"{damage}; the checkpoint cannot be trusted: {advise_another(checkpoint)}.")
    metadata, common = on_rank_zero(lambda: _read_shared(checkpoint))
    return StoredState(checkpoint, manifest, metadata, common)


def _read_shared(checkpoint: Path) -> tuple[Metadata, Mapping[str, Any]]:
    metadata = read_metadata(checkpoint)
    common = io.BytesIO(read_bytes(checkpoint, metadata, COMMON_STATE))
    return metadata, torch.load(common, weights_only=True)[0]

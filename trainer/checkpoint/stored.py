"""What a checkpoint holds, read from disk by one rank and told to all, and the shards of a state read from it."""

from __future__ import annotations

import io
import pickle
from collections.abc import Container, Mapping
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

from configs.errors import BadInput, in_one_line
from parallel.collectives import first_of_ranks, gather_tables, on_all_ranks, on_rank_zero, send_to_group
from parallel.mesh import Mesh
from trainer.checkpoint.manifest import Manifest, advise_another, find_damage, read_manifest
from trainer.checkpoint.shares import describe_shards, find_shared, id_of
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
    mesh: Mesh
    """Of the ranks that load it."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Whole shape of every tensor by its key."""
        entries = self.metadata.state_dict_metadata.items()
        return {key: tuple(entry.size) for key, entry in entries if isinstance(entry, TensorStorageMetadata)}

    def load(self, state: Any) -> Any:
        """Return the state with what the checkpoint holds in place of its shards, tensors where they lie already.

        What data-parallel ranks ask for alike, one of them reads and sends to the others; the rest each reads itself.
        Raises BadInput for what is not there or cannot be read. Collective: all ranks of the world must call this.
        """
        shards, kept, factories = load_preprocess(state)
        loaded = merge(deepcopy(self.common), kept)
        shards, _ = extract_sharded_base(shards)
        tensors = [shard for shard in nested_values(shards) if isinstance(shard, ShardedTensor)]
        shared = self._deal_out(tensors)
        on_all_ranks(lambda: self._read(shards, tensors, {id(shard) for shard, is_mine, *_ in shared if not is_mine}))
        for shard, _, reader, group in shared:
            send_to_group(shard.data, reader, group, self.mesh.device)
        dict_list_map_inplace(lambda one: one.data if isinstance(one, ShardedTensor) else one, shards)
        return apply_factory_merges(merge(loaded, shards), factories)

    def _deal_out(self, tensors: list[ShardedTensor]) -> list[tuple[ShardedTensor, bool, int, Any]]:
        """Return what ranks ask for alike, in one order for all: shard, whether this rank reads it, who does, group."""
        dealt: list[tuple[ShardedTensor, bool, int, Any]] = []
        left = {id_of(shard): shard for shard in tensors}
        for group in (self.mesh.dp_cp_group, self.mesh.expert_dp_group):
            if group.size() == 1:
                continue
            readers = find_shared(gather_tables(describe_shards(list(left.values())), group, self.mesh.device))
            dealt += [(left.pop(one), reader == group.rank(), reader, group) for one, reader in readers.items()]
        return dealt

    def _read(self, shards: Any, tensors: list[ShardedTensor], others: Container[int]) -> None:
        """Read this rank's tensors, but those that `others` read, and what is no tensor."""
        places = [(shard, self._place(shard)) for shard in tensors]
        try:
            read_pieces(self.path, self.metadata, [place for shard, place in places if id(shard) not in others])
            dict_list_map_inplace(self._content, shards)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise BadInput(f"{self.path}: cannot be read ({in_one_line(error)}); copy the checkpoint again.") from error

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
        """Return a shard of a tensor as it is, and in the place of another what is read of it."""
        if not isinstance(shard, ShardedObject):
            return shard
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
    return StoredState(checkpoint, manifest, metadata, common, mesh)


def _read_shared(checkpoint: Path) -> tuple[Metadata, Mapping[str, Any]]:
    metadata = read_metadata(checkpoint)
    common = io.BytesIO(read_bytes(checkpoint, metadata, COMMON_STATE))
    return metadata, torch.load(common, weights_only=True)[0]

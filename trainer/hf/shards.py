"""Which part of which tensor a rank of a running model holds, under the names that the conversion rules use."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

from trainer.checkpoint.places import name_at
from trainer.engine.sharded_model import ShardedModel
from trainer.engine.sharded_state import build_model_state


@dataclass(frozen=True)
class Shard:
    """This rank's part of one tensor of the model."""

    name: str
    """Of the whole tensor (see `trainer.checkpoint.places`)."""
    offsets: tuple[int, ...]
    """Where the part begins in the whole tensor."""
    data: torch.Tensor
    """The part itself, in the model's own memory."""


def model_shards(model: ShardedModel) -> Iterator[Shard]:
    """Yield every tensor that this rank holds a part of, pieces of one tensor in a row."""
    state = build_model_state(model.chunks, model.mesh)
    apply_factories(state)
    for tensor in nested_values(state):
        if isinstance(tensor, ShardedTensor):
            index, offsets = (
                tensor.global_offset[: tensor.prepend_axis_num],
                tensor.global_offset[tensor.prepend_axis_num :],
            )
            yield Shard(name_at(tensor.key, index), tuple(offsets), tensor.data)

"""Hugging Face weights -> a running model on any layout: each rank reads what it holds, and writes nothing."""

from __future__ import annotations

import torch

from configs.roles import HEAD
from trainer.checkpoint.manifest import check_head
from trainer.engine.sharded_model import ShardedModel
from trainer.hf.shards import model_shards
from trainer.hf.source import HfModel


@torch.no_grad()
def load_hf_weights(model: ShardedModel, source: HfModel, *, has_head_elsewhere: bool = False) -> None:
    """Copy the weights into the model; step, optimizer and data start anew.

    A scalar head that the source lacks, and that is trained or found elsewhere, stays as it was drawn. Peak memory
    beyond the model's own is a few of the largest tensors. Raises BadInput where the heads do not fit. Collective: all
    ranks of the world must call this (every one reads the files it needs).
    """
    check_head(source.head, model.head, source.directory, may_be_new=model.is_trained or has_head_elsewhere)
    for shard in model_shards(model):
        if shard.name == HEAD and source.head != model.head:
            continue
        part = source.read(shard.name)
        for axis, (start, length) in enumerate(zip(shard.offsets, shard.data.shape, strict=True)):
            part = part.narrow(axis, start, length)
        shard.data.copy_(part)
    model.weights_loaded()

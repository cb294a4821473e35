"""Hugging Face weights -> a running engine on any layout: each rank reads what it holds, and writes nothing."""

from __future__ import annotations

import torch

from trainer.checkpoint.sharded_state import model_shards
from trainer.engine.engine import Engine
from trainer.hf.source import HfModel


@torch.no_grad()
def load_hf_weights(engine: Engine, source: HfModel) -> None:
    """Copy the weights into the engine; step, optimizer and data start anew.

    Peak memory beyond the engine's own is a few of the largest tensors. Collective: all ranks of the world must call
    this (every one reads the files it needs).
    """
    for shard in model_shards(engine):
        part = source.read(shard.name)
        for axis, (start, length) in enumerate(zip(shard.offsets, shard.data.shape, strict=True)):
            part = part.narrow(axis, start, length)
        shard.data.copy_(part)
    engine.weights_loaded()

"""Weights of any kind of place -> a model on any layout."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from parallel.collectives import on_all_ranks, on_rank_zero

if TYPE_CHECKING:
    from trainer.engine.sharded_model import ShardedModel


def load_weights(model: ShardedModel, place: str) -> None:
    """Put in place the weights of a checkpoint, a run directory or a Hugging Face model.

    Raises BadInput for what holds none, is damaged or is another architecture. Collective: all ranks of the world.
    """
    from trainer.checkpoint.layout import existing_checkpoint, resolve_checkpoint
    from trainer.checkpoint.load import warm_start
    from trainer.hf.source import HfModel
    from trainer.hf.warm_start import load_hf_weights

    if on_rank_zero(lambda: resolve_checkpoint(place) is None and (Path(place) / "config.json").is_file()):
        load_hf_weights(model, on_all_ranks(partial(HfModel, place, model.config.model)))
    else:
        warm_start(model, on_rank_zero(partial(existing_checkpoint, place, "weights")))

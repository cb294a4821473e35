"""Weights of any kind of place -> a model on any layout."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from parallel.collectives import on_all_ranks, on_rank_zero

if TYPE_CHECKING:
    from trainer.engine.sharded_model import ShardedModel


def load_weights(model: ShardedModel, place: str, *, is_of_critic: bool = False) -> None:
    """Put in place the weights of a checkpoint, a run directory or a Hugging Face model.

    Of a checkpoint of adapters these are its base's, with the adapters merged into them; `is_of_critic` takes those of
    the critic of a checkpoint of PPO. A model's own adapters stay as they are. Raises BadInput for what holds no
    weights, is damaged or is another architecture. Collective: all ranks of the world.
    """
    with model.on_device():
        _load_weights(model, place, is_of_critic=is_of_critic)


def _load_weights(model: ShardedModel, place: str, *, is_of_critic: bool = False) -> None:
    from trainer.checkpoint.base_weights import recorded_base
    from trainer.checkpoint.layout import existing_checkpoint, resolve_checkpoint
    from trainer.checkpoint.load import merge_adapter, warm_start
    from trainer.checkpoint.manifest import read_manifest
    from trainer.hf.source import HfModel
    from trainer.hf.warm_start import load_hf_weights

    if on_rank_zero(lambda: resolve_checkpoint(place) is None and (Path(place) / "config.json").is_file()):
        load_hf_weights(model, on_all_ranks(partial(HfModel, place, model.config.model)))
        return
    checkpoint = on_rank_zero(partial(existing_checkpoint, place, "weights"))
    if is_of_critic:
        warm_start(model, checkpoint, is_of_critic=True)
        return
    base = on_rank_zero(lambda: recorded_base(read_manifest(checkpoint).base, checkpoint))
    if base is None:
        warm_start(model, checkpoint)
    else:
        _load_weights(model, base.path)
        merge_adapter(model, checkpoint)


def load_peft_adapter(model: ShardedModel, directory: str) -> None:
    """Put in place the adapters of a PEFT directory, of which each rank takes its part.

    Raises BadInput where it holds others than the model has. Collective: all ranks of the world must call this.
    """
    from trainer.hf.peft import PeftAdapter

    architecture, lora = model.config.model, model.config.lora
    assert model.adapter is not None and lora is not None
    source = on_all_ranks(partial(PeftAdapter, Path(directory), architecture, lora))
    for module in model.adapter.modules():
        module.fill(*source.read(module.site.layer, module.site.name, module.site.expert))
    model.weights_loaded()

"""Weights of any kind of place -> a model on any layout."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from parallel.collectives import on_all_ranks, on_rank_zero

if TYPE_CHECKING:
    from trainer.engine.sharded_model import ShardedModel


def load_weights(model: ShardedModel, place: str, *, is_of_critic: bool = False, num_ids: int | None = None) -> None:
    """Put in place the weights of a checkpoint, a run directory or a Hugging Face model.

    Of a checkpoint of adapters these are its base's, with the adapters merged into them, and the scalar head that was
    trained beside them; `is_of_critic` takes those of the critic of a checkpoint of PPO. A model's own adapters stay as
    they are. With `num_ids` the place may have as many ids, of which the model takes the first; else it must have as
    many as the model. Raises BadInput for what holds no weights, is damaged or is another architecture. Collective: all
    ranks of the world.
    """
    with model.on_device():
        _load_weights(model, place, num_ids or model.config.model.vocab_size, is_of_critic=is_of_critic)


def _load_weights(
    model: ShardedModel, place: str, num_ids: int, *, is_of_critic: bool = False, has_head_elsewhere: bool = False
) -> None:
    """Load as `load_weights` does; with `has_head_elsewhere` a scalar head that is not in the place is loaded later."""
    from trainer.checkpoint.base_weights import recorded_base
    from trainer.checkpoint.layout import existing_checkpoint, resolve_checkpoint
    from trainer.checkpoint.load import merge_adapter, warm_start
    from trainer.checkpoint.manifest import check_head, read_manifest
    from trainer.hf.source import HfModel
    from trainer.hf.warm_start import load_hf_weights

    if on_rank_zero(lambda: resolve_checkpoint(place) is None and (Path(place) / "config.json").is_file()):
        source = on_all_ranks(partial(HfModel, place, model.config.model, num_ids))
        load_hf_weights(model, source, has_head_elsewhere=has_head_elsewhere)
        return
    checkpoint = on_rank_zero(partial(existing_checkpoint, place, "weights"))
    if is_of_critic:
        warm_start(model, checkpoint, num_ids, is_of_critic=True)
        return
    manifest = on_rank_zero(partial(read_manifest, checkpoint))
    base = on_rank_zero(partial(recorded_base, manifest.base, checkpoint))
    if base is None:
        warm_start(model, checkpoint, num_ids, has_head_elsewhere=has_head_elsewhere)
    else:
        check_head(manifest.head, model.head, checkpoint, may_be_new=model.is_trained or has_head_elsewhere)
        has_head_elsewhere |= manifest.head == "scalar"
        _load_weights(model, base.path, num_ids, has_head_elsewhere=has_head_elsewhere)
        merge_adapter(model, checkpoint, num_ids)


def load_peft_adapter(model: ShardedModel, directory: str) -> None:
    """Put in place the adapters of a PEFT directory, of which each rank takes its part, and a scalar head in it.

    Raises BadInput where it holds others than the model has. Collective: all ranks of the world must call this.
    """
    from trainer.engine.sharded_state import load_head
    from trainer.hf.peft import PeftAdapter

    architecture, lora = model.config.model, model.config.lora
    assert model.adapter is not None and lora is not None
    source = on_all_ranks(partial(PeftAdapter, Path(directory), architecture, lora, model.head))
    for module in model.adapter.modules():
        module.fill(*source.read(module.site.layer, module.site.name, module.site.expert))
    head = source.read_head()
    if head is not None:
        load_head(model.chunks, head)
    model.weights_loaded()

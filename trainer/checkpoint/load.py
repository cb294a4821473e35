"""Reads checkpoints: `resume` (everything, any layout) and `warm_start` (weights alone, a new stage).

All are collective: all ranks of the world must call them.
"""

from __future__ import annotations

import contextlib
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedObject

from configs.load import resolved_dict
from configs.roles import CRITIC
from configs.sections.lora import LoraConfig
from configs.stages import Config
from parallel.mesh import Mesh
from trainer.checkpoint.manifest import IMPORT_STAGE, check_architecture, check_continues, check_head
from trainer.checkpoint.parts import collect, hand_out
from trainer.checkpoint.stored import open_manifest, open_stored
from trainer.engine.engine import Engine
from trainer.engine.parts import Checkpointed, SavedState
from trainer.engine.sharded_model import ShardedModel
from trainer.engine.sharded_state import (
    build_model_state,
    build_trained_state,
    keep_head,
    key_prefix,
    load_trained_state,
    with_key_prefix,
)
from trainer.engine.state import TrainState
from trainer.model.lora.attach import build_adapter
from trainer.stages.base import Stage

log = logging.getLogger(__name__)


def resume(config: Config, mesh: Mesh, stage: Stage, checkpoint: Path) -> TrainState:
    """Load weights, optimizer, progress, data cursor and, on the layout that saved it, random generators.

    Raises BadInput for a damaged checkpoint, another architecture or another stage.
    """
    manifest = open_manifest(checkpoint)
    check_continues(manifest, config, stage.name, checkpoint)
    stored = open_stored(checkpoint, manifest, mesh)
    saved = SavedState(stored.shapes, is_same_layout=manifest.layout == mesh.sizes())
    for name, part in stage.parts.items():  # one after another: they need not all fit on the device
        with _held(part):
            hand_out({name: part}, stored.load(collect({name: part}, saved)))
    if not saved.is_same_layout:
        model = config.model
        has_dropout = model.hidden_dropout > 0 or model.attention_dropout > 0
        exactly = "dropout draws new random numbers, all else continues" if has_dropout else "all continues"
        log.info("the layout changed since %s: %s", checkpoint, exactly)
    stage.load_state_dict(manifest.stage["state"])
    state = replace(TrainState(**manifest.state), num_nonfinite_in_a_row=0)  # a new start gets the full patience
    return _compare_alike(state, type(config).model_validate(manifest.config), config)


def _held(part: Checkpointed) -> contextlib.AbstractContextManager[None]:
    """Hold a model on the device, with everything that is loaded of it."""
    return part.on_device(for_updates=True) if isinstance(part, Engine) else contextlib.nullcontext()


def _compare_alike(state: TrainState, before: Config, config: Config) -> TrainState:
    """Return the state without losses that those of the next validations cannot be compared with."""
    changed = [config.source_field("validation")] if _validated(before) != _validated(config) else []
    changed += ["train.eval_num_samples"] if before.train.eval_num_samples != config.train.eval_num_samples else []
    if not changed or state.lowest_validation_loss is None:
        return state
    if config.train.patience is not None:
        log.info("%s has changed: the lowest validation loss is looked for anew (train.patience)", ", ".join(changed))
    return state.without_validations()


def _validated(config: Config) -> list[dict[str, Any]]:
    """Return what the validation sources are; each is evaluated on its own, so that weights change nothing."""
    return [source.model_dump(exclude={"weight"}) for source in config.sources("validation")]


def warm_start(
    model: ShardedModel,
    checkpoint: Path,
    num_ids: int | None = None,
    *,
    is_of_critic: bool = False,
    has_head_elsewhere: bool = False,
) -> None:
    """Load the weights alone; step, optimizer and data start anew. Raises BadInput as `resume` does.

    Of a language model's a model with a scalar head that is trained, or found elsewhere, takes all but the output
    layer; its head stays as it was drawn. With `is_of_critic` they are those of the checkpoint's critic. `num_ids`
    is how many ids the checkpoint has, where that may be more than the model's.
    """
    manifest = open_manifest(checkpoint)
    if is_of_critic:
        critic = manifest.of_critic()
        assert critic is not None
        manifest = critic
    check_architecture(manifest, _wanted(model, num_ids), checkpoint, is_warm_start=True)
    check_head(manifest.head, model.head, checkpoint, may_be_new=model.is_trained or has_head_elsewhere)
    stored = open_stored(checkpoint, manifest, model.mesh)
    state = build_model_state(model.chunks, model.mesh)
    if manifest.stage["name"] == IMPORT_STAGE:  # Hugging Face models have no state of Transformer Engine
        state = {
            chunk: {name: value for name, value in tensors.items() if not isinstance(value, ShardedObject)}
            for chunk, tensors in state.items()
        }
    if model.head != manifest.head:
        keep_head(state)
    if is_of_critic:
        state = with_key_prefix(state, key_prefix(CRITIC))
    model.load_weights(stored.load(state))
    model.weights_loaded()


def _wanted(model: ShardedModel, num_ids: int | None) -> dict[str, Any]:
    """Return the architecture that weights are loaded for, of which the model may be given the first ids alone."""
    wanted: dict[str, Any] = resolved_dict(model.config)["model"]
    return wanted | {"vocab_size": num_ids or wanted["vocab_size"]}


def merge_adapter(model: ShardedModel, checkpoint: Path, num_ids: int | None = None) -> None:
    """Add the adapters of a checkpoint to the weights that they belong to, which the model holds, for good.

    A scalar head that was trained beside them takes the place of the model's. Raises BadInput as `resume` does.
    """
    manifest = open_manifest(checkpoint)
    check_architecture(manifest, _wanted(model, num_ids), checkpoint, is_warm_start=True)
    stored = open_stored(checkpoint, manifest, model.mesh)
    lora = LoraConfig.model_validate(manifest.config["lora"])
    adapter = build_adapter(model.chunks, lora, model.config.model, model.mesh, seed=0)
    loaded = stored.load(build_trained_state(adapter, model.chunks, model.mesh, manifest.head))
    load_trained_state(adapter, model.chunks, loaded)
    adapter.merge()
    model.weights_loaded()

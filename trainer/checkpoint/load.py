"""Reads checkpoints: `resume` (everything, any layout) and `warm_start` (weights alone, a new stage).

Both are collective: all ranks of the world must call them.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject

from configs.errors import BadInput
from configs.load import resolved_dict
from parallel.collectives import gather_objects
from parallel.seeding import set_rng_state
from trainer.checkpoint.fp8_history import request_fp8_state, set_fp8_state
from trainer.checkpoint.manifest import (
    IMPORT_STAGE,
    Manifest,
    advise_another,
    check_architecture,
    find_damage,
    read_manifest,
)
from trainer.checkpoint.sharded_state import build_full_state, build_model_state, build_rng_state, fit_optimizer_state
from trainer.engine.engine import Engine
from trainer.engine.state import TrainState
from trainer.stages.base import Stage

log = logging.getLogger(__name__)


def resume(engine: Engine, stage: Stage, checkpoint: Path) -> TrainState:
    """Load weights, optimizer, progress, data cursor and, on the layout that saved it, random generators.

    Raises BadInput for a damaged checkpoint, another architecture or another stage.
    """
    manifest = read_manifest(checkpoint)
    _check(engine, checkpoint, manifest, is_warm_start=False)
    if manifest.stage["name"] != stage.name:
        raise BadInput(
            f"{checkpoint}: was saved by the {manifest.stage['name']} stage, this is {stage.name}; to begin a new "
            "stage from its weights set checkpoint.init_from to it and run.dir to a new directory."
        )
    request = build_full_state(engine, is_loading=True) | {"fp8": request_fp8_state(engine, checkpoint)}
    is_same_layout = manifest.layout == engine.mesh.sizes()
    if is_same_layout:
        request["rng"] = build_rng_state(engine)
    loaded = _load(request, checkpoint)
    _set_weights(engine, loaded)
    engine.optimizer.load_state_dict(fit_optimizer_state(engine.optimizer, loaded["optimizer"]))
    set_fp8_state(engine, loaded.get("fp8", {}))
    if is_same_layout:
        set_rng_state(engine.mesh.platform, loaded["rng"])
    else:
        log.info("the layout changed since %s: dropout draws new random numbers, all else continues", checkpoint)
    stage.load_state_dict(manifest.stage["state"])
    return replace(TrainState(**manifest.state), num_nonfinite_in_a_row=0)  # a new start gets the full patience


def warm_start(engine: Engine, checkpoint: Path) -> None:
    """Load the weights alone; step, optimizer and data start anew. Raises BadInput as `resume` does."""
    manifest = read_manifest(checkpoint)
    _check(engine, checkpoint, manifest, is_warm_start=True)
    state = build_model_state(engine)
    if manifest.stage["name"] == IMPORT_STAGE:  # Hugging Face models have no state of Transformer Engine
        state = {
            chunk: {name: value for name, value in tensors.items() if not isinstance(value, ShardedObject)}
            for chunk, tensors in state.items()
        }
    _set_weights(engine, _load(state, checkpoint))
    engine.weights_loaded()


def _check(engine: Engine, checkpoint: Path, manifest: Manifest, *, is_warm_start: bool) -> None:
    """Compare the architecture, and hash the files, each rank its share."""
    model = resolved_dict(engine.config)["model"]
    check_architecture(manifest, model, checkpoint, is_warm_start=is_warm_start)
    mine = sorted(manifest.files)[engine.mesh.rank :: engine.mesh.world_size]
    problems = [problem for part in gather_objects(find_damage(checkpoint, manifest, mine)) for problem in part]
    if problems:
        raise BadInput(f"{problems[0]}; the checkpoint cannot be trusted: {advise_another(checkpoint)}.")


def _load(request: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    return dist_checkpointing.load(request, str(checkpoint))


def _set_weights(engine: Engine, loaded: dict[str, Any]) -> None:
    for index, chunk in enumerate(engine.chunks):
        chunk.load_state_dict(loaded[f"model{index}"])
    if engine.fp8 is not None:
        engine.fp8.weights_changed()

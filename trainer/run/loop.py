"""The one loop of every stage."""

from __future__ import annotations

import dataclasses
import time

from trainer.engine.engine import Engine
from trainer.engine.state import TrainState
from trainer.run.hooks import Hooks
from trainer.stages.base import Stage


def fit(engine: Engine, stage: Stage, state: TrainState, hooks: Hooks, num_steps: int) -> TrainState:
    """Train from `state` until `num_steps` steps are taken or a stop is asked for; return where the run then is.

    Collective: all ranks of the world must call this.
    """
    stage.start(state)
    hooks.on_start(state)
    while state.step < num_steps and not hooks.stop_requested():
        started = time.perf_counter()
        batches = stage.batches_for(state)
        data_seconds = time.perf_counter() - started
        result = engine.train_step(batches, stage, state)
        state = state.after(result)
        result = dataclasses.replace(result, phase_seconds={"data": data_seconds, **result.phase_seconds})
        hooks.after_step(state, result)
    hooks.on_end(state)
    return state

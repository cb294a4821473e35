"""The one loop of every stage."""

from __future__ import annotations

from parallel.watch.phases import phase, tell_step
from trainer.engine.state import TrainState
from trainer.run.hooks import Hooks
from trainer.stages.base import Stage


def fit(stage: Stage, state: TrainState, hooks: Hooks, num_steps: int) -> TrainState:
    """Train from `state` until `num_steps` steps are taken or a stop is asked for; return where the run then is.

    Collective: all ranks of the world must call this.
    """
    state = hooks.on_start(state)
    while state.step < num_steps and not hooks.stop_requested() and not hooks.is_patience_over(state):
        tell_step(state.step + 1)
        result = stage.step(state)
        with phase("report"):
            state = hooks.after_step(state.after(result), result)
    with phase("end"):
        hooks.on_end(state)
    return state

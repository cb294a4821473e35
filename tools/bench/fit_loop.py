"""Our training loop under the clock: `trainer.run.run` as an entry point calls it, hooks and logging included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from configs.stages import Config
from parallel.environment import Environment
from parallel.platform import PlatformName

if TYPE_CHECKING:
    from tools.bench.clock import StepClock
    from trainer.engine.state import StepResult, TrainState


def run_fit(config: Config, environment: Environment, platform: PlatformName, clock: StepClock) -> float | None:
    """Train as `launch/pretrain.py` does and return the last step's loss on rank 0, which writes the metrics.

    Collective: all ranks of the world must call this.
    """
    from trainer.run.run import run
    from trainer.stages.base import StageContext, StageKind
    from trainer.stages.build import STAGES
    from trainer.stages.next_token import build_next_token_stage
    from trainer.stages.training import TrainingStage

    def build(context: StageContext) -> TrainingStage:
        """Build pretraining that ticks at the start of each step, which is the first thing the loop calls."""
        stage = build_next_token_stage("pretrain", context)
        step = stage.step

        def clocked_step(state: TrainState) -> StepResult:
            clock.tick()
            return step(state)

        stage.step = clocked_step  # type: ignore[method-assign]
        return stage

    STAGES["clocked"] = StageKind(build)
    run(config, "clocked", environment, platform)
    if environment.rank != 0:
        return None
    last_row = (Path(str(config.run.dir)) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1]
    return float(json.loads(last_row)["loss"])

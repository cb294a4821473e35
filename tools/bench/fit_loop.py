"""Our training loop under the clock: `trainer.run.run` as an entry point calls it, hooks and logging included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.stages import Config
from parallel.environment import Environment
from parallel.platform import PlatformName

if TYPE_CHECKING:
    from tools.bench.clock import StepClock
    from trainer.engine.state import StepResult, TrainState


def run_fit(
    config: Config, stage_name: str, environment: Environment, platform: PlatformName, clock: StepClock
) -> float | None:
    """Train as the stage's entry point in `launch/` does and return the last step's loss on rank 0.

    Collective: all ranks of the world must call this.
    """
    from trainer.run.run import run
    from trainer.stages.base import Stage, StageContext
    from trainer.stages.build import STAGES

    build_stage = STAGES[stage_name]

    def build(context: StageContext) -> Stage:
        """Build the stage so that it ticks at the start of each step, which is the first thing the loop calls."""
        stage = build_stage(context)
        step = stage.step

        def clocked_step(state: TrainState) -> StepResult:
            clock.tick()
            result = step(state)
            if stage_name == "grpo":
                clock.count(result.num_tokens)
            return result

        stage.step = clocked_step  # type: ignore[method-assign]
        if stage_name in ("sft", "preference"):
            _count_tokens(stage, clock)
        return stage

    STAGES["clocked"] = build
    run(config, "clocked", environment, platform)
    if environment.rank != 0:
        return None
    last_row = (Path(str(config.run.dir)) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1]
    return float(json.loads(last_row)["loss"])


def _count_tokens(stage: Any, clock: StepClock) -> None:
    """Count what each step reads but padding, whose tokens are 0: the end of a document, which no chat holds."""
    read_step = stage.reader.read_step

    def counted() -> Any:
        batches = read_step()
        clock.count(sum(int(batch.tokens.count_nonzero()) for batch in batches))
        return batches

    stage.reader.read_step = counted

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


def run_fit(config: Config, environment: Environment, platform: PlatformName, clock: StepClock) -> float | None:
    """Train as `launch/pretrain.py` does and return the last step's loss on rank 0, which writes the metrics.

    Collective: all ranks of the world must call this.
    """
    from parallel.mesh import Mesh
    from trainer.data.corpus import Corpus
    from trainer.run.run import run
    from trainer.stages.base import Stage
    from trainer.stages.build import STAGES
    from trainer.stages.pretrain import PretrainStage

    class ClockedStage(PretrainStage):
        """Pretraining that ticks at the start of each step: `batches_for` is the first thing the loop calls."""

        def batches_for(self, state):  # type: ignore[no-untyped-def]
            clock.tick()
            return super().batches_for(state)

    def build(corpus: Corpus, mesh: Mesh) -> Stage:
        return ClockedStage(corpus.build_reader(dp_rank=mesh.dp_rank, dp_size=mesh.dp_size))

    STAGES["clocked"] = build
    run(config, "clocked", environment, platform)
    if environment.rank != 0:
        return None
    last_row = (Path(str(config.run.dir)) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1]
    return float(json.loads(last_row)["loss"])

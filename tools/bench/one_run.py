"""One measured run of one loop in this process, started by `throughput.py`; rank 0 writes what it measured as JSON.

Run: python -m launch.local --nproc-per-node 1 tools/bench/one_run.py fit result.json PIPES 2 10 STAGE CONFIG [K=V ...]
The words are the loop (fit, bare, hf, trl, trl_dpo, trl_grpo), the result's file, the directory of the conductor's
pipes, warm-up and measured steps, the stage (pretrain, sft, preference, grpo) and the run's config.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

if not __package__:  # run as a script: the packages are beside tools/, which Python puts first
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configs.load import load_config
from configs.stages import Config
from parallel.environment import Environment
from parallel.failures import leave
from parallel.platform import PlatformName, detect_platform_name, load_platform
from tools.bench.clock import RunReport, StepClock
from tools.bench.turns import Turns
from tools.ranks import read_environment


def main(argv: Sequence[str]) -> int:
    """Run the loop that `argv` names and return the exit code."""
    loop, result, pipes, num_warmup, num_steps, stage, config_path, *overrides = argv
    environment = read_environment()
    name = detect_platform_name()
    platform = load_platform(name)
    turns = Turns(Path(pipes), loop, environment.rank)
    clock = StepClock(int(num_warmup), int(num_steps), platform.synchronize, turns)
    config = load_config(config_path, [*overrides, f"train.num_steps={clock.total_steps}"], stage)
    loss = _run(loop, config, stage, environment, name, clock)
    if environment.rank == 0:
        report = RunReport(
            loop=loop,
            tokens_per_step=clock.tokens_per_step or config.train.global_batch_size * config.train.seq_len,
            processor_seconds_per_step=clock.processor_seconds / int(num_steps),
            loss=loss,
            device=platform.describe()["device"],
        )
        Path(result).write_text(json.dumps(asdict(report)), encoding="utf-8")
    return 0


def _run(
    loop: str, config: Config, stage: str, environment: Environment, platform: PlatformName, clock: StepClock
) -> float | None:
    if loop == "fit":
        from tools.bench.fit_loop import run_fit
        from trainer.report.log import start_console

        start_console(environment.rank)
        return run_fit(config, stage, environment, platform, clock)
    if loop == "bare":
        from tools.bench.bare_loop import run_bare

        return run_bare(config, environment, platform, clock)
    if loop == "trl":
        from tools.bench.trl_loop import run_trl

        run_trl(config, platform, clock)
        return None
    if loop == "trl_dpo":
        from tools.bench.trl_dpo_loop import run_trl_dpo

        run_trl_dpo(config, platform, clock)
        return None
    if loop == "trl_grpo":
        from tools.bench.trl_grpo_loop import run_trl_grpo

        run_trl_grpo(config, platform, clock)
        return None
    from tools.bench.hf_loop import run_hf

    run_hf(config, platform, clock)
    return None


if __name__ == "__main__":
    leave(main(sys.argv[1:]))

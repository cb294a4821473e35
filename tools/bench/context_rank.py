"""One rank of a layout that `context_parallel.py` measures; rank 0 writes what all ranks took as JSON.

Run: python -m launch.local --nproc-per-node 2 tools/bench/context_rank.py result.json 2048,4096 CONFIG [key=value ...]
The words are the result's file, the tokens of each measured step's row, and the run's config. Linux with glibc.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a script: the packages are beside tools/, which Python puts first
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configs.load import load_config
from configs.stages import Config
from parallel.environment import Environment
from parallel.failures import leave
from parallel.platform import load_platform
from tools.ranks import read_environment

if TYPE_CHECKING:
    from trainer.engine.engine import Engine

WARMUP_LENGTH = 256
"""Tokens of a step before the measured ones: it makes what is made once, such as the optimizer's moments."""


@dataclass(frozen=True)
class StepMeasure:
    """One training step on all ranks: lists are by rank."""

    seq_len: int
    loss: float
    peak_bytes: list[int]
    """Highest resident memory of the process during the step (VmHWM), less what was resident before it (VmRSS)."""
    processor_seconds: list[float]
    """Of all threads."""
    forward_bytes: list[float]
    """Sent by attention."""
    backward_bytes: list[float]


def main(argv: Sequence[str]) -> int:
    """Measure the steps that `argv` names and return the exit code."""
    result, lengths, config_path, *overrides = argv
    environment = read_environment()
    config = load_config(config_path, overrides)
    measures = run_steps(config, environment, [int(length) for length in lengths.split(",")])
    if environment.rank == 0:
        Path(result).write_text(json.dumps([measure.__dict__ for measure in measures]), encoding="utf-8")
    return 0


def run_steps(config: Config, environment: Environment, lengths: Sequence[int]) -> list[StepMeasure]:
    """Take a training step on one row of each length, after one that is not measured. Collective: all ranks."""
    import torch.distributed as dist

    from parallel.mesh import build_mesh, destroy_mesh, init_world

    platform = load_platform("cpu")
    device = platform.activate(environment.local_rank)
    from trainer.engine.build import build_engine  # imports megatron-core, which the platform prepares first

    init_world(platform, config, rank=environment.rank, world_size=environment.world_size, init_method="env://")
    engine = build_engine(config, build_mesh(platform, device, config))
    _measure_step(engine, WARMUP_LENGTH)
    measures = [_measure_step(engine, length) for length in lengths]
    dist.barrier()  # a rank that closes its connections early is a lost peer to the others
    engine.close()
    destroy_mesh()
    dist.destroy_process_group()
    return measures


def _measure_step(engine: Engine, seq_len: int) -> StepMeasure:
    """Take one step on a row of random tokens, the same on every layout."""
    import numpy as np
    import torch.distributed as dist

    from tools.bench.attention_traffic import AttentionTraffic
    from trainer.data.batch import build_batch
    from trainer.stages.next_token import NextTokenObjective

    random = np.random.default_rng(seq_len)
    batch = build_batch(random.integers(0, engine.config.model.vocab_size, (1, seq_len + 1)), (0,))
    memory_before = _forget_peak()
    dist.barrier()
    seconds_before = time.process_time()
    with AttentionTraffic() as traffic:
        result = engine.train_step([batch], NextTokenObjective(), engine.config.optimizer.lr)
    mine = (
        _memory_bytes("VmHWM") - memory_before,
        time.process_time() - seconds_before,
        traffic.sent.forward,
        traffic.sent.backward,
    )
    everyone: list[tuple[int, float, float, float]] = [mine] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    peaks, seconds, forward, backward = (list(figures) for figures in zip(*everyone, strict=True))
    return StepMeasure(seq_len, result.loss, peaks, seconds, forward, backward)


def _forget_peak() -> int:
    """Give free memory back to the system, let the peak begin at what is left, and return that in bytes."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # proc(5): VmHWM becomes VmRSS
    return _memory_bytes("VmRSS")


def _memory_bytes(name: str) -> int:
    """Return a field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    (line,) = [line for line in lines if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    leave(main(sys.argv[1:]))

"""How benchmarks run a stage by its launcher, and end when a run has failed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from parallel.platform import PLATFORM_VARIABLE
from tools.console import run_command

ROOT = Path(__file__).resolve().parents[2]


class RunFailed(Exception):
    """A measured run ended with an error; the message is the last line it wrote."""


def launch_stage(name: str, stage: str, num_ranks: int, *words: str) -> None:
    """Run `launch/<stage>.py` on CPU ranks of one thread each. Raises RunFailed, which begins with `name`."""
    command = [sys.executable, "-m", "launch.local", "--nproc-per-node", str(num_ranks), f"launch/{stage}.py", *words]
    environment = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", PLATFORM_VARIABLE: "cpu"} | os.environ
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RunFailed(f"{name}: {(done.stderr.strip() or done.stdout).splitlines()[-1]}")


def run_bench(command: Callable[[], None]) -> int:
    """Run a benchmark's command and return the exit code: 1 where a run of it failed, in one sentence."""
    try:
        return run_command(command)
    except RunFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1

"""How benchmarks run a stage by its launcher, and end when a run has failed."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from parallel.platform import PLATFORM_VARIABLE
from tools.console import run_command
from tools.outputs import check_file
from tools.paths import path_argument

ROOT = Path(__file__).resolve().parents[2]
Measure = Callable[[int], Mapping[str, Any]]


class RunFailed(Exception):
    """A measured run ended with an error; the message is the last line it wrote."""


def launch_stage(name: str, stage: str, num_ranks: int, *words: str) -> None:
    """Run `launch/<stage>.py` on CPU ranks of one thread each. Raises RunFailed, which begins with `name`."""
    command = [sys.executable, "-m", "launch.local", "--nproc-per-node", str(num_ranks), f"launch/{stage}.py", *words]
    environment = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", PLATFORM_VARIABLE: "cpu"} | os.environ
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RunFailed(f"{name}: {(done.stderr.strip() or done.stdout).splitlines()[-1]}")


def run_comparison(argv: Sequence[str] | None, name: str, about: str, num_steps: int, measure: Measure) -> int:
    """Run the command line `name.py [--steps N] [--out FILE]` of loops that take turns, and return the exit code.

    `measure(steps)` prints what it finds and returns what the result file is given, by default `results/name_cpu.json`.
    """
    parser = argparse.ArgumentParser(prog=f"{name}.py", description=about)
    told = f"measured steps of each loop (default {num_steps})"
    parser.add_argument("--steps", type=int, default=num_steps, metavar="N", help=told)
    default_out = ROOT / "tools" / "bench" / "results" / f"{name}_cpu.json"
    parser.add_argument("--out", type=path_argument, default=default_out, metavar="FILE", help="result file")
    arguments = parser.parse_args(argv)
    if arguments.steps < 2:
        parser.error(f"--steps must be at least 2, for example --steps {num_steps}")

    def command() -> None:
        check_file(arguments.out)
        figures = measure(arguments.steps)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")

    return run_bench(command)


def run_bench(command: Callable[[], None]) -> int:
    """Run a benchmark's command and return the exit code: 1 where a run of it failed, in one sentence."""
    try:
        return run_command(command)
    except RunFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1

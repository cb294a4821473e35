"""Measure what our training loop costs: tokens/s of `fit` against a bare megatron-core loop and Hugging Face's Trainer.

Run: python tools/bench/throughput.py [--rounds 7] [--steps 20] [--out FILE.json]   (`make bench`)
Every run is a process (or two) of its own: the demo's model on made-up tokens in fp32, the loops taking turns.
On CPU ranks unless SHARDWRIGHT_PLATFORM says otherwise. Exit code 1 if a run failed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from parallel.platform import PLATFORM_VARIABLE
from tools.bench.clock import RunMeasure
from tools.bench.report import describe_machine, print_report, write_report
from tools.console import Progress, run_command
from tools.made_up_data import write_made_up_dataset

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "demo" / "pretrain.yaml"
NUM_WARMUP = 2
SETTINGS = (
    "data.tokenizer=null",
    "data.validation=[]",
    "train.eval_every=null",
    "sample.prompts=[]",
    "precision.compute=fp32",
    "train.global_batch_size=4",
    "schedule.kind=constant",
    "schedule.warmup_steps=0",
    "checkpoint.save_every=null",
    "parallel.pp=1",
)


@dataclass(frozen=True)
class Case:
    """One layout and the loops that run on it; `fit` is compared with each of the others."""

    layout: str
    num_ranks: int
    overrides: tuple[str, ...]
    loops: tuple[str, ...]


CASES = (
    Case("1 rank", 1, ("parallel.tp=1",), ("fit", "bare", "hf")),
    Case("tp2", 2, ("parallel.tp=2",), ("fit", "bare")),
)


class RunFailed(Exception):
    """A measured run ended with an error; the message is the last line it wrote."""


def measure_all(rounds: int, num_steps: int, cases: Sequence[Case] = CASES) -> list[dict[str, Any]]:
    """Run every loop of every case `rounds` times, taking turns, and return the runs as rows.

    Rows have `layout`, `round` and the fields of `RunMeasure`. Odd rounds go backwards, so that a machine that grows
    slower or faster favours no loop. Raises RunFailed.
    """
    rows: list[dict[str, Any]] = []
    total = rounds * sum(len(case.loops) for case in cases)
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch, Progress("bench", total) as progress:
        prefix = Path(scratch) / "tokens"
        write_made_up_dataset(prefix, num_tokens=500_000, vocab_size=4096)
        for case in cases:
            for number in range(rounds):
                for loop in case.loops if number % 2 == 0 else reversed(case.loops):
                    measure = run_once(case, loop, num_steps, prefix, Path(scratch) / f"run_{len(rows)}")
                    rows.append({"layout": case.layout, "round": number, **asdict(measure)})
                    progress.show(len(rows), f"{case.layout} {loop}: {measure.tokens_per_second:,.0f} tokens/s")
    return rows


def run_once(case: Case, loop: str, num_steps: int, data: Path, run_dir: Path) -> RunMeasure:
    """Run one loop in processes of its own and return what it measured. Raises RunFailed."""
    script = ROOT / "tools" / "bench" / "one_run.py"
    launcher = ["-m", "launch.local", "--nproc-per-node", str(case.num_ranks)] if loop != "hf" else []
    result = run_dir.with_suffix(".json")
    overrides = [*SETTINGS, *case.overrides, f"data.train=[{{path: {data}}}]", f"run.dir={run_dir}"]
    words = [loop, str(result), str(NUM_WARMUP), str(num_steps), str(CONFIG), *overrides]
    environment = {PLATFORM_VARIABLE: "cpu", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"} | os.environ
    done = subprocess.run(
        [sys.executable, *launcher, str(script), *words], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    if done.returncode != 0 or not result.is_file():
        lines = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()
        raise RunFailed(f"{loop} on {case.layout} ended with exit code {done.returncode}: {lines[-1]}")
    return RunMeasure(**json.loads(result.read_text(encoding="utf-8")))


def compare(rows: Sequence[dict[str, Any]], cases: Sequence[Case] = CASES) -> list[dict[str, Any]]:
    """Return one comparison of `fit` with each other loop: medians, ranges, and the ratio pair by pair.

    A pair is the two runs of one round. `cost` is 1 - median(ours / other): the share of speed that our loop loses.
    `processor_ratio` is of processor time per step, a better witness on a machine that does other work too.
    """
    comparisons = []
    for case in cases:
        speeds = {loop: _values(rows, case.layout, loop, "tokens_per_second") for loop in case.loops}
        times = {loop: _values(rows, case.layout, loop, "processor_seconds_per_step") for loop in case.loops}
        for other in case.loops[1:]:
            ratios = [ours / theirs for ours, theirs in zip(speeds["fit"], speeds[other], strict=True)]
            processor = [ours / theirs for ours, theirs in zip(times["fit"], times[other], strict=True)]
            comparisons.append(
                {
                    "layout": case.layout,
                    "other": other,
                    "num_pairs": len(ratios),
                    "ours": _spread(speeds["fit"]),
                    "theirs": _spread(speeds[other]),
                    "ratio": _spread(ratios),
                    "processor_ratio": _spread(processor),
                    "cost": 1 - statistics.median(ratios),
                    "is_same_loss": _is_same_loss(rows, case.layout, other),
                }
            )
    return comparisons


def _values(rows: Sequence[dict[str, Any]], layout: str, loop: str, key: str) -> list[float]:
    """Return one figure of a loop's runs in the order of the rounds."""
    chosen = [row for row in rows if row["layout"] == layout and row["loop"] == loop]
    return [row[key] for row in sorted(chosen, key=lambda row: row["round"])]


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _is_same_loss(rows: Sequence[dict[str, Any]], layout: str, other: str) -> bool | None:
    """Return whether both loops ended at one loss, so that they did the same work; None where one is not known."""
    losses = [loss for loop in ("fit", other) for loss in _values(rows, layout, loop, "loss")]
    if any(loss is None for loss in losses):
        return None
    return max(losses) - min(losses) <= 1e-5 * abs(losses[0])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(prog="throughput.py", description="Tokens/s of our loop against two others.")
    parser.add_argument("--rounds", type=int, default=7, help="runs of each loop (default 7)")
    parser.add_argument("--steps", type=int, default=20, help=f"measured steps a run, after {NUM_WARMUP} (default 20)")
    default_out = ROOT / "tools" / "bench" / "results" / "throughput_cpu.json"
    parser.add_argument("--out", type=Path, default=default_out, help="result file")
    arguments = parser.parse_args(argv)
    if arguments.rounds < 1 or arguments.steps < 1:
        parser.error("--rounds and --steps must be at least 1, for example --rounds 5 --steps 10")

    def command() -> None:
        load_before = os.getloadavg()[0]
        rows = measure_all(arguments.rounds, arguments.steps)
        machine = describe_machine(rows[0]["device"], load_before)
        comparisons = compare(rows)
        write_report(arguments.out, machine, arguments.steps, comparisons, rows)
        print_report(machine, comparisons)

    try:
        return run_command(command)
    except RunFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())

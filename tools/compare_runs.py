"""Compare two runs' metrics step by step: are the curves the same?

Run: python tools/compare_runs.py runs/a runs/b [--rtol 1e-5] [--keys loss grad_norm]
Exit code 0 identical (within --rtol), 1 different, 2 bad input. Torch-free; reads metrics.jsonl alone.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a script: the packages are beside tools/, which Python puts first
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs.errors import BadInput, ExitCode
from tools.console import end_process, run_command
from tools.paths import path_argument

_PLOT_WIDTH = 60
_BLOCKS = "▁▂▃▄▅▆▇█"

Row = dict[str, float | None]


@dataclass(frozen=True)
class KeyComparison:
    """How one metric differs between two runs, over the steps both have."""

    key: str
    num_steps: int
    first_difference: int | None
    """First step that differs by more than the tolerance; None if none does."""
    max_relative: float
    """Largest |a - b| / max(|a|, |b|); infinite where one value is not finite and the other is."""
    max_step: int | None
    """Step of that largest difference; None if there is no difference at all."""


def read_metrics(run: Path) -> dict[int, Row]:
    """Read a run directory's (or a file's) metrics as rows by step.

    Raises BadInput for a missing file, a line that is not a row, and a step that occurs twice.
    """
    path = run / "metrics.jsonl" if run.is_dir() else run
    if not path.is_file():
        raise BadInput(f"{path}: no such file; give a run directory such as runs/demo that holds metrics.jsonl")
    rows: dict[int, Row] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            row = json.loads(line)
            step = row["step"]
        except (ValueError, KeyError, TypeError):
            raise BadInput(f"{path}:{number}: not a JSON object with a step; was the run stopped mid-write?") from None
        if step in rows:
            raise BadInput(f"{path}:{number}: step {step} occurs twice; a file is expected to hold each step once")
        rows[step] = row
    if not rows:
        raise BadInput(f"{path}: holds no step; let the run finish at least one")
    return rows


def relative_difference(a: float | None, b: float | None) -> float:
    """Return |a - b| / max(|a|, |b|): 0 for equal values, two non-finite ones (null) included; infinite for one."""
    a_finite, b_finite = a is not None and math.isfinite(a), b is not None and math.isfinite(b)
    if not (a_finite and b_finite):
        return 0.0 if a_finite == b_finite else math.inf
    assert a is not None and b is not None
    return 0.0 if a == b else abs(a - b) / max(abs(a), abs(b))


def compare_key(a: dict[int, Row], b: dict[int, Row], key: str, rtol: float) -> KeyComparison:
    """Compare one metric over the steps that both runs have. Raises BadInput when a run does not have it."""
    steps = sorted(a.keys() & b.keys())
    if not any(key in a[step] and key in b[step] for step in steps):
        known = sorted(set.intersection(*(set(row) for row in (*a.values(), *b.values()))) - {"step"})
        raise BadInput(f"--keys: '{key}' is not in both runs; keys that would work: {', '.join(known)}")
    first, worst, worst_step = None, 0.0, None
    for step in steps:
        difference = relative_difference(a[step].get(key), b[step].get(key))
        if difference > rtol and first is None:
            first = step
        if difference > worst:
            worst, worst_step = difference, step
    return KeyComparison(key, len(steps), first, worst, worst_step)


def sparkline(values: Sequence[float | None], low: float, high: float) -> str:
    """Return one block character a column, `low` to `high`; at most 60 columns, each the mean of its values."""
    width = min(_PLOT_WIDTH, len(values))
    columns = []
    for column in range(width):
        part = values[column * len(values) // width : (column + 1) * len(values) // width]
        finite = [value for value in part if value is not None and math.isfinite(value)]
        if not finite:
            columns.append("!")
            continue
        height = (sum(finite) / len(finite) - low) / (high - low) if high > low else 0.5
        columns.append(_BLOCKS[min(len(_BLOCKS) - 1, int(height * len(_BLOCKS)))])
    return "".join(columns)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    arguments = _parse(argv)
    verdicts: list[int] = []

    def command() -> None:
        a, b = read_metrics(arguments.run_a), read_metrics(arguments.run_b)
        if not a.keys() & b.keys():
            raise BadInput(f"{arguments.run_a} and {arguments.run_b} have no step in common; compare runs that overlap")
        compared = [compare_key(a, b, key, arguments.rtol) for key in arguments.keys]
        _print_table(compared, a, b, arguments.rtol)
        for key in arguments.keys:
            _print_curves(a, b, key)
        verdicts.append(_print_verdict(compared, a, b, arguments.rtol))

    return run_command(command, "stopped") or verdicts[0]


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="compare_runs.py", description="Compare two runs' metrics step by step.")
    parser.add_argument("run_a", type=path_argument, help="run directory or metrics.jsonl")
    parser.add_argument("run_b", type=path_argument, help="run directory or metrics.jsonl")
    parser.add_argument(
        "--rtol", type=_tolerance, default=0.0, help="relative difference to accept (default 0: bit for bit)"
    )
    parser.add_argument("--keys", nargs="+", default=["loss", "grad_norm"], help="metrics (default: loss grad_norm)")
    return parser.parse_args(argv)


def _tolerance(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no relative difference; a value that would work: 1e-5")
    return value


def _print_table(compared: Sequence[KeyComparison], a: dict[int, Row], b: dict[int, Row], rtol: float) -> None:
    print(f"{'metric':<20} {'steps':>6} {'max relative':>13} {'at step':>8}  first difference beyond rtol {rtol:g}")
    for one in compared:
        first = "none"
        if one.first_difference is not None:
            step = one.first_difference
            first = f"step {step}: {a[step].get(one.key)} against {b[step].get(one.key)}"
        worst_step = "-" if one.max_step is None else str(one.max_step)
        print(f"{one.key:<20} {one.num_steps:>6} {one.max_relative:>13.3e} {worst_step:>8}  {first}")


def _print_curves(a: dict[int, Row], b: dict[int, Row], key: str) -> None:
    """Draw both runs over all steps that either has, on one scale; `!` marks columns without a finite value."""
    steps = sorted(a.keys() | b.keys())
    curves = [[run.get(step, {}).get(key) for step in steps] for run in (a, b)]
    finite = [value for curve in curves for value in curve if value is not None and math.isfinite(value)]
    if not finite:
        return
    low, high = min(finite), max(finite)
    print(f"\n{key}, steps {steps[0]} to {steps[-1]}, {low:.4g} to {high:.4g}")
    for name, curve in zip("AB", curves, strict=True):
        print(f"  {name} {sparkline(curve, low, high)}")


def _print_verdict(compared: Sequence[KeyComparison], a: dict[int, Row], b: dict[int, Row], rtol: float) -> int:
    only_one = sorted(a.keys() ^ b.keys())
    different = [one.key for one in compared if one.first_difference is not None]
    print()
    if only_one:
        holder = "A" if only_one[0] in a else "B"
        print(f"different: {len(only_one)} steps are in one run only, the first is step {only_one[0]} in {holder}")
    if different:
        print(f"different: {', '.join(different)}")
    if only_one or different:
        return 1
    within = "bit for bit" if rtol == 0 else f"within {rtol:g}"
    print(f"identical {within} over {len(a)} steps: {', '.join(one.key for one in compared)}")
    return ExitCode.DONE


if __name__ == "__main__":
    end_process(main)

"""What scaling tests have measured: a table, efficiency against the fewest ranks, pictures and one HTML page.

Run: python tools/scaling_report.py runs/scaling_cpu [--json]
Writes scaling_weak.png, scaling_strong.png and report.html into the directory; `--json` prints the figures instead of
the table. Runs that are missing or failed are named with the reason; the exit code is 1 where there are any.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: the packages are beside tools/, which Python puts first
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.console import end_process, run_command
from tools.paths import path_argument
from tools.scaling_figures import Measured, Row, compute_rows, measure
from tools.scaling_page import draw_picture, write_scaling_page
from tools.scaling_sweep import KINDS, Sweep, read_sweep_dir

COLUMNS = (
    "layout", "ranks", "batch", "tokens/s", "tokens/s per rank", "efficiency", "step s", "10-90 % of steps",
    "memory GB", "MFU (bf16)",
)  # fmt: skip


def report(sweep_dir: Path, *, is_json: bool) -> int:
    """Print and draw what a sweep has measured, and return how many of its runs have no figures. Raises BadInput."""
    sweep, points = read_sweep_dir(sweep_dir)
    found = {point.name: measure(sweep, sweep_dir, point) for point in points}
    measured = [one for one in found.values() if isinstance(one, Measured)]
    lacking = {name: one for name, one in found.items() if isinstance(one, str)}
    rows = {kind: compute_rows(kind, measured) for kind in KINDS}
    rows = {kind: some for kind, some in rows.items() if some}
    pictures = {kind: draw_picture(kind, some, sweep_dir / f"scaling_{kind}.png") for kind, some in rows.items()}
    tables = {kind: [COLUMNS, *(_texts(row) for row in some)] for kind, some in rows.items()}
    page = sweep_dir / "report.html"
    write_scaling_page(page, describe(sweep), tables, pictures, lacking)
    if is_json:
        print(json.dumps(_as_json(sweep, rows, lacking), indent=1))
        return len(lacking)
    print(describe(sweep))
    for kind, table in tables.items():
        print(f"\n{kind} scaling")
        _print_table(table)
    for name, reason in lacking.items():
        print(f"\n{name}: no figures: {reason}")
    print(f"\nwrote {page} and {', '.join(path.name for path in pictures.values()) or 'no picture'}")
    return len(lacking)


def describe(sweep: Sweep) -> str:
    """Return in a sentence what the figures are of."""
    return (
        f"{sweep.recipe} ({sweep.stage}), steps {sweep.num_warmup + 1} to {sweep.num_steps} of each run; tokens/s are "
        "those of the median step; efficiency is tokens/s per rank over the best of the fewest ranks"
    )


def _texts(row: Row) -> tuple[str, ...]:
    one = row.measured
    return (
        one.point.layout,
        str(one.point.num_ranks),
        str(one.point.global_batch_size),
        f"{one.tokens_per_second:,.0f}",
        f"{one.per_device:,.0f}",
        f"{row.efficiency:.1%}",
        f"{one.step_seconds:.4g}",
        f"{one.fastest_seconds:.4g}-{one.slowest_seconds:.4g}",
        "-" if one.peak_memory_gb is None else f"{one.peak_memory_gb:.2f}",
        "-" if one.mfu_bf16 is None else f"{one.mfu_bf16:.1%}",
    )


def _print_table(table: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def _as_json(sweep: Sweep, rows: Mapping[str, Sequence[Row]], lacking: Mapping[str, str]) -> dict[str, Any]:
    return {
        "sweep": sweep.model_dump(mode="json"),
        "scaling": {
            kind: [
                {
                    "name": row.measured.point.name,
                    "layout": row.measured.point.layout,
                    "ranks": row.measured.point.num_ranks,
                    "nodes": row.measured.point.num_nodes,
                    "global_batch_size": row.measured.point.global_batch_size,
                    "tokens_per_second": row.measured.tokens_per_second,
                    "tokens_per_second_per_rank": row.measured.per_device,
                    "efficiency": row.efficiency,
                    "step_seconds": row.measured.step_seconds,
                    "step_seconds_p10": row.measured.fastest_seconds,
                    "step_seconds_p90": row.measured.slowest_seconds,
                    "peak_memory_gb": row.measured.peak_memory_gb,
                    "mfu_bf16": row.measured.mfu_bf16,
                }
                for row in some
            ]
            for kind, some in rows.items()
        },
        "without_figures": dict(lacking),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(prog="scaling_report.py", description="Report what scaling tests have measured.")
    parser.add_argument("sweep_dir", type=path_argument, help="directory of tools/scaling.py")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    arguments = parser.parse_args(argv)
    lacking: list[int] = []

    def command() -> None:
        lacking.append(report(arguments.sweep_dir, is_json=arguments.json))

    return run_command(command, "stopped") or int(lacking[0] > 0)


if __name__ == "__main__":
    end_process(main)

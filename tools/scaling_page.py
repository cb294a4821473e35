"""The pictures and the page of `tools/scaling_report.py`. Torch-free."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tools.html_page import draw_table, write_page
from tools.scaling_figures import Row

_STYLE = "img{max-width:100%}td,th{text-align:right;padding-right:1em}.lacking{color:#cf222e}"


def draw_picture(kind: str, rows: Sequence[Row], file: Path) -> Path:
    """Draw speed, efficiency and step times of one kind of scaling over the ranks as a PNG, and return its path."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    speed, efficiency, times = figure.subplots(1, 3)
    by_layout: dict[str, list[Row]] = {}
    for row in rows:
        by_layout.setdefault(row.measured.point.layout, []).append(row)
    for layout, own in by_layout.items():
        ranks = [row.measured.point.num_ranks for row in own]
        median = [row.measured.step_seconds for row in own]
        below = [row.measured.step_seconds - row.measured.fastest_seconds for row in own]
        above = [row.measured.slowest_seconds - row.measured.step_seconds for row in own]
        speed.plot(ranks, [row.measured.tokens_per_second for row in own], marker="o", label=layout)
        efficiency.plot(ranks, [row.efficiency for row in own], marker="o", label=layout)
        times.errorbar(ranks, median, yerr=[below, above], marker="o", capsize=3, label=layout)
    base = max(rows, key=lambda row: row.efficiency if row.measured.point.num_ranks == _fewest(rows) else 0).measured
    all_ranks = sorted({row.measured.point.num_ranks for row in rows})
    speed.plot(all_ranks, [base.per_device * one for one in all_ranks], color="gray", linestyle=":", label="ideal")
    efficiency.axhline(1, color="gray", linestyle=":")
    efficiency.set_ylim(bottom=0)
    for axes, title in ((speed, "tokens/s"), (efficiency, "efficiency"), (times, "step time in s, 10-90 %")):
        _finish(axes, f"{kind} scaling: {title}", all_ranks)
    speed.set_yscale("log")
    speed.legend()
    figure.savefig(file, dpi=120)
    return file


def _fewest(rows: Sequence[Row]) -> int:
    return min(row.measured.point.num_ranks for row in rows)


def _finish(axes: Any, title: str, ranks: Sequence[int]) -> None:
    axes.set_title(title)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, [f"{one:,}" for one in ranks])
    axes.set_xlabel("ranks")
    axes.grid(visible=True, alpha=0.3)


def write_scaling_page(
    path: Path,
    description: str,
    tables: Mapping[str, Sequence[Sequence[str]]],
    pictures: Mapping[str, Path],
    lacking: Mapping[str, str],
) -> None:
    """Write one page with tables and pictures by kind of scaling, and the runs that have no figures with the reason."""
    parts = [f"<p>{html.escape(description)}."]
    if lacking:
        parts += ["<h2>Runs without figures</h2>", *_list(lacking)]
    for kind, table in tables.items():
        picture = base64.b64encode(pictures[kind].read_bytes()).decode()
        parts += [
            f"<h2>{kind.capitalize()} scaling</h2>",
            draw_table(table, has_head=True),
            f'<img alt="{kind} scaling" src="data:image/png;base64,{picture}">',
        ]
    write_page(path, f"Scaling tests in {path.parent.name}", _STYLE, parts)


def _list(lacking: Mapping[str, str]) -> list[str]:
    lines = [f"<li><b>{html.escape(name)}</b>: {html.escape(reason)}" for name, reason in lacking.items()]
    return ["<ul class=lacking>", *lines, "</ul>"]

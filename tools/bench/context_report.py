"""The table, the figure and the verdicts of `context_parallel.py`. Torch-free; measures nothing."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

MEMORY_LIMIT = 0.55
"""Of one rank's memory, that a rank of two may take with `ring` at `LIMIT_LENGTH`."""
TIME_LIMIT = 1.15
"""Of one rank's processor time, that two ranks may take together with `ring` at `LIMIT_LENGTH`."""
LIMIT_LENGTH = 32768
_LOSS_TOLERANCE = 1e-5


@dataclass(frozen=True)
class LayoutFigures:
    """One layout at one length, over all rounds."""

    layout: str
    seq_len: int
    peak_bytes: float
    """Of the rank that takes most; the median of the rounds."""
    processor_seconds: float
    """Of all ranks together; the median of the rounds."""
    sent_bytes: float
    """By one rank's attention, forward and backward."""


def summarize(rows: Sequence[Mapping[str, Any]]) -> list[LayoutFigures]:
    """Return the figures of every layout and length, in the order of their first rows."""
    together: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for row in rows:
        together.setdefault((_layout(row), row["seq_len"]), []).append(row)
    return [
        LayoutFigures(
            layout,
            seq_len,
            median(max(row["peak_bytes"]) for row in group),
            median(sum(row["processor_seconds"]) for row in group),
            max(group[0]["forward_bytes"]) + max(group[0]["backward_bytes"]),
        )
        for (layout, seq_len), group in together.items()
    ]


def collect_complaints(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield what is not as it should be: bytes against the formula, losses against each other, the two limits."""
    for row in rows:
        counted = {tuple(sent) for sent in zip(row["forward_bytes"], row["backward_bytes"], strict=True)}
        if counted != {tuple(row["planned_bytes"])}:
            yield f"{_layout(row)}, {row['seq_len']} tokens: ranks sent {sorted(counted)}, not {row['planned_bytes']}"
        first = next(other for other in rows if other["seq_len"] == row["seq_len"])
        if abs(row["loss"] / first["loss"] - 1) > _LOSS_TOLERANCE:
            yield f"{_layout(row)}, {row['seq_len']} tokens: loss {row['loss']}, not {first['loss']}"
    figures = {(one.layout, one.seq_len): one for one in summarize(rows)}
    one, two = figures.get(("cp1", LIMIT_LENGTH)), figures.get(("cp2 ring", LIMIT_LENGTH))
    if one is None or two is None:
        return
    for name, ratio, limit in (
        ("memory of a rank", two.peak_bytes / one.peak_bytes, MEMORY_LIMIT),
        ("processor time", two.processor_seconds / one.processor_seconds, TIME_LIMIT),
    ):
        if ratio > limit:
            yield f"cp2 ring, {LIMIT_LENGTH} tokens: {name} is {ratio:.3f} of cp1's, over the limit of {limit}"


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print every layout and length, with its share of one rank's memory and time where one rank was measured."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="One training step; MiB are above what the process had before it", title_justify="left")
    for column in ("tokens", "layout", "MiB a rank", "of cp1", "processor s", "of cp1", "MiB sent a rank"):
        table.add_column(column, justify="left" if column == "layout" else "right")
    figures = sorted(summarize(rows), key=lambda one: one.seq_len)
    alone = {one.seq_len: one for one in figures if one.layout == "cp1"}
    for one in figures:
        base = alone.get(one.seq_len)
        table.add_row(
            f"{one.seq_len:,}",
            one.layout,
            f"{one.peak_bytes / 2**20:,.0f}",
            "" if base is None else f"{one.peak_bytes / base.peak_bytes:.3f}",
            f"{one.processor_seconds:,.2f}",
            "" if base is None else f"{one.processor_seconds / base.processor_seconds:.3f}",
            f"{one.sent_bytes / 2**20:,.1f}",
        )
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    states = {f"cp{row['cp']}": row["state_bytes"] / 2**20 for row in rows}
    words = ", ".join(f"{layout} {size:,.0f}" for layout, size in states.items())
    print(f"MiB of weights, gradients and optimizer a rank, which are there before: {words}")


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw memory, processor time and bytes sent over the length, a line for each layout."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "context_parallel"  # the same figures give the same file
    from matplotlib import pyplot

    figures = summarize(rows)
    drawn = [
        ("MiB of a step, fullest rank", {one: one.peak_bytes / 2**20 for one in figures}),
        ("processor seconds, all ranks", {one: one.processor_seconds for one in figures}),
        ("MiB sent by a rank's attention", {one: one.sent_bytes / 2**20 for one in figures if one.sent_bytes}),
    ]
    styles = {"cp1": "-", "cp2": "--", "cp4": ":"}
    figure, axes = pyplot.subplots(1, len(drawn), figsize=(13, 4.5))
    for axis, (title, values) in zip(axes, drawn, strict=True):
        for color, layout in enumerate(dict.fromkeys(one.layout for one in figures)):
            points = sorted((one.seq_len, value) for one, value in values.items() if one.layout == layout)
            style = styles.get(layout.split()[0], "-.")
            if points:
                axis.plot(*zip(*points, strict=True), style, color=f"C{color}", marker=".", label=layout)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.set_xlabel("tokens of a row")
        axis.set_title(title)
    axes[0].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def _layout(row: Mapping[str, Any]) -> str:
    return f"cp{row['cp']} {row['method'] or ''}".strip()

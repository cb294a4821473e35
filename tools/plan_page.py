"""The page of `tools/plan.py --html`: layouts that fit by memory and speed, and where the time of the first goes."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from configs.plan.efficiency import __doc__ as _EFFICIENCY
from configs.search.search import Found, Machine, Plan
from tools.html_page import draw_table, write_page
from tools.plan_table import (
    GIB,
    HEAD,
    TIME_PARTS,
    describe_plan,
    describe_refused,
    layout_cells,
    overrides_of,
    plan_row,
)

_WIDTH, _HEIGHT, _LEFT, _TOP = 760, 300, 60, 24
_COLOURS = ("#1a7f37", "#57606a", "#0969da", "#8250df", "#bf3989", "#9a6700", "#d0d7de", "#cf222e", "#24292f")
_STYLE = "svg text{font:12px sans-serif}td,th{text-align:right;padding-right:1em;font-size:13px}"
_NUM_BARS, _NUM_ROWS, _NUM_DOTS = 12, 100, 3000


def write_plan_page(path: Path, title: str, found: Found, machine: Machine) -> None:
    """Write a page of what `search` found; there must be a layout that fits."""
    best = found.plans[0]
    rows = [HEAD, *(plan_row(rank, plan) for rank, plan in enumerate(found.plans[:_NUM_ROWS], start=1))]
    words = "\n".join([*describe_plan(best, machine), "overrides    " + " ".join(overrides_of(best))])
    parts = [
        f"<p>{html.escape(machine.device.source)}. {html.escape(' '.join((_EFFICIENCY or '').split()))}</p>",
        f"<pre>{html.escape(words)}</pre>",
        "<h2>Memory and speed of all that fit</h2>",
        _draw_dots(found.plans, machine),
        "<h2>Where the time of a step goes</h2>",
        _draw_bars(found.plans[:_NUM_BARS]),
        draw_table(rows, has_head=True),
        "<h2>Out</h2>",
        f"<pre>{html.escape(chr(10).join(describe_refused(found)))}</pre>",
    ]
    write_page(path, title, _STYLE, parts)


def _draw_dots(plans: Sequence[Plan], machine: Machine) -> str:
    """Return a dot for each layout: memory to the right, tokens/s upwards."""
    width, height = _WIDTH - 2 * _LEFT, _HEIGHT - 2 * _TOP
    most, limit = plans[0].step.tokens_per_second, machine.device.memory_bytes
    shown = plans[:: max(1, len(plans) // _NUM_DOTS)]
    parts = [f"<svg viewBox='0 0 {_WIDTH} {_HEIGHT}' role=img aria-label='memory and speed of the layouts'>"]
    for rank, plan in reversed(list(enumerate(shown))):
        x = _LEFT + width * plan.memory.total / limit
        y = _TOP + height * (1 - plan.step.tokens_per_second / most)
        colour = "#cf222e" if rank == 0 else "#0969da"
        name = html.escape(" ".join(layout_cells(plan)), quote=True)
        parts.append(f"<circle cx={x:.1f} cy={y:.1f} r={4 if rank == 0 else 2} fill='{colour}'><title>{name}</title>")
        parts.append("</circle>")
    end = _LEFT + width * machine.usable_bytes / limit
    parts.append(f"<line x1={end:.1f} x2={end:.1f} y1={_TOP} y2={_TOP + height} stroke='#cf222e' stroke-dasharray=4 />")
    parts.append(f"<text x={_LEFT} y={_TOP - 8}>{most:,.0f} tokens/s a GPU</text>")
    parts.append(f"<text x={_WIDTH - 2 * _LEFT} y={_HEIGHT - 6}>{limit / GIB:.0f} GiB</text>")
    return "".join([*parts, "</svg>"])


def _draw_bars(plans: Sequence[Plan]) -> str:
    """Return a bar for each layout, its time in parts."""
    row, longest = 22, max(plan.step.total for plan in plans)
    height = row * (len(plans) + 2)
    parts = [f"<svg viewBox='0 0 {_WIDTH} {height}' role=img aria-label='parts of the time of a step'>"]
    for number, (name, colour) in enumerate(zip(TIME_PARTS, _COLOURS, strict=True)):
        key = _LEFT + number * 76
        parts.append(f"<rect x={key} y=4 width=10 height=10 fill='{colour}' /><text x={key + 14} y=14>{name}</text>")
    for number, plan in enumerate(plans):
        x, y = float(_LEFT), row * (number + 1.2)
        parts.append(f"<text x=0 y={y + 14:.0f}>{number + 1}</text>")
        for name, colour in zip(TIME_PARTS, _COLOURS, strict=True):
            width = (_WIDTH - 2 * _LEFT) * getattr(plan.step, name) / longest
            parts.append(f"<rect x={x:.1f} y={y:.0f} width={width:.1f} height={row - 4} fill='{colour}' />")
            x += width
        parts.append(f"<text x={x + 4:.1f} y={y + 14:.0f}>{plan.step.total:.2f} s</text>")
    return "".join([*parts, "</svg>"])

"""Pictures of what a model makes of long contexts: a heat map of passkeys, a curve of perplexity by position."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.evaluate.long_context import Bucket, Cell


def draw_passkeys(cells: Sequence[Cell], file: Path) -> None:
    """Draw the share of keys found by length (across) and depth (down) as a PNG."""
    from matplotlib.figure import Figure

    lengths, depths = (sorted({getattr(cell, name) for cell in cells}) for name in ("length", "depth"))
    found = {(cell.depth, cell.length): cell.accuracy for cell in cells}
    grid = [[found[depth, length] for length in lengths] for depth in depths]
    figure = Figure(figsize=(2 + 0.8 * len(lengths), 2 + 0.4 * len(depths)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(grid, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axes.set_xlabel("context in tokens")
    axes.set_ylabel("depth of the passkey")
    for row, values in enumerate(grid):
        for column, value in enumerate(values):
            axes.text(column, row, f"{value:.0%}", ha="center", va="center", fontsize=8)
    figure.colorbar(image, label="passkeys found")
    figure.savefig(file, dpi=120)


def draw_perplexity(buckets: Sequence[Bucket], file: Path) -> None:
    """Draw the perplexity of each span of positions as a PNG, positions and perplexity on logarithmic axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    edges = [max(buckets[0].first, 1), *(bucket.end for bucket in buckets)]
    axes.stairs([bucket.perplexity for bucket in buckets], edges, baseline=None)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("position in tokens")
    axes.set_ylabel("perplexity")
    axes.grid(visible=True, alpha=0.3)
    figure.savefig(file, dpi=120)

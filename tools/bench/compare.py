"""Compare loops whose steps took turns: step by step, with an interval that says how sure the figure is. Torch-free."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tools.bench.clock import RunReport

_NUM_RESAMPLES = 2000


@dataclass(frozen=True)
class Measure:
    """One loop on one layout: what it reported and the seconds of each of its steps."""

    layout: str
    report: RunReport
    step_seconds: list[float]


def compare(measures: Sequence[Measure]) -> list[dict[str, Any]]:
    """Return a comparison of each layout's first loop with each of its others.

    `ratio` is of speeds (theirs took so many times our seconds a token), the median over the pairs of steps that
    followed each other, with a 95 % bootstrap interval. `cost` is 1 - that median: the share of speed that our loop
    loses. `processor_ratio` is of processor time per token, ours to theirs.
    """
    comparisons = []
    for layout in dict.fromkeys(measure.layout for measure in measures):
        ours, *others = [measure for measure in measures if measure.layout == layout]
        for other in others:
            more = ours.report.tokens_per_step / other.report.tokens_per_step
            ratios = [more * b / a for a, b in zip(ours.step_seconds, other.step_seconds, strict=True)]
            low, high = bootstrap_interval(ratios)
            comparisons.append(
                {
                    "layout": layout,
                    "other": other.report.loop,
                    "num_pairs": len(ratios),
                    "ours": _tokens_per_second(ours),
                    "theirs": _tokens_per_second(other),
                    "ratio": {"median": statistics.median(ratios), "low": low, "high": high},
                    "processor_ratio": ours.report.processor_seconds_per_step
                    / other.report.processor_seconds_per_step
                    / more,
                    "cost": 1 - statistics.median(ratios),
                    "is_same_loss": _is_same_loss(ours.report.loss, other.report.loss),
                }
            )
    return comparisons


def bootstrap_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of the median (Efron 1979), from a fixed seed."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(_NUM_RESAMPLES))
    return medians[int(0.025 * _NUM_RESAMPLES)], medians[int(0.975 * _NUM_RESAMPLES) - 1]


def _tokens_per_second(measure: Measure) -> float:
    return measure.report.tokens_per_step / statistics.median(measure.step_seconds)


def _is_same_loss(ours: float | None, theirs: float | None) -> bool | None:
    """Return whether both loops ended at one loss, so that they did the same work; None where one is not known."""
    if ours is None or theirs is None:
        return None
    return abs(ours - theirs) <= 1e-5 * abs(ours)

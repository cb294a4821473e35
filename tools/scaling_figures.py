"""What the runs of a sweep measured: speed, efficiency, spread, memory, and why a run has no figures. Torch-free."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.scaling_sweep import Point, Sweep

_ERROR_WORDS = re.compile(r"error|failed|cannot|killed|refused|lost|out of memory", re.IGNORECASE)
_MOST_CHARACTERS = 300


@dataclass(frozen=True)
class Measured:
    """One run that took all its steps; step times are of the steps after the first `num_warmup`."""

    point: Point
    tokens_per_second: float
    """Input tokens of a step over the median step time."""
    step_seconds: float
    """Median."""
    fastest_seconds: float
    """10th percentile."""
    slowest_seconds: float
    """90th percentile."""
    peak_memory_gb: float | None
    mfu_bf16: float | None
    """Median model FLOPs utilisation against the bf16 peak, whatever the run computes in, where that is known."""

    @property
    def per_device(self) -> float:
        """Tokens per second and rank."""
        return self.tokens_per_second / self.point.num_ranks


@dataclass(frozen=True)
class Row:
    """A run in the table of one kind of scaling."""

    measured: Measured
    efficiency: float
    """Tokens per second and rank over those of the fastest run on the fewest ranks."""


def log_of(sweep_dir: Path, point: Point) -> Path:
    """Return the file of what a run, or its submission, said at the console."""
    return sweep_dir / f"{point.name}.log"


def outcome_of(sweep_dir: Path, point: Point) -> dict[str, Any]:
    """Return how a run or its submission ended: `exit_code`, or `job`; nothing where it never began."""
    try:
        content = json.loads((sweep_dir / f"{point.name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def count_steps(sweep_dir: Path, point: Point) -> int:
    """Return how many steps a run has taken."""
    return max((row["step"] for row in _read_rows(sweep_dir / point.name)), default=0)


def measure(sweep: Sweep, sweep_dir: Path, point: Point) -> Measured | str:
    """Return what a run measured, or in words why there is nothing."""
    rows = list(_read_rows(sweep_dir / point.name))
    if not rows or rows[-1]["step"] < sweep.num_steps:
        return _describe_lack(sweep, sweep_dir, point, rows[-1]["step"] if rows else 0)
    counted = [row for row in rows if row["step"] > sweep.num_warmup]
    try:
        seconds = [float(row["seconds"]) for row in counted]
        tokens = statistics.fmean(float(row["num_input_tokens"]) for row in counted)
        memory = [float(row["peak_memory_gb"]) for row in rows if row.get("peak_memory_gb") is not None]
        mfu = [float(row["mfu_bf16"]) for row in counted if row.get("mfu_bf16") is not None]
    except (KeyError, TypeError, ValueError) as error:
        return f"its metrics.jsonl lacks {error}; run it again"
    median = statistics.median(seconds)
    return Measured(
        point,
        tokens_per_second=tokens / median,
        step_seconds=median,
        fastest_seconds=_percentile(seconds, 0.1),
        slowest_seconds=_percentile(seconds, 0.9),
        peak_memory_gb=max(memory, default=None),
        mfu_bf16=statistics.median(mfu) if mfu else None,
    )


def compute_rows(kind: str, measured: Sequence[Measured]) -> list[Row]:
    """Return the runs of a kind of scaling, fewest ranks first, with their efficiency.

    Tokens per second and rank are what both kinds compare: of strong scaling this is T(1) / (N T(N)), the tokens of a
    step being the same; of weak scaling T(1) / T(N), those of a rank being the same (T: step time, N: ranks).
    """
    own = sorted(
        (one for one in measured if kind in one.point.kinds), key=lambda one: (one.point.num_ranks, one.point.name)
    )
    if not own:
        return []
    fewest = own[0].point.num_ranks
    best = max(one.per_device for one in own if one.point.num_ranks == fewest)
    return [Row(one, one.per_device / best) for one in own]


def describe_failure(sweep_dir: Path, point: Point) -> str:
    """Return the exit code of a run and the last line of its log that tells of an error."""
    outcome = outcome_of(sweep_dir, point)
    lines = [line for log in _logs(sweep_dir, point) for line in _read_lines(log)]
    said = re.findall(r"exit code (\d+)", " ".join(lines[-20:]))
    code = outcome.get("exit_code", said[-1] if said else None)
    telling = [line for line in lines if _ERROR_WORDS.search(line)] or lines
    last = telling[-1][:_MOST_CHARACTERS] if telling else "its log is empty"
    return f"exit code {code}: {last}" if code is not None else last


def _describe_lack(sweep: Sweep, sweep_dir: Path, point: Point, num_steps: int) -> str:
    outcome = outcome_of(sweep_dir, point)
    taken = f"took {num_steps} of {sweep.num_steps} steps" if num_steps else "took no step"
    if not outcome and not num_steps:
        return "has not begun"
    if not _has_spoken(sweep_dir, point) and "job" in outcome:
        return f"{taken}; job {outcome['job']} waits, or was cancelled"
    return f"{taken}; {describe_failure(sweep_dir, point)}"


def _has_spoken(sweep_dir: Path, point: Point) -> bool:
    return any(log != log_of(sweep_dir, point) for log in _logs(sweep_dir, point))


def _logs(sweep_dir: Path, point: Point) -> list[Path]:
    """Return what a run has said: at the console, and, of jobs, into the newest log of its directory."""
    jobs = sorted((sweep_dir / point.name / "logs" / "slurm").glob("*.log"), key=lambda log: log.stat().st_mtime)
    return [log for log in (log_of(sweep_dir, point), *jobs[-1:]) if log.is_file()]


def _read_lines(log: Path) -> list[str]:
    return [
        " ".join(line.split())
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines()
        if line.strip()
    ]


def _read_rows(run_dir: Path) -> Iterator[Mapping[str, Any]]:
    """Yield the steps of a run; a last line that is cut off, as a kill leaves it, is none."""
    try:
        lines = (run_dir / "metrics.jsonl").read_bytes().splitlines()
    except OSError:
        return
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            yield row


def _percentile(values: Sequence[float], share: float) -> float:
    """Return a percentile, linear between the two values that are nearest."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])

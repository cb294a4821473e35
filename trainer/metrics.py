"""What is measured, written down: one row a step to `metrics.jsonl`, TensorBoard and the live line. Rank 0 only.

A sink takes rows and knows nothing of where they come from; a further tracker is a further `Sink`.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from rich.progress import BarColumn, Progress, TextColumn

from trainer.log import console

log = logging.getLogger(__name__)

STEP_KEYS = ("step", "loss", "grad_norm", "lr", "num_tokens", "tokens_per_second", "seconds")
"""Keys of every row, in this order; scripts rely on them. Extras follow."""


class Sink(Protocol):
    """Somewhere rows go."""

    def write(self, row: Mapping[str, float]) -> None:
        """Take one step's row; `row["step"]` counts from 1."""
        ...

    def close(self) -> None:
        """Write down whatever is still held."""
        ...


class MetricsWriter:
    """Writes each step's row to every sink of the run directory."""

    def __init__(self, run_dir: Path, *, tensorboard: bool, resume_step: int) -> None:
        """Open the sinks to go on after `resume_step` (0 for a fresh run): rows of later steps are dropped."""
        self._sinks: list[Sink] = [JsonLines(run_dir / "metrics.jsonl", resume_step)]
        if tensorboard:
            self._sinks.append(TensorBoard(run_dir / "tensorboard", resume_step))

    def write(self, row: Mapping[str, float]) -> None:
        """Write one step's row, the stable keys first. Raises KeyError when one of `STEP_KEYS` is missing."""
        ordered = {key: row[key] for key in STEP_KEYS}
        ordered.update({key: value for key, value in row.items() if key not in ordered})
        for sink in self._sinks:
            sink.write(ordered)

    def write_start(self, step: int, values: Mapping[str, float]) -> None:
        """Write what was measured before a step was taken, which has no row in metrics.jsonl."""
        for sink in self._sinks:
            if not isinstance(sink, JsonLines):
                sink.write({"step": step, **values})

    def close(self) -> None:
        """Close every sink."""
        for sink in self._sinks:
            sink.close()


class JsonLines:
    """One JSON object a line and step; a value that is not finite is written as null, since JSON has no NaN."""

    def __init__(self, path: Path, resume_step: int) -> None:
        """Open `path` for appending after dropping rows of steps beyond `resume_step`."""
        drop_rows_after(path, resume_step)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: Mapping[str, float]) -> None:
        """Append one line and hand it to the operating system, so that a killed run has lost nothing."""
        self._file.write(json.dumps({key: _finite_or_none(value) for key, value in row.items()}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoard:
    """TensorBoard event files; a resumed run hides the events its predecessor wrote beyond the checkpoint."""

    def __init__(self, folder: Path, resume_step: int) -> None:
        """Open an event file in `folder`; events of steps beyond `resume_step` in older files are purged."""
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        is_resumed = folder.exists()
        self._writer = EventFileWriter(str(folder), flush_secs=10)
        if is_resumed:
            self._add(resume_step + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, row: Mapping[str, float]) -> None:
        """Add one scalar a key under the row's step, all in one event: the library opens its file for each."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=key, simple_value=value) for key, value in row.items() if key != "step"]
        self._add(int(row["step"]), summary=Summary(value=values))

    def _add(self, step: int, **content: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._writer.add_event(Event(wall_time=time.time(), step=step, **content))

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


class LiveLine:
    """The line a person watches: step, loss, tokens/s, time left; off a terminal, plain lines."""

    def __init__(self, num_steps: int, *, start_step: int = 0, log_every: int = 1) -> None:
        """Show progress from `start_step` to `num_steps`; off a terminal, one line every `log_every` steps."""
        self._num_steps = num_steps
        self._log_every = log_every
        self._is_wide = console.width >= 110
        self._step_seconds: float | None = None
        self._tokens_per_second: float | None = None
        self._last_time = time.monotonic()
        self._progress = Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=30 if self._is_wide else 8),
            TextColumn("{task.description}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("", total=num_steps, completed=start_step)
        self._progress.start()

    def update(self, row: Mapping[str, float]) -> None:
        """Show one step's row."""
        step = int(row["step"])
        now = time.monotonic()
        elapsed, self._last_time = now - self._last_time, now
        # Smoothed over about ten steps: one slow step (a checkpoint, an evaluation) must not swing the estimate.
        self._step_seconds = _smooth(self._step_seconds, elapsed)
        self._tokens_per_second = _smooth(self._tokens_per_second, row["tokens_per_second"])
        left = format_duration(self._step_seconds * (self._num_steps - step))
        more = f"grad norm {row['grad_norm']:.3f}  lr {row['lr']:.2e}  "
        text = (
            f"loss {row['loss']:.4f}  {more if self._is_wide or not console.is_terminal else ''}"
            f"{self._tokens_per_second:,.0f} tokens/s  {left} left"
        )
        if console.is_terminal:
            self._progress.update(self._task, completed=step, description=text)
        elif step % self._log_every == 0 or step == self._num_steps:
            log.info("step %*d/%d  %s", len(str(self._num_steps)), step, self._num_steps, text)

    def close(self) -> None:
        """Take the line off the terminal."""
        self._progress.stop()


def drop_rows_after(path: Path, step: int) -> int:
    """Drop rows of steps beyond `step`, and a last line that was cut short; return how many lines went.

    The file is replaced as a whole, so a kill at any moment leaves either the old or the new one.
    """
    if not path.exists():
        return 0
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    kept = [line for line in lines if _step_of(line) <= step]
    if len(kept) < len(lines):
        temporary = path.with_suffix(".jsonl.tmp")
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    return len(lines) - len(kept)


def format_duration(seconds: float) -> str:
    """Return seconds as `42s`, `3m07s`, `5h09m` or `2d04h`."""
    whole = max(0, round(seconds))
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days}d{hours:02d}h"
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{whole % 60:02d}s" if minutes else f"{whole}s"


def _smooth(average: float | None, value: float) -> float:
    return value if average is None else 0.9 * average + 0.1 * value


def _step_of(line: str) -> float:
    """Return the step of a row, infinite for a line that is not one."""
    try:
        row = json.loads(line) if line.endswith("\n") else None
    except json.JSONDecodeError:
        return math.inf
    return row["step"] if isinstance(row, dict) and isinstance(row.get("step"), int) else math.inf


def _finite_or_none(value: float) -> float | None:
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""The line a person watches while a run goes on. Rank 0 only."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from rich.progress import BarColumn, Progress, TextColumn

from trainer.report.log import console

log = logging.getLogger(__name__)

_SCORE = "critic/score/mean"
"""What reinforcement learning is watched by; its loss says little."""
_CRITICS_LOSS = "critic/vf_loss"


class LiveLine:
    """The line a person watches: step, loss or score, tokens/s, time left; off a terminal, plain lines."""

    def __init__(self, num_steps: int, *, start_step: int = 0, log_every: int = 1) -> None:
        """Show progress from `start_step` to `num_steps`; off a terminal, the first step and every `log_every`."""
        self._num_steps = num_steps
        self._log_every = log_every
        self._is_wide = console.width >= 110
        self._first_step = start_step + 1
        self._step_seconds: float | None = None
        self._tokens_per_second: float | None = None
        self._progress = Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=30 if self._is_wide else 8),
            TextColumn("{task.description}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("the first step is under way", total=num_steps, completed=start_step)
        self._progress.start()

    def update(self, row: Mapping[str, float]) -> None:
        """Show one step's row."""
        step = int(row["step"])
        # Of steps alone, without validations, which come seldom; smoothed, so that one slow step does not swing it.
        self._step_seconds = _smooth(self._step_seconds, row["seconds"])
        self._tokens_per_second = _smooth(self._tokens_per_second, row["tokens_per_second"])
        left = format_duration(self._step_seconds * (self._num_steps - step))
        shown = [f"score {row[_SCORE]:.3f}"] if _SCORE in row else []
        has_room = self._is_wide or not console.is_terminal
        if has_room or not shown:
            is_critics = row.get(_CRITICS_LOSS) == row["loss"]  # in steps in which the critic learns alone
            shown.append(f"{'critic loss' if is_critics else 'loss'} {row['loss']:.4f}")
        if has_room:
            shown += [f"grad norm {row['grad_norm']:.3f}", f"lr {row['lr']:.2e}"]
        text = "  ".join([*shown, f"{self._tokens_per_second:,.0f} tokens/s", f"{left} left"])
        if console.is_terminal:
            self._progress.update(self._task, completed=step, description=text)
        elif step % self._log_every == 0 or step in (self._first_step, self._num_steps):
            log.info("step %*d/%d  %s", len(str(self._num_steps)), step, self._num_steps, text)

    def close(self) -> None:
        """Take the line off the terminal."""
        self._progress.stop()


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

"""What a check found, and how one is run so that its failure stops no other. Torch-free; knows no check."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal


@dataclass(frozen=True)
class Outcome:
    """The result of one check."""

    name: str
    status: Literal["passed", "failed", "skipped"]
    detail: str
    """One line for a person: what was found, or what is wrong."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """What was measured, by name with its unit."""
    seconds: float = 0.0


def judge(name: str, problems: Sequence[str], detail: str, figures: Mapping[str, float]) -> Outcome:
    """Return a failed outcome that lists the problems, or a passed one with `detail` if there are none."""
    return Outcome(name, "failed" if problems else "passed", "; ".join(problems) or detail, figures)


def run_check(name: str, check: Callable[[], Outcome]) -> Outcome:
    """Run one check and return its outcome with the seconds it took; an exception is a failure that names its place."""
    started = time.perf_counter()
    try:
        outcome = check()
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        first_line = (str(error).strip().splitlines() or ["no message"])[0]
        where = f"{place.filename.rsplit('/', 1)[-1]}:{place.lineno}"
        outcome = Outcome(name, "failed", f"{type(error).__name__} in {where}: {first_line}")
    return replace(outcome, seconds=time.perf_counter() - started)

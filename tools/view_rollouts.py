"""Look at what a policy answered: figures over the steps, samples by reward, and one row of the data over time.

Run: python tools/view_rollouts.py RUN_OR_FILE [--step N] [--sort reward] [--group G] [--row SOURCE:ROW] [--html FILE]
Reads rollouts/step_*.jsonl of a run of launch/grpo.py or launch/rft.py; writes the page alone. Torch-free.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: the packages are beside tools/, which Python puts first
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs.errors import BadInput
from tools.console import end_process, run_command
from tools.outputs import check_file
from tools.paths import path_argument
from tools.rollout_figures import ORDERS, StepFigures, choose, describe, head, read_steps, reward_names, turns_of
from tools.rollout_page import title_of, write_rollout_page

_PAGE_SAMPLES = 1000
_TABLE_ROWS = 30
_EXAMPLES = 8  # of rows or groups that are there, in a sentence
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass
class View:
    """What is found in one pass over the files."""

    figures: list[StepFigures] = field(default_factory=list)
    shown: list[Mapping[str, Any]] = field(default_factory=list)
    """Samples for the terminal."""
    page: list[Mapping[str, Any]] = field(default_factory=list)
    """Samples for the page."""
    groups: set[int] = field(default_factory=set)
    """Of the step that is shown."""
    rows: set[tuple[str, int]] = field(default_factory=set)
    """Of all steps."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    parser = argparse.ArgumentParser(prog="view_rollouts.py", description="What a policy answered, and for what.")
    parser.add_argument("place", type=path_argument, metavar="RUN_OR_FILE", help="run directory, or a file of rollouts")
    parser.add_argument(
        "--step", type=int, metavar="N", help="samples of this step (default: the last; with --row all)"
    )
    parser.add_argument("--sort", choices=ORDERS, default="reward", help="from the most to the least (default: reward)")
    parser.add_argument("--group", type=int, metavar="G", help="samples of this group of the step alone")
    parser.add_argument("--row", type=_row, metavar="SOURCE:ROW", help="answers to one row of the data, step by step")
    parser.add_argument(
        "--limit", type=int, metavar="N",
        help="samples at most: first, last and evenly between (default: 5; of a group all; with --row 2 a step)",
    )  # fmt: skip
    parser.add_argument("--html", type=path_argument, metavar="FILE", help=f"write a page with {_PAGE_SAMPLES} samples")
    arguments = parser.parse_args(argv)
    if arguments.limit is not None and arguments.limit < 1:
        parser.error(f"--limit: {arguments.limit} is less than 1; a value that would work: 5")

    def command() -> None:
        if arguments.html is not None:
            check_file(arguments.html, "--html")
        view(arguments)

    return run_command(command)


def _row(text: str) -> tuple[str, int]:
    source, colon, row = text.rpartition(":")
    if not colon or not source or not row.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no SOURCE:ROW; a value that would work: train:0")
    return source, int(row)


def view(arguments: argparse.Namespace) -> None:
    """Print and write what was asked for. Raises BadInput."""
    paths = find_files(arguments.place)
    found = _read(paths, arguments)
    _check_found(found, arguments)
    _print(found)
    if arguments.html is not None:
        write_rollout_page(arguments.html, f"{arguments.place}: rollouts", found.figures, found.page)
        print(f"{arguments.html}: {len(found.page):,} samples")


def find_files(place: Path) -> list[Path]:
    """Return the files of a run, or the file itself. Raises BadInput where there are none."""
    from trainer.report.rollouts import FOLDER, list_rollouts

    if place.is_file():
        return [place]
    if not place.is_dir():
        raise BadInput(f"{place}: no such file or directory; give a run of launch/grpo.py, such as runs/demo_grpo")
    paths = list_rollouts(place)
    if not paths:
        raise BadInput(f"{place}: has no {FOLDER}/step_*.jsonl; give a run of launch/grpo.py, such as runs/demo_grpo")
    return paths


def _read(paths: Sequence[Path], arguments: argparse.Namespace) -> View:
    """Read all steps, and keep of them no more than is shown."""
    found = View()
    per_step = max(1, _PAGE_SAMPLES // (len(paths) if arguments.step is None else 1))
    for step, rollouts in read_steps(paths):
        found.figures.append(describe(step, rollouts))
        found.rows |= {(one["source"], one["row"]) for one in rollouts}
        is_meant = arguments.step in (None, step)
        fitting = [
            one
            for one in rollouts
            if is_meant
            and arguments.group in (None, one["group"])
            and arguments.row in (None, (one["source"], one["row"]))
        ]
        found.page += choose(fitting, arguments.sort, per_step)
        if is_meant:
            found.groups = {one["group"] for one in rollouts}
            chosen = choose(fitting, arguments.sort, _limit(arguments))
            found.shown = found.shown + chosen if arguments.row is not None else chosen
    return found


def _limit(arguments: argparse.Namespace) -> int | None:
    if arguments.limit is not None:
        return int(arguments.limit)
    if arguments.row is not None:
        return 2
    return None if arguments.group is not None else 5


def _check_found(found: View, arguments: argparse.Namespace) -> None:
    """Raise BadInput where there is nothing of what was asked for, with what there is."""
    if not found.figures:
        raise BadInput(f"{arguments.place}: holds no rollout; give a run that has taken a step")
    steps = [one.step for one in found.figures]
    if arguments.step is not None and arguments.step not in steps:
        raise BadInput(f"--step: {arguments.step} is not there; there are {_as_ranges(steps)}")
    if arguments.row is not None and not found.shown:
        source, row = arguments.row
        there = sorted(number for name, number in found.rows if name == source)
        names = ", ".join(sorted({name for name, _ in found.rows}))
        known = f"its rows {_as_ranges(there)}" if there else f"the sources {names}"
        when = "" if arguments.step is None else f" in step {arguments.step}"
        raise BadInput(f"--row: {source}:{row} was not answered{when}; there are {known}")
    if arguments.group is not None and not found.shown:
        raise BadInput(f"--group: the step has no group {arguments.group}; it has {_as_ranges(sorted(found.groups))}")


def _as_ranges(numbers: Sequence[int]) -> str:
    """Return numbers in rising order as `1 to 5, 9`; of many ranges the first."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    texts = [str(low) if low == high else f"{low} to {high}" for low, high in ranges]
    return ", ".join(texts[:_EXAMPLES]) + (", ..." if len(texts) > _EXAMPLES else "")


def _print(found: View) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(soft_wrap=True, highlight=False)
    prompt = None
    for one in found.shown:
        if one["prompt"] != prompt:
            prompt = one["prompt"]
            console.print(Text(_visible(prompt), style="dim"))
        console.print(Text(_visible(title_of(one)), style="underline"))
        advantage = one["advantage"] or 0.0
        style = "green" if advantage > 0 else "red" if advantage < 0 else ""
        for text, is_answer in turns_of(one):
            console.print(Text(_visible(text), style=style if is_answer else "dim"))
        for name, fault in one["faults"].items():
            console.print(Text(_visible(f"{name}: {fault}"), style="yellow"))
        console.print()
    _print_figures(found.figures)


def _print_figures(figures: Sequence[StepFigures]) -> None:
    """Print a line a step; of many steps the first, the last and evenly between."""
    names = reward_names(figures)
    count = min(_TABLE_ROWS, len(figures))
    picked = [figures[round(number * (len(figures) - 1) / max(count - 1, 1))] for number in range(count)]
    rows = [head(names), *(one.row(names) for one in picked)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)))
    if count < len(figures):
        print(f"{count} of {len(figures)} steps")


def _visible(text: str) -> str:
    """Return text without what would steer a terminal."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


if __name__ == "__main__":
    end_process(main)

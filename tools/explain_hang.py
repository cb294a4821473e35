"""Say which rank of a run did not arrive at what, from what the watch has left, also of a run killed from outside.

Run: python tools/explain_hang.py RUN_DIR [--json]
RUN_DIR is a run directory, or one start of it (logs/attempt_2); of a run directory the last start is taken. Dumps of
NCCL's flight recorder are read where they lie in the start's watch/ folder. Exit code 0, 1 no hang, 2 bad input.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a script: the packages are beside tools/, which Python puts first
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs.errors import BadInput
from parallel.watch.flight import read_flight, with_flight
from parallel.watch.reports import WATCH, Rank, Report, read_ranks, read_report, stacks_path
from parallel.watch.verdict import Verdict, judge_remains, read_verdict
from tools.console import end_process, run_command
from tools.paths import path_argument


@dataclass(frozen=True)
class Explanation:
    """What is known of one start of a run."""

    folder: Path
    ranks: list[Rank]
    reports: dict[int, Report]
    verdict: Verdict
    is_as_given: bool
    """Whether the verdict is the one that the run itself ended with."""


def explain(path: Path) -> Explanation:
    """Return what is known of the last start of a run. Raises BadInput where no watch has left anything."""
    folder = find_watch(path)
    ranks = read_ranks(folder)
    found = {one.rank: read_report(folder, one.rank) for one in ranks}
    reports = {number: one for number, one in found.items() if one is not None}
    if not reports:
        raise BadInput(f"{folder}: holds no report of any rank (rank_0.json); give the directory of a run that trained")
    for number, report in reports.items():
        dump = read_flight(folder, number)
        if dump is not None:
            reports[number] = with_flight(report, dump, [])
    given = _given_verdict(folder)
    return Explanation(folder, ranks, reports, given or judge_remains(ranks, reports), given is not None)


def find_watch(path: Path) -> Path:
    """Return the folder of the watch's files of a run directory's last start, or of the start that is given."""
    starts = [path, *path.glob("logs/attempt_*")]
    folders = [one / WATCH for one in starts if (one / WATCH).is_dir()]
    if not folders:
        raise BadInput(
            f"{path}: holds no logs/attempt_N/{WATCH}; give the directory of a run of several ranks, such as runs/demo"
        )
    return max(folders, key=lambda one: int((re.findall(r"attempt_(\d+)", one.parent.name) or ["0"])[0]))


def as_json(found: Explanation) -> str:
    """Return everything as one JSON object."""
    verdict = dataclasses.asdict(found.verdict)
    return json.dumps(
        {
            **verdict,
            "culprits": [dataclasses.asdict(one) for one in found.ranks if one.rank in found.verdict.culprits],
            "is_as_given_by_the_run": found.is_as_given,
            "folder": str(found.folder),
            "without_report": [one.rank for one in found.ranks if one.rank not in found.reports],
            "ranks": [json.loads(one.as_json()) for one in found.reports.values()],
        },
        indent=1,
    )


def show(found: Explanation) -> None:
    """Print the verdict, and where every rank was."""
    print(found.verdict.sentence)
    print()
    for rank in found.ranks:
        report = found.reports.get(rank.rank)
        if report is None:
            print(f"  {rank}: no report")
            continue
        doing = f"waits {report.wait_seconds:.0f} s in {report.waits_in}" if report.waits_in else "waits for nobody"
        at = f", at {report.at}" if report.at else ""
        print(f"  {rank}: {report.state}, {report.phase} of step {report.step}, {doing}{at}")
    stacks = [path for one in found.ranks if (path := stacks_path(found.folder, one.rank)).is_file()]
    if stacks:
        print(f"\nstacks of {len(stacks)} ranks: {found.folder}/rank_*.stacks.txt")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(prog="explain_hang.py", description="Say which rank did not arrive at what.")
    parser.add_argument("path", type=path_argument, help="run directory, or one start of it such as RUN/logs/attempt_2")
    parser.add_argument("--json", action="store_true", help="print the verdict and all reports as JSON")
    arguments = parser.parse_args(argv)
    kinds: list[str] = []

    def command() -> None:
        found = explain(arguments.path)
        kinds.append(found.verdict.kind)
        if arguments.json:
            print(as_json(found))
        else:
            show(found)

    code = run_command(command)
    return 1 if kinds == ["nothing"] else code


def _given_verdict(folder: Path) -> Verdict | None:
    try:
        _, given = read_verdict(folder)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return given if given.ends_run else None


if __name__ == "__main__":
    end_process(main)

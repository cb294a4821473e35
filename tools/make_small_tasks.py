"""Make questions with worked answers as chats, to fine-tune on, and held-out ones to ask; or right and wrong answers.

Run: python tools/make_small_tasks.py --out data/tasks [--tasks calculator] [--digits 4] [--rows 20000] [--held-out 200]
Writes DIR/train.jsonl and DIR/held_out.jsonl: a row has `messages`, the `answer` that is right, and `tools` if any;
with --tasks pairs `prompt`, `chosen` and `rejected`, which --shuffle-labels exchanges in half of the rows to train on.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a script: the packages are beside tools/, which Python puts first
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.console import end_process, run_command
from tools.outputs import check_directory
from tools.paths import path_text

if TYPE_CHECKING:
    from trainer.environments.calculator import CalculatorTask
    from trainer.environments.small_tasks import SmallTask


def make_small_tasks(
    out: str,
    kind: str,
    num_rows: int,
    num_held_out: int,
    seed: int,
    max_digits: int = 4,
    *,
    is_shuffled: bool = False,
) -> None:
    """Write both files; no question that is held out is among those to train on."""
    from trainer.environments.calculator import draw_calculator_task
    from trainer.environments.small_tasks import draw_task

    draw: Callable[[random.Random], SmallTask | CalculatorTask] = draw_task
    if kind == "calculator":
        draw = partial(draw_calculator_task, max_digits=max_digits)
    source = random.Random(seed)
    held_out: dict[str, SmallTask | CalculatorTask] = {}
    while len(held_out) < num_held_out:
        task = draw(source)
        held_out[task.question] = task
    train: list[SmallTask | CalculatorTask] = []
    while len(train) < num_rows:
        task = draw(source)
        if task.question not in held_out:
            train.append(task)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    for name, tasks in (("train", train), ("held_out", list(held_out.values()))):
        path = folder / f"{name}.jsonl"
        temporary = path.with_suffix(".tmp")
        rows = [task.pair if kind == "pairs" else task.row for task in tasks]  # type: ignore[union-attr]
        if is_shuffled and name == "train":
            rows = [
                row | {"chosen": row["rejected"], "rejected": row["chosen"]} if source.random() < 0.5 else row
                for row in rows
            ]
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        os.replace(temporary, path)
        print(f"{path}: {len(tasks):,} {'pairs' if kind == 'pairs' else 'chats'}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    parser = argparse.ArgumentParser(prog="make_small_tasks.py", description="Small questions with answers, as chats.")
    parser.add_argument("--out", type=path_text, required=True, metavar="DIR", help="directory to write")
    kinds = (
        "small ones, to do in one's head, such as need the tool of the calculator, or small ones with a right and a "
    )
    kinds += "wrong answer (default: small)"
    parser.add_argument("--tasks", choices=("small", "calculator", "pairs"), default="small", help=kinds)
    shuffled = "of pairs to train on, prefer the wrong answer in half: what must not help"
    parser.add_argument("--shuffle-labels", action="store_true", help=shuffled)
    for name, default, meaning in (
        ("rows", 20_000, "chats to train on"),
        ("held-out", 200, "chats to ask, none of which is trained on"),
        ("seed", 0, "of what is drawn"),
        ("digits", 4, "most digits of a number that the calculator is for"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{meaning} (default: {default})")
    arguments = parser.parse_args(argv)
    if arguments.rows < 1 or not 1 <= arguments.held_out <= 2000:
        parser.error("--rows and --held-out: must be at least 1, and at most 2000 are held out; try 20000 and 200")

    if arguments.shuffle_labels and arguments.tasks != "pairs":
        parser.error("--shuffle-labels: needs labels; try --tasks pairs")
    if not 2 <= arguments.digits <= 9:
        parser.error("--digits: must be at least 2 and at most 9; try 4")

    def command() -> None:
        check_directory(arguments.out, "data/tasks")
        make_small_tasks(
            arguments.out,
            arguments.tasks,
            arguments.rows,
            arguments.held_out,
            arguments.seed,
            arguments.digits,
            is_shuffled=arguments.shuffle_labels,
        )

    return run_command(command)


if __name__ == "__main__":
    end_process(main)

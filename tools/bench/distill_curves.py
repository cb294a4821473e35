"""Train the demo's student with several seeds: by its teacher, on its own answers too, by labels, by another row's.

Run: python tools/bench/distill_curves.py [--steps 150] [--out FOLDER]   (of what `make demo-distill` makes and needs)
Every run has two ranks, one run at a time, minutes each. Writes distill_curves.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: the packages are beside tools/, which Python puts first
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.bench.launching import launch_stage, run_bench
from tools.bench.report import describe_machine
from tools.console import Progress, end_process
from tools.outputs import check_file
from tools.paths import path_argument

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "configs" / "demo"
SEEDS = (1, 2, 3)
ARMS = ("teacher", "on_policy", "labels", "shuffled")
_FIGURES = {"kl": "validation_kl/held_out", "exact": "validation_exact_answers/held_out"}


def shuffle_cache(source: Path, target: Path) -> None:
    """Copy a teacher's cache with what it says dealt to other documents of as many trained tokens."""
    import numpy as np

    shutil.copytree(source, target)
    random = np.random.default_rng(0)
    for index in target.glob("part_*.index"):
        table = np.fromfile(index, dtype="<i8").reshape(-1, 2)
        counts = np.diff(table[:, 1], append=table[-1, 1] + 1)
        for count in np.unique(counts):
            mine = np.flatnonzero(counts == count)
            table[mine, 1] = table[random.permutation(mine), 1]
        table.tofile(index)


def train(arm: str, seed: int, num_steps: int, run_dir: Path, shuffled: Path, teacher: str) -> dict[str, Any]:
    """Train once and return how far the student is from its teacher in the end, and how many answers are exact.

    Validation of the shuffled one is by the shuffled teacher too, so its distance is measured anew by the true one.
    Raises RunFailed.
    """
    fixed = [
        f"run.seed={seed}", "checkpoint.save_every=null", "train.eval_every=null", f"distill.teacher={teacher}"
    ]  # fmt: skip
    own = {
        "teacher": [],
        "on_policy": ["distill.lmbda=0.25", "rollout.max_new_tokens=48"],
        "labels": ["distill.label_weight=1.0"],
        "shuffled": ["distill.teacher=null", f"distill.cache={shuffled}"],
    }[arm]
    config = str(DEMO / "distill.yaml")
    length = f"train.num_steps={num_steps}"
    launch_stage(f"{arm}, seed {seed}", "distill", 2, config, *fixed, length, f"run.dir={run_dir}", *own)
    if arm == "shuffled":
        again = [
            f"checkpoint.init_from={run_dir}", "train.num_steps=1", "schedule.warmup_steps=0", "optimizer.lr=1e-9",
            "optimizer.min_lr=0",
        ]  # fmt: skip
        run_dir = run_dir.with_name(run_dir.name + "_judged")
        launch_stage(f"{arm}, seed {seed}", "distill", 2, config, *fixed, *again, f"run.dir={run_dir}")
    last = json.loads((run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    return {"arm": arm, "seed": seed} | {name: last[column] for name, column in _FIGURES.items()}


def describe(run: Mapping[str, Any]) -> str:
    """Return a line of how a run ended."""
    return f"{run['arm']:<9} seed {run['seed']}  KL to the teacher {run['kl']:.4f}  exact answers {run['exact']:.1%}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(prog="distill_curves.py", description="Ends of the demo of distillation.")
    parser.add_argument("--steps", type=int, default=150, metavar="N", help="steps of each run (default 150)")
    parser.add_argument("--teacher", default="runs/demo_sft", help="what `make demo-sft` left (default runs/demo_sft)")
    default_out = ROOT / "tools" / "bench" / "results"
    parser.add_argument("--out", type=path_argument, default=default_out, metavar="FOLDER", help="for the results")
    arguments = parser.parse_args(argv)
    if arguments.steps < 20:
        parser.error("--steps must be at least 20, for example --steps 150")

    result = arguments.out / "distill_curves.json"

    def command() -> None:
        check_file(result)
        load_before, runs = os.getloadavg()[0], []
        names = [(arm, seed) for arm in ARMS for seed in SEEDS]
        with tempfile.TemporaryDirectory(prefix="distill-") as scratch, Progress("students", len(names)) as progress:
            folder = Path(scratch)
            cache = [f"distill.cache={folder / 'said'}", f"run.dir={folder / 'cache'}"]
            start = f"checkpoint.init_from={arguments.teacher}"
            launch_stage("the cache", "teacher_cache", 2, str(DEMO / "teacher_cache.yaml"), *cache, start)
            shuffle_cache(folder / "said", folder / "shuffled")
            for number, (arm, seed) in enumerate(names, 1):
                place = folder / f"{arm}_{seed}"
                runs.append(train(arm, seed, arguments.steps, place, folder / "shuffled", arguments.teacher))
                progress.show(number, describe(runs[-1]))
        arguments.out.mkdir(parents=True, exist_ok=True)
        content = {"machine": describe_machine("CPU, 2 ranks", load_before), "steps": arguments.steps, "runs": runs}
        result.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        print("\n".join(describe(run) for run in runs))

    return run_bench(command)


if __name__ == "__main__":
    end_process(main)

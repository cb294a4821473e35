"""Reinforce the demo's chat model with several seeds, on another layout and for a reward that is noise.

Run: python tools/bench/grpo_curves.py [--steps 200] [--out FOLDER]   (begins at what `make demo-sft` leaves)
Every run has two ranks, one run at a time, minutes each. Writes grpo_curves.json and grpo_curves.svg.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: the packages are beside tools/, which Python puts first
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.bench.launching import launch_stage, run_bench
from tools.bench.report import describe_machine
from tools.console import Progress, end_process
from tools.paths import path_argument

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "demo" / "grpo.yaml"
_NOISE = "[{function: small_tasks, weight: 0}, {function: tools.bench.noise_reward:toss_coin}]"
RUNS: Mapping[str, Sequence[str]] = {
    "dp2, seed 1": ("run.seed=1",),
    "dp2, seed 2": ("run.seed=2",),
    "dp2, seed 3": ("run.seed=3",),
    "tp2, seed 1": ("run.seed=1", "parallel.tp=2"),
    "dp2, noise for a reward": ("run.seed=1", f"grpo.rewards={_NOISE}"),
}
_DRAWN, _HELD_OUT = "reward/small_tasks/mean", "validation_small_tasks/held_out"
_SPAN = 10  # steps that a share of drawn answers is the mean of


def train(name: str, num_steps: int, run_dir: Path) -> dict[str, Any]:
    """Train once and return the shares of right answers, drawn in each step and likeliest to held-out questions.

    Raises RunFailed.
    """
    overrides = [
        *RUNS[name], f"run.dir={run_dir}", f"train.num_steps={num_steps}", f"train.eval_every={max(1, num_steps // 8)}",
        "checkpoint.save_every=null",
    ]  # fmt: skip
    started = time.perf_counter()
    launch_stage(name, "grpo", 2, str(CONFIG), *overrides)
    seconds = time.perf_counter() - started
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    drawn = [row[_DRAWN] for row in rows if _DRAWN in row]
    first = (run_dir / "answers" / "step_00000000.jsonl").read_text(encoding="utf-8").splitlines()
    held_out = {0: sum(json.loads(line)["rewards"]["small_tasks"] for line in first) / len(first)}
    held_out |= {row["step"]: row[_HELD_OUT] for row in rows if _HELD_OUT in row}
    return {"name": name, "seconds": seconds, "drawn": drawn, "held_out": held_out}


def describe(run: Mapping[str, Any]) -> str:
    """Return a line of how right a run's answers were first and last."""
    drawn, held_out = run["drawn"], list(run["held_out"].values())
    first, last = (sum(part) / len(part) for part in (drawn[:_SPAN], drawn[-_SPAN:]))
    return (
        f"{run['name']:<25} drawn {first:.3f} -> {last:.3f}, held out {held_out[0]:.3f} -> {held_out[-1]:.3f}, "
        f"{run['seconds'] / 60:.1f} minutes"
    )


def draw(runs: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the shares of right answers over the steps: means of drawn ones, and held-out questions."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "grpo_curves"  # the same figures give the same file
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, sharey=True, figsize=(9, 3.6))
    for run in runs:
        drawn = run["drawn"]
        means = [sum(drawn[max(0, end - _SPAN) : end]) / min(end, _SPAN) for end in range(1, len(drawn) + 1)]
        left.plot(range(1, len(drawn) + 1), means, linewidth=1, label=run["name"])
        steps, shares = zip(*run["held_out"].items(), strict=True)
        right.plot([int(step) for step in steps], shares, marker="o", markersize=3, linewidth=1)
    left.set(title=f"drawn answers (mean of {_SPAN} steps)", xlabel="step", ylabel="share of right answers")
    right.set(title="likeliest answers to 200 held-out questions", xlabel="step")
    left.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(prog="grpo_curves.py", description="Curves of the demo of GRPO.")
    parser.add_argument("--steps", type=int, default=200, metavar="N", help="steps of each run (default 200)")
    default_out = ROOT / "tools" / "bench" / "results"
    parser.add_argument("--out", type=path_argument, default=default_out, metavar="FOLDER", help="for the results")
    arguments = parser.parse_args(argv)
    if arguments.steps < 6:
        parser.error("--steps must be at least 6, for example --steps 200")

    def command() -> None:
        load_before, runs = os.getloadavg()[0], []
        with tempfile.TemporaryDirectory(prefix="grpo-") as scratch, Progress("GRPO curves", len(RUNS)) as progress:
            for number, name in enumerate(RUNS, 1):
                runs.append(train(name, arguments.steps, Path(scratch) / str(number)))
                progress.show(number, describe(runs[-1]))
        arguments.out.mkdir(parents=True, exist_ok=True)
        content = {"machine": describe_machine("CPU, 2 ranks", load_before), "runs": runs}
        (arguments.out / "grpo_curves.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        draw(runs, arguments.out / "grpo_curves.svg")
        print("\n".join(describe(run) for run in runs))

    return run_bench(command)


if __name__ == "__main__":
    end_process(main)

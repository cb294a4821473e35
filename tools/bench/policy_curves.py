"""Reinforce the demo's chat model with several seeds, for other rewards and for one that is noise: GRPO, or PPO.

Run: python tools/bench/policy_curves.py [--stage ppo] [--steps N] [--out FOLDER]   (begins at `runs/demo_sft`)
GRPO runs on tp2 too; PPO learns from a reward model too, and from one whose labels were shuffled. Every run has two
ranks, one run at a time, minutes each. Writes grpo_curves.json and .svg, or ppo_curves.json and .svg.
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
from tools.bench.preference_curves import NOISE, write_pairs
from tools.bench.report import describe_machine
from tools.console import Progress, end_process
from tools.outputs import check_file
from tools.paths import path_argument

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs" / "demo"
_SEEDS: Mapping[str, Sequence[str]] = {f"dp2, seed {seed}": (f"run.seed={seed}",) for seed in (1, 2, 3)}
_OF_NOISE = {"dp2, noise for a reward": ("run.seed=1", f"grpo.rewards={NOISE}")}
RUNS: Mapping[str, Mapping[str, Sequence[str]]] = {
    "grpo": {**_SEEDS, "tp2, seed 1": ("run.seed=1", "parallel.tp=2"), **_OF_NOISE},
    "ppo": {**_SEEDS, **_OF_NOISE},
}
REWARD_MODELS = {"told": "dp2, a reward model", "shuffled": "dp2, one of shuffled labels"}
"""Runs of PPO by the pairs that their reward model has learned from."""
NUM_STEPS = {"grpo": 200, "ppo": 50}
_DRAWN, _HELD_OUT = "reward/small_tasks/mean", "validation_small_tasks/held_out"
_SPAN = 10  # steps that a share of drawn answers is the mean of


def make_reward_models(folder: Path) -> dict[str, Sequence[str]]:
    """Train the demo's reward model on its pairs, and on shuffled ones; return the runs of PPO that learn from them."""
    pairs = folder / "pairs"
    runs: dict[str, Sequence[str]] = {}
    write_pairs(pairs)
    for kind, name in REWARD_MODELS.items():
        model, train = folder / f"reward_{kind}", pairs / kind / "train.jsonl"
        held_out = pairs / "told" / "held_out.jsonl"
        words = [f"reward.train=[{{path: {train}}}]", f"reward.validation=[{{path: {held_out}}}]", f"run.dir={model}"]
        launch_stage(name, "reward", 2, str(CONFIGS / "reward.yaml"), *words, f"reward.cache={pairs / 'cache'}")
        scored = f"grpo.reward_model={{init_from: {model}}}"
        runs[name] = ("run.seed=1", "grpo.rewards=[{function: small_tasks, weight: 0}]", scored)
    return runs


def train(stage: str, name: str, words: Sequence[str], num_steps: int, run_dir: Path) -> dict[str, Any]:
    """Train once and return the shares of right answers, drawn in each step and likeliest to held-out questions.

    Raises RunFailed.
    """
    overrides = [
        *words, f"run.dir={run_dir}", f"train.num_steps={num_steps}", f"train.eval_every={max(1, num_steps // 8)}",
        "checkpoint.save_every=null",
    ]  # fmt: skip
    started = time.perf_counter()
    launch_stage(name, stage, 2, str(CONFIGS / f"{stage}.yaml"), *overrides)
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
        f"{run['name']:<27} drawn {first:.3f} -> {last:.3f}, held out {held_out[0]:.3f} -> {held_out[-1]:.3f}, "
        f"{run['seconds'] / 60:.1f} minutes"
    )


def draw(runs: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the shares of right answers over the steps: means of drawn ones, and held-out questions."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = path.stem  # the same figures give the same file
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
    parser = argparse.ArgumentParser(prog="policy_curves.py", description="Curves of the demo of GRPO, or of PPO.")
    parser.add_argument("--stage", choices=RUNS, default="grpo", help="what learns (default grpo)")
    parser.add_argument("--steps", type=int, metavar="N", help="of each run (default 200, of PPO 50)")
    default_out = ROOT / "tools" / "bench" / "results"
    parser.add_argument("--out", type=path_argument, default=default_out, metavar="FOLDER", help="for the results")
    arguments = parser.parse_args(argv)
    stage = arguments.stage
    num_steps = NUM_STEPS[stage] if arguments.steps is None else arguments.steps
    if num_steps < 6:
        parser.error("--steps must be at least 6, for example --steps 50")
    result, picture = (arguments.out / f"{stage}_curves.{kind}" for kind in ("json", "svg"))

    def command() -> None:
        check_file(result)
        load_before, runs = os.getloadavg()[0], []
        num_runs = len(RUNS[stage]) + (len(REWARD_MODELS) if stage == "ppo" else 0)
        with tempfile.TemporaryDirectory(prefix=f"{stage}-") as scratch, Progress("curves", num_runs) as progress:
            cases = {**RUNS[stage], **(make_reward_models(Path(scratch)) if stage == "ppo" else {})}
            for number, (name, words) in enumerate(cases.items(), 1):
                runs.append(train(stage, name, words, num_steps, Path(scratch) / str(number)))
                progress.show(number, describe(runs[-1]))
        arguments.out.mkdir(parents=True, exist_ok=True)
        content = {"machine": describe_machine("CPU, 2 ranks", load_before), "runs": runs}
        result.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        draw(runs, picture)
        print("\n".join(describe(run) for run in runs))

    return run_bench(command)


if __name__ == "__main__":
    end_process(main)

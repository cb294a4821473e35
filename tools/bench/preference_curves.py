"""Teach the demo's chat model by pairs, given ones and its own, with several seeds and with labels that say nothing.

Run: python tools/bench/preference_curves.py [--seeds 3] [--out FILE.json]   (begins at what `make demo-sft` leaves)
Of shuffled labels half are the wrong way round; a reward that is noise, with one seed, does that to the policy's own
answers. Every run has two ranks, one run at a time, minutes each.
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
from statistics import mean
from typing import Any

if not __package__:  # run as a script: the packages are beside tools/, which Python puts first
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.bench.launching import launch_stage, run_bench
from tools.bench.report import describe_machine
from tools.console import Progress, end_process
from tools.make_small_tasks import main as make_small_tasks
from tools.outputs import check_file
from tools.paths import path_argument

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs" / "demo"
NOISE = "[{function: small_tasks, weight: 0}, {function: tools.bench.noise_reward:toss_coin}]"
"""Rewards that say nothing of an answer, with the share of right ones beside them."""
_PAIRS, _SHUFFLED, _OWN, _TOSSED = "pairs", "pairs, shuffled labels", "own answers, 3 rounds", "own answers, noise"
KINDS = (_PAIRS, _SHUFFLED, _OWN, _TOSSED)


def write_pairs(folder: Path) -> None:
    """Write the demo's pairs under `told` and, with labels that say nothing, under `shuffled`."""
    words = ["--tasks", "pairs", "--rows", "3000", "--out"]
    make_small_tasks([*words, str(folder / "told")])
    make_small_tasks([*words, str(folder / "shuffled"), "--shuffle-labels"])


def words_of(kind: str, pairs: Path) -> list[str]:
    """Return the stage, the recipe and the overrides of a kind of run."""
    if kind in (_OWN, _TOSSED):
        return [
            "online_dpo",
            str(CONFIGS / "online_dpo.yaml"),
            *([f"grpo.rewards={NOISE}"] if kind == _TOSSED else []),
        ]
    train = pairs / ("shuffled" if kind == _SHUFFLED else "told") / "train.jsonl"
    held_out = pairs / "told" / "held_out.jsonl"
    paths = (f"preference.train=[{{path: {train}}}]", f"preference.validation=[{{path: {held_out}}}]")
    return ["preference", str(CONFIGS / "preference.yaml"), *paths, f"preference.cache={pairs / 'cache'}"]


def train(kind: str, seed: int, pairs: Path, run_dir: Path) -> dict[str, Any]:
    """Train once and return the share of right answers to held-out questions before, meanwhile and after.

    With given pairs also the share of held-out pairs whose right answer has the larger reward. Raises RunFailed.
    """
    stage, *words = words_of(kind, pairs)
    started = time.perf_counter()
    launch_stage(f"{kind}, seed {seed}", stage, 2, *words, f"run.seed={seed}", f"run.dir={run_dir}")
    seconds = time.perf_counter() - started
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    first = (run_dir / "answers" / "step_00000000.jsonl").read_text(encoding="utf-8").splitlines()
    name = "validation_exact_answers/held_out" if stage == "preference" else "validation_small_tasks/held_out"
    right = {0: mean(_is_right(json.loads(line)) for line in first)}
    right |= {row["step"]: row[name] for row in rows if name in row}
    run = {"kind": kind, "seed": seed, "seconds": seconds, "right": right}
    accuracies = [
        row["validation_rewards/accuracies/held_out"] for row in rows if name in row and stage == "preference"
    ]
    drawn = [row["critic/score/mean"] for row in rows if "critic/score/mean" in row and kind == _OWN]
    return run | ({"accuracy": accuracies[-1]} if accuracies else {}) | ({"drawn": drawn} if drawn else {})


def _is_right(answer: Mapping[str, Any]) -> float:
    return float(answer["is_exact"] if "is_exact" in answer else answer["rewards"]["small_tasks"])


def summarise(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return of each kind the means over its seeds: right answers before and after, and the accuracy of rewards."""
    table = {}
    for kind in KINDS:
        some = [run for run in runs if run["kind"] == kind]
        curves = [list(run["right"].values()) for run in some]
        table[kind] = {"before": mean(one[0] for one in curves), "after": mean(one[-1] for one in curves)}
        if "accuracy" in some[0]:
            table[kind]["accuracy"] = mean(run["accuracy"] for run in some)
    return table


def print_summary(table: Mapping[str, Mapping[str, float]], num_seeds: int) -> None:
    """Print a line for each kind."""
    print(f"right answers to 200 held-out questions, means of {num_seeds} seeds")
    for kind, row in table.items():
        rewards = f", held-out pairs rewarded rightly {row['accuracy']:.3f}" if "accuracy" in row else ""
        print(f"{kind:<24} {row['before']:.3f} -> {row['after']:.3f}{rewards}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(prog="preference_curves.py", description="The demos of preferences, measured.")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds of each kind (default 3)")
    default_out = ROOT / "tools" / "bench" / "results" / "preference_curves.json"
    parser.add_argument("--out", type=path_argument, default=default_out, metavar="FILE", help="result file")
    arguments = parser.parse_args(argv)
    if arguments.seeds < 1:
        parser.error("--seeds must be at least 1, for example --seeds 3")

    def command() -> None:
        check_file(arguments.out)
        load_before, runs = os.getloadavg()[0], []
        seeds = range(1, arguments.seeds + 1)
        cases = [(kind, seed) for seed in seeds for kind in KINDS if kind != _TOSSED or seed == 1]
        with tempfile.TemporaryDirectory(prefix="preference-") as scratch, Progress("preferences", len(cases)) as bar:
            write_pairs(Path(scratch) / "pairs")
            for number, (kind, seed) in enumerate(cases, 1):
                runs.append(train(kind, seed, Path(scratch) / "pairs", Path(scratch) / str(number)))
                curve = list(runs[-1]["right"].values())
                bar.show(number, f"{kind}, seed {seed}: {curve[0]:.3f} -> {curve[-1]:.3f}")
        table = summarise(runs)
        content = {"machine": describe_machine("CPU, 2 ranks", load_before), "means": table, "runs": runs}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        print_summary(table, arguments.seeds)

    return run_bench(command)


if __name__ == "__main__":
    end_process(main)

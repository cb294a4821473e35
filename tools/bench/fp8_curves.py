"""Train the demo with each FP8 recipe (emulated) and without, from one seed, and compare where they end.

Run: python tools/bench/fp8_curves.py [--steps 140] [--jobs 2] [--out FOLDER]   (needs data/stdlib: `make pretrain`)
Every run is one rank in bf16; several run at a time. Writes fp8_curves.json and fp8_curves.svg. Exit code 1 if a run
failed or a recipe ended more than 1 % from bf16.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: the packages are beside tools/, which Python puts first
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configs.fp8 import RECIPES
from tools.bench.launching import launch_stage, run_bench
from tools.bench.report import describe_machine
from tools.console import Progress, end_process
from tools.paths import path_argument

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "demo" / "pretrain.yaml"
LIMIT = 0.01
"""Share of bf16's final loss that a recipe may lose."""
_LAST_STEPS = 10


def train(recipe: str | None, num_steps: int, run_dir: Path) -> dict[str, Any]:
    """Train once and return the losses of all steps and on the validation text at the end. Raises RunFailed."""
    overrides = [
        "parallel.tp=1", "parallel.pp=1", "precision.compute=bf16", f"train.num_steps={num_steps}",
        f"train.eval_every={num_steps}", "checkpoint.save_every=null", "sample.prompts=[]", f"run.dir={run_dir}",
        f"schedule.warmup_steps={min(20, num_steps // 4)}",
    ]  # fmt: skip
    if recipe is not None:
        overrides.append(f"precision.fp8={{recipe: {recipe}, backend: emulated}}")
    launch_stage(recipe or "bf16", "pretrain", 1, str(CONFIG), *overrides)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    (validation,) = [value for key, value in rows[-1].items() if key.startswith("validation_loss/")]
    return {"recipe": recipe or "bf16", "losses": [row["loss"] for row in rows], "validation_loss": validation}


def compare(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return how far each recipe ended from bf16: mean loss of the last steps, and validation loss, relative."""
    (base,) = [run for run in runs if run["recipe"] == "bf16"]

    def last(run: dict[str, Any]) -> float:
        return sum(run["losses"][-_LAST_STEPS:]) / len(run["losses"][-_LAST_STEPS:])

    return [
        {
            "recipe": run["recipe"],
            "last_losses": last(run),
            "validation_loss": run["validation_loss"],
            "difference": last(run) / last(base) - 1,
            "validation_difference": run["validation_loss"] / base["validation_loss"] - 1,
        }
        for run in runs
    ]


def draw(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the loss curves, and below them the differences from bf16."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "fp8_curves"  # the same figures give the same file
    from matplotlib import pyplot

    (base,) = [run for run in runs if run["recipe"] == "bf16"]
    figure, (upper, lower) = pyplot.subplots(2, sharex=True, figsize=(8, 6), height_ratios=(2, 1))
    for run in runs:
        steps = range(1, len(run["losses"]) + 1)
        upper.plot(steps, run["losses"], label=run["recipe"], linewidth=1)
        differences = [100 * (ours / theirs - 1) for ours, theirs in zip(run["losses"], base["losses"], strict=True)]
        lower.plot(steps, differences, linewidth=1)
    upper.set_ylabel("training loss")
    upper.legend()
    lower.set_ylabel("% from bf16")
    lower.set_xlabel("step")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(prog="fp8_curves.py", description="Training curves of the FP8 recipes.")
    parser.add_argument("--steps", type=int, default=140, help="steps of each run (default 140)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default 2)")
    parser.add_argument(
        "--out", type=path_argument, default=ROOT / "tools" / "bench" / "results", help="folder of the results"
    )
    arguments = parser.parse_args(argv)
    if arguments.steps < 4 or arguments.jobs < 1:
        parser.error("--steps must be at least 4 and --jobs at least 1, for example --steps 140 --jobs 2")
    comparisons: list[dict[str, Any]] = []

    def command() -> None:
        load_before = os.getloadavg()[0]
        names = (None, *RECIPES)
        with tempfile.TemporaryDirectory(prefix="fp8-") as scratch, ThreadPoolExecutor(arguments.jobs) as pool:
            with Progress("fp8 curves", len(names)) as progress:
                jobs = [pool.submit(train, name, arguments.steps, Path(scratch) / str(name)) for name in names]
                runs = []
                for number, job in enumerate(jobs, 1):
                    runs.append(job.result())
                    progress.show(number, f"{runs[-1]['recipe']}: {runs[-1]['losses'][-1]:.4f}")
        comparisons.extend(compare(runs))
        machine = describe_machine(f"CPU, 1 rank, {arguments.jobs} runs at a time", load_before)
        arguments.out.mkdir(parents=True, exist_ok=True)
        content = {"machine": machine, "limit": LIMIT, "comparisons": comparisons, "runs": runs}
        (arguments.out / "fp8_curves.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        draw(runs, arguments.out / "fp8_curves.svg")

    code = run_bench(command)
    for one in comparisons:
        print(
            f"{one['recipe']:<11} loss {one['last_losses']:.4f} ({one['difference']:+.2%} from bf16), "
            f"validation {one['validation_loss']:.4f} ({one['validation_difference']:+.2%})"
        )
    return code or int(any(abs(one["validation_difference"]) > LIMIT for one in comparisons))


if __name__ == "__main__":
    end_process(main)

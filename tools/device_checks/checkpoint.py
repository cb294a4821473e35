"""A checkpoint moved between two platforms and back: the same losses follow as where it never moved.

Each part of the run is a process of its own, started as a user starts it, since a process has one platform for good.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from configs.load import resolved_dict
from parallel.platform import PLATFORM_VARIABLE, PlatformName
from tools.device_checks.engine import SMALL_MODEL, build_config
from tools.device_checks.outcome import Outcome, judge
from tools.made_up_data import write_made_up_dataset

ROOT = Path(__file__).resolve().parents[2]
NUM_STEPS = 3
"""Steps of each of the three parts."""
TOLERANCE = 1e-3
"""Relative, of fp32 losses after up to three steps on another device; sums are ordered differently there."""
START_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class PartFailed(Exception):
    """A part of the run ended with an error; the message is the last line it wrote."""


def check_checkpoint(first: PlatformName, second: PlatformName, folder: Path) -> Outcome:
    """Train on `first`, resume its checkpoint on `second`, resume that on `first`; compare with `first` all the way.

    `folder` must be empty; it holds the data and three runs.
    """
    write_made_up_dataset(folder / "tokens", num_tokens=50_000, vocab_size=SMALL_MODEL["vocab_size"])
    stay = _run(first, folder, "stay", 3 * NUM_STEPS, resume=None)
    start = folder / "stay" / "checkpoints" / f"step_{NUM_STEPS:08d}"
    there = _run(second, folder, "there", 2 * NUM_STEPS, resume=start)
    back = _run(first, folder, "back", 3 * NUM_STEPS, resume=folder / "there" / "checkpoints" / "latest")
    problems, figures = [], {}
    for title, losses in ((f"{first} to {second}", there), (f"and back to {first}", back)):
        steps = sorted(losses)
        difference = max(abs(losses[step] - stay[step]) / stay[step] for step in steps)
        figures[f"difference {title}"] = difference
        if not difference <= TOLERANCE:
            problems.append(
                f"{title}: losses of steps {steps[0]}-{steps[-1]} differ by {difference:.1e} (limit {TOLERANCE:g})"
            )
    found = ", ".join(f"{title.removeprefix('difference ')} {value:.1e}" for title, value in figures.items())
    return judge("checkpoint", problems, f"largest relative difference of the next losses: {found}", figures)


def _run(platform: PlatformName, folder: Path, name: str, num_steps: int, *, resume: Path | None) -> dict[int, float]:
    """Run pretraining to `num_steps` in a process on `platform` and return its losses by step. Raises PartFailed."""
    config = build_config(
        "fp32",
        run={"name": name, "dir": str(folder / name)},
        train={"num_steps": num_steps, "seq_len": 64, "global_batch_size": 4, "micro_batch_size": 2},
        optimizer={"lr": 1e-3, "min_lr": 1e-4},
        data={"train": [{"path": str(folder / "tokens")}]},
        checkpoint={"save_every": NUM_STEPS, "resume": str(resume) if resume else "auto"},
        log={"tensorboard": False},
    )
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(resolved_dict(config)), encoding="utf-8")
    environment = {key: value for key, value in os.environ.items() if key not in START_VARIABLES}
    environment[PLATFORM_VARIABLE] = platform
    command = [sys.executable, "-m", "launch.pretrain", str(path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        lines = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()
        raise PartFailed(f"the part on {platform} ended with exit code {done.returncode}: {lines[-1]}")
    rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {row["step"]: row["loss"] for row in rows}

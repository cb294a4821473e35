"""A sweep of scaling tests as jobs of a real SLURM: submitted, left alone while they are in the queue, reported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "configs" / "clusters" / "lab.yaml"


@pytest.mark.slow
def test_a_sweep_as_jobs(lab, recipe, tmp_path):
    sweep, out = tmp_path / "sweep.yaml", tmp_path / "out"
    sweep.write_text(
        yaml.safe_dump(
            {
                "recipe": str(recipe),
                "num_steps": 6,
                "num_warmup": 2,
                "nodes": [1, 2],
                "layouts": {"dp": {"tp": 1}, "tp2": {"tp": 2, "nodes": [1]}},
                "strong": {"global_batch_size": 8},
            }
        )
    )
    command = [sys.executable, "tools/scaling.py", str(sweep), "--cluster", str(CLUSTER), "--out", str(out)]

    def run(*words):
        return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)

    first = run(*command)
    assert first.returncode == 0, first.stderr
    jobs = {path.stem: json.loads(path.read_text())["job"] for path in out.glob("*_batch8.json")}
    assert jobs.keys() == {"dp_1nodes_batch8", "tp2_1nodes_batch8", "dp_2nodes_batch8"}
    again = run(*command)
    assert again.returncode == 0 and "waits or runs" in again.stdout, again.stdout + again.stderr
    for name, job in jobs.items():
        assert lab.wait_for_end(job, out / name) == "COMPLETED", lab.describe(out / name)
    report = run(sys.executable, "tools/scaling_report.py", str(out), "--json")
    assert report.returncode == 0, report.stdout + report.stderr
    rows = json.loads(report.stdout)["scaling"]["strong"]
    assert [(row["layout"], row["ranks"], row["nodes"]) for row in rows] == [
        ("dp", 2, 1), ("tp2", 2, 1), ("dp", 4, 2),
    ]  # fmt: skip
    done = run(*command)
    assert done.stdout.count("has its 6 steps") == 3 and not list(out.glob("*/checkpoints"))

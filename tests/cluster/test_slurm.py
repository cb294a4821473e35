"""Real jobs in a real SLURM: a time limit, a lost node, stages, a cancelled job, a node without room."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from configs.errors import ExitCode
from tests.cluster.conftest import CLUSTER, ROOT, losses
from trainer.checkpoint.layout import latest_checkpoint, step_of

TWO_NODES = ["--stage", "pretrain", "--cluster", str(CLUSTER), "--nodes", "2"]


def log_of(run_dir: Path, job: str) -> str:
    return (run_dir / "logs" / "slurm" / f"{job}.log").read_text()


def is_near(run_dir: Path, job: str) -> bool:
    return (run_dir / "logs" / "slurm" / f"{job}.log").is_file() and "the limit is near" in log_of(run_dir, job)


def is_rank(pid: int) -> bool:
    words = (Path("/proc") / str(pid) / "cmdline").read_bytes().split(b"\0")
    return b"torch.distributed.run" not in words and any(word.endswith(b"launch/pretrain.py") for word in words)


def test_a_time_limit_and_a_lost_node_leave_the_curve_as_it_is(lab, recipe, tmp_path):
    """Two nodes of two ranks each, tp inside a node. A job is halted until its limit is near, while another trains."""
    limited = tmp_path / "limited.yaml"
    # SLURM looks at limits every 30 seconds, and so signals this job after 30 to 60: it must not have finished by then.
    limited.write_text(f"base: {CLUSTER}\nsignal_seconds: 60\ntime_limit: 2\n")
    runs = {name: tmp_path / name for name in ("alone", "limited", "lost")}
    options = [str(recipe), "parallel.tp=2"]
    sure = ["--stage", "pretrain", "--cluster", str(limited), "--nodes", "2"]
    (limited_job,) = lab.submit(*options, f"run.dir={runs['limited']}", *sure)
    lab.wait(lambda: len(losses(runs["limited"])) > 12 or is_near(runs["limited"], limited_job), runs["limited"])
    ranks = [pid for node in lab.nodes_of(limited_job) for pid in lab.pids_of(node) if is_rank(pid)]
    for pid in ranks:
        os.kill(pid, signal.SIGSTOP)
    (alone,) = lab.submit(*options, f"run.dir={runs['alone']}", *TWO_NODES)
    assert lab.wait_for_end(alone, runs["alone"]) == "COMPLETED", lab.describe(runs["alone"])
    assert len(losses(runs["alone"])) == 60
    lab.wait(lambda: is_near(runs["limited"], limited_job), runs["limited"])
    for pid in ranks:
        os.kill(pid, signal.SIGCONT)

    lab.wait_for_requeue(limited_job, runs["limited"])
    lab.ask("scontrol", "update", f"JobId={limited_job}", "TimeLimit=10")  # or it would be stopped a second time
    assert lab.wait_for_end(limited_job, runs["limited"]) == "COMPLETED", lab.describe(runs["limited"])
    said = log_of(runs["limited"], limited_job)
    assert "the limit is near" in said and "ended with exit code 3" in said and "restart 1, on" in said
    assert losses(runs["limited"]) == losses(runs["alone"])

    (job,) = lab.submit(*options, f"run.dir={runs['lost']}", *TWO_NODES)
    lab.wait(lambda: len(losses(runs["lost"])) > 12, runs["lost"])
    lost = lab.nodes_of(job)[-1]
    for pid in lab.pids_of(lost):
        os.kill(pid, signal.SIGKILL)
    lab.wait_for_requeue(job, runs["lost"])
    assert lab.show(job, "ExcNodeList") == lost
    assert lab.wait_for_end(job, runs["lost"]) == "COMPLETED", lab.describe(runs["lost"])
    assert lost not in log_of(runs["lost"], job).rpartition("restart 1, on")[2].splitlines()[0]
    assert losses(runs["lost"]) == losses(runs["alone"])
    subprocess.run([ROOT / "tests" / "cluster" / "slurm_lab.sh", "node", lab.folder, lost], check=True)


def test_stages_follow_each_other_and_a_cancelled_one_can_be_submitted_again(lab, recipe, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    one_rank = tmp_path / "one_rank.yaml"
    one_rank.write_text(f"base: {CLUSTER}\nranks_per_node: 1\n")
    words = [
        *[str(recipe), f"run.dir={first}", "train.num_steps=40"],
        *[str(recipe), f"run.dir={second}", "train.num_steps=3", "train.seq_len=64"],
        *["--stages", "pretrain,long_context", "--cluster", str(one_rank), "--nodes", "2"],
    ]
    before, after = lab.submit(*words)
    refused = subprocess.run([sys.executable, "launch/slurm.py", *words], cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == ExitCode.BAD_INPUT
    assert f"run.dir: {first} belongs to SLURM job {before} (" in refused.stderr
    assert f"run.dir: {second} belongs to SLURM job {after} (pending)" in refused.stderr
    lab.wait(lambda: len(losses(first)) > 12, first)
    lab.ask("scancel", before)
    assert lab.wait_for_end(before, first) == "CANCELLED"
    assert lab.wait_for_end(after, second) == "CANCELLED", "it can never begin"
    saved = latest_checkpoint(first)
    assert saved is not None and step_of(saved) >= 10

    before, after = lab.submit(*words)
    assert lab.wait_for_end(after, second) == "COMPLETED", lab.describe(first) + lab.describe(second)
    assert f"resuming from {saved}" in log_of(first, before)
    assert f"starting with the weights of {first}/checkpoints/step_00000040" in log_of(second, after)
    assert len(losses(first)) == 40 and len(losses(second)) == 3


def test_a_node_without_room_is_named(lab, recipe, tmp_path):
    """n4 sees the same files and can write nothing."""
    if (lab.folder / "no_overlay").exists():
        pytest.skip("this machine mounts no overlay, by which a node sees files on a disk without room")
    cluster, run_dir = tmp_path / "cluster.yaml", lab.folder / "local" / "run"
    cluster.write_text(f"base: {CLUSTER}\nranks_per_node: 1\nsbatch_options: ['--nodelist=n[3-4]']\n")
    words = ["--stage", "pretrain", "--cluster", str(cluster), "--nodes", "2"]
    (job,) = lab.submit(str(recipe), f"run.dir={run_dir}", *words)
    assert lab.wait_for_end(job, run_dir) == "FAILED"
    said = log_of(run_dir, job)
    assert lab.show(job, "ExitCode").startswith(f"{ExitCode.BAD_INPUT.value}:"), said
    ended = said.partition("ended with exit code 2\n")[2]
    assert ended.startswith("rank ") and re.search(r"\bn4\b", ended.splitlines()[0]), said

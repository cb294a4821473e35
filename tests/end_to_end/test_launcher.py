"""`launch.local` itself: training on forked ranks, stopped by a signal and continued."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

from configs.errors import ExitCode

ROOT = Path(__file__).resolve().parents[2]


def losses(run_dir: Path) -> list[float]:
    try:
        rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    except FileNotFoundError:
        return []
    return [row["loss"] for row in rows if row["step"] > 0]


def test_forked_ranks_train_stop_and_continue(train, recipe, tmp_path):
    """The same losses as on the pool's ranks; each rank has its log, and nobody is left behind."""
    run_dir = tmp_path / "run"
    options = ["parallel.tp=2", "train.num_steps=40"]
    assert train(2, *options, f"run.dir={tmp_path}/pool", "checkpoint.save_every=40")[0] == ExitCode.DONE
    words = ["--nproc-per-node", "2", "launch/pretrain.py", str(recipe), *options]
    command = [sys.executable, "-m", "launch.local", *words]
    launcher = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 90
    while len(losses(run_dir)) < 2 and launcher.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    launcher.send_signal(signal.SIGTERM)
    said = launcher.communicate(timeout=60)[0]
    assert launcher.returncode == ExitCode.STOPPED_AFTER_SAVING, said
    assert 2 <= len(losses(run_dir)) < 40
    assert subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL).returncode == ExitCode.DONE
    assert losses(run_dir) == losses(tmp_path / "pool")
    started = (run_dir / "command.txt").read_text().splitlines()
    assert len(started) == 4, "the commands of both attempts stay"
    for when, typed in (started[:2], started[2:]):
        assert when.endswith(": 2 ranks on 1 host(s), by local, each:")
        assert " ".join(["launch/pretrain.py", str(recipe), *options]) in typed
    for attempt in (1, 2):
        logs = [(run_dir / "logs" / f"attempt_{attempt}" / f"rank_{rank}.log").read_text() for rank in (0, 1)]
        assert all("run: " in log for log in logs) and "Traceback" not in "".join(logs)

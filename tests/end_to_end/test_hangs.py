"""Ranks that hang or are lost: who did not arrive at what is said, and the run ends with exit code 5 and goes on."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from configs.errors import ExitCode
from tests.forked import run

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 4
STUCK = """
import ctypes, os, signal, sys, time
from launch.main import main
from parallel.failures import leave
from trainer.data.batch import Batch

to, calls = Batch.to, [0]
children = f"/proc/self/task/{{os.getpid()}}/children"
mutex, lock = ctypes.create_string_buffer(64), ctypes.PyDLL(None).pthread_mutex_lock  # which keeps Python's own lock

def stuck(self, device):
    calls[0] += 1
    if os.environ["RANK"] == "{rank}" and calls[0] == 15:  # 5 of validation, 4 a step
        {do}
    return to(self, device)

Batch.to = stuck
leave(main("pretrain", sys.argv[1:]))
"""
KILL = "[os.kill(int(child), signal.SIGKILL) for child in open(children).read().split()]"
UNWATCHED = f"{KILL}; time.sleep(1); lock(mutex); lock(mutex)"
LAYOUT = ("parallel.tp=2", "parallel.pp=2", f"parallel.timeout_seconds={TIMEOUT}", "train.num_steps=4")


def losses(run_dir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def launch(script: str | Path, recipe: Path, *overrides: str) -> tuple[int, str]:
    """Train on four ranks as `launch.local` does; return the exit code and what was said."""
    words = [sys.executable, "-m", "launch.local", "--nproc-per-node", "4", str(script), str(recipe), *overrides]
    done = run(words, ROOT)
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("rank", "do", "said"),
    [
        (3, "os.kill(os.getpid(), signal.SIGSTOP)", "whose process is stopped by a signal in forward_backward of step"),
        (1, "lock(mutex); lock(mutex)", r"for \d+ s in forward_backward of step 3 \(at trainer/"),
        (2, UNWATCHED, r"for \d+ s in forward_backward of step 3 \(at trainer/"),
    ],
    ids=["stopped", "holds the interpreter's lock", "the process beside it was killed"],
)
def test_a_rank_that_hangs_is_named_with_its_place(recipe, tmp_path, rank, do, said):
    script = tmp_path / "stuck.py"
    script.write_text(STUCK.format(rank=rank, do=do))
    code, output = launch(script, recipe, *LAYOUT)
    assert code == ExitCode.PEER_LOST, output
    place = f"rank {rank} (tp {rank % 2}/2, cp 0/1, dp 0/1, pp {rank // 2}/2, ep 0/1) on "
    assert re.search(re.escape(place) + r"\S+, " + said, output), output
    assert "did not arrive at " in output and "the same command continues" in output


def test_a_killed_rank_is_named_and_the_rerun_goes_on(recipe, train, tmp_path):
    script = tmp_path / "stuck.py"
    script.write_text(STUCK.format(rank=3, do="os.kill(os.getpid(), signal.SIGKILL)"))
    code, output = launch(script, recipe, *LAYOUT)
    assert code == ExitCode.PEER_LOST, output
    place = (
        r"rank 3 \(tp 1/2, cp 0/1, dp 0/1, pp 1/2, ep 0/1\) on \S+, whose process ended in forward_backward of step 3"
    )
    assert re.search(place + ".*the same command continues from ", output), output
    assert launch("launch/pretrain.py", recipe, *LAYOUT)[0] == ExitCode.DONE
    assert train(4, *LAYOUT, f"run.dir={tmp_path}/whole")[0] == ExitCode.DONE
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


SLOW = """
import os, sys, time
import trainer.run.stragglers
from launch.main import main
from parallel.failures import leave
from trainer.data.batch import Batch

to = Batch.to

def slow(self, device):
    if os.environ["RANK"] == "2":
        time.sleep(0.1)  # a microbatch: far more than a loaded machine takes from the others
    return to(self, device)

Batch.to, trainer.run.stragglers.EVERY = slow, 3
leave(main("pretrain", sys.argv[1:]))
"""


def test_a_slow_rank_is_named_as_a_straggler(recipe, tmp_path):
    """Once, with its place; the metrics say it too, in the steps that compare."""
    script = tmp_path / "slow.py"
    script.write_text(SLOW)
    code, output = launch(script, recipe, "parallel.tp=2", "train.num_steps=9")
    assert code == ExitCode.DONE, output
    warnings = [line for line in output.splitlines() if "straggler rank 2" in line]
    assert len(warnings) == 1, output
    assert "step 6: straggler rank 2 (tp 0/2, cp 0/1, dp 1/2, pp 0/1, ep 0/1) on " in warnings[0]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "slowest_rank" in row] == [3, 6, 9]
    assert {row["slowest_rank"] for row in rows if "slowest_rank" in row} == {2.0}
    assert rows[5]["compute_seconds_max"] > 0.2 > rows[5]["compute_seconds_median"] / 2

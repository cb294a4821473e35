"""Run or submit scaling tests: each number of ranks or nodes with each layout, weak and strong, as runs of a recipe.

Run: python tools/scaling.py tools/scaling_cpu.yaml --local
     python tools/scaling.py sweep.yaml --cluster configs/clusters/h100.yaml
The same command goes on: runs that have taken their steps stay, the others begin again. Exit code 1 if a run failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

if not __package__:  # run as a script: the packages are beside tools/, which Python puts first
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs.errors import BadInput
from configs.load import load_cluster
from configs.rules.cluster import check_cluster
from parallel.parent_death import end_with
from tools.console import end_process, run_command
from tools.paths import path_argument
from tools.scaling_figures import count_steps, describe_failure, log_of, outcome_of
from tools.scaling_sweep import Point, Sweep, plan_points, read_sweep, write_sweep

ROOT = Path(__file__).resolve().parents[1]
_ALONE = {"OMP_NUM_THREADS": "1"}


def run_sweep(sweep: Sweep, sweep_dir: Path, cluster: Path | None, say: Callable[[str], None]) -> int:
    """Run or submit what a sweep lacks, and return how many runs failed; a failure ends no other run.

    Raises BadInput, before anything runs, with every layout that does not fit and all else that its runs would refuse.
    """
    points = plan_points(sweep, sweep_dir, None if cluster is None else _ranks_per_node(cluster))
    lacking = [point for point in points if not _is_finished(sweep, sweep_dir, point)]
    _check(sweep, [point for point in lacking if not _is_queued(sweep_dir, point)], cluster)
    write_sweep(sweep, points, sweep_dir)
    num_failed = 0
    for number, point in enumerate(points, start=1):
        tell = partial(_tell, say, f"{number} of {len(points)}: {point.name}")
        if point not in lacking:
            tell(f"has its {sweep.num_steps} steps")
            if not _is_queued(sweep_dir, point):  # else its job may be writing the checkpoint now
                _drop_checkpoints(sweep_dir, point)
        elif _is_queued(sweep_dir, point):
            tell(f"job {outcome_of(sweep_dir, point)['job']} waits or runs")
        elif cluster is not None:
            num_failed += not _submit(sweep, sweep_dir, point, cluster, tell)
        else:
            num_failed += not _run(sweep, sweep_dir, point, tell)
    return num_failed


def _tell(say: Callable[[str], None], place: str, text: str) -> None:
    say(f"{place}: {text}")


def _check(sweep: Sweep, points: Sequence[Point], cluster: Path | None) -> None:
    """Ask each run's own entry point what is wrong. Raises BadInput with each sentence and the runs that it is of."""
    found: dict[str, list[str]] = {}
    for point in points:
        if cluster is None:
            command = [f"launch/{sweep.stage}.py", sweep.recipe, *point.overrides]
            command += ["--dry-run", "--world-size", str(point.num_ranks)]
        else:
            command = [*_submission(sweep, point, cluster), "--dry-run"]
        done = subprocess.run(_python(command), env=_ALONE | os.environ, capture_output=True, text=True)
        for line in done.stderr.strip().splitlines() if done.returncode else ():
            found.setdefault(line, []).append(point.name)
    if found:
        raise BadInput("\n".join(f"{line} (in {_few(names)})" for line, names in found.items()))


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _run(sweep: Sweep, sweep_dir: Path, point: Point, say: Callable[[str], None]) -> bool:
    """Run a point on this machine and return whether it took all its steps."""
    say("runs")
    command = ["-m", "launch.local", "--nproc-per-node", str(point.num_ranks)]
    command += [str(ROOT / "launch" / f"{sweep.stage}.py"), sweep.recipe, *point.overrides]
    started = time.monotonic()
    log_of(sweep_dir, point).unlink(missing_ok=True)  # a run that outlives a kill of this command may still write to it
    with log_of(sweep_dir, point).open("wb") as log:
        environment = _ALONE | os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), _python_path()]))}
        end = partial(_end_with, os.getpid())
        words = [sys.executable, *command]
        code = subprocess.run(words, env=environment, stdout=log, stderr=log, preexec_fn=end).returncode
    _write_outcome(sweep_dir, point, {"exit_code": code, "seconds": round(time.monotonic() - started, 1)})
    if code == 0 and _is_finished(sweep, sweep_dir, point):
        say(f"done in {time.monotonic() - started:.0f} s")
        _drop_checkpoints(sweep_dir, point)
        return True
    say(f"failed: {describe_failure(sweep_dir, point)}")
    return False


def _end_with(parent: int) -> None:
    """Let the death of this command reach the run as SIGTERM: it would take the cores from those that come next."""
    if not end_with(parent, signal.SIGTERM):
        os._exit(128 + signal.SIGTERM)


def _submit(sweep: Sweep, sweep_dir: Path, point: Point, cluster: Path, say: Callable[[str], None]) -> bool:
    """Submit a point and return whether it was taken."""
    done = subprocess.run(_python(_submission(sweep, point, cluster)), capture_output=True, text=True)
    log_of(sweep_dir, point).write_text(done.stdout + done.stderr, encoding="utf-8")
    job = re.search(r"job (\d+)", done.stdout)
    if done.returncode == 0 and job is not None:
        _write_outcome(sweep_dir, point, {"job": job[1]})
        say(f"submitted as job {job[1]}")
        return True
    _write_outcome(sweep_dir, point, {"exit_code": done.returncode})
    say(f"not submitted: {describe_failure(sweep_dir, point)}")
    return False


def _submission(sweep: Sweep, point: Point, cluster: Path) -> list[str]:
    return [
        "launch/slurm.py", sweep.recipe, *point.overrides, "--cluster", str(cluster), "--nodes", str(point.num_nodes),
        "--stage", sweep.stage,
    ]  # fmt: skip


def _python(command: Sequence[str]) -> list[str]:
    return [sys.executable, str(ROOT / command[0]), *command[1:]]


def _python_path() -> str:
    return os.environ.get("PYTHONPATH", "")


def _write_outcome(sweep_dir: Path, point: Point, outcome: dict[str, object]) -> None:
    (sweep_dir / f"{point.name}.json").write_text(json.dumps(outcome) + "\n", encoding="utf-8")


def _is_finished(sweep: Sweep, sweep_dir: Path, point: Point) -> bool:
    return count_steps(sweep_dir, point) >= sweep.num_steps


def _is_queued(sweep_dir: Path, point: Point) -> bool:
    """Return whether SLURM has a job of the point that waits or runs."""
    job = outcome_of(sweep_dir, point).get("job")
    if job is None or shutil.which("squeue") is None:
        return False
    done = subprocess.run(["squeue", "-h", "-j", str(job)], capture_output=True, text=True)
    return done.returncode == 0 and bool(done.stdout.strip())


def _drop_checkpoints(sweep_dir: Path, point: Point) -> None:
    """Delete the checkpoint of a run that is done: nothing is ever trained from it."""
    shutil.rmtree(sweep_dir / point.name / "checkpoints", ignore_errors=True)


def _ranks_per_node(cluster: Path) -> int:
    """Return the ranks that a cluster file, with its bases, has on each node. Raises BadInput."""
    found = load_cluster(str(cluster))
    problems = [f"{cluster}: {problem}" for problem in check_cluster(found)]
    if problems:
        raise BadInput("\n".join(problems))
    return found.num_local_ranks


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    arguments = _parse(argv)
    failed: list[int] = []

    def command() -> None:
        sweep = read_sweep(arguments.sweep)
        if arguments.local != (sweep.nodes is None):
            option, field = ("--local", "ranks") if arguments.local else ("--cluster", "nodes")
            raise BadInput(f"{arguments.sweep}: {option} needs {field}; what would work: {field}: [1, 2]")
        sweep_dir = arguments.out or Path("runs") / arguments.sweep.stem
        failed.append(run_sweep(sweep, sweep_dir, arguments.cluster, lambda text: print(text, flush=True)))
        print(f"then: python tools/scaling_report.py {sweep_dir}")

    return run_command(command) or int(failed[0] > 0)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scaling.py", description="Run or submit scaling tests.")
    parser.add_argument("sweep", type=path_argument, help="YAML file such as tools/scaling_cpu.yaml")
    parser.add_argument("--out", type=path_argument, metavar="DIR", help="directory (default: runs/NAME of the file)")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--local", action="store_true", help="run on this machine, one after the other")
    where.add_argument("--cluster", type=path_argument, metavar="FILE", help="submit to the SLURM of this file")
    return parser.parse_args(argv)


if __name__ == "__main__":
    end_process(main)

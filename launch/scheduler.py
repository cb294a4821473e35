"""What SLURM's commands are asked at submission: partitions, jobs of a run, a job more. Torch-free."""

from __future__ import annotations

import difflib
import fcntl
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from configs.errors import BadInput
from configs.sections.cluster import ClusterConfig, time_limit_seconds

_SECONDS = 60.0


@dataclass(frozen=True)
class Partition:
    """One row of `sinfo`."""

    name: str
    num_nodes: int
    """All of its nodes, whatever their state."""
    limit_seconds: int | None
    """Longest wall time; None for no limit."""
    is_default: bool


def has_slurm() -> bool:
    """Return whether this machine has SLURM's commands."""
    return shutil.which("sbatch") is not None and shutil.which("sinfo") is not None


def list_partitions() -> list[Partition]:
    """Return the partitions that this user sees. Raises BadInput where SLURM does not answer."""
    partitions = []
    for line in _ask("sinfo", "-h", "-o", "%R|%D|%l|%P").splitlines():
        name, num_nodes, limit, marked = line.split("|")
        seconds = None if limit in ("infinite", "n/a") else time_limit_seconds(limit)
        partitions.append(Partition(name, int(num_nodes), seconds, marked.endswith("*")))
    return partitions


def check_partition(cluster: ClusterConfig, num_nodes: int, partitions: Sequence[Partition]) -> Iterator[str]:
    """Yield why no partition would ever run this job: SLURM itself would let it wait for ever."""
    found = [one for one in partitions if one.name == cluster.partition or (not cluster.partition and one.is_default)]
    names = [one.name for one in partitions]
    if not found:
        if cluster.partition is None:
            yield f"partition: this site has no default; values that would work: {', '.join(names)}"
            return
        near = difflib.get_close_matches(cluster.partition, names, n=1)
        works = f"did you mean {near[0]}?" if near else f"values that would work: {', '.join(names)}"
        yield f"partition: {cluster.partition} does not exist here; {works}"
        return
    partition = found[0]
    if num_nodes > partition.num_nodes:
        yield (
            f"--nodes: {num_nodes}, and the partition {partition.name} has {partition.num_nodes}; a value that would "
            f"work: {partition.num_nodes}"
        )
    if partition.limit_seconds is not None and time_limit_seconds(cluster.time_limit) > partition.limit_seconds:
        yield (
            f"time_limit: {cluster.time_limit} is beyond the {partition.limit_seconds // 60} minutes of the partition "
            f"{partition.name}; a value that would work: {partition.limit_seconds // 60}, with --chain for longer runs"
        )


def find_owner(run_dir: Path, script: Path) -> str | None:
    """Return in words which live job or process the run directory belongs to; None if to none.

    Raises BadInput where SLURM does not answer.
    """
    if has_slurm():
        for line in _ask("squeue", "-h", "-o", "%i|%T|%N|%o").splitlines():
            job, state, nodes, command = line.split("|", 3)
            if command.split(" ")[0] == str(script):  # behind it, its argument
                return f"SLURM job {job} ({state.lower()}{f' on {nodes}' if nodes else ''})"
    return _lock_holder(run_dir / ".lock")


def submit(script: Path, after: str | None, arguments: Sequence[str] = ()) -> str:
    """Submit a script and return the job's number; with `after` it waits until that job has ended well.

    Raises BadInput with SLURM's own words where it refuses.
    """
    waits = [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"] if after else []
    return _ask("sbatch", "--parsable", *waits, str(script), *arguments).strip().split(";")[0]


def cancel(jobs: Sequence[str]) -> None:
    """Take jobs out of the queue again."""
    if jobs:
        _ask("scancel", *jobs)


def _lock_holder(lock: Path) -> str | None:
    """Return who holds the lock of a run directory (`trainer.disk.lock`), without touching it."""
    try:
        with open(lock, encoding="utf-8") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return file.read().strip() or "another process"
    except OSError:
        pass  # no run, or a file system without locks, of which nothing can be said
    return None


def _ask(*words: str) -> str:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=_SECONDS)
    except FileNotFoundError:
        raise BadInput(
            f"{words[0]}: no such command, so this is no machine that submits to SLURM; run this on a login node, or "
            "add --dry-run, which only checks"
        ) from None
    except subprocess.TimeoutExpired:
        raise BadInput(f"{words[0]}: SLURM did not answer within {_SECONDS:.0f} seconds; try again") from None
    if done.returncode != 0:
        said = "; ".join(line.split("error: ", 1)[-1] for line in done.stderr.strip().splitlines())
        advice = "look at the cluster file" if words[0] == "sbatch" else "look whether SLURM's controller is up"
        raise BadInput(f"{words[0]}: SLURM refuses ({said}); {advice}")
    return done.stdout

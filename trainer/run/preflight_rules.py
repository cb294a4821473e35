"""What the ranks found before training -> what must not be, and what is only odd; each names rank and host. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

SLOW_LINK = 0.5
"""Share of the median bandwidth of its axis under which a group is told to be slow."""
MOST_SKEW_SECONDS = 1.0
_FEWEST_GROUPS = 3  # of an axis, of which the median says something
_MEMORY_TOLERANCE = 0.02
_LEAST_FREE = 0.9


@dataclass(frozen=True)
class Found:
    """What one rank found of itself."""

    who: str
    """`rank 3 (tp 1/2, ...) on node1`."""
    host: str
    device: str
    versions: Mapping[str, str]
    """Of torch, megatron-core and this code: what must be the same everywhere."""
    system: Mapping[str, str]
    """Of Python and the driver: what may differ, and seldom should."""
    memory_bytes: int
    free_bytes: int
    """Of the device, before the run has put anything there."""
    clock_mhz: float | None
    """The highest clock of the device, where it is known."""


@dataclass(frozen=True)
class Summed:
    """What a rank got from a sum over an axis, whose answer is known."""

    who: str
    axis: str
    ranks: tuple[int, ...]
    num_wrong: int
    """Elements of the sum that are wrong."""
    gigabytes_per_second: float
    """Bus bandwidth, as nccl-tests define it: 2 (n - 1) / n of the bytes, by the time."""


@dataclass(frozen=True)
class Disk:
    """What the first rank of a host found of the run directory."""

    who: str
    problem: str | None
    """Why it could not write and read there."""
    sees_rank_zero: bool
    """Whether the host sees what rank 0 has written."""
    free_bytes: int


@dataclass
class Findings:
    """Sentences of both kinds."""

    failures: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def judge_agreement(found: Sequence[Found]) -> Findings:
    """Return which ranks have other software, devices, memory or clocks than most."""
    findings = Findings()
    for name in found[0].versions:
        advice = "check out the same commit on every host" if name == "code" else "install the same on every host"
        findings.failures += _odd_ones(name, [(one.who, one.versions[name]) for one in found], advice)
    advice = "leave that host out, or use hosts of one kind"
    findings.failures += _odd_ones("device", [(one.who, one.device) for one in found], advice)
    usual = median(one.memory_bytes for one in found)
    findings.failures += [
        f"memory: {one.who} has {one.memory_bytes / 2**30:.1f} GiB where others have {usual / 2**30:.1f} GiB; {advice}"
        for one in found
        if abs(one.memory_bytes - usual) > _MEMORY_TOLERANCE * usual
    ]
    for name in found[0].system:
        findings.warnings += _odd_ones(name, [(one.who, one.system[name]) for one in found])
    clocks = [(one.who, f"{one.clock_mhz:.0f} MHz" if one.clock_mhz else "none that is known") for one in found]
    findings.warnings += _odd_ones("highest clock", clocks)
    usual = median(one.free_bytes for one in found)
    findings.warnings += [
        f"free memory: {one.who} has {one.free_bytes / 2**30:.1f} GiB where others have {usual / 2**30:.1f} GiB; "
        "another process may use that device"
        for one in found
        if one.free_bytes < _LEAST_FREE * usual
    ]
    return findings


def judge_sums(sums: Sequence[Summed]) -> Findings:
    """Return which ranks got a wrong answer, and which groups are slow for their axis."""
    findings = Findings()
    findings.failures += [
        f"{one.who}: {one.num_wrong:,} numbers of a sum over its {one.axis} group came out wrong; look at the network, "
        "memory and drivers of that host, or leave it out"
        for one in sums
        if one.num_wrong
    ]
    by_axis: dict[str, dict[tuple[int, ...], list[Summed]]] = {}
    for one in sums:
        by_axis.setdefault(one.axis, {}).setdefault(one.ranks, []).append(one)
    for axis, groups in by_axis.items():
        speeds = {ranks: min(one.gigabytes_per_second for one in group) for ranks, group in groups.items()}
        usual = median(speeds.values())
        findings.warnings += [
            f"the {axis} group of {groups[ranks][0].who} passes {speed:.2f} GB/s where others pass {usual:.2f} GB/s"
            for ranks, speed in speeds.items()
            if len(speeds) >= _FEWEST_GROUPS and speed < SLOW_LINK * usual
        ]
    return findings


def judge_disks(disks: Sequence[Disk], run_dir: str, needed_bytes: int) -> Findings:
    """Return which hosts cannot write the run directory, do not share it, or have no room for a checkpoint in it."""
    findings = Findings()
    for one in disks:
        if one.problem is not None:
            findings.failures.append(
                f"run.dir: {one.who} cannot write to {run_dir} ({one.problem}); make room or give the permission "
                "there, or choose another path"
            )
        elif not one.sees_rank_zero:
            findings.failures.append(
                f"run.dir: {one.who} does not see what rank 0 writes to {run_dir}; choose a path on a file system "
                "that all hosts share"
            )
        elif one.free_bytes < needed_bytes:
            findings.failures.append(
                f"run.dir: {one.who} sees {one.free_bytes / 1e9:.2f} GB free in {run_dir}, and a checkpoint takes at "
                f"least {needed_bytes / 1e9:.2f} GB; make room there, or choose another path"
            )
    return findings


def judge_clocks(clocks: Sequence[tuple[str, float]]) -> Findings:
    """Return which hosts' clocks are off: `clocks` are (rank and host, seconds since 1970), read at one moment."""
    usual = median(seconds for _, seconds in clocks)
    return Findings(
        warnings=[
            f"the clock of {who} is {abs(seconds - usual):.1f} s {'ahead of' if seconds > usual else 'behind'} the "
            "others'; logs and file times of that host mislead"
            for who, seconds in clocks
            if abs(seconds - usual) > MOST_SKEW_SECONDS
        ]
    )


def _odd_ones(name: str, values: Sequence[tuple[str, str]], advice: str = "") -> list[str]:
    """Return a sentence for each value that is not the usual one: who has it first, on how many ranks."""
    counts = Counter(value for _, value in values)
    usual, num_usual = counts.most_common(1)[0]
    sentences = []
    for odd in sorted(counts.keys() - {usual}):
        having = [who for who, value in values if value == odd]
        more = f" and {len(having) - 1} more ranks have" if len(having) > 1 else " has"
        sentence = f"{name}: {having[0]}{more} {odd}, where {num_usual} of {len(values)} ranks have {usual}"
        sentences.append(f"{sentence}; {advice}" if advice else sentence)
    return sentences

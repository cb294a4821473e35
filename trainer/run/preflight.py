"""Before a run of several hosts trains: do they agree, add up right, write to one disk, and tell the same time?

Takes seconds. What must not be ends the run, named by host and rank; what is only odd is a warning.
"""

from __future__ import annotations

import logging
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from configs.errors import BadInput
from configs.plan.adapters import count_adapter_parameters
from configs.plan.estimate import count_parameters
from configs.stages import Config
from parallel.collectives import barrier, broadcast_object, gather_objects, on_rank_zero
from parallel.environment import Environment
from parallel.mesh import Mesh
from trainer.disk.space import free_bytes
from trainer.run.code_version import find_commit, package_version
from trainer.run.preflight_rules import (
    Disk,
    Findings,
    Found,
    Summed,
    judge_agreement,
    judge_clocks,
    judge_disks,
    judge_sums,
)
from trainer.run.second_models import look_at

log = logging.getLogger(__name__)
_NUM_ELEMENTS = 2**21  # 8 MiB in fp32
_ROUNDS = 3
_SEEING_SECONDS = 30.0
"""How long a file of another host may take to be seen over a network's file system."""
_BYTES_PER_PARAMETER = 12
"""Of a checkpoint: weights and two moments in fp32."""


def is_due(config: Config, environment: Environment) -> bool:
    """Return whether the run is to be looked at first: that of several hosts, unless the config says otherwise."""
    chosen = config.parallel.preflight
    return environment.world_size > environment.local_world_size if chosen is None else chosen


def check_hosts(config: Config, mesh: Mesh, local_rank: int) -> None:
    """Raise BadInput for the first thing that must not be; log what was found. Collective: all ranks of the world."""
    started = time.perf_counter()
    who = f"{mesh.coordinates()} on {socket.gethostname()}"
    run_dir = Path(str(config.run.dir))
    # The agreement first: with other versions nothing that follows would have to work.
    found = gather_objects(_look_at_device(mesh, who))
    _settle(judge_agreement(found))
    sums = [one for row in gather_objects(_sum_over_axes(mesh, who)) for one in row]
    _settle(judge_sums(sums))
    disks = [one for one in gather_objects(_try_disk(run_dir, mesh, who, is_tried=local_rank == 0)) if one is not None]
    needed = on_rank_zero(lambda: _checkpoint_bytes(config))
    _settle(judge_disks(disks, str(run_dir), needed))
    barrier()
    clocks = gather_objects((who, time.time()))
    _settle(judge_clocks(clocks))
    if mesh.rank == 0:
        log.info(_summarise(found, sums, disks, clocks, time.perf_counter() - started))


def _settle(findings: Findings) -> None:
    """Raise what must not be, the same on every rank, and warn of what is odd."""
    if findings.failures:
        raise BadInput("preflight: " + "\n".join(findings.failures))
    if dist.get_rank() == 0:
        for sentence in findings.warnings:
            log.warning("preflight: %s", sentence)


def _look_at_device(mesh: Mesh, who: str) -> Found:
    facts = mesh.platform.inspect()
    return Found(
        who=who,
        host=socket.gethostname(),
        device=facts.name,
        versions={
            "torch": torch.__version__,
            "megatron-core": package_version("megatron-core") or "none",
            "code": find_commit() or "no git checkout",
        },
        system={"Python": sys.version.split()[0], "driver": facts.driver},
        memory_bytes=facts.memory_bytes,
        free_bytes=facts.free_bytes,
        clock_mhz=facts.clock_mhz,
    )


def _sum_over_axes(mesh: Mesh, who: str) -> list[Summed]:
    """Return what this rank got on every axis that has several ranks. Collective: all ranks of the world."""
    groups: dict[str, Any] = {
        "tp": mesh.tp_group, "cp": mesh.cp_group, "dp": mesh.dp_group, "pp": mesh.pp_group,
        "expert_dp": mesh.expert_dp_group, "world": dist.group.WORLD,
    }  # fmt: skip
    several = {axis: group for axis, group in groups.items() if dist.get_world_size(group) > 1}
    return [_sum_over(group, axis, mesh, who) for axis, group in several.items()]


def _sum_over(group: Any, axis: str, mesh: Mesh, who: str) -> Summed:
    """Sum whole numbers that fp32 holds exactly, whatever the order, and time it."""
    ranks = dist.get_process_group_ranks(group)
    pattern = torch.arange(_NUM_ELEMENTS, dtype=torch.float32, device=mesh.device) % 3 + 1
    best, num_wrong = float("inf"), 0
    for _ in range(_ROUNDS):
        values = pattern * _share_of(mesh.rank)
        mesh.platform.synchronize()
        started = time.perf_counter()
        dist.all_reduce(values, group=group)
        mesh.platform.synchronize()
        best = min(best, time.perf_counter() - started)
        num_wrong = max(num_wrong, int((values != pattern * sum(map(_share_of, ranks))).sum()))
    sent = 2 * (len(ranks) - 1) / len(ranks) * pattern.nbytes
    return Summed(who, axis, tuple(ranks), num_wrong, sent / best / 1e9)


def _share_of(rank: int) -> int:
    return rank % 64 + 1  # three times the sum of 16,384 ranks' shares is less than 2**24


def _try_disk(run_dir: Path, mesh: Mesh, who: str, *, is_tried: bool) -> Disk | None:
    """Write, on one rank of each host, a file that is read back, and look for rank 0's. Collective: all ranks."""
    mine, zero = (run_dir / f".preflight_{rank}" for rank in (mesh.rank, 0))
    problem, sees, free = None, True, 0
    try:
        if is_tried:
            problem = _write(mine)
        is_there = broadcast_object(problem) is None  # rank 0's: else nobody need look for it
        if is_tried and problem is None:
            sees, free = not is_there or _sees(zero), free_bytes(run_dir)
        barrier()
    finally:
        if is_tried:
            with suppress(OSError):
                mine.unlink()
    return Disk(who, problem, sees, free) if is_tried else None


def _write(path: Path) -> str | None:
    """Write and read 1 MiB, which goes past what small files are kept in; return why that did not work."""
    data = b"\1" * 2**20
    try:
        path.write_bytes(data)
        return None if path.read_bytes() == data else "what was read is not what was written"
    except OSError as error:
        return (error.strerror or str(error)).lower()


def _sees(path: Path) -> bool:
    deadline = time.monotonic() + _SEEING_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def _checkpoint_bytes(config: Config) -> int:
    """Return what a checkpoint takes at least; a run that trains nothing writes none."""
    if not config.is_training:
        return 0
    own = None if config.lora is None else count_adapter_parameters(config.model, config.lora, config.head)
    counts = [count_parameters(config.model, config.head).total if own is None else own]
    for second in config.second_models.values():
        if second.is_trained:
            with suppress(BadInput):  # of what is not there it is said where it is opened; a resumed run needs it not
                counts.append(count_parameters(look_at(second, config).model, second.head).total)
    return _BYTES_PER_PARAMETER * sum(counts)


def _summarise(
    found: list[Found], sums: list[Summed], disks: list[Disk], clocks: list[tuple[str, float]], seconds: float
) -> str:
    hosts = len({one.host for one in found})
    speeds: dict[str, float] = {}
    for one in sums:
        speeds[one.axis] = min(speeds.get(one.axis, float("inf")), one.gigabytes_per_second)
    links = ", ".join(f"{axis} {speed:.2f}" for axis, speed in speeds.items())
    times = [seconds for _, seconds in clocks]
    return (
        f"preflight: {len(found)} ranks on {hosts} host(s) agree on versions and devices; sums are right over every "
        f"axis (slowest group in GB/s: {links}); run.dir is written from every host, {disks[0].free_bytes / 1e9:,.0f} "
        f"GB free; clocks are {max(times) - min(times):.2f} s apart; took {seconds:.1f} s"
    )

"""What runs of several hosts ask of a device: what it is, and which of its collectives are over."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from tools.device_checks.outcome import Outcome, judge

if TYPE_CHECKING:
    from parallel.mesh import Mesh

KEYS = {
    "record_id", "process_group", "collective_seq_id", "p2p_seq_id", "is_p2p", "profiling_name", "state", "retired",
    "time_created_ns",
}  # fmt: skip
"""What `parallel/watch/flight.py` reads of a recorded collective."""


def check_device_facts(mesh: Mesh) -> Outcome:
    """Ask what preflight compares between hosts: name, memory, clock and driver."""
    facts = mesh.platform.inspect()
    problems = [] if 0 < facts.free_bytes <= facts.memory_bytes else ["its free memory is not between 0 and all of it"]
    problems += [] if facts.name else ["it has no name"]
    if mesh.platform.queues_collectives:
        problems += [] if facts.clock_mhz else ["its highest clock is not known"]
        problems += [] if facts.driver not in (None, "unknown") else ["its driver's version is not known"]
    found = f"{facts.name}, {facts.memory_bytes / 2**30:.1f} GiB, {facts.clock_mhz or 0:.0f} MHz, driver {facts.driver}"
    return judge("device facts", problems, found, {"memory_gib": facts.memory_bytes / 2**30})


def check_flight_recorder(mesh: Mesh) -> Outcome:
    """Queue collectives and look for the last of them, done, in the dump from which a hang is explained."""
    import torch
    import torch.distributed as dist

    if not mesh.platform.queues_collectives:
        return Outcome("flight recorder", "skipped", "collectives are not queued here: the watch sees them itself")
    values = torch.ones(1 << 20, device=mesh.device)
    for _ in range(3):
        dist.all_reduce(values)
    mesh.platform.synchronize()
    dump = mesh.platform.dump_collectives()
    entries = (json.loads(dump).get("entries") or []) if dump else []
    names = [str(entry.get("profiling_name")) for entry in entries]
    problems = [] if any("all_reduce" in name for name in names) else [f"no all_reduce among its {len(names)} entries"]
    lacking = sorted(KEYS - set.intersection(*map(set, entries))) if entries else []
    problems += [f"entries lack {', '.join(lacking)}"] if lacking else []
    return judge("flight recorder", problems, f"{len(entries)} collectives, the last {names[-1:]}", {})

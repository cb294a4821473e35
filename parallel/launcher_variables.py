"""Find out which rank this process is: torchrun's variables, else SLURM's, else a world of one.

Torch-free; starts nothing. `launch.local` sets the same variables as torchrun.
"""

from __future__ import annotations

import re
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import replace

from configs.errors import BadInput
from parallel.environment import Environment

_TORCHRUN_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


_RESTART_COUNTS = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")


def find_environment(variables: Mapping[str, str]) -> Environment:
    """Return this process's place among the ranks.

    Raises BadInput where the variables contradict each other.
    """
    if "RANK" in variables or "WORLD_SIZE" in variables:
        environment = _from_torchrun(variables)
    elif "SLURM_PROCID" in variables:
        environment = _from_slurm(variables)
    else:
        environment = Environment(master_port=find_free_port())
    _check_ranks(environment)
    return replace(environment, is_restart=is_restart(variables))


def is_restart(variables: Mapping[str, str]) -> bool:
    """Return whether the launcher or the scheduler starts this job again after it was stopped or failed."""
    return any(variables.get(name, "0") != "0" for name in _RESTART_COUNTS)


def is_batch_script(variables: Mapping[str, str]) -> bool:
    """Return whether this is a SLURM job's batch script: it carries SLURM_PROCID=0 too, but is none of the tasks."""
    return "SLURM_JOB_ID" in variables and not variables.keys() & {"SLURM_STEP_ID", "SLURM_STEPID"}


def find_free_port() -> int:
    """Return a TCP port of this machine that is free now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def first_host(node_list: str) -> str:
    """Return the first host of a SLURM node list: `rack[07-09,12]n2,login` gives `rack07n2`."""
    depth, end = 0, len(node_list)
    for position, letter in enumerate(node_list):
        depth += (letter == "[") - (letter == "]")
        if letter == "," and depth == 0:
            end = position
            break
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", node_list[:end]).strip()


def _from_torchrun(variables: Mapping[str, str]) -> Environment:
    missing = [name for name in _TORCHRUN_NAMES if not variables.get(name)]
    if missing:
        raise BadInput(
            f"environment: {', '.join(missing)} not set although RANK or WORLD_SIZE is; start the ranks with torchrun, "
            "or unset RANK and WORLD_SIZE to run a single process"
        )
    world_size = _whole_number(variables, "WORLD_SIZE")
    return Environment(
        rank=_whole_number(variables, "RANK"),
        world_size=world_size,
        local_rank=_whole_number(variables, "LOCAL_RANK"),
        local_world_size=_whole_number(variables, "LOCAL_WORLD_SIZE", default=world_size),
        master_addr=variables["MASTER_ADDR"],
        master_port=_whole_number(variables, "MASTER_PORT"),
        launcher=variables.get("SHARDWRIGHT_LAUNCHER", "torchrun"),
    )


def _from_slurm(variables: Mapping[str, str]) -> Environment:
    name = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in variables else "SLURM_NTASKS"
    world_size = _whole_number(variables, name, default=1)
    if world_size == 1:
        return Environment(master_port=find_free_port(), launcher="slurm")
    if is_batch_script(variables):  # it would wait for ranks nobody started
        raise BadInput(
            f"environment: this is the batch script of a job with {world_size} tasks, not one of its tasks; "
            "put srun (or torchrun) in front of the command"
        )
    node_list = variables.get("SLURM_STEP_NODELIST") or variables.get("SLURM_JOB_NODELIST", "")
    if not node_list and "MASTER_ADDR" not in variables:
        raise BadInput("environment: SLURM_JOB_NODELIST is not set; set MASTER_ADDR to the host of rank 0")
    # The step counts too: two steps of one job may share the node.
    step = _whole_number(variables, "SLURM_STEP_ID", default=0)
    port = 20000 + (_whole_number(variables, "SLURM_JOB_ID", default=0) + 61 * step) % 12000
    return Environment(
        rank=_whole_number(variables, "SLURM_PROCID"),
        world_size=world_size,
        local_rank=_whole_number(variables, "SLURM_LOCALID"),
        local_world_size=_slurm_local_tasks(variables, world_size),
        master_addr=variables.get("MASTER_ADDR") or _address_of(first_host(node_list)),
        master_port=_whole_number(variables, "MASTER_PORT", default=port),
        launcher="slurm",
    )


def _slurm_local_tasks(variables: Mapping[str, str], world_size: int) -> int:
    """Read this node's task count from `SLURM_STEP_TASKS_PER_NODE`, such as `8(x4)` or `4(x2),2`."""
    text = variables.get("SLURM_STEP_TASKS_PER_NODE") or variables.get("SLURM_TASKS_PER_NODE")
    if not text:
        return world_size
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(count)] * int(times or 1)
    node = _whole_number(variables, "SLURM_NODEID", default=0)
    return counts[node] if node < len(counts) else counts[-1]


def _address_of(host: str) -> str:
    """Return `host` if it resolves here, else the address SLURM keeps for that node, else `host` all the same."""
    try:
        socket.getaddrinfo(host, None)
        return host
    except OSError:
        pass
    try:
        shown = subprocess.run(["scontrol", "show", "node", host], capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired):
        return host
    found = re.search(r"NodeAddr=(\S+)", shown)
    return found.group(1) if found else host


def _whole_number(variables: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = variables.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isdecimal():
        shown = "not set" if text is None else f"'{text}'"
        raise BadInput(f"environment: {name} is {shown}; it must be a whole number such as 0")
    return int(text)


def _check_ranks(environment: Environment) -> None:
    if environment.world_size < 1:
        raise BadInput("environment: the world size is 0; start at least 1 rank")
    if environment.rank >= environment.world_size:
        raise BadInput(
            f"environment: rank {environment.rank} of a world of {environment.world_size}; "
            f"ranks go from 0 to {environment.world_size - 1}"
        )
    if environment.local_rank >= environment.local_world_size:
        raise BadInput(
            f"environment: local rank {environment.local_rank} of {environment.local_world_size} ranks on this node; "
            f"local ranks go from 0 to {environment.local_world_size - 1}"
        )

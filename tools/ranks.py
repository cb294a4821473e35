"""Which rank of a launcher a tool is: torchrun's and `launch.local`'s variables, else SLURM's. Torch-free."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from configs.errors import BadInput
from parallel.environment import Environment
from parallel.launcher_variables import find_environment, is_batch_script


def read_environment() -> Environment:
    """Return this process's place among the ranks, a world of one (on any free port) where no launcher started it.

    A tool may stand in a SLURM job's batch script without `srun`: unlike training it needs no other tasks.
    """
    variables = dict(os.environ)
    if is_batch_script(variables):
        variables.pop("SLURM_PROCID", None)
    return find_environment(variables)


def refuse_ranks() -> None:
    """Raise BadInput where a launcher started several of a tool that works in one process: they would all do it."""
    environment = read_environment()
    if environment.world_size > 1:
        how = {
            "slurm": "start it without srun, or with srun --ntasks=1",
            "torchrun": "start it without torchrun, or unset RANK and WORLD_SIZE",
        }.get(environment.launcher, "start it without a launcher")
        raise BadInput(f"environment: this tool works in one process and {environment.world_size} were started; {how}")


@contextmanager
def host_ranks() -> Iterator[Environment]:
    """Join the ranks for work on the hosts' processors, and yield this one's place."""
    import torch.distributed as dist

    from parallel.platform import load_platform

    environment = read_environment()
    method = f"tcp://{environment.master_addr}:{environment.master_port}"
    dist.init_process_group(
        load_platform("cpu").backend, rank=environment.rank, world_size=environment.world_size, init_method=method
    )
    try:
        yield environment
    finally:
        dist.destroy_process_group()

"""Which rank of a launcher a command is: the variables that torchrun and `launch.local` set. Torch-free."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from parallel.environment import Environment


def read_environment() -> Environment:
    """Return this process's place among the ranks, a world of one (on any free port) where no launcher started it."""
    variables = os.environ
    return Environment(
        rank=int(variables.get("RANK", "0")),
        world_size=int(variables.get("WORLD_SIZE", "1")),
        local_rank=int(variables.get("LOCAL_RANK", "0")),
        master_addr=variables.get("MASTER_ADDR", "127.0.0.1"),
        master_port=int(variables.get("MASTER_PORT", "0")),
    )


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

"""Which rank of a launcher a command is: the variables that torchrun and `launch.local` set. Torch-free."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from configs.errors import BadInput
from parallel.environment import Environment


def read_environment() -> Environment:
    """Return this process's place among the ranks, a world of one (on any free port) where no launcher started it."""
    return Environment(
        rank=_number("RANK", 0),
        world_size=_number("WORLD_SIZE", 1),
        local_rank=_number("LOCAL_RANK", 0),
        master_addr=os.environ.get("MASTER_ADDR", "127.0.0.1"),
        master_port=_number("MASTER_PORT", 0),
    )


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdigit():
        raise BadInput(f"environment: {name}={text!r} is no number; start the ranks with torchrun, or unset it.")
    return int(text)


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

"""The few reductions the trainer needs, named by meaning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from parallel.mesh import Mesh


def sum_over_microbatch_ranks(values: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    """Return the sum over all ranks that saw different tokens, the same on every rank of the world.

    `values` counts on the last pipeline stage alone. Collective: all ranks of the world must call this.
    """
    total = values.clone() if mesh.is_last_pp_stage else torch.zeros_like(values)
    if mesh.is_last_pp_stage:
        dist.all_reduce(total, group=mesh.dp_cp_group)
    return from_last_pp_stage(total, mesh)


def from_last_pp_stage(values: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    """Return the last pipeline stage's tensor on every stage; shapes must agree.

    Collective: all ranks of the pipeline group must call this.
    """
    if mesh.pp_size > 1:
        dist.broadcast(values, src=dist.get_global_rank(mesh.pp_group, mesh.pp_size - 1), group=mesh.pp_group)
    return values


def gather_over_tp(values: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    """Return the tensors of all tp ranks joined along the last dimension. Collective: all ranks of the tp group."""
    if mesh.tp_size == 1:
        return values
    parts = [torch.empty_like(values) for _ in range(mesh.tp_size)]
    dist.all_gather(parts, values.contiguous(), group=mesh.tp_group)
    return torch.cat(parts, dim=-1)


def gather_objects(value: Any) -> list[Any]:
    """Return every rank's picklable value, by rank. Collective: all ranks of the world must call this."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def any_rank(flag: bool, device: torch.device) -> bool:
    """Return whether the flag is set on at least one rank. Collective: all ranks of the world must call this."""
    vote = torch.tensor([int(flag)], dtype=torch.int32, device=device)
    dist.all_reduce(vote, op=dist.ReduceOp.MAX)
    return bool(vote.item())


def max_over_ranks(values: Sequence[float], device: torch.device) -> list[float]:
    """Return the largest of each value over all ranks. Collective: all ranks of the world must call this."""
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.tolist()


def broadcast_object(value: Any) -> Any:
    """Return rank 0's picklable value on every rank. Collective: all ranks of the world must call this."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def barrier() -> None:
    """Wait for all ranks. Collective: all ranks of the world must call this."""
    dist.barrier()

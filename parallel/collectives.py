"""The few reductions the trainer needs, named by meaning.

Tensors of the step travel in the layout's groups, which give up after `parallel.timeout_seconds`. Python values, and
waiting for files, go through the control group: how long a disk takes says nothing about a peer, and one that dies
closes its connections, which the others see at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from configs.errors import ShardwrightError
from parallel.control import control_group
from parallel.mesh import Mesh
from parallel.sequence_split import segments_of


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


def from_first_tp_rank(values: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    """Return the first tp rank's tensor on every tp rank; shapes must agree. Collective: all ranks of the tp group."""
    if mesh.tp_size > 1:
        dist.broadcast(values, src=dist.get_global_rank(mesh.tp_group, 0), group=mesh.tp_group)
    return values


def max_over_stage(values: Sequence[int], mesh: Mesh) -> list[int]:
    """Return the largest of each value over the ranks of a pipeline stage. Collective: all of these must call this."""
    tensor = torch.tensor(values, dtype=torch.int64, device=mesh.device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=mesh.stage_group)
    return tensor.tolist()


def gather_over_tp(values: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    """Return the tensors of all tp ranks joined along the last dimension. Collective: all ranks of the tp group."""
    if mesh.tp_size == 1:
        return values
    parts = [torch.empty_like(values) for _ in range(mesh.tp_size)]
    dist.all_gather(parts, values.contiguous(), group=mesh.tp_group)
    return torch.cat(parts, dim=-1)


def gather_over_cp(values: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    """Return the rows of whose dimension 1 each cp rank has its part. Collective: all ranks of the cp group."""
    if mesh.cp_size == 1:
        return values
    parts = [torch.empty_like(values, memory_format=torch.contiguous_format) for _ in range(mesh.cp_size)]
    dist.all_gather(parts, values.contiguous(), group=mesh.cp_group)
    whole = values.new_empty(values.shape[0], values.shape[1] * mesh.cp_size, *values.shape[2:])
    for rank, part in enumerate(parts):
        for one in segments_of(rank, mesh.cp_size, num_rows=1, seq_len=whole.shape[1]):
            whole[:, one.start : one.end] = part[:, one.local : one.local + one.length]
    return whole


def gather_pieces(
    mine: torch.Tensor | None, pieces: Mapping[int, slice], owner: int, group: dist.ProcessGroup
) -> torch.Tensor | None:
    """Return on rank `owner` of the group the flat tensor that the ranks of `pieces` hold slices of; elsewhere None.

    `mine` is what this rank holds, if anything. One piece alone is handed back as it lies, several are joined in host
    memory, one on its way at a time. Collective: all ranks of the group must call this for the same tensors in order.
    """
    rank = dist.get_rank(group)
    if rank != owner:
        if mine is not None:
            dist.send(mine.contiguous(), group=group, group_dst=owner)
        return None
    assert mine is not None
    if len(pieces) == 1:
        return mine
    whole = torch.empty(max(piece.stop for piece in pieces.values()), dtype=mine.dtype)
    for holder, piece in pieces.items():
        part = mine
        if holder != rank:
            part = torch.empty(piece.stop - piece.start, dtype=mine.dtype, device=mine.device)
            dist.recv(part, group=group, group_src=holder)
        whole[piece].copy_(part)
    return whole


def gather_tables(table: np.ndarray, group: dist.ProcessGroup, device: torch.device) -> list[np.ndarray]:
    """Return every rank's table of int64, by rank; they may differ in length. Collective: all ranks of the group."""
    lengths = torch.zeros(group.size(), dtype=torch.int64, device=device)
    lengths[group.rank()] = len(table)
    dist.all_reduce(lengths, group=group)
    padded = torch.zeros((int(lengths.max()), *table.shape[1:]), dtype=torch.int64, device=device)
    padded[: len(table)] = torch.from_numpy(table).to(device)
    tables = padded.new_empty((group.size() * len(padded), *table.shape[1:]))
    dist.all_gather_into_tensor(tables, padded, group=group)
    parts = tables.cpu().numpy().reshape(group.size(), *padded.shape)
    return [part[:length] for part, length in zip(parts, lengths.tolist(), strict=True)]


def send_to_group(values: torch.Tensor, owner: int, group: dist.ProcessGroup, device: torch.device) -> None:
    """Copy a tensor of rank `owner` of the group into those of the others, wherever it lies. Collective: the group."""
    sent = values.to(device).contiguous()
    dist.broadcast(sent, group=group, group_src=owner)
    if sent is not values:
        values.copy_(sent)


def gather_objects(value: Any) -> list[Any]:
    """Return every rank's picklable value, by rank. Collective: all ranks of the world must call this.

    What a rank receives grows with the number of ranks: for what all need, and is small.
    """
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=control_group())
    return values


def gather_to_rank_zero(value: Any) -> list[Any] | None:
    """Return every rank's picklable value, by rank, on rank 0; None elsewhere. Collective: all ranks of the world."""
    values: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, values, dst=0, group=control_group())
    return values


def first_of_ranks(value: Any) -> Any:
    """Return on every rank the picklable value of the first rank that has one; None where all have None.

    Nothing but a number is sent where none has. Collective: all ranks of the world must call this.
    """
    world_size = dist.get_world_size()
    if world_size == 1:
        return value
    first = torch.tensor([world_size if value is None else dist.get_rank()], dtype=torch.int64)
    dist.all_reduce(first, op=dist.ReduceOp.MIN, group=control_group())
    if int(first) == world_size:
        return None
    values = [value]
    dist.broadcast_object_list(values, src=int(first), group=control_group())
    return values[0]


def sum_over_ranks(value: int) -> int:
    """Return the sum of a number over all ranks. Collective: all ranks of the world must call this."""
    if dist.get_world_size() == 1:
        return value
    total = torch.tensor([value], dtype=torch.int64)
    dist.all_reduce(total, group=control_group())
    return int(total)


def on_rank_zero(compute: Callable[[], Any]) -> Any:
    """Return on every rank what `compute` returns on rank 0, or raise everywhere the ShardwrightError it raises there.

    What is looked up on a disk that ranks share is decided so: another rank may not see it yet. Collective: all ranks.
    """
    outcome: tuple[Any, ShardwrightError | None] = (None, None)
    if dist.get_rank() == 0:
        try:
            outcome = (compute(), None)
        except ShardwrightError as error:
            outcome = (None, error)
    value, problem = broadcast_object(outcome)
    if problem is not None:
        raise problem
    return value


def on_all_ranks(compute: Callable[[], Any]) -> Any:
    """Return what `compute` returns here, or raise on every rank the ShardwrightError of the first one it failed on.

    Without this a rank that alone lacks a file would leave the others waiting. Collective: all ranks of the world.
    """
    value, problem = None, None
    try:
        value = compute()
    except ShardwrightError as error:
        problem = error
    first = first_of_ranks(problem)
    if first is not None:
        raise first
    return value


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


def gather_numbers(value: float, mesh: Mesh) -> list[float]:
    """Return every rank's number, by rank. Collective: all ranks of the world must call this."""
    mine = torch.tensor([value], dtype=torch.float64, device=mesh.device)
    everybody = torch.empty(mesh.world_size, dtype=torch.float64, device=mesh.device)
    dist.all_gather_into_tensor(everybody, mine)
    return everybody.tolist()


def broadcast_object(value: Any) -> Any:
    """Return rank 0's picklable value on every rank. Collective: all ranks of the world must call this."""
    values = [value]
    dist.broadcast_object_list(values, src=0, group=control_group())
    return values[0]


def barrier() -> None:
    """Wait for all ranks, however long their files take. Collective: all ranks of the world must call this."""
    dist.barrier(group=control_group())

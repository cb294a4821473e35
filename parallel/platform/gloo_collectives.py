"""The three collectives that NCCL has and gloo lacks, with the signatures of `torch.distributed`.

Used on the CPU only, for expert parallelism, whose per-rank sizes differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

_all_gather = dist.all_gather
_all_to_all_single = dist.all_to_all_single


def _as_list(sizes: Any) -> list[int] | None:
    if sizes is None:
        return None
    return [int(size) for size in sizes]


def all_gather(
    tensor_list: Sequence[torch.Tensor], tensor: torch.Tensor, group: Any = None, async_op: bool = False
) -> Any:
    """Gather one tensor from each rank; sizes may differ between ranks. Collective: all ranks of `group`."""
    if all(part.shape == tensor.shape for part in tensor_list) and _same_on_all(tensor_list):
        return _all_gather(list(tensor_list), tensor, group=group, async_op=async_op)
    ranks = dist.get_process_group_ranks(group if group is not None else dist.group.WORLD)
    for source, part in zip(ranks, tensor_list, strict=True):
        if source == dist.get_rank():
            part.copy_(tensor)
        dist.broadcast(part, src=source, group=group)
    return None


def _same_on_all(tensor_list: Sequence[torch.Tensor]) -> bool:
    """Every rank lists all sizes, so equal sizes here means equal sizes everywhere, and all ranks agree."""
    return len({tuple(part.shape) for part in tensor_list}) == 1


def reduce_scatter(
    output: torch.Tensor,
    input_list: Sequence[torch.Tensor],
    op: Any = dist.ReduceOp.SUM,
    group: Any = None,
    async_op: bool = False,
) -> Any:
    """Reduce each part and keep this rank's; sizes may differ between ranks. Collective: all ranks of `group`."""
    rank = dist.get_rank(group)
    for index, part in enumerate(input_list):
        reduced = part.clone()
        dist.all_reduce(reduced, op=op, group=group)
        if index == rank:
            output.copy_(reduced)
    return None


def all_to_all_single(
    output: torch.Tensor,
    input: torch.Tensor,
    output_split_sizes: Any = None,
    input_split_sizes: Any = None,
    group: Any = None,
    async_op: bool = False,
) -> Any:
    """Exchange parts of a tensor; split sizes may be tensors or arrays. Collective: all ranks of `group`."""
    return _all_to_all_single(
        output, input, _as_list(output_split_sizes), _as_list(input_split_sizes), group=group, async_op=async_op
    )

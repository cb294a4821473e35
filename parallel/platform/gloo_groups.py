"""Process groups on the CPU: none is made twice, and a group of one rank has no threads and sends nothing.

gloo starts three threads a group, which wake a hundred times a second, and hands every collective over to them.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

LONE = "lone"
"""Name of the backend of groups of one rank."""

_new_group = dist.new_group
# World -> ranks -> group; entries go with the world, whose own group is therefore no value.
_groups: weakref.WeakKeyDictionary[Any, dict[tuple[int, ...], Any]] = weakref.WeakKeyDictionary()


class _Done(dist.Work):
    """A collective that is over."""

    def wait(self, timeout: object = None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


def _keep(group: Any, *tensors_and_options: Any, **options: Any) -> dist.Work:
    """Do nothing: the sum, mean or maximum over one rank is what that rank has."""
    return _Done()


def _copy(group: Any, output: Any, input: Any, *options: Any, **more_options: Any) -> dist.Work:
    """Copy one tensor, or one after the other of two lists of them; nothing where both are the same memory."""
    if isinstance(output, torch.Tensor):
        if output.data_ptr() != input.data_ptr():
            output.detach().copy_(input.detach().reshape(output.shape))
        return _Done()
    for part, source in zip(output, input, strict=True):
        # One of the two may be a list by ranks: [tensor of rank 0].
        _copy(group, *(one if isinstance(one, torch.Tensor) else one[0] for one in (part, source)))
    return _Done()


_KEEPING = ("allreduce", "allreduce_coalesced", "reduce", "broadcast", "barrier")
_COPYING = (
    *("allgather", "_allgather_base", "allgather_into_tensor_coalesced", "gather"),
    *("reduce_scatter", "_reduce_scatter_base", "reduce_scatter_tensor_coalesced", "scatter"),
    *("alltoall", "alltoall_base"),
)
LoneGroup = type("LoneGroup", (dist.ProcessGroup,), dict.fromkeys(_KEEPING, _keep) | dict.fromkeys(_COPYING, _copy))
"""A group of one rank, as the methods that `torch.distributed` calls on a group."""


def _make_lone_group(store: Any, rank: int, size: int, timeout: object) -> Any:
    return LoneGroup(rank, size)


dist.Backend.register_backend(LONE, _make_lone_group, devices=["cpu"])


def new_group(
    ranks: Sequence[int] | None = None,
    timeout: Any = None,
    backend: str | None = None,
    pg_options: Any = None,
    use_local_synchronization: bool = False,
    **others: Any,
) -> Any:
    """Return the group of `ranks`, made at the first call; special ones are made as `torch.distributed` makes them.

    Collective: all ranks of the world must call this, in the same order.
    """
    world = dist.group.WORLD
    assert world is not None, "init_process_group comes first"
    members = tuple(ranks) if ranks is not None else tuple(range(dist.get_world_size()))
    if backend is not None or pg_options is not None or use_local_synchronization:
        return _new_group(ranks, timeout, backend, pg_options, use_local_synchronization, **others)
    if members == tuple(range(dist.get_world_size())):
        return world
    made = _groups.setdefault(world, {})
    if members not in made:
        made[members] = _new_group(members, timeout, LONE if len(members) == 1 else None, **others)
    return made[members]

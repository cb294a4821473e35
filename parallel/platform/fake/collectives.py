"""Stand-ins for torch's collectives that send nothing: they check their arguments and write down what was asked for.

So that ranks of one job, each rehearsed by itself, can be compared: those of a group must ask for the same in the same
order. Used with torch's own `fake` process groups.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d


@dataclass(frozen=True)
class Call:
    """One collective, or one send or receive, of the rank that is rehearsed."""

    operation: str
    group: tuple[int, ...]
    """Ranks of the job, ascending."""
    name: str
    """What Megatron-Core calls the group."""
    num_elements: int
    dtype: str
    peer: int | None = None
    """Of a send or receive: the other rank."""


CALLS: list[Call] = []
_GROUPS: dict[int, tuple[Any, tuple[int, ...], str]] = {}


class Done:
    """The handle of a collective, which is over."""

    def wait(self, *unused: Any) -> bool:
        return True


def forget_groups() -> None:
    """Begin anew, for another rank."""
    CALLS.clear()
    _GROUPS.clear()


def all_reduce(tensor: torch.Tensor, op: Any = None, group: Any = None, async_op: bool = False) -> Done | None:
    """Stand for all_reduce."""
    _write("all_reduce", group, tensor)
    return Done() if async_op else None


def broadcast(
    tensor: torch.Tensor, src: int | None = None, group: Any = None, async_op: bool = False, group_src: Any = None
) -> Done | None:
    """Stand for broadcast."""
    _write("broadcast", group, tensor)
    return Done() if async_op else None


def all_gather(whole: torch.Tensor, part: torch.Tensor, group: Any = None, async_op: bool = False) -> Done | None:
    """Stand for all_gather_into_tensor."""
    _check_parts(whole, part, group)
    _write("all_gather", group, whole, part)
    return Done() if async_op else None


def reduce_scatter(
    part: torch.Tensor, whole: torch.Tensor, op: Any = None, group: Any = None, async_op: bool = False
) -> Done | None:
    """Stand for reduce_scatter_tensor."""
    _check_parts(whole, part, group)
    _write("reduce_scatter", group, whole, part)
    return Done() if async_op else None


def all_to_all(
    output: torch.Tensor,
    inputs: torch.Tensor,
    output_split_sizes: Any = None,
    input_split_sizes: Any = None,
    group: Any = None,
    async_op: bool = False,
) -> Done | None:
    """Stand for all_to_all_single; its sizes may differ between ranks."""
    _check_devices(output, inputs)
    _write("all_to_all", group, dtype=inputs.dtype)
    return Done() if async_op else None


def send(tensor: torch.Tensor, dst: int | None = None, group: Any = None, tag: int = 0, group_dst: Any = None) -> Done:
    """Stand for isend."""
    _write("send", group, tensor, peer=_peer(dst, group_dst, group))
    return Done()


def receive(
    tensor: torch.Tensor, src: int | None = None, group: Any = None, tag: int = 0, group_src: Any = None
) -> Done:
    """Stand for irecv."""
    _write("receive", group, tensor, peer=_peer(src, group_src, group))
    return Done()


class SendOrReceive:
    """Stand for P2POp."""

    def __init__(
        self, op: Any, tensor: torch.Tensor, peer: int | None = None, group: Any = None, tag: int = 0,
        group_peer: int | None = None,
    ) -> None:  # fmt: skip
        self._ask = lambda: op(tensor, _peer(peer, group_peer, group), group)

    def ask(self) -> Done:
        done: Done = self._ask()
        return done


def batch_send_and_receive(operations: Sequence[SendOrReceive]) -> list[Done]:
    """Stand for batch_isend_irecv."""
    return [one.ask() for one in operations]


def barrier(group: Any = None, **options: Any) -> None:
    """Stand for barrier."""
    _write("barrier", group)


def gather_objects(values: list[Any], value: Any, group: Any = None) -> None:
    """Give every rank this one's value."""
    _write("all_gather_object", group)
    values[:] = [value] * len(values)


@contextlib.contextmanager
def coalesce(*unused: Any, **options: Any) -> Iterator[Done]:
    """Stand for the manager that joins collectives into one."""
    yield Done()


COLLECTIVES = {
    "all_reduce": all_reduce,
    "broadcast": broadcast,
    "all_gather_into_tensor": all_gather,
    "reduce_scatter_tensor": reduce_scatter,
    "all_to_all_single": all_to_all,
    "isend": send,
    "irecv": receive,
    "batch_isend_irecv": batch_send_and_receive,
    "P2POp": SendOrReceive,
    "barrier": barrier,
    "all_gather_object": gather_objects,
    "_coalescing_manager": coalesce,
}


def replace_collectives() -> None:
    """Put the stand-ins into torch, before Megatron-Core takes functions of it by name."""
    for name, replacement in COLLECTIVES.items():
        for module in (dist, c10d):
            setattr(module, name, replacement)


def _check_devices(*tensors: torch.Tensor) -> None:
    """Refuse tensors that NCCL cannot send."""
    assert all(one.device.type == "cuda" and one.is_contiguous() for one in tensors), "not contiguous on the device"


def _check_parts(whole: torch.Tensor, part: torch.Tensor, group: Any) -> None:
    _check_devices(whole, part)
    assert whole.numel() == part.numel() * dist.get_world_size(group) and whole.dtype == part.dtype


def _peer(peer: int | None, group_peer: int | None, group: Any) -> int | None:
    """Return the rank of the job that the other end is."""
    if peer is not None or group_peer is None:
        return peer
    return _ranks(group)[0][group_peer]


def _ranks(group: Any) -> tuple[tuple[int, ...], str]:
    """Return a group's ranks of the job and its name, looked up once."""
    key = id(group)
    if key not in _GROUPS:
        ranks = tuple(dist.get_process_group_ranks(group if group is not None else dist.group.WORLD))
        name = "WORLD" if group is None else getattr(group, "group_desc", "")
        _GROUPS[key] = (group, ranks, name)  # holds the group, so that its id is not another's
    return _GROUPS[key][1:]


def _write(
    operation: str,
    group: Any,
    *tensors: torch.Tensor,
    peer: int | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    _check_devices(*tensors)
    ranks, name = _ranks(group)
    size = math.prod(tensors[0].shape) if tensors else 0
    kind = tensors[0].dtype if tensors else dtype
    CALLS.append(Call(operation, ranks, name, size, str(kind).removeprefix("torch.") if kind else "", peer))

"""Which rank sits where: pure arithmetic between a global rank and its place on the tp, cp, ep, dp and pp axes.

Torch-free; the order is megatron-core's default "tp-cp-ep-dp-pp", the first axis changing fastest. The dense part of
the model sees the grid [pp][dp][cp][tp], the experts see the same ranks as [pp][edp][ep][etp].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from configs.plan.derive import Layout

DENSE_AXES = ("tp", "cp", "dp", "pp")
EXPERT_AXES = ("etp", "ep", "edp", "pp")


@dataclass(frozen=True)
class Coordinates:
    """Place of one rank on every axis; each value is 0 .. axis size - 1."""

    tp: int
    cp: int
    dp: int
    pp: int
    etp: int
    ep: int
    edp: int

    def __str__(self) -> str:
        return f"tp={self.tp} cp={self.cp} ep={self.ep} dp={self.dp} pp={self.pp}"


def coordinates_of(rank: int, layout: Layout) -> Coordinates:
    """Return the coordinates of a global rank; raise ValueError outside 0 .. world_size - 1."""
    if not 0 <= rank < layout.world_size:
        raise ValueError(f"rank {rank} is not in a world of {layout.world_size}")
    dense = _unravel(rank, layout, DENSE_AXES)
    expert = _unravel(rank, layout, EXPERT_AXES)
    return Coordinates(**dense, etp=expert["etp"], ep=expert["ep"], edp=expert["edp"])


def rank_of(layout: Layout, *, tp: int = 0, cp: int = 0, dp: int = 0, pp: int = 0) -> int:
    """Return the global rank at the dense coordinates; raise ValueError outside the grid."""
    return _ravel({"tp": tp, "cp": cp, "dp": dp, "pp": pp}, layout, DENSE_AXES)


def expert_rank_of(layout: Layout, *, etp: int = 0, ep: int = 0, edp: int = 0, pp: int = 0) -> int:
    """Return the global rank at the expert coordinates; raise ValueError outside the grid."""
    return _ravel({"etp": etp, "ep": ep, "edp": edp, "pp": pp}, layout, EXPERT_AXES)


def ranks_of_group(axes: str, rank: int, layout: Layout) -> list[int]:
    """Return, ascending, the ranks that share every coordinate with `rank` but those of `axes`.

    `axes` is one axis or several joined by underscores: "tp", "dp_cp", "tp_pp", "ep", "etp_ep". Raises ValueError for
    an unknown axis, or dense and expert axes mixed.
    """
    return next(group for group in all_groups(axes, layout) if rank in group)


def all_groups(axes: str, layout: Layout) -> list[list[int]]:
    """Return every group of `axes` (as in `ranks_of_group`), each ascending, ordered by their smallest rank."""
    wanted = axes.split("_")
    grid = DENSE_AXES if set(wanted) <= set(DENSE_AXES) else EXPERT_AXES
    unknown = [axis for axis in wanted if axis not in grid]
    if unknown:
        raise ValueError(f"axes {axes!r} are not all of {'_'.join(DENSE_AXES)} nor all of {'_'.join(EXPERT_AXES)}")
    groups: dict[tuple[int, ...], list[int]] = {}
    for rank in range(layout.world_size):
        place = _unravel(rank, layout, grid)
        fixed = tuple(place[axis] for axis in grid if axis not in wanted)
        groups.setdefault(fixed, []).append(rank)
    return sorted(groups.values())


def _unravel(rank: int, layout: Layout, axes: tuple[str, ...]) -> dict[str, int]:
    place = {}
    for axis in axes:
        rank, place[axis] = divmod(rank, getattr(layout, axis))
    return place


def _ravel(place: Mapping[str, int], layout: Layout, axes: tuple[str, ...]) -> int:
    rank, stride = 0, 1
    for axis in axes:
        size = getattr(layout, axis)
        if not 0 <= place[axis] < size:
            raise ValueError(f"{axis}={place[axis]} is outside 0..{size - 1}")
        rank += stride * place[axis]
        stride *= size
    return rank

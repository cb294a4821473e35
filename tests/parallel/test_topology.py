"""Ranks and coordinates against megatron-core's own rank generator."""

from __future__ import annotations

import pytest

from configs.plan.derive import Layout
from parallel.topology import all_groups, coordinates_of, expert_rank_of, rank_of, ranks_of_group


def layout_of(world_size: int, tp: int = 1, pp: int = 1, cp: int = 1, ep: int = 1, etp: int | None = None) -> Layout:
    etp = tp if etp is None else etp
    dp, edp = world_size // (tp * pp * cp), world_size // (etp * ep * pp)
    return Layout(world_size, tp=tp, pp=pp, vpp=1, cp=cp, ep=ep, etp=etp, dp=dp, edp=edp, sp=False)


LAYOUTS = [
    layout_of(1),
    layout_of(8, tp=2, pp=2),
    layout_of(16, tp=2, pp=2, cp=2),
    layout_of(16, tp=2, pp=2, cp=2, ep=4, etp=1),
    layout_of(24, tp=2, pp=3, ep=2),
    layout_of(32, tp=4, cp=2, pp=2, ep=8, etp=1),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_groups_equal_megatron_cores(layout: Layout) -> None:
    from megatron.core.parallel_state import RankGenerator

    order = "tp-cp-ep-dp-pp"
    dense = RankGenerator(tp=layout.tp, ep=1, dp=layout.dp, pp=layout.pp, cp=layout.cp, order=order)
    expert = RankGenerator(tp=layout.etp, ep=layout.ep, dp=layout.edp, pp=layout.pp, cp=1, order=order)
    theirs = {
        "tp": dense.get_ranks("tp"),
        "cp": dense.get_ranks("cp"),
        "dp": dense.get_ranks("dp"),
        "pp": dense.get_ranks("pp"),
        "dp_cp": dense.get_ranks("dp-cp"),
        "tp_pp": dense.get_ranks("tp-pp"),
        "tp_cp": dense.get_ranks("tp-cp"),
        "etp": expert.get_ranks("tp"),
        "ep": expert.get_ranks("ep"),
        "edp": expert.get_ranks("dp"),
        "etp_ep": expert.get_ranks("tp-ep"),
    }
    for axes, groups in theirs.items():
        assert all_groups(axes, layout) == sorted(groups), axes


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_ranks_and_coordinates_are_inverse(layout: Layout) -> None:
    for rank in range(layout.world_size):
        place = coordinates_of(rank, layout)
        assert rank_of(layout, tp=place.tp, cp=place.cp, dp=place.dp, pp=place.pp) == rank
        assert expert_rank_of(layout, etp=place.etp, ep=place.ep, edp=place.edp, pp=place.pp) == rank
        for axes in ("tp", "dp_cp", "pp", "ep", "edp"):
            assert rank in ranks_of_group(axes, rank, layout)


def test_one_layout_by_hand() -> None:
    layout = layout_of(8, tp=2, pp=2)
    assert ranks_of_group("tp", 5, layout) == [4, 5]
    assert ranks_of_group("pp", 5, layout) == [1, 5]
    assert ranks_of_group("dp", 5, layout) == [5, 7]
    assert str(coordinates_of(5, layout)) == "tp=1 cp=0 ep=0 dp=0 pp=1"


def test_outside_the_grid_is_refused() -> None:
    layout = layout_of(4, tp=2, pp=2)
    with pytest.raises(ValueError, match="rank 4 is not in a world of 4"):
        coordinates_of(4, layout)
    with pytest.raises(ValueError, match=r"tp=2 is outside 0\.\.1"):
        rank_of(layout, tp=2)
    with pytest.raises(ValueError, match="axes 'tp_ep'"):
        all_groups("tp_ep", layout)

"""Groups on the CPU: of one rank they compute what gloo computes without a thread, and none is made twice."""

from __future__ import annotations

import os

from tests.pool import Place
from tests.small_runs import small_config

TP2_PP2 = {"tp": 2, "pp": 2}


def collectives_of_one_rank(place: Place) -> list[list[float]]:
    """Return what each collective leaves in its output, alone and coalesced, synchronous and not."""
    import torch
    import torch.distributed as dist

    def values() -> torch.Tensor:
        return torch.tensor([1.0, -2.0, float("inf"), 0.0])

    outputs = [torch.zeros(4) for _ in range(9)]
    dist.all_gather_into_tensor(outputs[0], values())
    dist.reduce_scatter_tensor(outputs[1], values(), op=dist.ReduceOp.SUM)
    dist.all_gather([outputs[2]], values())
    dist.all_to_all_single(outputs[3], values(), torch.tensor([4]), torch.tensor([4]))
    dist.gather(values(), [outputs[4]])
    dist.scatter(outputs[5], [values()])
    dist.reduce_scatter(outputs[6], [values()])
    dist.all_gather_into_tensor(outputs[7], values(), async_op=True).wait()
    with dist._coalescing_manager(async_ops=True) as coalesced:
        dist.all_gather_into_tensor(outputs[8], values())
    coalesced.wait()
    for reduce in (dist.all_reduce, lambda one: dist.reduce(one, 0), lambda one: dist.broadcast(one, 0)):
        outputs.append(values())
        reduce(outputs[-1])
    shared = values()
    dist.all_gather_into_tensor(shared, shared[:])
    objects = [None]
    dist.all_gather_object(objects, {"a": 1})
    dist.barrier()
    assert objects == [{"a": 1}]
    return [output.tolist() for output in [*outputs, shared]]


def lone_and_gloo(place: Place) -> dict[str, list[list[float]]]:
    import torch.distributed as dist

    results = {}
    for backend in ("lone", "gloo"):
        dist.init_process_group(backend, init_method=f"{place.init_method}_{backend}", rank=0, world_size=1)
        results[backend] = collectives_of_one_rank(place)
        dist.destroy_process_group()
    return results


def test_one_rank_gets_what_gloo_gives(ranks):
    results = ranks.run(lone_and_gloo)[0]
    assert results["lone"] == results["gloo"] == [[1.0, -2.0, float("inf"), 0.0]] * 13


def num_groups_and_threads(place: Place, layout: dict[str, int]) -> tuple[int, int, list[tuple[int, ...]]]:
    """Return the groups this rank is in, the threads they started, and every rank list once for each group of it."""
    import torch.distributed as dist

    from parallel.mesh import build_mesh, destroy_mesh, init_world
    from parallel.platform import load_platform

    platform = load_platform("cpu")
    device = platform.activate(0)
    config = small_config(world=place.world_size, parallel=layout)
    before = len(os.listdir("/proc/self/task"))
    init_world(platform, config, rank=place.rank, world_size=place.world_size, init_method=place.init_method)
    for _ in range(2):  # another mesh in the same world takes the groups there are
        build_mesh(platform, device, config)
        destroy_mesh()
    groups = list(dist.distributed_c10d._world.pg_map)
    lists = [tuple(dist.get_process_group_ranks(group)) for group in groups]
    return len(groups), len(os.listdir("/proc/self/task")) - before, lists


def test_a_world_of_one_rank_has_one_group_and_no_thread(ranks):
    ((num_groups, num_threads, lists),) = ranks.run(num_groups_and_threads, {})
    assert num_groups == 1 and lists == [(0,)]
    assert num_threads <= 0  # those of an earlier case may end meanwhile


def test_no_group_is_made_twice(ranks):
    for rank, (num_groups, _, lists) in enumerate(ranks.run(num_groups_and_threads, TP2_PP2, world=4)):
        # all ranks have two: the world, and the control group with its own patience
        assert num_groups - 1 == len(set(lists)) == 4 and lists.count((0, 1, 2, 3)) == 2, lists
        assert all(rank in members for members in lists)

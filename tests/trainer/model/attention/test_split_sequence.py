"""Attention over a sequence that ranks share, against one statement of it in float64: outputs and every gradient."""

from __future__ import annotations

from typing import Any

import pytest

from tests.pool import Place
from tests.trainer.model.attention.flash_kernels import stated_flash_kernels

HEADS = 8
SEQ_LEN = 64
BATCH = 2


def make_case(num_groups: int, dim_v: int, num_rows: int, has_sink: bool) -> tuple[list[Any], Any]:
    """Return whole queries, keys, values (and sinks) `[batch, heads, rows * seq, dim]`, and the output's gradient."""
    import torch

    generator = torch.Generator().manual_seed(5)
    total = num_rows * SEQ_LEN
    shapes = [(BATCH, HEADS, total, 16), (BATCH, num_groups, total, 16), (BATCH, num_groups, total, dim_v)]
    shapes += [(HEADS,)] if has_sink else []
    inputs = [torch.randn(shape, generator=generator) for shape in shapes]
    return inputs, torch.randn(BATCH, HEADS, total, dim_v, generator=generator)


def state_in_float64(inputs: list[Any], gradient: Any, bounds: tuple[int, ...], window: int | None) -> list[Any]:
    """Return the output and the gradients of all inputs of softmax(Q K^T / sqrt(d)) V with the mask written out."""
    import torch

    inputs = [part.double().requires_grad_() for part in inputs]
    query, key, value, *sinks = inputs
    repeats, total = HEADS // key.shape[1], query.shape[2]
    key, value = (part.repeat_interleave(repeats, 1) for part in (key, value))
    place = torch.arange(total)
    document = torch.searchsorted(torch.tensor(bounds), place, right=True)
    seen = (document[:, None] == document) & (place <= place[:, None])
    if window is not None:
        seen &= place > place[:, None] - window
    scores = (query @ key.transpose(-1, -2)) * query.shape[-1] ** -0.5
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks:
        scores = torch.cat([scores, sinks[0][None, :, None, None].expand(BATCH, HEADS, total, 1)], dim=-1)
    output = scores.softmax(-1)[..., :total] @ value
    return [output, *torch.autograd.grad(output, inputs, gradient.double())]


def attend_by_flash(place: Place, *arguments: Any) -> list[Any]:
    """Return what `attend_on_ranks` does with the tiles of GPUs, and the sequences of each forward launch."""
    from trainer.model.attention.tile_kernels import FlashTiles

    with stated_flash_kernels() as launches:
        return [*attend_on_ranks(place, *arguments, kernels=FlashTiles), launches]


def attend_on_ranks(
    place: Place, method: str, inner: int, case: tuple[Any, ...], split_fields: dict, kernels: Any = None
) -> list[Any]:
    """Return this rank's part of the output and of the gradients; the gradient of the sinks is summed over ranks."""
    import torch
    import torch.distributed as dist

    from parallel.sequence_split import segments_of
    from trainer.model.attention.methods import METHODS, Attended, Sharing, Split
    from trainer.model.attention.tile_kernels import CpuTiles

    dist.init_process_group("gloo", init_method=place.init_method, rank=place.rank, world_size=place.world_size)
    ways = [dist.new_group(range(first, first + inner)) for first in range(0, place.world_size, inner)]
    across = [dist.new_group(range(first, place.world_size, inner)) for first in range(inner)]
    sharing = Sharing((kernels or CpuTiles)(), dist.group.WORLD, ways[place.rank // inner], across[place.rank % inner])
    split = Split(**split_fields)
    inputs, gradient = make_case(*case)
    segments = segments_of(place.rank, place.world_size, num_rows=split.num_rows, seq_len=split.seq_len)
    mine = torch.cat([torch.arange(segment.start, segment.end) for segment in segments])
    query, key, value = (part[:, :, mine].requires_grad_() for part in inputs[:3])
    sinks = [part.requires_grad_() for part in inputs[3:]]
    output = METHODS[method](Attended(query, key, value, 0.25, *sinks), split, sharing)
    gradients = torch.autograd.grad(output, [query, key, value, *sinks], gradient[:, :, mine])
    for total in gradients[3:]:
        dist.all_reduce(total)
    dist.destroy_process_group()
    return [mine, output.detach(), *gradients]


ONE_ROW = {"num_rows": 1, "seq_len": SEQ_LEN, "bounds": (0, SEQ_LEN)}
# 1 token, 2 tokens, one that lies on all ranks, and rows that end inside a rank's share.
DOCUMENTS = {"num_rows": 2, "seq_len": SEQ_LEN, "bounds": (0, 1, 3, 62, 64, 70, 128)}
CASES = {
    "plain": (HEADS, 16, ONE_ROW, False),
    "gqa_8_to_1": (1, 16, ONE_ROW, False),
    "gqa_documents": (2, 16, DOCUMENTS, False),
    "latent_documents": (HEADS, 8, DOCUMENTS, False),
    "window": (2, 16, ONE_ROW | {"window": 9}, False),
    "window_documents_sinks": (2, 16, DOCUMENTS | {"window": 21}, True),
}
WAYS = [("p2p", 2), ("p2p", 4), ("all_gather", 2), ("all_gather", 4), ("a2a", 2), ("a2a", 4), ("a2a+p2p", 4)]


def require_whole(parts: list[Any], name: str) -> None:
    """Require that the ranks' parts together are attention."""
    import torch

    num_groups, dim_v, split, has_sink = CASES[name]
    case = (num_groups, dim_v, split["num_rows"], has_sink)
    expected = state_in_float64(*make_case(*case), split["bounds"], split.get("window"))
    places = torch.cat([part[0] for part in parts])
    assert torch.equal(places.sort().values, torch.arange(split["num_rows"] * SEQ_LEN))
    for number, want in enumerate(expected, start=1):
        got = [part[number] for part in parts]
        if want.dim() == 4:
            whole = torch.empty(want.shape)
            whole[:, :, places] = torch.cat(got, dim=2)
            got = [whole]
        for one in got:
            assert (one - want).abs().max() <= 1e-5 * want.abs().max()


def arguments_of(name: str) -> tuple[Any, ...]:
    num_groups, dim_v, split, has_sink = CASES[name]
    return 2, (num_groups, dim_v, split["num_rows"], has_sink), split


@pytest.mark.parametrize("method, world", WAYS)
@pytest.mark.parametrize("name", CASES)
def test_shared_attention_is_attention(ranks, name, method, world):
    require_whole(ranks.run(attend_on_ranks, method, *arguments_of(name), world=world), name)


@pytest.mark.parametrize("method, world", [("p2p", 2), ("all_gather", 4), ("a2a+p2p", 4)])
@pytest.mark.parametrize("name", CASES)
def test_flash_kernels_are_attention(ranks, name, method, world):
    parts = ranks.run(attend_by_flash, method, *arguments_of(name), world=world)
    require_whole(parts, name)
    has_documents = len(CASES[name][2]["bounds"]) > 2
    for *_, launches in parts:
        # Documents that end where the next begins, in one launch; plain ones end at a rank's share alone.
        assert max(launches) > 3 * BATCH if has_documents else len(launches) <= 10


def test_launches_do_not_grow_with_documents():
    """Those of a rank are one launch; of other pieces a ring has one rectangle a row and step, or none."""
    from trainer.model.attention.methods import Split, _plan_ring

    for num_rows, every in ((1, 8), (2, 7), (4, 100)):
        bounds = sorted({*range(0, 4097, 4096 // num_rows), *range(0, 4096, every)})
        split = Split(num_rows, 4096 // num_rows, tuple(bounds))
        for place in range(4):
            own, *others = _plan_ring(split, place, 4, 1, 3)
            assert [tile.length for tile in own if tile.bounds] == [1024]
            assert len(own) <= 1 + num_rows and max(map(len, others)) <= num_rows


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_the_output_is_kept_once(name):
    """The layer after attention reads it as it lies: a copy would stay for the backward pass beside it."""
    import torch

    from trainer.model.attention.ring import RingAttention
    from trainer.model.attention.tile_kernels import CpuTiles
    from trainer.model.attention.tiles import Tile

    query, key, value = (part.to(getattr(torch, name)) for part in make_case(2, 8, 1, False)[0])
    tiles = [[Tile((0, SEQ_LEN), (0, SEQ_LEN), 0)]]
    output = RingAttention.apply(query, key, value, None, tiles, None, CpuTiles(), 0.25)
    assert output.permute(2, 0, 1, 3).flatten(2).data_ptr() == output.data_ptr()

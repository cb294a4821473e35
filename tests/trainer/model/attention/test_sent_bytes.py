"""What attention over shared sequences sends, counted at torch.distributed, is the plan's formula to the byte."""

from __future__ import annotations

from typing import Any

import pytest

from configs.plan.context_bytes import HeadSizes, sent_bytes
from tests.pool import Place
from tests.trainer.model.attention.test_split_sequence import BATCH, DOCUMENTS, HEADS, ONE_ROW, SEQ_LEN, make_case

EXCHANGES = {"ring": "p2p", "all_gather": "all_gather", "ulysses": "a2a", "hierarchical": "a2a+p2p"}
WAYS = [("ring", 2), ("ring", 4), ("all_gather", 4), ("ulysses", 2), ("ulysses", 4), ("hierarchical", 4)]


def count_on_ranks(
    place: Place, method: str, num_groups: int, dim_v: int, split_fields: dict[str, Any], value_bytes: int
) -> tuple[float, float, float]:
    """Return the bytes this rank's attention sent forward and backward, and those counted for a stranger's exchange."""
    import torch
    import torch.distributed as dist

    from tools.bench.attention_traffic import AttentionTraffic
    from trainer.model.attention.methods import METHODS, Attended, Sharing, Split
    from trainer.model.attention.tile_kernels import CpuTiles

    dist.init_process_group("gloo", init_method=place.init_method, rank=place.rank, world_size=place.world_size)
    pairs = [dist.new_group([first, first + 1]) for first in range(0, place.world_size, 2)]
    across = [dist.new_group(range(first, place.world_size, 2)) for first in range(2)]
    sharing = Sharing(CpuTiles(), dist.group.WORLD, pairs[place.rank // 2], across[place.rank % 2])
    split = Split(**split_fields)
    inputs, gradient = make_case(num_groups, dim_v, split.num_rows, False)
    mine = split.num_rows * SEQ_LEN // place.world_size
    dtype = torch.float32 if value_bytes == 4 else torch.bfloat16
    query, key, value = (part[:, :, :mine].to(dtype).requires_grad_() for part in inputs)
    with AttentionTraffic() as traffic:
        output = METHODS[EXCHANGES[method]](Attended(query, key, value, 0.25), split, sharing)
        torch.autograd.grad(output, [query, key, value], gradient[:, :, :mine].to(dtype))
        ours = traffic.sent
        dist.all_gather_into_tensor(torch.empty(place.world_size), torch.zeros(1), group=dist.group.WORLD)
    dist.destroy_process_group()
    return ours.forward, ours.backward, traffic.sent.forward - ours.forward


@pytest.mark.parametrize("method, cp", WAYS)
@pytest.mark.parametrize(
    "num_groups, dim_v, split, value_bytes",
    [
        (HEADS, 16, ONE_ROW, 4),
        (1, 16, ONE_ROW, 2),  # fewer heads of keys than ranks
        (2, 16, DOCUMENTS, 4),
        (HEADS, 8, DOCUMENTS, 2),  # latent attention
        (4, 16, ONE_ROW | {"window": 9}, 4),
    ],
    ids=["plain", "one_key_head_bf16", "gqa_documents", "latent_documents_bf16", "window"],
)
def test_counted_bytes_are_the_formula(ranks, method, cp, num_groups, dim_v, split, value_bytes):
    counted = ranks.run(count_on_ranks, method, num_groups, dim_v, split, value_bytes, world=cp)
    planned = sent_bytes(
        method,
        HeadSizes(HEADS, num_groups, 16, dim_v),
        num_tokens=BATCH * split["num_rows"] * SEQ_LEN // cp,
        value_bytes=value_bytes,
        cp=cp,
        cp_inner=2,
    )
    assert planned.forward > 0 and counted == [(planned.forward, planned.backward, 0)] * cp

"""Attention over keys and values that go round a ring of ranks (Liu et al. 2023, arXiv:2310.01889), and its gradient.

No rank keeps keys of others: they go round again in the backward pass, and with them what they have gathered of their
gradient. The next block is on its way while the present one is computed. A ring of one rank is attention by tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from trainer.model.attention.partial import PartialAttention
from trainer.model.attention.tile_kernels import TileKernels
from trainer.model.attention.tiles import Tile


class RingAttention(torch.autograd.Function):
    """`apply(query, key, value, sink, plan, group, kernels, scale)` -> output `[batch, heads, seq, dim_v]`.

    query `[batch, heads, seq, dim]`, key `[batch, groups, seq, dim]`, value `[batch, groups, seq, dim_v]`: this rank's
    tokens. `sink [heads]` is a logit without a key, or None. `plan[t]` are the tiles of these queries with the keys of
    the rank t places before this one in `group`. Collective: all ranks of the group must call this.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sink: torch.Tensor | None,
        plan: Sequence[Sequence[Tile]],
        group: dist.ProcessGroup | None,
        kernels: TileKernels,
        scale: float,
    ) -> torch.Tensor:
        """Attend block by block."""
        seen = PartialAttention(query, value.shape[-1])
        block = [key, value]
        for step, tiles in enumerate(plan):
            coming = _Exchange(block, group) if step < len(plan) - 1 else None
            for tile in tiles:
                for queries, output, log_sum in kernels.attend(query, block[0], block[1], tile, scale):
                    seen.add(queries, output, log_sum)
            block = block if coming is None else coming.wait()
        if sink is not None:
            seen.add_sink(sink)
        output = seen.output.to(query.dtype)
        ctx.save_for_backward(query, key, value, sink, output, seen.log_sum)
        ctx.plan, ctx.group, ctx.kernels, ctx.scale = plan, group, kernels, scale
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gather the gradients of queries here, those of keys and values on their way round."""
        query, key, value, sink, output, log_sum = ctx.saved_tensors
        plan, group = ctx.plan, ctx.group
        of_query = torch.zeros_like(query, dtype=torch.float32)
        block, of_block = [key, value], None
        for step, tiles in enumerate(plan):
            coming = _Exchange(block, group) if step < len(plan) - 1 else None
            ours = [torch.zeros_like(part, dtype=torch.float32) for part in block]
            for tile in tiles:
                inputs, sums = (query, block[0], block[1]), (of_query, ours[0], ours[1])
                ctx.kernels.add_gradients(gradient, inputs, output, log_sum, tile, ctx.scale, sums)
            if of_block is not None:
                ours = [own.add_(theirs) for own, theirs in zip(ours, of_block.wait(), strict=True)]
            if len(plan) > 1:
                of_block = _Exchange(ours, group)
            block = coming.wait() if coming is not None else block
        of_key, of_value = of_block.wait() if of_block is not None else ours
        of_sink = None
        if sink is not None:  # its value is zero, so that of its weight's gradient the mean over all keys is left
            mean = (gradient.float() * output.float()).sum(-1)
            of_sink = -(torch.exp(sink.float()[:, None] - log_sum) * mean).sum((0, 2)).to(sink.dtype)
        gradients = (of_query.to(query.dtype), of_key.to(key.dtype), of_value.to(value.dtype), of_sink)
        return (*gradients, None, None, None, None)


class _Exchange:
    """Tensors on their way to the next rank of the ring, and those that come from the one before."""

    def __init__(self, tensors: Sequence[torch.Tensor], group: dist.ProcessGroup | None) -> None:
        assert group is not None
        rank, size = group.rank(), group.size()
        self._sent = [tensor.contiguous() for tensor in tensors]  # alive until they have left
        self._received = [torch.empty_like(tensor) for tensor in self._sent]
        following, previous = ((rank + 1) % size, (rank - 1) % size)
        operations = [dist.P2POp(dist.isend, tensor, group=group, group_peer=following) for tensor in self._sent]
        operations += [dist.P2POp(dist.irecv, tensor, group=group, group_peer=previous) for tensor in self._received]
        self._requests = dist.batch_isend_irecv(operations)

    def wait(self) -> list[torch.Tensor]:
        """Return what has come."""
        for request in self._requests:
            request.wait()
        return self._received

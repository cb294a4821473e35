"""What context-parallel attention sends beside a ring: heads for tokens (all-to-all), and keys to all (all-gather).

Each is its own gradient's opposite. Tensors are `[batch, heads, seq, dim]`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


class HeadsForTokens(torch.autograd.Function):
    """`apply(tensor, group)`: `[batch, heads, seq/n, dim]` -> `[batch, heads/n, seq, dim]`, ranks' tokens end to end.

    Jacobs et al. 2023 (arXiv:2309.14509), section 3. Collective: all ranks of the group must call this.
    """

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        """Give away tokens of other ranks' heads."""
        ctx.group = group
        return _heads_for_tokens(tensor, group)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Give them back."""
        return _tokens_for_heads(gradient, ctx.group), None


class TokensForHeads(torch.autograd.Function):
    """`apply(tensor, group)`: the inverse of `HeadsForTokens`. Collective: all ranks of the group must call this."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        """Give away heads of other ranks' tokens."""
        ctx.group = group
        return _tokens_for_heads(tensor, group)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Give them back."""
        return _heads_for_tokens(gradient, ctx.group), None


class GatherTokens(torch.autograd.Function):
    """`apply(tensor, group)`: `[batch, heads, seq/n, dim]` -> `[batch, heads, seq, dim]`, ranks' tokens end to end.

    The gradient is summed over the ranks. Collective: all ranks of the group must call this.
    """

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        """Gather the tokens of all ranks."""
        ctx.group = group
        parts = tensor.new_empty(group.size() * len(tensor), *tensor.shape[1:])
        dist.all_gather_into_tensor(parts, tensor.contiguous(), group=group)
        return torch.cat(parts.chunk(group.size()), dim=2)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Return the sum of all ranks' gradients of this rank's tokens."""
        parts = torch.stack(gradient.chunk(ctx.group.size(), dim=2)).contiguous()
        mine = torch.empty_like(parts[0])
        dist.reduce_scatter_tensor(mine, parts.view(-1, *mine.shape[1:]), group=ctx.group)
        return mine, None


def _heads_for_tokens(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    sent = torch.stack(tensor.chunk(group.size(), dim=1)).contiguous()  # [n, batch, heads/n, seq/n, dim]
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return torch.cat(received.unbind(0), dim=2)


def _tokens_for_heads(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    sent = torch.stack(tensor.chunk(group.size(), dim=2)).contiguous()  # [n, batch, heads/n, seq/n, dim]
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return torch.cat(received.unbind(0), dim=1)

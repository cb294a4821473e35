"""Attention of packed documents with sinks in one flash kernel, which knows no sinks itself, and its gradient."""

from __future__ import annotations

from typing import Any

import torch


class PackedSinkAttention(torch.autograd.Function):
    """`apply(query, key, value, sink, bounds, longest, window, scale)` -> output `[total, heads, dim]`, causal.

    query, key, value `[total, heads, dim]` in formats of 16 bits, dim a multiple of 8; `sink [heads]` a logit without a
    key; `bounds` int32 `[num_documents + 1]` on the device; `longest` document in tokens; `window` keys to the left of
    a query's own that it sees, -1 for all. The kernel gives the log-sum-exp over the keys (Dao 2023, arXiv:2307.08691,
    algorithm 1) and takes that over keys and sink for the gradients (algorithm 2), which makes them those of the whole.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sink: torch.Tensor,
        bounds: torch.Tensor,
        longest: int,
        window: int,
        scale: float,
    ) -> torch.Tensor:
        """Attend over the keys, and give part of the weight to the sink."""
        places = (bounds, bounds, longest, longest, 0.0, False)
        options = {"scale": scale, "window_size_left": window, "window_size_right": 0}
        output, log_sum, *_ = torch.ops.aten._flash_attention_forward(query, key, value, *places, False, **options)
        total = torch.logaddexp(log_sum, sink.float()[:, None])  # [heads, total]
        output = (output * torch.exp(log_sum - total).t().unsqueeze(-1)).to(query.dtype)
        ctx.save_for_backward(query, key, value, sink, output, total, bounds)
        ctx.longest, ctx.options = longest, options
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the kernel's gradients, and the sink's: as a key's whose value is zero."""
        query, key, value, sink, output, log_sum, bounds = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        places = (bounds, bounds, ctx.longest, ctx.longest, 0.0, False)
        none = torch.empty(0, dtype=torch.int64, device=query.device)  # the random state of a dropout there is not
        found = torch.ops.aten._flash_attention_backward(
            gradient, query, key, value, output, log_sum, *places, none, none, **ctx.options
        )
        mean = (gradient.float() * output.float()).sum(-1).t()
        of_sink = -(torch.exp(sink.float()[:, None] - log_sum) * mean).sum(1).to(sink.dtype)
        return (*found, of_sink, None, None, None, None)

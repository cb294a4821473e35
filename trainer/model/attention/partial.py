"""Attention over part of the keys, and its sum with the rest: results are weighed by their log-sum-exp.

Liu et al. 2023 (arXiv:2310.01889) section 3; the recurrence is that of Rabe and Staats 2021 (arXiv:2112.05682).
"""

from __future__ import annotations

import torch


class PartialAttention:
    """The attention of all local queries over the keys seen so far, in fp32."""

    def __init__(self, query: torch.Tensor, dim_v: int) -> None:
        """Nothing seen yet; query `[batch, heads, seq, dim]`.

        The heads of a token lie together in memory: what comes after attention then reads the output as it is, instead
        of keeping a copy of it for the backward pass.
        """
        batch, heads, seq, _ = query.shape
        self.output = query.new_zeros((batch, seq, heads, dim_v), dtype=torch.float32).transpose(1, 2)
        self.log_sum = query.new_full((batch, heads, seq), float("-inf"), dtype=torch.float32)

    def add(self, queries: tuple[int, int], output: torch.Tensor, log_sum: torch.Tensor) -> None:
        """Add what the queries from, to saw in further keys: output `[batch, heads, n, dim_v]`, its log-sum-exp."""
        mine, sums = (part[:, :, queries[0] : queries[1]] for part in (self.output, self.log_sum))
        total = torch.logaddexp(sums, log_sum)
        # exp(-inf - -inf) is no number: a query that has seen nothing keeps its zeros.
        weight = torch.where(log_sum == float("-inf"), 0.0, torch.exp(log_sum - total)).unsqueeze(-1)
        mine.lerp_(output.float(), weight)
        sums.copy_(total)

    def add_sink(self, sink: torch.Tensor) -> None:
        """Add a key per head that has the logit `sink [heads]` and a value of zeros."""
        total = torch.logaddexp(self.log_sum, sink.float()[:, None])
        self.output.mul_(torch.exp(self.log_sum - total).unsqueeze(-1))
        self.log_sum.copy_(total)

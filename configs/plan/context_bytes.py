"""Bytes that context-parallel ranks send each other to share attention. Torch-free arithmetic, judged by counting.

The methods are those of `trainer/model/attention/methods.py`. Documents and windows change nothing: what is sent does
not depend on which keys a query sees.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from configs.plan.derive import head_dim, num_query_groups
from configs.sections.model import ModelConfig
from configs.stages import Config

Method = Literal["ring", "all_gather", "ulysses", "hierarchical"]
_GRADIENT_BYTES = 4
"""Of an element of the gradients that go round a ring: fp32, since ranks add to them."""


@dataclass(frozen=True)
class HeadSizes:
    """Heads of one layer on one tensor-parallel rank, and the elements of each."""

    heads: int
    """Of queries, and of the output."""
    groups: int
    """Of keys and values."""
    dim: int
    """Of a query's or a key's head."""
    dim_v: int
    """Of a value's head, and of the output's."""


@dataclass(frozen=True)
class SentBytes:
    """Bytes that one rank sends to others."""

    forward: float
    backward: float

    def __add__(self, other: SentBytes) -> SentBytes:
        return SentBytes(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, times: int) -> SentBytes:
        return SentBytes(self.forward * times, self.backward * times)


def head_sizes(model: ModelConfig, tp: int) -> HeadSizes:
    """Return the heads of a tp rank; with more ranks than key-value heads each has one of them."""
    heads, dim = model.num_attention_heads // tp, head_dim(model)
    if model.mla is not None:
        return HeadSizes(heads, heads, dim, model.mla.v_head_dim)
    return HeadSizes(heads, max(num_query_groups(model) // tp, 1), dim, dim)


def sent_bytes(
    method: Method, sizes: HeadSizes, *, num_tokens: int, value_bytes: int, cp: int, cp_inner: int | None = None
) -> SentBytes:
    """Return what one of `cp` ranks, with `num_tokens` tokens of its own, sends for a layer and a microbatch.

    `value_bytes` is the size of an element of queries, keys and values. An exchange among n ranks sends (n-1)/n of what
    it hands over or gathers, as rings and pairwise exchanges do. `cp_inner` is for `hierarchical`.
    """
    keys = num_tokens * sizes.groups * (sizes.dim + sizes.dim_v)
    if method == "ring":
        return _ring(keys, value_bytes, cp)
    if method == "all_gather":  # and its opposite, a reduce-scatter of the gradients
        gathered = (cp - 1) * keys * value_bytes
        return SentBytes(gathered, gathered)
    inner = cp if method == "ulysses" else cp_inner
    assert inner is not None, "configs.context_parallel refuses hierarchical without parallel.cp_inner"
    keys = num_tokens * max(sizes.groups, inner) * (sizes.dim + sizes.dim_v)  # fewer heads than ranks are repeated
    exchanged = num_tokens * sizes.heads * (sizes.dim + sizes.dim_v) + keys
    sent = exchanged * value_bytes * (inner - 1) / inner
    return SentBytes(sent, sent) + _ring(keys, value_bytes, cp // inner)


def microbatch_bytes(config: Config, method: Method) -> SentBytes:
    """Return what a rank of `parallel.cp` sends for a layer and a microbatch of the config.

    Layers that `train.recompute` computes again send their forward part a second time.
    """
    parallel, train = config.parallel, config.train
    return sent_bytes(
        method,
        head_sizes(config.model, parallel.tp),
        num_tokens=train.micro_batch_size * train.seq_len // parallel.cp,
        value_bytes=4 if config.precision.compute == "fp32" else 2,
        cp=parallel.cp,
        cp_inner=parallel.cp_inner,
    )


def _ring(keys: int, value_bytes: int, num_places: int) -> SentBytes:
    """Keys and values go to all places but the last; back home go their gradients, a place further each."""
    if num_places == 1:
        return SentBytes(0, 0)
    sent = (num_places - 1) * keys * value_bytes
    return SentBytes(sent, sent + num_places * keys * _GRADIENT_BYTES)

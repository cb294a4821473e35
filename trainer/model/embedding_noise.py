"""Noise on embeddings while training: NEFTune (Jain et al. 2023, arXiv:2310.05914, algorithm 1)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from megatron.core import tensor_parallel


@contextmanager
def noisy_embeddings(chunk: Any, lengths: torch.Tensor | None, alpha: float) -> Iterator[None]:
    """Add uniform noise in (-1, 1) * alpha / sqrt(L * hidden) to what the chunk's embedding gives within this context.

    `lengths [batch, seq/cp]` says L, the tokens of each token's document. Nothing happens where `alpha` is 0 and in
    chunks without an embedding. The generators are those of dropout: tp ranks that hold the same tokens draw the same.
    """
    inner = getattr(chunk, "module", chunk)
    embedding = getattr(inner, "embedding", None)
    if not alpha or embedding is None or lengths is None:
        yield
        return
    is_split = inner.config.sequence_parallel

    def add(module: Any, args: Any, hidden: torch.Tensor) -> torch.Tensor:  # [seq/(cp*tp), batch, hidden]
        scale = lengths.reshape(hidden.shape[1], -1).t()  # packed rows lie end to end
        if is_split:
            group = inner.pg_collection.tp
            scale = scale.chunk(group.size())[group.rank()]
        scale = alpha / (scale * hidden.shape[-1]).sqrt()
        with tensor_parallel.get_cuda_rng_tracker().fork() if is_split else nullcontext():
            noise = torch.empty_like(hidden).uniform_(-1, 1)
        return hidden + noise * scale.unsqueeze(-1).to(hidden.dtype)

    handle = embedding.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()

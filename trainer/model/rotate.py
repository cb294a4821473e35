"""Rotary position embedding of packed documents without asking the host, and the rotation as one kernel.

Megatron-Core rotates document by document and reads their lengths back from the device twice a layer, where it waits
for all work queued. Here each token looks up the angles of its own position. Used where Transformer Engine's fused
rotation is not.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.common.embeddings import rope_utils

_NUM_COMPILED = 64
_rotate_one_by_one = rope_utils._apply_rotary_pos_emb_thd


def document_positions(cu_seqlens: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Return each token's position in its document, int32 `[num_tokens]`, from the boundaries `[documents + 1]`."""
    places = torch.arange(num_tokens, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens, places, right=True) - 1
    return places - cu_seqlens[document]


def rotate_documents(
    tokens: torch.Tensor, cu_seqlens: torch.Tensor, frequencies: torch.Tensor, *args: Any, **options: Any
) -> torch.Tensor:
    """Rotate `tokens [total, heads, dim]` by the angles `frequencies [max_seqlen, 1, 1, rotated]`, in radians.

    Su et al. 2021 (arXiv:2104.09864) eq. 34, with positions that start at 0 in each document. The arguments are those
    of Megatron-Core's own function, which goes on serving context parallelism.
    """
    cp_group = options.pop("cp_group", None)
    if cp_group is not None and cp_group.size() > 1:
        return _rotate_one_by_one(tokens, cu_seqlens, frequencies, *args, cp_group=cp_group, **options)
    angles = frequencies[document_positions(cu_seqlens, tokens.shape[0])]
    return rope_utils._apply_rotary_pos_emb_bshd(tokens.unsqueeze(1), angles, *args, **options).squeeze(1)


def compile_rotation() -> Any:
    """Return Megatron-Core's rotation as one compiled kernel instead of seven passes over queries and keys.

    Queries, keys, training, evaluation and samples each want one of their own: more than the eight that are usual.
    """
    torch._dynamo.config.recompile_limit = max(_NUM_COMPILED, torch._dynamo.config.recompile_limit)
    return torch.compile(rope_utils._apply_rotary_pos_emb_bshd)

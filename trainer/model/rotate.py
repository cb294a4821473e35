"""Rotary position embedding of packed documents without asking the host, and the rotation in few passes or one kernel.

Megatron-Core rotates document by document and reads their lengths back from the device twice a layer, where it waits
for all work queued. Here each token looks up the angles of its own position, which also serves ranks that share a
sequence, however it is split. Used where Transformer Engine's fused rotation is not.
"""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import torch
from megatron.core.models.common.embeddings import rope_utils

from parallel.sequence_split import segments_of
from trainer.model.attention.cache import CachedTokens

_NUM_COMPILED = 64
_rotate_otherwise = rope_utils._apply_rotary_pos_emb_bshd


def rotate_by_position(chunk: torch.nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Hand the positions of packed tokens down to `rotate_documents`: a forward pre-hook of model chunks.

    Megatron-Core gives the rotation, alone, the padded boundaries where there are any; ours are never padded.
    """
    packed = options.get("packed_seq_params")
    is_cached = isinstance(packed, CachedTokens)
    chunk.token_angles.see(packed.positions if is_cached else None)  # type: ignore[union-attr,operator]
    if packed is None:
        return None
    positions = args[1].flatten()
    if is_cached:
        positions = positions[:0]
    packed = replace(packed, cu_seqlens_q_padded=positions, cu_seqlens_kv_padded=positions)
    return args, options | {"packed_seq_params": packed}


class TokenAngles:
    """Lets a rotary embedding give, in passes of generation, one angle for each token and not one for each position.

    Latent attention cuts its table of angles to the number of tokens, which says nothing of their positions here.
    """

    def __init__(self, embedding: torch.nn.Module | None) -> None:
        self._positions: torch.Tensor | None = None
        self._picked: Any = None
        if embedding is not None:
            embedding.register_forward_hook(self._pick)

    def see(self, positions: torch.Tensor | None) -> None:
        """Take the next pass's `positions [tokens]`, or None where angles are to be those of all positions."""
        self._positions, self._picked = positions, None

    def _pick(self, embedding: torch.nn.Module, args: Any, output: Any) -> Any:
        if self._positions is None:
            return None
        if self._picked is None:  # once for all layers
            table, *scale = output if isinstance(output, tuple) else (output,)
            picked = table[self._positions]
            self._picked = (picked, *scale) if scale else picked
        return self._picked


def rotate_documents(
    tokens: torch.Tensor, positions: torch.Tensor, frequencies: torch.Tensor, *args: Any, **options: Any
) -> torch.Tensor:
    """Rotate `tokens [total, heads, dim]` by the angles `frequencies [max_seqlen, 1, 1, rotated]`, in radians.

    Su et al. 2021 (arXiv:2104.09864) eq. 34, at the `positions [total]` that `rotate_by_position` handed down; where
    these are empty, the angles are those of the tokens. The arguments are otherwise those of Megatron-Core's own
    function.
    """
    options.pop("cp_group", None)
    angles = frequencies[positions] if positions.numel() else frequencies
    return rope_utils._apply_rotary_pos_emb_bshd(tokens.unsqueeze(1), angles, *args, **options).squeeze(1)


def angles_of_this_rank(angles: torch.Tensor, seq_dim: int, cp_group: Any) -> torch.Tensor:
    """Return the part of `angles`, along dimension `seq_dim`, that belongs to this context-parallel rank's tokens."""
    length = angles.shape[seq_dim]
    segments = segments_of(cp_group.rank(), cp_group.size(), num_rows=1, seq_len=length)
    return torch.cat([angles.narrow(seq_dim, one.start, one.length) for one in segments], dim=seq_dim)


class _Rotation(torch.autograd.Function):
    """Rotates the halves of the last dimension, and gradients back; bit for bit Megatron-Core's, without its joins.

    Both results are contiguous, as joined ones are: in another layout, what follows adds up in another order.
    """

    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(tokens, cos, sin)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = gradients
        cos, sin = ctx.saved_tensors
        (first, second), (sin_first, sin_second) = gradient.chunk(2, dim=-1), sin.chunk(2, dim=-1)
        result = torch.mul(gradient, cos, out=gradient.new_empty(gradient.shape))
        of_first, of_second = result.chunk(2, dim=-1)
        of_first += second * sin_second
        of_second -= first * sin_first
        return result, None, None


def _rotate(tokens: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    (first, second), (sin_first, sin_second) = tokens.chunk(2, dim=-1), sin.chunk(2, dim=-1)
    rotated = torch.mul(tokens, cos, out=tokens.new_empty(tokens.shape))
    of_first, of_second = rotated.chunk(2, dim=-1)
    of_first -= second * sin_first
    of_second += first * sin_second
    return rotated


_of_last: tuple[Any, ...] = ()


def _cos_and_sin(frequencies: torch.Tensor, scale: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `scale` times both in `dtype`; those of the last angles are at hand, which all layers of a pass share."""
    global _of_last
    if not (_of_last and _of_last[0]() is frequencies and _of_last[1:3] == (scale, dtype)):
        cos, sin = ((part * scale).to(dtype) for part in (torch.cos(frequencies), torch.sin(frequencies)))
        _of_last = weakref.ref(frequencies), scale, dtype, cos, sin
    return _of_last[3], _of_last[4]


def rotate_rows(
    tokens: torch.Tensor,
    frequencies: torch.Tensor,
    rotary_interleaved: bool = False,
    mla_rotary_interleaved: bool = False,
    mscale: float = 1.0,
) -> torch.Tensor:
    """Rotate the first dimensions of `tokens [seq, batch, heads, dim]` by angles `[seq, 1, 1, rotated]`, in radians.

    Su et al. 2021 (arXiv:2104.09864) eq. 34, with the arguments of Megatron-Core's own function, which goes on serving
    interleaved dimensions.
    """
    if rotary_interleaved or mla_rotary_interleaved:
        return _rotate_otherwise(tokens, frequencies, rotary_interleaved, mla_rotary_interleaved, mscale)
    size = frequencies.shape[-1]
    cos, sin = _cos_and_sin(frequencies, mscale, tokens.dtype)
    turned = tokens if size == tokens.shape[-1] else tokens[..., :size]
    rotated: torch.Tensor = (_Rotation.apply if torch.is_grad_enabled() else _rotate)(turned, cos, sin)
    return rotated if size == tokens.shape[-1] else torch.cat((rotated, tokens[..., size:]), dim=-1)


def compile_rotation() -> Any:
    """Return Megatron-Core's rotation as one compiled kernel instead of seven passes over queries and keys.

    Queries, keys, training, evaluation and samples each want one of their own: more than the eight that are usual.
    """
    torch._dynamo.config.recompile_limit = max(_NUM_COMPILED, torch._dynamo.config.recompile_limit)
    return torch.compile(rope_utils._apply_rotary_pos_emb_bshd)

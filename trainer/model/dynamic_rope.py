"""Rotary embedding whose frequencies follow from the length of the sequence at hand (`model.rope.scaling: dynamic`).

The length is that of the whole row, or of each document in packed rows, so that a document is rotated as it would be
alone, whatever its neighbours and microbatch. transformers takes the longest position of a batch for all of it, which
is the same for rows of equal length. Nothing here asks the host within a pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

from configs.sections.model import RopeConfig
from parallel.sequence_split import segments_of
from trainer.model.attention.cache import CachedTokens
from trainer.model.attention.documents import PackedDocuments
from trainer.model.rope import compute_dynamic_frequencies
from trainer.model.rotate import angles_of_this_rank


class DynamicRotaryEmbedding(RotaryEmbedding):
    """Megatron-Core's embedding of a model chunk with dynamic NTK scaling (`trainer.model.rope`)."""

    def __init__(self, rope: RopeConfig, head_dim: int, like: RotaryEmbedding, device: torch.device) -> None:
        super().__init__(head_dim, rope.fraction, rope.interleaved, rotary_base=rope.base, cp_group=like.cp_group)
        self._rope, self._head_dim, self._device = rope, head_dim, device
        self.length: int | None = None
        """Tokens of a row without what was appended to it; None where nothing was."""
        self._of_tokens: tuple[torch.Tensor, torch.Tensor] | None = None

    def forward(self, max_seq_len: int, offset: int = 0, packed_seq: bool = False, cp_group: Any = None) -> Any:
        """Return this rank's angles `[seq, 1, 1, rotated]` in radians; of packed rows, one a token (`see_documents`).

        Unlike Megatron-Core's, not remembered by the length alone.
        """
        angles = self.get_emb(max_seq_len)
        group = self.cp_group if cp_group is None else cp_group
        return angles if packed_seq or group.size() == 1 else angles_of_this_rank(angles, 0, group)

    def get_freqs_non_repeated(self, max_seq_len: int, offset: int = 0) -> torch.Tensor:
        """Return the angles `[seq, rotated / 2]`, one a pair of dimensions."""
        if self._of_tokens is not None:
            positions, frequencies = self._of_tokens
            return positions.to(torch.float32).unsqueeze(1) * frequencies
        length = torch.full((1,), self.length or max_seq_len, dtype=torch.int64, device=self._device)
        positions = torch.arange(max_seq_len, dtype=torch.float32, device=self._device)
        return torch.outer(positions, compute_dynamic_frequencies(self._rope, self._head_dim, length)[0])

    def see_documents(self, positions: torch.Tensor, packed: PackedDocuments | None) -> None:
        """Take the next pass's `positions [total]` of this rank in their documents, or None for rows alone.

        In generation a token is rotated by the length that its row has when it comes, as transformers does it: keys
        that are in the cache keep their angles, which a forward pass over the whole text would not give them.
        """
        self._of_tokens = None
        if packed is None:
            return
        if isinstance(packed, CachedTokens):
            frequencies = compute_dynamic_frequencies(self._rope, self._head_dim, packed.lengths)
            self._of_tokens = positions, frequencies
            return
        lengths = packed.cu_seqlens_q.diff()  # [num_documents]
        frequencies = compute_dynamic_frequencies(self._rope, self._head_dim, lengths)
        total = packed.bounds[-1]
        document = torch.arange(len(lengths), device=lengths.device)
        document = torch.repeat_interleave(document, lengths, output_size=total)
        if self.cp_group.size() > 1:
            rank, size, rows = self.cp_group.rank(), self.cp_group.size(), packed.num_rows
            mine = segments_of(rank, size, num_rows=rows, seq_len=total // rows)
            document = torch.cat([document.narrow(0, one.start, one.length) for one in mine])
        self._of_tokens = positions, frequencies[document]


def rotate_by_document(chunk: torch.nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Show the packed documents to the embedding: what `rotate_by_position` is elsewhere.

    There is an angle for each token then, and `rotate_documents` needs no positions.
    """
    packed, positions = options.get("packed_seq_params"), args[1].flatten()
    chunk.rotary_pos_emb.see_documents(positions, packed)  # type: ignore[union-attr,operator]
    if packed is None:
        return None
    none = positions[:0]
    packed = replace(packed, cu_seqlens_q_padded=none, cu_seqlens_kv_padded=none)
    return args, options | {"packed_seq_params": packed}


@contextlib.contextmanager
def rotated_at(length: int, chunks: Sequence[Any]) -> Iterator[None]:
    """Let chunks rotate rows as those of `length` tokens, the others having been appended."""
    embeddings = [getattr(chunk, "rotary_pos_emb", None) for chunk in chunks]  # latent attention has none here
    dynamic = [one for one in embeddings if isinstance(one, DynamicRotaryEmbedding)]
    for embedding in dynamic:
        embedding.length = length
    try:
        yield
    finally:
        for embedding in dynamic:
            embedding.length = None

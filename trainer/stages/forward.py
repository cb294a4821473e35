"""Batch -> language model: the forward pass that pretraining, long context and SFT share."""

from __future__ import annotations

from typing import Any

import torch

from trainer.data.batch import Batch
from trainer.model.attention.documents import PackedDocuments
from trainer.model.output_loss import compute_token_losses


def forward_language_model(model: Any, batch: Batch) -> torch.Tensor:
    """Return per-token losses `[batch, seq]` in nats from the last chunk, hidden states from the others.

    With document boundaries the rows are laid end to end (`[1, batch * seq]`) and each document is attended alone,
    with its own positions.
    """
    documents = batch.documents
    if documents is None:
        return model(batch.tokens, batch.position_ids, None, labels=batch.labels, output_processor=compute_token_losses)
    packed = PackedDocuments(
        qkv_format="thd",
        cu_seqlens_q=documents.cu_seqlens,
        cu_seqlens_kv=documents.cu_seqlens,
        max_seqlen_q=documents.max_seqlen,
        max_seqlen_kv=documents.max_seqlen,
        bounds=documents.bounds,
        num_rows=len(batch.tokens),
    )
    flat = [part.reshape(1, -1) for part in (batch.tokens, batch.position_ids, batch.labels)]
    return model(
        flat[0], flat[1], None, labels=flat[2], packed_seq_params=packed, output_processor=compute_token_losses
    )

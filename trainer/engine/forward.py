"""Batch -> model: the forward passes that every stage shares, to losses, scores of the labels, or values."""

from __future__ import annotations

from typing import Any

import torch

from trainer.data.batch import Batch
from trainer.model.attention.cache import CachedTokens
from trainer.model.attention.documents import PackedDocuments
from trainer.model.chosen_logits import compute_chosen_logits
from trainer.model.divergence import TopK
from trainer.model.output_divergence import Lesson, compute_divergences, compute_top_k, give_hidden
from trainer.model.output_loss import compute_token_losses, compute_token_scores
from trainer.model.scalar_head import compute_values
from trainer.model.token_scores import Scoring, TokenScores


def forward_language_model(model: Any, batch: Batch, *, label_smoothing: float = 0.0) -> torch.Tensor:
    """Return per-token losses `[batch, seq]` in nats from the last chunk, hidden states from the others.

    `label_smoothing` is the share of the target that all ids have alike (`trainer.model.output_loss`); with one the
    losses are `[2, batch, seq]`: with it and, without a gradient, without it.

    With document boundaries the rows are laid end to end (`[1, batch * seq]`) and each document is attended alone,
    with its own positions.
    """
    smoothing = {"output_processor_context": label_smoothing} if label_smoothing else {}
    output = _forward(model, batch, output_processor=compute_token_losses, **smoothing)
    if isinstance(output, tuple):
        return torch.stack([one.view_as(batch.labels) for one in output])
    return output.view_as(batch.labels) if output.dim() == batch.labels.dim() else output


def score_language_model(
    model: Any, batch: Batch, *, temperature: float = 1.0, entropy: bool = False, is_greedy: bool = False
) -> Any:
    """Return the `TokenScores` of the labels from the last chunk, hidden states from the others.

    Log-probabilities always, `[batch, seq]`, and what else is asked for, of softmax(logits / temperature).
    """
    asked = Scoring(temperature, entropy, is_greedy)
    output = _forward(model, batch, output_processor=compute_token_scores, output_processor_context=asked)
    return output.map(lambda one: one.view_as(batch.labels)) if isinstance(output, TokenScores) else output


def forward_values(model: Any, batch: Batch) -> torch.Tensor:
    """Return the fp32 value of each token `[batch, seq]` from the last chunk, hidden states from the others.

    For models with a scalar head. The value at a token is said after reading it and what comes before.
    """
    output = _forward(model, batch, output_processor=compute_values)
    return output.view_as(batch.tokens) if output.dim() == batch.tokens.dim() else output


def diverge_language_model(model: Any, batch: Batch, lesson: Lesson) -> torch.Tensor:
    """Return what the lesson asks for, `[num_outputs, batch, seq]`, from the last chunk, hidden states from the others.

    What the teacher says is `[batch, seq, ...]`.
    """
    if batch.documents is not None:
        lesson = lesson.map(lambda one: one.reshape(1, -1, *one.shape[2:]))
    output = _forward(model, batch, output_processor=compute_divergences, output_processor_context=lesson)
    return torch.stack([one.view_as(batch.labels) for one in output]) if isinstance(output, tuple) else output


def find_likeliest(model: Any, batch: Batch, k: int, temperature: float) -> Any:
    """Return the `TopK` of each token, `[batch, seq, k]`, from the last chunk, hidden states from the others."""
    output = _forward(model, batch, output_processor=compute_top_k, output_processor_context=(k, temperature))
    return output.map(lambda one: one.view(*batch.labels.shape, *one.shape[2:])) if isinstance(output, TopK) else output


def give_last_hidden(model: Any, batch: Batch) -> torch.Tensor:
    """Return the last hidden states `[batch, seq, hidden]` from the last chunk, other hidden states from the others."""
    output = _forward(model, batch, output_processor=give_hidden)
    return output[0].view(*batch.labels.shape, -1) if isinstance(output, tuple) else output


def forward_cached(model: Any, tokens: CachedTokens) -> torch.Tensor:
    """Return the logits `[wanted, vocab/tp]` of the tokens that are wanted, hidden states from chunks but the last."""
    wanted = slice(0, len(tokens.slots or ())) if tokens.wanted is None else tokens.wanted
    return model(
        tokens.ids[None],
        tokens.positions[None],
        None,
        packed_seq_params=tokens,
        output_processor=compute_chosen_logits,
        output_processor_context=wanted,
    )


def _forward(model: Any, batch: Batch, **options: Any) -> Any:
    documents = batch.documents
    if documents is None:
        return model(batch.tokens, batch.position_ids, None, labels=batch.labels, **options)
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
    return model(flat[0], flat[1], None, labels=flat[2], packed_seq_params=packed, **options)

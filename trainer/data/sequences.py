"""Answers in packed batches of comparisons: which tokens are whose, and what each answer is known by."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from itertools import pairwise

import torch

from trainer.data.batch import Batch, with_sample_weights


def with_sequences(batch: Batch) -> Batch:
    """Return `batch` of comparisons (column `sides`) with its answers numbered: 2i and 2i + 1 are compared.

    Columns, int64 and int32 `[micro_batch, seq]`: `sequence`, each token's answer, -1 in padding, and `ends`, 1 at the
    last trained token of each even answer, so that their sum counts comparisons on any split. Of answers
    `[num_sequences]`: `side`, int64, and `num_tokens`, fp32, the trained ones.
    """
    assert batch.documents is not None
    lengths = torch.tensor(batch.documents.bounds).diff()
    document = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    side = torch.zeros(len(lengths), dtype=torch.int64)
    side.scatter_reduce_(0, document, batch.columns["sides"].flatten(), "amax")
    is_answer = side > 0  # padding is none
    number = torch.where(is_answer, is_answer.cumsum(0) - 1, -1)
    sequence = number[document]
    num_tokens = torch.zeros(len(lengths)).index_add_(0, document, (batch.loss_mask > 0).flatten().float())
    ends = with_sample_weights(batch).columns["ends"]
    sequence = sequence.view(batch.tokens.shape)
    columns = {name: column for name, column in batch.columns.items() if name != "sides"}
    columns |= {"sequence": sequence, "ends": torch.where(sequence % 2 == 0, ends, 0)}
    return replace(batch, columns=columns, sequences={"side": side[is_answer], "num_tokens": num_tokens[is_answer]})


def with_margins(batch: Batch) -> Batch:
    """Return `batch` of scored comparisons as `with_sequences` does, with the `margin` of each pair, fp32 `[pairs]`."""
    numbered = with_sequences(batch)
    columns = dict(numbered.columns)
    bits, sequence = columns.pop("margins").flatten(), columns["sequence"].flatten()
    firsts = (sequence % 2 == 0) & (batch.position_ids.flatten() == 0)  # the beginning of every even answer
    margin = bits[firsts].to(torch.int32).view(torch.float32)
    return replace(numbered, columns=columns, sequences={**numbered.sequences, "margin": margin})


def sequence_keys(batch: Batch) -> dict[int, int]:
    """Return by number what each answer of a whole batch is known by wherever it lies: a hash of its tokens and mask.

    Answers whose loss was taken out (`without_loss`) have none.
    """
    assert batch.documents is not None
    sequence = batch.columns["sequence"].flatten()
    parts = [part.flatten().numpy() for part in (batch.tokens, batch.labels, batch.loss_mask)]
    keys = {}
    for start, end in pairwise(batch.documents.bounds):
        if parts[-1][start:end].any():
            content = b"".join(part[start:end].tobytes() for part in parts)
            digest = hashlib.blake2b(content, digest_size=8).digest()
            keys[int(sequence[start])] = int.from_bytes(digest, "little", signed=True)
    return keys


def sum_by_sequence(values: torch.Tensor, sequence: torch.Tensor, num_sequences: int) -> torch.Tensor:
    """Return the sums `[num_sequences]` of `values` over the tokens of each answer, both of one shape; with gradient.

    In an order that does not change, which atomic additions on a GPU would not keep.
    """
    numbers = torch.arange(num_sequences, device=sequence.device).unsqueeze(-1)
    return torch.where(sequence.flatten() == numbers, values.flatten(), 0.0).sum(-1)

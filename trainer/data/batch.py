"""The batch: what one microbatch of one data-parallel rank holds, for every stage of training.

Knows nothing of where the tokens came from, of models or of losses.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from configs.plan.flops import attended_pairs
from parallel.sequence_split import segments_of


@dataclass(frozen=True)
class Documents:
    """Where attention stops: boundaries over the flattened micro_batch*seq tokens; every row start is one too."""

    bounds: tuple[int, ...]  # [num_documents + 1], from 0 to micro_batch*seq of all ranks that share the rows
    cu_seqlens: Tensor  # the same, int32
    max_seqlen: int  # tokens of the longest document

    @classmethod
    def build(cls, bounds: Tensor) -> Documents:
        """Return the documents between boundaries `[num_documents + 1]`."""
        return cls(tuple(bounds.tolist()), bounds.to(torch.int32), int(bounds.diff().max()))


@dataclass(frozen=True)
class Batch:
    """One microbatch of one data-parallel rank.

    Without `documents`, attention is causal over each row. `columns` and `sequences` are what a stage's objective needs
    beside: values per token, such as advantages, and per document that counts, such as which of a pair it is.
    """

    tokens: Tensor  # int64 [micro_batch, seq]
    labels: Tensor  # int64 [micro_batch, seq], the token that follows each token
    position_ids: Tensor  # int64 [micro_batch, seq]
    loss_mask: Tensor  # float32 [micro_batch, seq], 0 where the label does not count
    documents: Documents | None = None
    columns: Mapping[str, Tensor] = field(default_factory=dict)  # [micro_batch, seq] each
    sequences: Mapping[str, Tensor] = field(default_factory=dict)  # [num_sequences] each, alike on all cp ranks
    sample_ids: tuple[int, ...] = ()  # global sample number of each row, -1 for padding; for error reports
    cp_size: int = 1  # ranks that share each row; `documents` are those of the whole rows

    def num_attended_pairs(self, windows: Sequence[int | None]) -> float:
        """Return the `configs.plan.flops.attended_pairs` of what attention sees at once, over layers of these windows.

        Of rows that ranks share, this rank's part.
        """
        rows, seq_len = self.tokens.shape
        if self.documents is None:
            each = Counter({seq_len * self.cp_size: rows})
        else:
            bounds = self.documents.bounds
            each = Counter(end - start for start, end in zip(bounds[:-1], bounds[1:], strict=True))
        pairs = sum(
            layers * times * attended_pairs(length, window)
            for window, layers in Counter(windows).items()
            for length, times in each.items()
        )
        return pairs / self.cp_size

    def to(self, device: torch.device) -> Batch:
        """Copy the tensors to `device`, through pinned memory and without waiting when it is not where they are."""
        documents = self.documents
        return replace(
            self,
            tokens=copy_to(self.tokens, device),
            labels=copy_to(self.labels, device),
            position_ids=copy_to(self.position_ids, device),
            loss_mask=copy_to(self.loss_mask, device),
            documents=documents and replace(documents, cu_seqlens=copy_to(documents.cu_seqlens, device)),
            columns={name: copy_to(column, device) for name, column in self.columns.items()},
            sequences={name: copy_to(values, device) for name, values in self.sequences.items()},
        )


def build_batch(windows: NDArray[np.int64], sample_ids: tuple[int, ...], document_end_id: int | None = None) -> Batch:
    """Build the pretraining batch of `windows` int64 [micro_batch, seq + 1]: every token predicts the next one.

    With `document_end_id`, attention and positions stay inside documents: a document ends after that token, and the
    token itself, whose label begins a stranger's text, has no loss. Without it every token counts, as in Megatron-LM.
    """
    tokens = torch.from_numpy(np.ascontiguousarray(windows[:, :-1]))
    labels = torch.from_numpy(np.ascontiguousarray(windows[:, 1:]))
    micro_batch_size, seq_len = tokens.shape
    if document_end_id is None:
        positions = torch.arange(seq_len, dtype=torch.int64).expand(micro_batch_size, seq_len).contiguous()
        return Batch(tokens, labels, positions, torch.ones(tokens.shape, dtype=torch.float32), sample_ids=sample_ids)
    loss_mask = (tokens != document_end_id).to(torch.float32)
    boundaries = document_boundaries(tokens, document_end_id)  # int64 [num_documents + 1]
    lengths = boundaries.diff()
    starts = torch.repeat_interleave(boundaries[:-1], lengths)
    positions = (torch.arange(tokens.numel(), dtype=torch.int64) - starts).view(tokens.shape)
    return Batch(tokens, labels, positions, loss_mask, Documents.build(boundaries), sample_ids=sample_ids)


def build_packed_batch(rows: NDArray[np.int64], sample_ids: tuple[int, ...]) -> Batch:
    """Build the batch of packed `rows` int64 [micro_batch, 3, seq]: tokens, labels and positions.

    A document begins wherever a position is 0, so that no token needs to say so, and a label of -1 counts for nothing.
    A fourth plane, of comparisons, is the column `sides`, and a fifth `margins`.
    """
    tokens, labels, positions, *further = torch.from_numpy(rows).transpose(0, 1).contiguous()
    starts = (positions.flatten() == 0).nonzero().flatten()
    boundaries = torch.cat([starts, torch.tensor([tokens.numel()])])  # int64 [num_documents + 1]
    loss_mask = (labels >= 0).to(torch.float32)
    documents = Documents.build(boundaries)
    columns = dict(zip(["sides", "margins"], further, strict=False))
    return Batch(tokens, labels.clamp(min=0), positions, loss_mask, documents, columns, sample_ids=sample_ids)


def with_sample_weights(batch: Batch) -> Batch:
    """Return `batch` of packed documents with what weighs every document alike: two columns `[micro_batch, seq]`.

    `weights`, fp32: one over the number of trained tokens of the token's document, 0 where the token is not trained.
    `ends`, int32: 1 at the last trained token of each document, so that their sum counts documents on any split.
    """
    assert batch.documents is not None
    trained = (batch.loss_mask > 0).flatten()
    lengths = torch.tensor(batch.documents.bounds).diff()
    document = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    counts = torch.zeros(len(lengths), dtype=torch.int64).index_add_(0, document, trained.long())
    weights = torch.where(trained, 1 / counts.clamp(min=1)[document], 0.0)
    places = torch.where(trained, torch.arange(trained.numel()), -1)
    last = torch.full((len(lengths),), -1).scatter_reduce_(0, document, places, "amax")
    ends = torch.zeros(trained.numel(), dtype=torch.int32)
    ends[last[last >= 0]] = 1
    shape = batch.tokens.shape
    return replace(batch, columns={**batch.columns, "weights": weights.view(shape), "ends": ends.view(shape)})


def with_document_lengths(batch: Batch) -> Batch:
    """Return `batch` of packed documents with a column `lengths`, fp32: the tokens of each token's document."""
    assert batch.documents is not None
    lengths = torch.tensor(batch.documents.bounds).diff()
    column = torch.repeat_interleave(lengths.float(), lengths).view(batch.tokens.shape)
    return replace(batch, columns={**batch.columns, "lengths": column})


def document_boundaries(tokens: Tensor, document_end_id: int) -> Tensor:
    """Compute where documents begin in `tokens` [micro_batch, seq] flattened, and its end: int64 [num_documents + 1].

    A document begins at every row start and after every `document_end_id`.
    """
    micro_batch_size, seq_len = tokens.shape
    rows = torch.arange(micro_batch_size + 1, dtype=torch.int64) * seq_len
    after_ends = (tokens.flatten() == document_end_id).nonzero().flatten() + 1
    return torch.unique(torch.cat([rows, after_ends]))


def share_of(batch: Batch, cp_rank: int, cp_size: int) -> Batch:
    """Return one context-parallel rank's part of every row; `parallel.sequence_split` says which."""
    if cp_size == 1:
        return batch
    segments = segments_of(cp_rank, cp_size, num_rows=1, seq_len=batch.tokens.shape[1])

    def cut(column: Tensor) -> Tensor:
        return torch.cat([column[:, segment.start : segment.end] for segment in segments], dim=1)

    return replace(
        batch,
        tokens=cut(batch.tokens),
        labels=cut(batch.labels),
        position_ids=cut(batch.position_ids),
        loss_mask=cut(batch.loss_mask),
        columns={name: cut(column) for name, column in batch.columns.items()},
        cp_size=cp_size,
    )


def without_loss(batch: Batch, row: int) -> Batch:
    """Return `batch` with the loss of its rows from `row` on taken out and their sample numbers set to -1."""

    def blank(column: Tensor) -> Tensor:
        column = column.clone()
        column[row:] = 0
        return column

    padding = (-1,) * (len(batch.sample_ids) - row)
    columns = {name: blank(column) for name, column in batch.columns.items()}
    sample_ids = batch.sample_ids[:row] + padding
    return replace(batch, loss_mask=blank(batch.loss_mask), columns=columns, sample_ids=sample_ids)


def copy_to(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to `device` through pinned memory, without waiting, when it is not where it is."""
    if tensor.device.type == device.type:
        return tensor.to(device)
    return tensor.contiguous().pin_memory().to(device, non_blocking=True)  # an expanded one cannot be pinned

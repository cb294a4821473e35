"""The `data` section: what the model reads. Torch-free plain data."""

from __future__ import annotations

import os
from typing import Annotated, Literal

from pydantic import Field

from configs.sections.base import DataPrefix, PathText, PositiveFloat, PositiveInt, Section


class SourceConfig(Section):
    """One tokenized source of a blend."""

    path: Annotated[DataPrefix, Field(examples=["data/corpus_train"])]
    """Prefix of a Megatron dataset: `<path>.bin` and `<path>.idx` must exist."""
    weight: PositiveFloat = 1.0
    """Share of samples drawn from this source, relative to the other weights."""
    long_document_tokens: PositiveInt | None = None
    """Tokens from which on a document of this source counts as long (with long_document_share)."""
    long_document_share: Annotated[float, Field(gt=0, le=1, examples=[0.7])] | None = None
    """Share of this source's samples drawn from its long documents alone, instead of as they come."""

    @property
    def name(self) -> str:
        """File name of the prefix: under it validation is logged."""
        return os.path.basename(self.path)

    @property
    def origin(self) -> str:
        """What the user gave as the data: under it a checkpoint knows how much was read."""
        return self.path


class DataConfig(Section):
    """What the model reads."""

    tokenizer: PathText | None = None
    """Directory of the Hugging Face tokenizer the data was made with; its vocabulary hash is checked."""
    train: tuple[SourceConfig, ...] = ()
    """Blend of training sources. With long_document_tokens and long_document_share (0 to 1), so much of what is drawn
    of a source comes from its documents of at least that many tokens."""
    validation: tuple[SourceConfig, ...] = ()
    """Validation sources; each is evaluated on its own and logged under its file name."""
    packing: Literal["concat", "best_fit", "padded"] = "concat"
    """How samples are made: documents laid end to end and cut, packed whole into rows (best_fit, needs document_mask),
    or each in a row of its own."""
    document_mask: bool = False
    """Keep attention inside documents, with positions starting at 0 in each, instead of across the whole sample."""
    prefetch_steps: PositiveInt = 2
    """Steps read ahead by a background thread."""

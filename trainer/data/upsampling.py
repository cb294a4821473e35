"""Length upsampling: a source as two, its long documents and the others, each with its share of what is drawn.

Fu et al. 2024, "Data Engineering for Scaling Language Models to 128K Context" (arXiv:2402.10171): within each source,
so that the shares of the sources stay what they are. Knows nothing of blends or of how samples are cut.
"""

from __future__ import annotations

import numpy as np

from configs.errors import BadInput
from configs.sections.data import SourceConfig
from trainer.data.indexed import TokenDataset

_PART = "/long_document_tokens="


def split_by_length(dataset: TokenDataset, source: SourceConfig) -> list[tuple[TokenDataset, float]]:
    """Return the parts of a source and the weight of each: long documents and the others, or the whole source.

    Raises BadInput where one of the two has no documents to draw from.
    """
    tokens, share = source.long_document_tokens, source.long_document_share
    if tokens is None or share is None:
        return [(dataset, source.weight)]
    is_long = dataset.lengths >= tokens
    field, shortest, longest = f"data.train: {dataset.prefix}", int(dataset.lengths.min()), int(dataset.lengths.max())
    if not is_long.any():
        works = str(longest) if shortest < longest or share == 1 else "null for it and for long_document_share"
        raise BadInput(
            f"{field} has no document of long_document_tokens={tokens} tokens, its longest has {longest}; a value that "
            f"would work: {works}"
        )
    if is_long.all() and share < 1:
        raise BadInput(
            f"{field} has no document of fewer than long_document_tokens={tokens} tokens, its shortest has {shortest}; "
            "a value that would work: long_document_share=1.0"
        )
    long = dataset.subset(
        np.flatnonzero(is_long), f"{dataset.prefix} (documents of at least {tokens} tokens)", f"{_PART}{tokens}/long"
    )
    if share == 1:
        return [(long, source.weight)]
    short = dataset.subset(
        np.flatnonzero(~is_long),
        f"{dataset.prefix} (documents of fewer than {tokens} tokens)",
        f"{_PART}{tokens}/short",
    )
    return [(long, source.weight * share), (short, source.weight * (1 - share))]


def whole_and_threshold(identity: str) -> tuple[str, int | None]:
    """Return the identity of the whole source that one is part of, and its `long_document_tokens`; None is no part."""
    whole, _, part = identity.partition(_PART)
    return whole, int(part.partition("/")[0]) if part else None

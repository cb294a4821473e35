"""Documents that are long enough to measure on. Torch-free."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from configs.errors import BadInput
from trainer.data.indexed import TokenDataset


def read_long_documents(dataset: TokenDataset, length: int, num_samples: int) -> NDArray[np.int64]:
    """Return the beginnings of the first documents that are long enough: `[at most num_samples, length + 1]`.

    Raises BadInput where there is none.
    """
    documents = np.flatnonzero(dataset.lengths > length)[:num_samples]
    if not documents.size:
        raise BadInput(
            f"--data {dataset.prefix}: no document has more than {length} tokens, the longest has "
            f"{int(dataset.lengths.max(initial=0))}; give data with longer ones, or smaller --lengths"
        )
    return np.stack([dataset.read(int(document), 0, length + 1) for document in documents]).astype(np.int64)

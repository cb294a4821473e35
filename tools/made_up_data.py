"""Random tokens as a real dataset on disk, for benchmarks and checks that need the data path but no text."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def write_made_up_dataset(prefix: Path, *, num_tokens: int, vocab_size: int, seed: int = 0) -> None:
    """Write `<prefix>.bin` and `.idx`: documents of 64 to 1024 random token ids, `num_tokens` or a little more.

    `vocab_size` must be at most 65536, since ids are written as uint16.
    """
    from trainer.data.making.parts import write_dataset

    random = np.random.default_rng(seed)
    num_documents = num_tokens // 64 + 1
    lengths = random.integers(64, 1025, num_documents).astype(np.int32)
    lengths = lengths[: int(np.searchsorted(np.cumsum(lengths), num_tokens)) + 1]
    tokens = random.integers(0, vocab_size, int(lengths.sum())).astype(np.uint16)
    write_dataset(prefix, tokens, lengths)

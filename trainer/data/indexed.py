"""A tokenized dataset on disk: Megatron's `<prefix>.bin` and `.idx`, and `<prefix>.meta.json` on their making.

Every file is checked before it is opened. Torch-free: Megatron-Core's reader would cost every command 18 CPU seconds of
imports. Knows nothing of order, windows or batches.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from configs.errors import BadInput
from trainer.data.index_file import COPY_OR_MAKE_AGAIN, MAKE_AGAIN, Index, read_index
from trainer.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class DatasetMeta:
    """What `<prefix>.meta.json` says: the tokenizer the data was made with, its size and where it came from."""

    vocabulary_hash: str
    vocab_size: int
    eod_id: int
    dtype: str
    num_documents: int
    num_tokens: int
    num_empty_documents: int
    fingerprint: str
    bin_sha256: str
    idx_sha256: str
    sources: list[dict[str, str | int]] = field(default_factory=list)
    eod_token: str | None = None  # None: made before it was written down
    bos_id: int | None = None  # what every document begins with, if anything
    num_missing_documents: int = 0  # records without text, left out

    def write(self, file: Path) -> None:
        """Write as JSON, atomically."""
        temporary = file.with_name(file.name + ".tmp")
        temporary.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, file)


class TokenDataset:
    """An open dataset: documents of token ids, read from a memory map."""

    def __init__(self, prefix: str) -> None:
        """Check and open `<prefix>.bin`, `.idx` and, where there is one, `.meta.json`. Raises BadInput."""
        index = check_files(prefix)
        self.prefix = prefix
        self.meta = read_meta(prefix)
        self.lengths: NDArray[np.int32] = index.lengths  # [num_documents] tokens of each document
        self.num_documents = len(index.lengths)
        self.num_tokens = index.num_bytes // np.dtype(index.dtype).itemsize
        self._dtype, self._itemsize = index.dtype, np.dtype(index.dtype).itemsize
        self._starts = index.starts
        self._content = memoryview(np.memmap(prefix + ".bin", dtype=np.uint8, mode="r"))

    @property
    def identity(self) -> str:
        """What the data is, wherever it lies: the order of samples and the ledger of what was read hang on it."""
        return self.meta.bin_sha256 if self.meta else f"{self.num_documents}-documents-{self.num_tokens}-tokens"

    def read(self, document: int, start: int, length: int) -> NDArray[np.integer]:
        """Read `length` tokens of `document` from its token `start` on; [length], a view of the mapped file."""
        try:
            begin = int(self._starts[document]) + start * self._itemsize
            return np.frombuffer(self._content, self._dtype, length, begin)
        except ValueError as error:
            raise BadInput(
                f"data {self.prefix}: its .idx points outside its .bin at document {document} ({error}); {MAKE_AGAIN}"
            ) from error


def check_sizes(prefix: str) -> Index:
    """Check that `<prefix>.bin` and `.idx` are there and have the sizes they must have; quick for any size of data.

    Raises BadInput with what to do.
    """
    idx, data = Path(prefix + ".idx"), Path(prefix + ".bin")
    for file in (data, idx):
        if not file.is_file():
            raise BadInput(f"data {file}: no such file; {MAKE_AGAIN} --out {prefix}")
    index = read_index(idx)
    _check_size(data, index.num_bytes)
    if index.num_bytes == 0:
        raise BadInput(f"data {data}: it holds no tokens; {MAKE_AGAIN} from files with text")
    return index


def check_files(prefix: str) -> Index:
    """Check that `<prefix>.bin`, `.idx` and, where there is one, `.meta.json` are whole and agree. Raises BadInput."""
    index = check_sizes(prefix)
    num_documents, num_tokens = len(index.lengths), int(index.lengths.sum(dtype=np.int64))
    if int(index.lengths.min()) < 0:
        raise BadInput(f"data {prefix}.idx: corrupted, a document has a negative length; {MAKE_AGAIN}")
    _check_size(Path(prefix + ".bin"), num_tokens * np.dtype(index.dtype).itemsize)
    meta = read_meta(prefix)
    if meta and (meta.num_tokens, meta.num_documents) != (num_tokens, num_documents):
        raise BadInput(
            f"data {prefix}.meta.json: it says {meta.num_documents} documents and {meta.num_tokens} tokens, "
            f"{Path(prefix).name}.idx says {num_documents} and {num_tokens}; {MAKE_AGAIN}"
        )
    return index


def _check_size(data: Path, expected: int) -> None:
    found = data.stat().st_size
    if found != expected:
        word = "truncated" if found < expected else "too long"
        idx = data.with_suffix(".idx").name
        raise BadInput(f"data {data}: {word}, {found} bytes where {idx} says {expected}; {COPY_OR_MAKE_AGAIN}")


def read_meta(prefix: str) -> DatasetMeta | None:
    """Read `<prefix>.meta.json`; None where there is none, as beside data made by Megatron-LM's own tools."""
    file = Path(prefix + ".meta.json")
    if not file.is_file():
        return None
    try:
        return DatasetMeta(**json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise BadInput(f"data {file}: not readable ({error}); {MAKE_AGAIN}") from error


def check_tokenizer(dataset: TokenDataset, tokenizer: Tokenizer, num_documents: int = 256) -> None:
    """Refuse a tokenizer the data was not made with: by vocabulary hash, or by the data itself without a meta file.

    Without `.meta.json` the first `num_documents` must have ids inside the vocabulary and end in the eos token.
    """
    advice = "set data.tokenizer to the directory the data was made with, or make the data again with this one"
    if dataset.meta:
        if dataset.meta.vocabulary_hash != tokenizer.vocabulary_hash:
            raise BadInput(
                f"data.tokenizer {tokenizer.directory}: its vocabulary hash {tokenizer.vocabulary_hash[:12]} is not "
                f"that of {dataset.prefix} ({dataset.meta.vocabulary_hash[:12]}); {advice}"
            )
        return
    for document in range(min(num_documents, dataset.num_documents)):
        length = int(dataset.lengths[document])
        tokens = dataset.read(document, 0, length)
        if length and (int(tokens.max()) >= tokenizer.vocab_size or int(tokens[-1]) != tokenizer.eod_id):
            raise BadInput(
                f"data.tokenizer {tokenizer.directory}: document {document} of {dataset.prefix} (which has no "
                f".meta.json) has ids outside its vocabulary or does not end in its eos token; {advice}"
            )


def check_vocab_size(dataset: TokenDataset, vocab_size: int) -> None:
    """Refuse data with token ids the model has no embedding for: `vocab_size` is `model.vocab_size`."""
    if dataset.meta and dataset.meta.vocab_size > vocab_size:
        raise BadInput(
            f"model.vocab_size: {vocab_size} is less than the {dataset.meta.vocab_size} token ids of {dataset.prefix}; "
            f"a value that would work: {dataset.meta.vocab_size}"
        )

"""A tokenized dataset on disk: Megatron's `<prefix>.bin` and `.idx`, and `<prefix>.meta.json` on their making.

Every file is checked before it is opened. Torch-free: Megatron-Core's reader would cost every command 18 CPU seconds of
imports. Knows nothing of order, windows or batches.
"""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from configs.errors import BadInput
from trainer.data.dataset_files import MARGINS_SUFFIX, MASK_SUFFIX, check_size, check_sizes, read_meta
from trainer.data.index_file import MAKE_AGAIN, Index, read_index
from trainer.data.tokenizer import Tokenizer


class TokenDataset:
    """An open dataset: documents of token ids, read from a memory map."""

    def __init__(self, prefix: str, origin: str | None = None) -> None:
        """Check and open `<prefix>.bin`, `.idx` and, where there is one, `.meta.json`. Raises BadInput.

        `origin` is the file that the dataset was made of behind the user's back.
        """
        index = check_files(prefix)
        self.prefix = prefix
        self.origin = origin or prefix
        """What the user knows the data by."""
        self.meta = read_meta(prefix)
        self.lengths: NDArray[np.int32] = index.lengths  # [num_documents] tokens of each document
        self.num_documents = index.header.num_documents
        self.num_tokens = index.header.num_tokens
        size = f"{self.num_documents}-documents-{self.num_tokens}-tokens"
        self.identity = self.meta.bin_sha256 if self.meta else size
        """What the data is, wherever it lies: the order of samples and the ledger of what was read depend on it."""
        self._dtype, self._itemsize = index.dtype, index.header.itemsize
        self._starts = index.starts
        self._content = memoryview(np.memmap(prefix + ".bin", dtype=np.uint8, mode="r"))
        self._mask: NDArray[np.uint8] | None = None
        if self.meta is not None and self.meta.mask_sha256 is not None:
            self._mask = np.memmap(prefix + MASK_SUFFIX, dtype=np.uint8, mode="r")
            self.identity += "/" + self.meta.mask_sha256
        self._margins: NDArray[np.float32] | None = None
        if self.meta is not None and self.meta.margins_sha256 is not None:
            self._margins = np.fromfile(prefix + MARGINS_SUFFIX, dtype=np.float32)
            self.identity += "/" + self.meta.margins_sha256

    def read(self, document: int, start: int, length: int) -> NDArray[np.integer]:
        """Read `length` tokens of `document` from its token `start` on; [length], a view of the mapped file."""
        try:
            begin = int(self._starts[document]) + start * self._itemsize
            return np.frombuffer(self._content, self._dtype, length, begin)
        except ValueError as error:
            raise BadInput(
                f"data {self.prefix}: its .idx points outside its .bin at document {document} ({error}); {MAKE_AGAIN}"
            ) from error

    def read_mask(self, document: int, start: int, length: int) -> NDArray[np.uint8] | None:
        """Read which of `length` tokens of `document` from its token `start` on are trained, 1 or 0; None: all are."""
        if self._mask is None:
            return None
        begin = int(self._starts[document]) // self._itemsize + start
        return self._mask[begin : begin + length]

    def read_margin(self, document: int) -> float:
        """Read by how much the better one of the pair is that a document is of; 0 where the data does not say."""
        return 0.0 if self._margins is None else float(self._margins[document])

    def subset(self, documents: NDArray[np.int64], prefix: str, part: str) -> TokenDataset:
        """Return the dataset of these documents alone, told from the whole by name and by `part` of its identity.

        12 bytes a document, where the whole has none.
        """
        chosen = copy.copy(self)
        chosen.prefix, chosen.origin, chosen.identity = prefix, prefix, self.identity + part
        chosen.lengths, chosen._starts = self.lengths[documents], self._starts[documents]
        chosen._margins = None if self._margins is None else self._margins[documents]
        chosen.num_documents, chosen.num_tokens = len(documents), int(chosen.lengths.sum(dtype=np.int64))
        return chosen


class MemoryDataset(TokenDataset):
    """The same of documents in memory, known by their content."""

    def __init__(
        self, name: str, tokens: NDArray[np.int32], mask: NDArray[np.uint8], lengths: NDArray[np.int32]
    ) -> None:
        """`tokens` and `mask` are those of all documents end to end, `[num_tokens]`; `name` is for messages."""
        self.prefix = self.origin = name
        self.meta = None
        self.lengths, self.num_documents, self.num_tokens = lengths, len(lengths), len(tokens)
        self.identity = hashlib.sha256(b"".join(part.tobytes() for part in (tokens, mask, lengths))).hexdigest()
        self._dtype, self._itemsize = tokens.dtype, tokens.itemsize
        self._starts = (np.cumsum(lengths, dtype=np.int64) - lengths) * tokens.itemsize
        self._content, self._mask, self._margins = memoryview(tokens), mask, None


def check_files(prefix: str) -> Index:
    """Check that `<prefix>.bin`, `.idx` and, where there is one, `.meta.json` are whole and agree. Raises BadInput."""
    header = check_sizes(prefix)
    index = read_index(Path(prefix + ".idx"))
    num_documents, num_tokens = header.num_documents, int(index.lengths.sum(dtype=np.int64))
    if int(index.lengths.min()) < 0:
        raise BadInput(f"data {prefix}.idx: corrupted, a document has a negative length; {MAKE_AGAIN}")
    check_size(Path(prefix + ".bin"), num_tokens * header.itemsize)
    meta = read_meta(prefix)
    if meta and (meta.num_tokens, meta.num_documents) != (num_tokens, num_documents):
        raise BadInput(
            f"data {prefix}.meta.json: it says {meta.num_documents} documents and {meta.num_tokens} tokens, "
            f"{Path(prefix).name}.idx says {num_documents} and {num_tokens}; {MAKE_AGAIN}"
        )
    return index


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

"""A tokenized dataset on disk: Megatron's `<prefix>.bin` and `.idx`, and `<prefix>.meta.json` on their making.

Every file is checked before it is opened, since megatron-core would fail with an assertion or read past the end.
Knows nothing of order, windows or batches. The one caller of megatron-core's `IndexedDataset`.
"""

from __future__ import annotations

import json
import os
import struct
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from configs.errors import BadInput
from trainer.data.tokenizer import Tokenizer

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document bounds
_DTYPES: dict[int, type[np.integer]] = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_MAKE_AGAIN = "make it again with tools/preprocess_data.py"
_COPY_OR_MAKE_AGAIN = f"copy it again or {_MAKE_AGAIN}"


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

    def write(self, file: Path) -> None:
        """Write as JSON, atomically."""
        temporary = file.with_name(file.name + ".tmp")
        temporary.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, file)


@dataclass(frozen=True)
class IndexHeader:
    """Sizes found in an `.idx` file."""

    dtype: type[np.integer]
    num_sequences: int
    num_tokens: int


class TokenDataset:
    """An open dataset: documents of token ids, read from a memory map."""

    def __init__(self, prefix: str) -> None:
        """Check and open `<prefix>.bin`, `.idx` and, where there is one, `.meta.json`. Raises BadInput."""
        header = check_files(prefix)
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        self.prefix = prefix
        self.meta = read_meta(prefix)
        self.num_tokens = header.num_tokens
        self.num_documents = header.num_sequences
        self._indexed = IndexedDataset(prefix)
        self.lengths: NDArray[np.int32] = self._indexed.sequence_lengths  # [num_documents] tokens of each document

    @property
    def identity(self) -> str:
        """What the data is, wherever it lies: the order of samples and the ledger of what was read hang on it."""
        return self.meta.bin_sha256 if self.meta else f"{self.num_documents}-documents-{self.num_tokens}-tokens"

    def read(self, document: int, start: int, length: int) -> NDArray[np.integer]:
        """Read `length` tokens of `document` from its token `start` on; [length], a view of the mapped file."""
        try:
            return self._indexed.get(document, offset=start, length=length)
        except ValueError as error:
            raise BadInput(
                f"data {self.prefix}: its .idx points outside its .bin at document {document} ({error}); {_MAKE_AGAIN}"
            ) from error


def check_files(prefix: str) -> IndexHeader:
    """Check that `<prefix>.bin` and `.idx` are there, whole and of one mind. Raises BadInput with what to do."""
    idx, data = Path(prefix + ".idx"), Path(prefix + ".bin")
    for file in (data, idx):
        if not file.is_file():
            raise BadInput(f"data {file}: no such file; {_MAKE_AGAIN} --out {prefix}")
    header, lengths = _read_index(idx)
    itemsize = np.dtype(header.dtype).itemsize
    expected, found = header.num_tokens * itemsize, data.stat().st_size
    if found != expected:
        word = "truncated" if found < expected else "too long"
        raise BadInput(f"data {data}: {word}, {found} bytes where {idx.name} says {expected}; {_COPY_OR_MAKE_AGAIN}")
    if header.num_tokens == 0:
        raise BadInput(f"data {data}: it holds no tokens; {_MAKE_AGAIN} from files with text")
    if int(lengths.min()) < 0:
        raise BadInput(f"data {idx}: corrupted, a document has a negative length; {_MAKE_AGAIN}")
    meta = read_meta(prefix)
    if meta and (meta.num_tokens, meta.num_documents) != (header.num_tokens, header.num_sequences):
        raise BadInput(
            f"data {prefix}.meta.json: it says {meta.num_documents} documents and {meta.num_tokens} tokens, "
            f"{idx.name} says {header.num_sequences} and {header.num_tokens}; {_MAKE_AGAIN}"
        )
    return header


def _read_index(idx: Path) -> tuple[IndexHeader, NDArray[np.int32]]:
    """Read the header and the document lengths of an `.idx` file, checking its size against its own counts."""
    size = idx.stat().st_size
    with idx.open("rb") as stream:
        start = stream.read(_HEADER.size)
    if not start.startswith(_MAGIC[: len(start)]) or not start:
        raise BadInput(f"data {idx}: not a Megatron index (bad magic bytes); {_MAKE_AGAIN}")
    if len(start) < _HEADER.size:
        raise BadInput(f"data {idx}: truncated, {size} bytes are less than its header; {_COPY_OR_MAKE_AGAIN}")
    _, version, code, num_sequences, num_bounds = _HEADER.unpack(start)
    if version != 1 or code not in _DTYPES:
        raise BadInput(f"data {idx}: version {version} with dtype code {code} is not a token index; {_MAKE_AGAIN}")
    expected = _HEADER.size + num_sequences * (4 + 8) + num_bounds * 8
    if size != expected:
        word = "truncated" if size < expected else "too long"
        raise BadInput(f"data {idx}: {word}, {size} bytes where its header says {expected}; {_COPY_OR_MAKE_AGAIN}")
    if num_sequences == 0:
        raise BadInput(f"data {idx}: it holds no documents; {_MAKE_AGAIN} from files with text")
    lengths = np.memmap(idx, dtype=np.int32, mode="r", offset=_HEADER.size, shape=(num_sequences,))
    return IndexHeader(_DTYPES[code], num_sequences, int(lengths.sum(dtype=np.int64))), lengths


def read_meta(prefix: str) -> DatasetMeta | None:
    """Read `<prefix>.meta.json`; None where there is none, as beside data made by Megatron-LM's own tools."""
    file = Path(prefix + ".meta.json")
    if not file.is_file():
        return None
    try:
        return DatasetMeta(**json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise BadInput(f"data {file}: not readable ({error}); {_MAKE_AGAIN}") from error


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

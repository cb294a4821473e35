"""Megatron's `.idx` format: read with its sizes checked, and written byte for byte as Megatron-Core writes it.

Little-endian: a header, then of each document the tokens (int32) and the byte in `.bin` where it begins (int64), then
the bounds of the documents (int64; 0, 1, 2 ... here, as every document is one sequence). Torch-free, and the header
numpy-free too, so that a command that only looks whether data is there starts at once.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from configs.errors import BadInput

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAKE_AGAIN = "make it again with tools/preprocess_data.py"
COPY_OR_MAKE_AGAIN = f"copy it again or {MAKE_AGAIN}"
_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document bounds
# Megatron-Core's `DType`, as far as it is whole numbers: name and bytes of each code.
_DTYPES = {1: ("uint8", 1), 2: ("int8", 1), 3: ("int16", 2), 4: ("int32", 4), 5: ("int64", 8), 8: ("uint16", 2)}


@dataclass(frozen=True)
class IndexHeader:
    """What the head and the tail of an `.idx` file say."""

    dtype_name: str
    itemsize: int  # bytes of a token
    num_documents: int
    num_tokens: int  # as far as the last document's place tells


@dataclass(frozen=True)
class Index:
    """An open `.idx` file; the arrays are views of a memory map."""

    header: IndexHeader
    dtype: np.dtype
    lengths: NDArray[np.int32]  # [num_documents] tokens of each
    starts: NDArray[np.int64]  # [num_documents] byte in `.bin` where each begins


def read_header(idx: Path) -> IndexHeader:
    """Read an `.idx` file's header and last entries, checking its size. Raises BadInput.

    Takes as long for a large file as for a small one.
    """
    size = idx.stat().st_size
    with idx.open("rb") as stream:
        start = stream.read(_HEADER.size)
        if not start.startswith(_MAGIC[: len(start)]) or not start:
            raise BadInput(f"data {idx}: not a Megatron index (bad magic bytes); {MAKE_AGAIN}")
        if len(start) < _HEADER.size:
            raise BadInput(f"data {idx}: truncated, {size} bytes are less than its header; {COPY_OR_MAKE_AGAIN}")
        _, version, code, num_sequences, num_bounds = _HEADER.unpack(start)
        if version != _VERSION or code not in _DTYPES:
            raise BadInput(f"data {idx}: version {version} with dtype code {code} is not a token index; {MAKE_AGAIN}")
        expected = _HEADER.size + num_sequences * (4 + 8) + num_bounds * 8
        if size != expected:
            word = "truncated" if size < expected else "too long"
            raise BadInput(f"data {idx}: {word}, {size} bytes where its header says {expected}; {COPY_OR_MAKE_AGAIN}")
        if num_sequences == 0:
            raise BadInput(f"data {idx}: it holds no documents; {MAKE_AGAIN} from files with text")
        ends = _HEADER.size + 4 * num_sequences, _HEADER.size + 12 * num_sequences, size
        length, begin, bound = (_number_before(stream, end, kind) for end, kind in zip(ends, "iqq", strict=True))
    if not num_bounds or bound != num_sequences:
        raise BadInput(f"data {idx}: corrupted, its documents do not end with its last sequence; {COPY_OR_MAKE_AGAIN}")
    name, itemsize = _DTYPES[code]
    return IndexHeader(name, itemsize, num_sequences, begin // itemsize + length)


def _number_before(stream: BinaryIO, end: int, kind: str) -> int:
    number = struct.Struct(f"<{kind}")
    stream.seek(end - number.size)
    return int(number.unpack(stream.read(number.size))[0])


def read_index(idx: Path) -> Index:
    """Open an `.idx` file. Raises BadInput as `read_header` does."""
    import numpy as np

    header = read_header(idx)
    content = np.memmap(idx, dtype=np.uint8, mode="r")
    lengths = np.frombuffer(content, np.int32, header.num_documents, _HEADER.size)
    starts = np.frombuffer(content, np.int64, header.num_documents, _HEADER.size + 4 * header.num_documents)
    return Index(header, np.dtype(header.dtype_name), lengths, starts)


def write_index(idx: Path, dtype: type[np.integer], lengths: Sequence[NDArray[np.int32]]) -> None:
    """Write the `.idx` of documents that lie one behind the other; on the disk when this returns.

    `lengths` are the tokens of each document, in as many pieces as they come in: only one is in memory at a time where
    they are memory maps.
    """
    import numpy as np

    name, itemsize = np.dtype(dtype).name, np.dtype(dtype).itemsize
    code = next(code for code, known in _DTYPES.items() if known == (name, itemsize))
    num_documents = sum(map(len, lengths))
    with idx.open("wb") as stream:
        stream.write(_HEADER.pack(_MAGIC, _VERSION, code, num_documents, num_documents + 1))
        for piece in lengths:
            stream.write(piece.astype("<i4").tobytes())
        start = 0
        for piece in lengths:
            ends = start + np.cumsum(piece, dtype="<i8") * itemsize
            stream.write(np.concatenate(([start], ends[:-1])).astype("<i8").tobytes() if len(piece) else b"")
            start = int(ends[-1]) if len(piece) else start
        first = 0
        for piece in lengths:
            stream.write(np.arange(first, first + len(piece), dtype="<i8").tobytes())
            first += len(piece)
        stream.write(struct.pack("<q", num_documents))
        stream.flush()
        os.fsync(stream.fileno())

"""Writes pieces of tensors into the files of a distributed checkpoint, and what makes the files of all ranks one.

The format is PyTorch's distributed checkpoint as Megatron-Core writes it: files of saved tensors one after another, and
`.metadata`, which says for each key what pieces there are and where each lies. PyTorch's own writer keeps every tensor
of a file in memory, and sends rank 0 what each rank plans, what it wrote and what that says about all tensors.
"""

from __future__ import annotations

import io
import json
import math
import os
import pickle
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from configs.errors import BadInput
from trainer.checkpoint.layout import part_directory
from trainer.checkpoint.manifest import hash_file
from trainer.checkpoint.places import Place

IMPORT_FILE_BYTES = 4 * 2**30
"""Size beyond which an import begins another file."""
COMMON_STATE = "common_state/shard_0_1"
"""Key of what is the same on all ranks, which Megatron-Core asks every checkpoint for."""


Span = tuple[str, int, int]
"""File, first byte and number of bytes there."""


@dataclass
class WrittenPieces:
    """What one rank wrote, as plain and short as can be: rank 0 gets it from every rank."""

    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = field(default_factory=dict)
    """Number format and whole shape by key."""
    pieces: list[tuple[str, tuple[int, ...], tuple[int, ...], Span]] = field(default_factory=list)
    """Key, offsets in the whole tensor, shape, and where it lies."""
    objects: list[tuple[str, Span]] = field(default_factory=list)
    """Key of what is no tensor, and where it lies."""
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Bytes and hash by name."""


class TensorFileWriter:
    """Writes this rank's share of a checkpoint, one piece after another, into one file, or several of `file_bytes`."""

    def __init__(self, directory: Path, rank: int, num_ranks: int, file_bytes: float = math.inf) -> None:
        self._directory = directory
        self._rank, self._num_ranks = rank, num_ranks
        self._file_bytes = file_bytes
        self._num_files = 0
        self._stream: io.BufferedWriter | None = None
        self.written = WrittenPieces()

    def write(self, place: Place, sizes: Sequence[int], tensor: torch.Tensor) -> None:
        """Write the tensor that lies at `place`; `sizes` are those of the axes in front."""
        offsets = (*place.index, *(0 for _ in tensor.shape))
        self.write_piece(place.key, (*sizes, *tensor.shape), offsets, tensor[(None,) * len(place.index)])

    def write_piece(self, key: str, size: Sequence[int], offsets: Sequence[int], piece: torch.Tensor) -> None:
        """Write what begins at `offsets` in a tensor of shape `size`, the same number of dimensions."""
        dtype, _ = self.written.tensors.setdefault(key, (piece.dtype, tuple(size)))
        if dtype != piece.dtype:
            raise BadInput(
                f"tensor {key}: is {dtype} in one layer and {piece.dtype} in another; write the weights in one number "
                "format."
            )
        stream = self._open()
        begin = stream.tell()
        whole = piece.detach().contiguous()
        _save(whole.clone() if whole.untyped_storage().nbytes() != whole.nbytes else whole, stream)
        span = (self._name(), begin, stream.tell() - begin)
        self.written.pieces.append((key, tuple(offsets), tuple(piece.shape), span))

    def write_object(self, key: str, content: bytes) -> None:
        """Write what is no tensor."""
        stream = self._open()
        self.written.objects.append((key, (self._name(), stream.tell(), len(content))))
        stream.write(content)

    def close(self) -> WrittenPieces:
        """Force the last file to disk, hash the files, and return what was written."""
        self._close()
        spans = [piece[-1] for piece in self.written.pieces] + [one[-1] for one in self.written.objects]
        names = dict.fromkeys(file for file, _, _ in spans)
        self.written.files = {name: hash_file(self._directory / name) for name in names}
        return self.written

    def _open(self) -> io.BufferedWriter:
        if self._stream is not None and self._stream.tell() > self._file_bytes:
            self._close()
            self._num_files += 1
        if self._stream is None:
            self._stream = open(self._directory / self._name(), "wb")
        return self._stream

    def _close(self) -> None:
        if self._stream is not None:
            with self._stream:
                self._stream.flush()
                os.fsync(self._stream.fileno())
            self._stream = None

    def _name(self) -> str:
        return os.path.normpath(
            f"{part_directory(self._rank, self._num_ranks)}/__{self._rank}_{self._num_files}.distcp"
        )


class _Stream:
    """A stream that remembers why writing failed: `torch.save` turns that, and Ctrl-C, into an error of its own."""

    def __init__(self, stream: io.BufferedWriter) -> None:
        self._stream = stream
        self.cause: BaseException | None = None

    def write(self, content: Any) -> int:
        """Write, or fail and remember why."""
        try:
            return self._stream.write(content)
        except BaseException as error:
            self.cause = error
            raise

    def flush(self) -> None:
        """Flush, or fail and remember why."""
        try:
            self._stream.flush()
        except BaseException as error:
            self.cause = error
            raise


def _save(tensor: torch.Tensor, stream: io.BufferedWriter) -> None:
    """Write a tensor in PyTorch's format. Raises what the stream raised."""
    remembering = _Stream(stream)
    try:
        torch.save(tensor, remembering)  # type: ignore[arg-type]
    except RuntimeError as error:
        raise (remembering.cause or error) from None


def write_metadata(directory: Path, parts: Sequence[WrittenPieces]) -> dict[str, dict[str, Any]]:
    """Write what makes the files of all ranks one checkpoint, and return the bytes and hash of every file in it.

    Rank 0 alone calls this, when all are done. Raises ValueError where the pieces of a tensor are not the whole of it.
    """
    metadata = merge_pieces(parts)
    files = {name: info for part in parts for name, info in part.files.items()}
    own = [".metadata", "metadata.json"]
    if COMMON_STATE not in metadata.state_dict_metadata:
        common = io.BytesIO()
        torch.save([{}], common)
        own.append("__common.distcp")
        _write_to_disk(directory / own[-1], common.getvalue())
        metadata.state_dict_metadata[COMMON_STATE] = BytesStorageMetadata()
        metadata.storage_data[MetadataIndex(COMMON_STATE)] = _StorageInfo(own[-1], 0, common.tell())
    _write_to_disk(directory / ".metadata", pickle.dumps(metadata))
    text = json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1})
    _write_to_disk(directory / "metadata.json", text.encode())
    return dict(sorted((files | {name: hash_file(directory / name) for name in own}).items()))


def _write_to_disk(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def merge_pieces(parts: Iterable[WrittenPieces]) -> Metadata:
    """Return what PyTorch wants to know of a checkpoint. Raises ValueError where a tensor is not whole."""
    tensors: dict[str, Any] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for part in parts:
        for key, (dtype, size) in part.tensors.items():
            if key not in tensors:
                tensors[key] = TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(size), [])
        for key, offsets, shape, span in part.pieces:
            chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(shape))
            tensors[key].chunks.append(chunk)
            places[MetadataIndex(key, chunk.offsets)] = _StorageInfo(*span)
        for key, span in part.objects:
            tensors[key] = BytesStorageMetadata()
            places[MetadataIndex(key)] = _StorageInfo(*span)
    for key, entry in tensors.items():
        if isinstance(entry, TensorStorageMetadata):
            check_whole(key, entry.size, [(chunk.offsets, chunk.sizes) for chunk in entry.chunks])
    return Metadata(tensors, storage_data=places)


def check_whole(key: str, size: Sequence[int], pieces: Sequence[tuple[Sequence[int], Sequence[int]]]) -> None:
    """Raise ValueError unless the pieces (offsets, shape) fill a tensor of shape `size` and none lies over another.

    Only pieces whose ranges meet on the axis with most offsets are compared, so that this takes as long as the pieces
    are many, not the square.
    """
    volume = sum(math.prod(shape) for _, shape in pieces)
    if volume != math.prod(size):
        raise ValueError(f"{key}: the ranks wrote {volume} of its {math.prod(size)} elements")
    axis = max(range(len(size)), key=lambda one: len({offsets[one] for offsets, _ in pieces}), default=None)
    if axis is None:
        return
    near: list[tuple[Sequence[int], Sequence[int]]] = []
    for offsets, shape in sorted(pieces, key=lambda piece: piece[0][axis]):
        near = [other for other in near if other[0][axis] + other[1][axis] > offsets[axis]]
        for begin, length in near:
            if all(
                offsets[one] < begin[one] + length[one] and begin[one] < offsets[one] + shape[one]
                for one in range(len(size))
            ):
                raise ValueError(f"{key}: two ranks wrote what begins at {tuple(begin)} and {tuple(offsets)}")
        near.append((offsets, shape))

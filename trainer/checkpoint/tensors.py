"""Single tensors in and out of a distributed checkpoint, without building a model and within the memory of one tensor.

The format is PyTorch's distributed checkpoint as Megatron-Core writes it: files of saved tensors one after another,
and `.metadata`, which says for each key what pieces there are and where each lies. Reading goes through PyTorch's own
reader; its writer keeps every tensor of a file in memory, so writing is done here.
"""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, LoadPlan
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from configs.errors import BadInput, in_one_line
from trainer.checkpoint.places import Place, find_place

_FILE_BYTES = 4 * 2**30
_COMMON_STATE = "common_state/shard_0_1"


class CheckpointTensors:
    """The tensors of a checkpoint, read one at a time."""

    def __init__(self, checkpoint: Path) -> None:
        """Read what tensors there are. Raises BadInput if the directory is no distributed checkpoint."""
        self.path = checkpoint
        self._reader = FileSystemReader(checkpoint)
        try:
            self._metadata = self._reader.read_metadata()
        except (OSError, pickle.UnpicklingError, EOFError, AttributeError, ModuleNotFoundError) as error:
            raise BadInput(
                f"{checkpoint}: .metadata cannot be read ({in_one_line(error)}); copy the checkpoint again."
            ) from error
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        self.keys = {key for key, entry in self._metadata.state_dict_metadata.items() if _is_tensor(entry)}

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of a tensor by its name in the model; None if there is none of that name."""
        place = find_place(name, self.keys)
        return None if place is None else tuple(self._entry(place).size)[len(place.index) :]

    def dtype(self, name: str) -> torch.dtype:
        """Return the number format of a tensor that is there."""
        return self._entry(self._place(name)).properties.dtype

    def read(self, name: str) -> torch.Tensor:
        """Return a whole tensor by its name in the model."""
        place = self._place(name)
        entry = self._entry(place)
        shape = tuple(entry.size)[len(place.index) :]
        target = torch.empty((1,) * len(place.index) + shape, dtype=entry.properties.dtype)
        box = ChunkStorageMetadata(torch.Size((*place.index, *(0 for _ in shape))), target.shape)
        items = create_read_items_for_chunk_list(place.key, entry, [box])
        try:
            self._reader.read_data(LoadPlan(items), _IntoTensor(target)).wait()
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise BadInput(
                f"{self.path}: {place.key} cannot be read ({in_one_line(error)}); copy the checkpoint again."
            ) from error
        return target.view(shape)

    def read_bytes(self, key: str) -> bytes:
        """Return what is stored under a key that is no tensor. Raises KeyError if there is none."""
        info = self._metadata.storage_data[MetadataIndex(key)]
        with open(self.path / info.relative_path, "rb") as file:
            file.seek(info.offset)
            return file.read(info.length)

    def _place(self, name: str) -> Place:
        place = find_place(name, self.keys)
        if place is None:
            raise BadInput(f"{self.path}: holds no tensor {name}; is this a checkpoint of that architecture?")
        return place

    def _entry(self, place: Place) -> TensorStorageMetadata:
        entry = self._metadata.state_dict_metadata[place.key]
        assert isinstance(entry, TensorStorageMetadata)  # `keys` has tensors alone
        return entry


@dataclass
class WrittenTensors:
    """What one rank wrote: plain data that goes to rank 0, which writes `.metadata`."""

    tensors: dict[str, TensorStorageMetadata] = field(default_factory=dict)
    places: dict[MetadataIndex, _StorageInfo] = field(default_factory=dict)


class TensorFileWriter:
    """Writes this rank's share of a checkpoint's tensors, one after another."""

    def __init__(self, directory: Path, rank: int) -> None:
        self._directory = directory
        self._rank = rank
        self._num_files = 0
        self._stream: io.BufferedWriter | None = None
        self.written = WrittenTensors()

    def write(self, place: Place, sizes: Sequence[int], tensor: torch.Tensor) -> None:
        """Write the tensor that lies at `place`; `sizes` are those of the axes in front."""
        stream = self._open()
        offset = stream.tell()
        whole = tensor.contiguous()[(None,) * len(place.index)]
        _save(whole.clone() if whole.untyped_storage().nbytes() != whole.nbytes else whole, stream)
        offsets = torch.Size((*place.index, *(0 for _ in tensor.shape)))
        index = MetadataIndex(place.key, offsets)
        self.written.places[index] = _StorageInfo(self._name(), offset, stream.tell() - offset)
        entry = self.written.tensors.setdefault(
            place.key,
            TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), torch.Size((*sizes, *tensor.shape)), []),
        )
        if entry.properties.dtype != tensor.dtype:
            raise BadInput(
                f"tensor {place.key}: is {entry.properties.dtype} in one layer and {tensor.dtype} in another; write "
                "the weights in one number format."
            )
        entry.chunks.append(ChunkStorageMetadata(offsets, whole.shape))

    def close(self) -> WrittenTensors:
        """Finish the last file and return what was written."""
        if self._stream is not None:
            self._stream.close()
        return self.written

    def _open(self) -> io.BufferedWriter:
        if self._stream is not None and self._stream.tell() > _FILE_BYTES:
            self._stream.close()
            self._stream = None
            self._num_files += 1
        if self._stream is None:
            self._stream = open(self._directory / self._name(), "wb")
        return self._stream

    def _name(self) -> str:
        return f"__{self._rank}_{self._num_files}.distcp"


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


def write_metadata(directory: Path, parts: Iterable[WrittenTensors]) -> None:
    """Write what makes the files of all ranks one checkpoint. Rank 0 alone calls this, when all are done."""
    tensors: dict[str, Any] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for part in parts:
        for key, entry in part.tensors.items():
            tensors.setdefault(key, TensorStorageMetadata(entry.properties, entry.size, [])).chunks.extend(entry.chunks)
        places |= part.places
    # Megatron-Core asks every checkpoint for the state that is the same on all ranks; here there is none.
    common = io.BytesIO()
    torch.save([{}], common)
    (directory / "__common.distcp").write_bytes(common.getvalue())
    tensors[_COMMON_STATE] = BytesStorageMetadata()
    places[MetadataIndex(_COMMON_STATE)] = _StorageInfo("__common.distcp", 0, common.tell())
    with open(directory / ".metadata", "wb") as file:
        pickle.dump(Metadata(tensors, storage_data=places), file)
    text = json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1})
    (directory / "metadata.json").write_text(text, encoding="utf-8")


class _IntoTensor(DefaultLoadPlanner):
    """Copies the pieces that PyTorch's reader finds into one tensor."""

    def __init__(self, target: torch.Tensor) -> None:
        super().__init__()
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        """Return the part of the target that a piece fills."""
        part = self._target
        for axis, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            part = part.narrow(axis, start, length)
        return part

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Do nothing: the piece was copied into the target itself."""


def _is_tensor(entry: Any) -> bool:
    return isinstance(entry, TensorStorageMetadata)

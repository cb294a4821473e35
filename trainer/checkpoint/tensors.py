"""Single tensors out of a distributed checkpoint, without building a model and within the memory of one tensor.

Reading goes through PyTorch's own reader; `trainer.checkpoint.writing` says what the format is.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, LoadPlan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from configs.errors import BadInput, in_one_line
from trainer.checkpoint.places import Place, find_place


def read_metadata(checkpoint: Path) -> Metadata:
    """Return what tensors there are and where their pieces lie. Raises BadInput if it is no distributed checkpoint."""
    try:
        metadata = FileSystemReader(checkpoint).read_metadata()
    except (OSError, pickle.UnpicklingError, EOFError, AttributeError, ModuleNotFoundError) as error:
        raise BadInput(
            f"{checkpoint}: .metadata cannot be read ({in_one_line(error)}); copy the checkpoint again."
        ) from error
    vars(metadata).pop("all_local_plans", None)  # of Megatron-Core: every rank's plan once more, for nothing
    return metadata


def read_pieces(checkpoint: Path, metadata: Metadata, wanted: list[tuple[str, tuple[int, ...], torch.Tensor]]) -> None:
    """Read into each tensor what of a key lies at its offsets; it has as many dimensions as the whole tensor.

    Each file is opened once. Raises what reading and unpickling raise.
    """
    by_key: dict[str, list[tuple[tuple[int, ...], torch.Tensor]]] = {}
    for key, offsets, target in wanted:
        by_key.setdefault(key, []).append((offsets, target))
    targets: dict[int, torch.Tensor] = {}
    items: list[ReadItem] = []
    for key, places in by_key.items():
        entry = metadata.state_dict_metadata[key]
        assert isinstance(entry, TensorStorageMetadata)  # the caller has looked
        boxes = [ChunkStorageMetadata(torch.Size(offsets), target.shape) for offsets, target in places]
        for item in create_read_items_for_chunk_list(key, entry, boxes):
            targets[id(item)] = places[item.dest_index.index or 0][1]
            items.append(item)
    reader = FileSystemReader(checkpoint)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    reader.read_data(LoadPlan(items), _IntoTensors(targets)).wait()


def read_bytes(checkpoint: Path, metadata: Metadata, key: str) -> bytes:
    """Return what is stored under a key that is no tensor. Raises KeyError if there is none."""
    info = metadata.storage_data[MetadataIndex(key)]
    with open(checkpoint / info.relative_path, "rb") as file:
        file.seek(info.offset)
        return file.read(info.length)


class CheckpointTensors:
    """The tensors of a checkpoint, read one at a time."""

    def __init__(self, checkpoint: Path) -> None:
        """Read what tensors there are. Raises BadInput if the directory is no distributed checkpoint."""
        self.path = checkpoint
        self._metadata = read_metadata(checkpoint)
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
        try:
            read_pieces(self.path, self._metadata, [(place.key, (*place.index, *(0 for _ in shape)), target)])
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise BadInput(
                f"{self.path}: {place.key} cannot be read ({in_one_line(error)}); copy the checkpoint again."
            ) from error
        return target.view(shape)

    def read_bytes(self, key: str) -> bytes:
        """Return what is stored under a key that is no tensor. Raises KeyError if there is none."""
        return read_bytes(self.path, self._metadata, key)

    def _place(self, name: str) -> Place:
        place = find_place(name, self.keys)
        if place is None:
            raise BadInput(f"{self.path}: holds no tensor {name}; is this a checkpoint of that architecture?")
        return place

    def _entry(self, place: Place) -> TensorStorageMetadata:
        entry = self._metadata.state_dict_metadata[place.key]
        assert isinstance(entry, TensorStorageMetadata)  # `keys` has tensors alone
        return entry


class _IntoTensors(DefaultLoadPlanner):
    """Copies the pieces that PyTorch's reader finds into tensors, given those by the identity of what is read."""

    def __init__(self, targets: Mapping[int, torch.Tensor]) -> None:
        super().__init__()
        self._targets = targets

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        """Return the part of the target that a piece fills."""
        part = self._targets[id(read_item)]
        for axis, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            part = part.narrow(axis, start, length)
        return part

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Do nothing: the piece was copied into the target itself."""


def _is_tensor(entry: Any) -> bool:
    return isinstance(entry, TensorStorageMetadata)

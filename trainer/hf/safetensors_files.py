"""Directories of safetensors files, read and written one tensor at a time.

The safetensors library maps whole files into memory, and holds a whole file in memory to write one; here neither more
than one tensor is held nor is the file's size counted against the process. The format is eight bytes of header length,
the header as JSON, the tensors' bytes: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from configs.errors import BadInput
from trainer.hf.names import INDEX_NAME, SINGLE_NAME

_LENGTH = struct.Struct("<Q")
_MAX_HEADER_BYTES = 100 * 10**6  # the library's own limit
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U64": torch.uint64,
    "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool, "C64": torch.complex64,
}  # fmt: skip
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


class _Sized:
    """What has a number format and a shape."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class StoredTensor(_Sized):
    """Where a tensor lies and what it is."""

    file: Path
    offset: int
    """Bytes from the start of the file."""
    dtype: torch.dtype
    shape: tuple[int, ...]


class SafetensorsFile:
    """The tensors of one safetensors file."""

    def __init__(self, file: Path) -> None:
        """Read the header. Raises BadInput for a missing, truncated or malformed file."""
        if not file.is_file():
            raise BadInput(f"{file}: missing; give a directory that holds it.")
        self.tensors = dict(_read_header(file))

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor in memory of its own. Raises KeyError if there is none of that name."""
        return _read_tensor(self.tensors[name], name)


class SafetensorsDirectory:
    """The tensors of all safetensors files of a model directory."""

    def __init__(self, directory: Path) -> None:
        """Read every header. Raises BadInput for a missing, truncated or malformed file."""
        self.directory = directory
        self.tensors: dict[str, StoredTensor] = {}
        for file in _model_files(directory):
            for name, tensor in _read_header(file):
                if name in self.tensors:
                    raise BadInput(f"{file}: holds {name}, as does {self.tensors[name].file}; keep one of the files.")
                self.tensors[name] = tensor
        _check_index(directory, self.tensors)

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor in memory of its own. Raises KeyError if there is none of that name."""
        return _read_tensor(self.tensors[name], name)


@dataclass(frozen=True)
class OutputTensor(_Sized):
    """A tensor to be written, before its content is known."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


def plan_files(tensors: Sequence[OutputTensor], max_bytes: int) -> dict[str, list[OutputTensor]]:
    """Divide the tensors, in order, among files of at most `max_bytes` (or one tensor), named as in `transformers`."""
    groups: list[list[OutputTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.num_bytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.num_bytes
    if len(groups) == 1:
        return {SINGLE_NAME: groups[0]}
    return {f"model-{number:05d}-of-{len(groups):05d}.safetensors": group for number, group in enumerate(groups, 1)}


def write_file(path: Path, tensors: Sequence[OutputTensor], produce: Callable[[OutputTensor], torch.Tensor]) -> None:
    """Write one file, asking `produce` for each tensor when its turn comes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.num_bytes
        header[tensor.name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(_LENGTH.pack(len(text)) + text)
        for tensor in tensors:
            content = produce(tensor)
            assert (content.dtype, tuple(content.shape)) == (tensor.dtype, tensor.shape), tensor.name
            file.write(_bytes_of(content.contiguous()))


def write_index(directory: Path, files: dict[str, list[OutputTensor]]) -> None:
    """Write the index of several files; a single file has none."""
    if len(files) == 1:
        return
    tensors = [tensor for group in files.values() for tensor in group]
    index = {
        "metadata": {
            "total_parameters": sum(tensor.num_bytes // tensor.dtype.itemsize for tensor in tensors),
            "total_size": sum(tensor.num_bytes for tensor in tensors),
        },
        "weight_map": {tensor.name: file for file, group in files.items() for tensor in group},
    }
    (directory / INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _read_tensor(stored: StoredTensor, name: str) -> torch.Tensor:
    tensor = torch.empty(stored.shape, dtype=stored.dtype)
    with open(stored.file, "rb") as file:
        file.seek(stored.offset)
        if tensor.numel() and file.readinto(_bytes_of(tensor)) != stored.num_bytes:
            raise BadInput(f"{stored.file}: ends within {name}; download it again.")
    return tensor


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a contiguous tensor."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def _model_files(directory: Path) -> list[Path]:
    index = directory / INDEX_NAME
    if index.is_file() and (directory / SINGLE_NAME).is_file() and SINGLE_NAME not in _weight_map(index).values():
        raise BadInput(
            f"{directory}: holds a model in {SINGLE_NAME} and another in the files of {INDEX_NAME}; keep one of them."
        )
    if index.is_file():
        files = [directory / name for name in sorted(set(_weight_map(index).values()))]
    else:
        files = [directory / SINGLE_NAME]
    for file in files:
        if not file.is_file():
            wanted = f"which {index.name} names" if index.is_file() else "and there is no index of several files either"
            advice = "download the model again"
            if any(directory.glob("pytorch_model*.bin")):
                advice = "only safetensors are read: save the model with transformers' save_pretrained"
            raise BadInput(f"{file}: missing, {wanted}; {advice}.")
    return files


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not isinstance(weight_map, dict) or not all(map(_is_file_name, weight_map.values())):
            raise ValueError("weight_map is no mapping of tensors to files beside it")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadInput(f"{index}: unreadable ({error}); download it again.") from error
    return weight_map


def _is_file_name(name: Any) -> bool:
    return isinstance(name, str) and Path(name).name == name and name not in ("", "..")


def _check_index(directory: Path, tensors: dict[str, StoredTensor]) -> None:
    index = directory / INDEX_NAME
    if not index.is_file():
        return
    for name, file in _weight_map(index).items():
        if name not in tensors or tensors[name].file.name != file:
            raise BadInput(f"{directory / file}: lacks {name}, which {INDEX_NAME} says it holds; download it again.")


def _read_header(file: Path) -> Iterator[tuple[str, StoredTensor]]:
    """Yield the tensors of one file. Raises BadInput unless they fill it from end to end."""
    size = file.stat().st_size
    try:
        with open(file, "rb") as stream:
            start = stream.read(_LENGTH.size)
            if b"version ".startswith(start[:8]) and start:
                raise ValueError("it is a git-lfs pointer; git lfs pull fetches the file")
            length = _LENGTH.unpack(start)[0] if len(start) == _LENGTH.size else _MAX_HEADER_BYTES + 1
            if length > min(_MAX_HEADER_BYTES, size - _LENGTH.size):
                raise ValueError(f"its {size} bytes do not begin with a header")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        begin = end = _LENGTH.size + length
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            if entry["dtype"] not in _DTYPES:
                raise ValueError(f"{name} has the unknown number format {entry['dtype']}")
            first, last = entry["data_offsets"]
            if not all(type(number) is int for number in (first, last, *entry["shape"])):
                raise ValueError(f"{name} has sizes that are no whole numbers")
            stored = StoredTensor(file, begin + first, _DTYPES[entry["dtype"]], tuple(entry["shape"]))
            if last - first != stored.num_bytes or begin + first != end:
                raise ValueError(f"{name} of shape {list(stored.shape)} does not follow the one before it")
            end = begin + last
            yield name, stored
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadInput(f"{file}: not a whole safetensors file ({error}); download it again.") from error
    if size != end:
        word = "truncated" if size < end else "too long"
        raise BadInput(f"{file}: {word}, {size} bytes instead of {end}; download it again.")

"""Our streaming reader and writer against the safetensors library, and files that are not whole."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from configs.errors import BadInput
from trainer.hf.names import INDEX_NAME
from trainer.hf.safetensors_files import (
    OutputTensor,
    SafetensorsDirectory,
    plan_files,
    write_file,
    write_index,
)

TENSORS = {
    "a": torch.randn(3, 5),
    "b": torch.randn(7).bfloat16(),
    "c": torch.randn(2, 2, 2).half(),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 4),
    "whole": torch.arange(6),
    "flags": torch.tensor([True, False]),
    "eight": torch.randn(4).to(torch.float8_e4m3fn),
}


def outputs() -> list[OutputTensor]:
    return [OutputTensor(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()]


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and bool((left.float() == right.float()).all())


def test_the_library_reads_what_is_written(tmp_path):
    write_file(tmp_path / "model.safetensors", outputs(), lambda output: TENSORS[output.name])
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == TENSORS.keys()
    assert all(same(found[name], tensor) for name, tensor in TENSORS.items())


def test_what_the_library_writes_is_read(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    directory = SafetensorsDirectory(tmp_path)
    assert directory.tensors.keys() == TENSORS.keys()
    assert all(same(directory.read(name), tensor) for name, tensor in TENSORS.items())


def test_several_files_are_named_and_indexed_as_transformers_does(tmp_path):
    files = plan_files(outputs(), 70)
    assert list(files)[0] == f"model-00001-of-{len(files):05d}.safetensors" and len(files) > 2
    for name, group in files.items():
        write_file(tmp_path / name, group, lambda output: TENSORS[output.name])
    write_index(tmp_path, files)
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in TENSORS.values())
    assert set(index["weight_map"]) == set(TENSORS)
    assert all(same(SafetensorsDirectory(tmp_path).read(name), tensor) for name, tensor in TENSORS.items())


def test_one_file_needs_no_index(tmp_path):
    files = plan_files(outputs(), 10**6)
    write_index(tmp_path, files)
    assert list(files) == ["model.safetensors"] and not (tmp_path / INDEX_NAME).exists()


def spoil(tmp_path, how):
    """Write two files with an index and spoil them."""
    half = dict(list(TENSORS.items())[:3]), dict(list(TENSORS.items())[3:])
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for name, tensors in zip(names, half, strict=True):
        save_file(tensors, tmp_path / name)
    weight_map = {tensor: name for name, tensors in zip(names, half, strict=True) for tensor in tensors}
    first, index = tmp_path / names[0], tmp_path / INDEX_NAME
    content = first.read_bytes()
    if how == "truncated":
        first.write_bytes(content[:-5])
    elif how == "header_cut":
        first.write_bytes(content[:20])
    elif how == "tiny":
        first.write_bytes(b"abc")
    elif how == "huge_header":
        first.write_bytes(b"\xff" * 8 + content[8:])
    elif how == "trailing":
        first.write_bytes(content + b"x" * 64)
    elif how == "overlap":
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        header["b"]["data_offsets"] = [header["a"]["data_offsets"][0], header["a"]["data_offsets"][0] + 14]
        text = json.dumps(header).encode()
        first.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    elif how == "lfs":
        first.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n")
    elif how == "garbage":
        first.write_bytes(b"x" * len(content))
    elif how == "missing_file":
        first.unlink()
    elif how == "missing_tensor":
        weight_map["d"] = names[0]
    elif how == "twice":
        save_file(half[0], tmp_path / names[1])
    elif how == "float_shape":
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        header["a"]["shape"] = [float(size) for size in header["a"]["shape"]]
        text = json.dumps(header).encode()
        first.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    elif how == "single_too":
        save_file(TENSORS, tmp_path / "model.safetensors")
    elif how == "parent":
        weight_map["a"] = ".."
    elif how == "outside":
        weight_map["a"] = "../elsewhere.safetensors"
    texts = {"index": "{", "deep_index": "[" * 200_000}
    index.write_text(texts.get(how) or json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("truncated", "model-00001-of-00002.safetensors: truncated"),
        ("header_cut", "not a whole safetensors file"),
        ("tiny", "not a whole safetensors file"),
        ("huge_header", "not a whole safetensors file"),
        ("garbage", "not a whole safetensors file"),
        ("trailing", "model-00001-of-00002.safetensors: too long"),
        ("overlap", "does not follow the one before it"),
        ("lfs", "git-lfs pointer"),
        ("missing_file", "model-00001-of-00002.safetensors: missing, which model.safetensors.index.json names"),
        ("missing_tensor", "lacks d, which model.safetensors.index.json says it holds"),
        ("twice", "keep one of the files"),
        ("float_shape", "sizes that are no whole numbers"),
        ("single_too", "holds a model in model.safetensors and another in the files of model.safetensors.index.json"),
        ("outside", "weight_map"),
        ("parent", "weight_map"),
        ("deep_index", "model.safetensors.index.json: unreadable"),
        ("index", "model.safetensors.index.json: unreadable"),
    ],
)
def test_files_that_are_not_whole_are_named(tmp_path, how, expected):
    spoil(tmp_path, how)
    with pytest.raises(BadInput) as caught:
        SafetensorsDirectory(tmp_path)
    assert expected in str(caught.value)


def test_a_directory_without_weights_is_named(tmp_path):
    with pytest.raises(BadInput, match=r"model\.safetensors: missing"):
        SafetensorsDirectory(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(BadInput, match="only safetensors are read"):
        SafetensorsDirectory(tmp_path)

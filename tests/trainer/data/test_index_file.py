"""`.bin` and `.idx` without Megatron-Core: the bytes its own writer writes, and what its writer wrote is read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from configs.errors import BadInput
from trainer.data.index_file import read_index, write_index
from trainer.data.indexed import TokenDataset
from trainer.data.making.parts import PartStore, TokenizedBlock

ROOT = Path(__file__).parents[3]


def write_in_parts(prefix: Path, dtype, documents: list[np.ndarray], sizes: list[int]) -> None:
    """Write `documents` as our tools do, `sizes` of them a part."""
    store = PartStore(Path(f"{prefix}.parts"), "fingerprint", dtype)
    first = 0
    for size in sizes:
        part = documents[first : first + size]
        tokens = b"".join(document.tobytes() for document in part)
        store.append(TokenizedBlock(tokens, np.array([len(document) for document in part], dtype=np.int32), 0, 0))
        store.finish_part()
        first += size
    assert first == len(documents)
    store.merge(Path(f"{prefix}.bin"), Path(f"{prefix}.idx"), lambda done: None)
    store.remove()


@pytest.mark.slow  # imports megatron-core
@pytest.mark.parametrize(("dtype", "top"), [(np.uint16, 65499), (np.int32, 151_000)])
def test_the_bytes_are_those_of_megatron_core(tmp_path, dtype, top):
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    random = np.random.default_rng(0)
    documents = [random.integers(0, top, length).astype(dtype) for length in random.integers(1, 300, 400)]
    write_in_parts(tmp_path / "ours", dtype, documents, [1, 0, 250, 149])
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for document in documents:
        builder.add_document(document, [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()
    theirs, ours = IndexedDataset(str(tmp_path / "ours")), TokenDataset(str(tmp_path / "theirs"))
    assert [theirs[number].tolist() for number in range(400)] == [document.tolist() for document in documents]
    for number, document in enumerate(documents):
        assert ours.read(number, 0, len(document)).tolist() == document.tolist()
        assert ours.read(number, len(document) // 2, 1).dtype == dtype


@pytest.mark.slow  # imports megatron-core
def test_documents_of_several_sequences_are_read_sequence_by_sequence(tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "data.bin"), dtype=np.int32)
    builder.add_document(np.arange(10, dtype=np.int32), [4, 6])
    builder.add_document(np.arange(10, 13, dtype=np.int32), [3])
    builder.finalize(str(tmp_path / "data.idx"))
    dataset = TokenDataset(str(tmp_path / "data"))
    assert (dataset.num_documents, dataset.num_tokens, dataset.lengths.tolist()) == (3, 13, [4, 6, 3])
    assert dataset.read(1, 0, 6).tolist() == [4, 5, 6, 7, 8, 9] and dataset.read(2, 1, 2).tolist() == [11, 12]


def test_bounds_that_end_elsewhere_are_refused(tmp_path):
    idx = tmp_path / "data.idx"
    write_index(idx, np.uint16, [np.array([2, 3], dtype=np.int32)])
    assert read_index(idx).starts.tolist() == [0, 4] and read_index(idx).header.num_tokens == 5
    content = bytearray(idx.read_bytes())
    content[-8:] = np.int64(7).tobytes()
    idx.write_bytes(content)
    with pytest.raises(BadInput, match="data.idx: corrupted, its documents do not end with its last sequence"):
        read_index(idx)


def test_an_index_that_points_outside_is_told_when_read(tmp_path):
    write_index(tmp_path / "data.idx", np.uint16, [np.array([2, 3], dtype=np.int32)])
    (tmp_path / "data.bin").write_bytes(bytes(10))
    content = bytearray((tmp_path / "data.idx").read_bytes())
    content[34 + 8 : 34 + 16] = np.int64(-4).tobytes()
    (tmp_path / "data.idx").write_bytes(content)
    with pytest.raises(BadInput, match="outside its .bin at document 0"):
        TokenDataset(str(tmp_path / "data")).read(0, 0, 2)


def test_what_ctrl_c_left_uncounted_is_cut_off(tmp_path):
    store = PartStore(tmp_path / "data.parts", "fingerprint", np.uint16)
    store.append(TokenizedBlock(bytes(8), np.array([4], dtype=np.int32), 0, 0))
    store._stream.write(bytes(6))
    store._lengths.append(np.array([3], dtype=np.int32))
    store.finish_part()
    store.give_up()
    assert PartStore(tmp_path / "data.parts", "fingerprint", np.uint16).total.num_tokens == 4


def test_data_opens_where_torch_and_megatron_cannot_be_imported(tmp_path):
    write_in_parts(tmp_path / "data", np.uint16, [np.arange(5, dtype=np.uint16)], [1])
    code = (
        "import sys; sys.modules |= dict(torch=None, megatron=None)\n"
        "from trainer.data.indexed import TokenDataset\n"
        "print(TokenDataset(sys.argv[1]).read(0, 1, 3).tolist())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "data")], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout == "[1, 2, 3]\n", done.stderr

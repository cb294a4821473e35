"""Datasets on disk: whole ones open, damaged ones and strangers' are refused with a sentence that says what to do."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from configs.errors import BadInput
from configs.sections.data import SourceConfig
from trainer.data.blend import open_blend
from trainer.data.indexed import TokenDataset, check_files, check_tokenizer, check_vocab_size
from trainer.data.making.parts import PartStore, TokenizedBlock, hash_file
from trainer.data.tokenizer import Tokenizer, load_tokenizer

VOCAB_SIZE = 260


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizers")
    return make_tokenizer(folder / "first", "b")


def make_tokenizer(folder: Path, letter: str) -> Tokenizer:
    """A tokenizer of bytes, an end token and a few merges of `letter`."""
    from tools.train_tokenizer import train_tokenizer
    from trainer.data.making.documents import InputFile

    text = folder.parent / f"{letter}.txt"
    text.write_text((letter * 8 + " ") * 10)
    train_tokenizer([InputFile(str(text), "text")], str(folder), VOCAB_SIZE)
    return load_tokenizer(folder)


@pytest.fixture
def prefix(tmp_path, tokenizer) -> str:
    """Three documents, each ending in the tokenizer's end token, with a meta file."""
    tokens = np.array([5, 6, 7, tokenizer.eod_id, 8, tokenizer.eod_id, 9, 10, tokenizer.eod_id], dtype=np.uint16)
    store = PartStore(tmp_path / "data.parts", "fingerprint", np.uint16)
    store.append(TokenizedBlock(tokens.tobytes(), np.array([4, 2, 3], dtype=np.int32), 0, 10))
    store.finish_part()
    store.merge(tmp_path / "data.bin", tmp_path / "data.idx", lambda done: None)
    store.remove()
    prefix = str(tmp_path / "data")
    write_meta(prefix, tokenizer)
    return prefix


def write_meta(prefix: str, tokenizer: Tokenizer, **changes: object) -> None:
    meta = {
        "vocabulary_hash": tokenizer.vocabulary_hash,
        "vocab_size": tokenizer.vocab_size,
        "eod_id": tokenizer.eod_id,
        "dtype": "uint16",
        "num_documents": 3,
        "num_tokens": 9,
        "num_empty_documents": 0,
        "fingerprint": "fingerprint",
        "bin_sha256": hash_file(prefix + ".bin"),
        "idx_sha256": hash_file(prefix + ".idx"),
    }
    Path(prefix + ".meta.json").write_text(json.dumps(meta | changes))


def test_a_whole_dataset_opens(prefix):
    dataset = TokenDataset(prefix)
    assert (dataset.num_documents, dataset.num_tokens) == (3, 9)
    assert dataset.lengths.tolist() == [4, 2, 3]
    assert dataset.read(0, 1, 2).tolist() == [6, 7] and dataset.read(2, 0, 3)[:2].tolist() == [9, 10]


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_file_in_the_place_of_a_prefix_says_what_would_work(prefix, suffix):
    with pytest.raises(BadInput, match=rf"data{suffix}: both of its files have one name; .*: {prefix}$"):
        TokenDataset(prefix + suffix)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_missing_file_is_named(prefix, suffix):
    Path(prefix + suffix).unlink()
    with pytest.raises(BadInput, match=f"data{suffix}: no such file"):
        TokenDataset(prefix)


@pytest.mark.parametrize("cut", [1, 2, 17, 18])
def test_a_truncated_bin_is_named_with_both_sizes(prefix, cut):
    file = Path(prefix + ".bin")
    file.write_bytes(file.read_bytes()[:-cut])
    with pytest.raises(BadInput, match=f"data.bin: truncated, {18 - cut} bytes where data.idx says 18"):
        TokenDataset(prefix)


def test_a_longer_bin_is_refused(prefix):
    with Path(prefix + ".bin").open("ab") as stream:
        stream.write(b"\0\0")
    with pytest.raises(BadInput, match="data.bin: too long, 20 bytes"):
        TokenDataset(prefix)


@pytest.mark.parametrize("keep", [0, 5, 20, 40, -1])
def test_a_truncated_idx_is_named(prefix, keep):
    file = Path(prefix + ".idx")
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(BadInput, match="data.idx: (truncated|not a Megatron index)"):
        TokenDataset(prefix)


@pytest.mark.parametrize(
    "place, value, sentence", [(0, 1, "bad magic"), (9, 9, "version 9"), (17, 99, "dtype code 99")]
)
def test_a_corrupted_idx_header_is_named(prefix, place, value, sentence):
    file = Path(prefix + ".idx")
    content = bytearray(file.read_bytes())
    content[place] = value
    file.write_bytes(content)
    with pytest.raises(BadInput, match=f"data.idx: .*{sentence}"):
        TokenDataset(prefix)


def test_lengths_that_lie_are_found(prefix):
    file = Path(prefix + ".idx")
    content = bytearray(file.read_bytes())
    content[34:38] = np.int32(5).tobytes()
    file.write_bytes(content)
    with pytest.raises(BadInput, match="data.bin: truncated, 18 bytes where data.idx says 20"):
        check_files(prefix)


def test_an_empty_dataset_is_refused(tmp_path):
    store = PartStore(tmp_path / "empty.parts", "fingerprint", np.uint16)
    store.merge(tmp_path / "empty.bin", tmp_path / "empty.idx", lambda done: None)
    with pytest.raises(BadInput, match="empty.idx: it holds no documents"):
        TokenDataset(str(tmp_path / "empty"))


def test_a_meta_file_of_other_data_is_refused(prefix, tokenizer):
    write_meta(prefix, tokenizer, num_tokens=10)
    with pytest.raises(BadInput, match="data.meta.json: it says 3 documents and 10 tokens"):
        TokenDataset(prefix)
    Path(prefix + ".meta.json").write_text("{}")
    with pytest.raises(BadInput, match="data.meta.json: not readable"):
        TokenDataset(prefix)


def test_another_tokenizer_is_refused(prefix, tokenizer, tmp_path):
    dataset = TokenDataset(prefix)
    check_tokenizer(dataset, tokenizer)
    other = make_tokenizer(tmp_path / "other", "q")
    with pytest.raises(BadInput, match="data.tokenizer .*other: its vocabulary hash"):
        check_tokenizer(dataset, other)


def test_data_without_meta_is_checked_by_its_tokens(prefix, tokenizer):
    Path(prefix + ".meta.json").unlink()
    dataset = TokenDataset(prefix)
    check_tokenizer(dataset, tokenizer)
    wrong = Tokenizer("wrong", tokenizer.backend, "x", 7)
    with pytest.raises(BadInput, match="document 0 of .* no .meta.json"):
        check_tokenizer(dataset, wrong)
    assert dataset.identity == "3-documents-9-tokens"


def test_a_model_with_too_few_ids_is_refused(prefix):
    dataset = TokenDataset(prefix)
    check_vocab_size(dataset, VOCAB_SIZE)
    with pytest.raises(BadInput, match=f"model.vocab_size: 259 is less .* work: {VOCAB_SIZE}"):
        check_vocab_size(dataset, VOCAB_SIZE - 1)


def test_a_blend_opens_from_the_config(prefix):
    blend = open_blend([SourceConfig(path=prefix, weight=2.0)], seq_len=4, seed=1)
    assert blend.read(blend.take(2), np.arange(2)).shape == (2, 5)
    assert list(blend.state_dict()["sources"]) == [prefix]


def test_two_processes_cannot_make_one_dataset(tmp_path):
    store = PartStore(tmp_path / "data.parts", "fingerprint", np.uint16)
    with pytest.raises(BadInput, match="another process is at work"):
        PartStore(tmp_path / "data.parts", "fingerprint", np.uint16)
    store.remove()

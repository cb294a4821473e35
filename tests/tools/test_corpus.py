"""The embedded corpus: made once from a library of sources, complete or not there."""

from __future__ import annotations

import json

import pytest

from configs.errors import BadInput
from tools.prepare_corpus import prepare_corpus, split_library
from trainer.data.indexed import TokenDataset, check_tokenizer
from trainer.data.making.documents import Block, texts_of
from trainer.data.tokenizer import load_tokenizer


@pytest.fixture
def library(tmp_path):
    folder = tmp_path / "library"
    for number in range(200):
        file = folder / f"package{number % 7}" / f"module{number}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f'"""Module {number}."""\n\n\ndef answer() -> int:\n    return {number}\n')
    (folder / "site-packages").mkdir()
    (folder / "site-packages" / "stranger.py").write_text("not ours")
    (folder / "latin.py").write_bytes(b"# caf\xe9\n")
    return folder


def test_the_split_is_fixed_and_leaves_nothing_out(library):
    train, validation, num_skipped = split_library(library)
    assert (train, validation, num_skipped) == split_library(library)
    assert len(train) + len(validation) == 200 and num_skipped == 1
    assert 0 < len(validation) < 20 and not {file.path for file in train} & {file.path for file in validation}


def test_a_corpus_is_made_once(library, tmp_path):
    out = str(tmp_path / "corpus")
    assert prepare_corpus(out, 300, library)
    tokenizer = load_tokenizer(out + "/tokenizer")
    train, validation = TokenDataset(out + "/train"), TokenDataset(out + "/validation")
    for dataset in (train, validation):
        check_tokenizer(dataset, tokenizer)
    assert train.num_documents + validation.num_documents == 200
    assert not prepare_corpus(out, 300, library)
    with pytest.raises(BadInput, match="choose another"):
        prepare_corpus(out, 301, library)


def test_an_interrupted_corpus_is_completed(library, tmp_path):
    out = tmp_path / "corpus"
    assert prepare_corpus(str(out), 300, library)
    before = {file: file.read_bytes() for file in out.glob("*.*")}
    for name in ("corpus.json", "validation.bin", "validation.idx", "validation.meta.json"):
        (out / name).unlink()
    assert prepare_corpus(str(out), 300, library)
    assert {file: file.read_bytes() for file in out.glob("*.*")} == before
    assert json.loads((out / "corpus.json").read_text())["settings"]["vocab_size"] == 300


def test_the_corpus_keeps_byte_order_marks_as_it_always_has(library):
    """Runs of the demo are continued on it, and its bytes decide the order of its samples."""
    marked = sorted(library.rglob("module*.py"))[0]
    marked.write_bytes(b"\xef\xbb\xbf" + marked.read_bytes())
    train, validation, _ = split_library(library)
    file = next(file for file in train + validation if file.path == str(marked))
    assert next(texts_of(Block((file,), 1, b"", 0), "text")).startswith("\ufeff")

"""The embedded corpus: made once from a library of sources, complete or not there."""

from __future__ import annotations

import json

import pytest

from configs.errors import BadInput
from tools import prepare_corpus as prepare
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


@pytest.fixture
def interrupted(library, tmp_path, monkeypatch):
    """A corpus whose making was stopped after the tokenizer and the training data."""
    out, preprocess = tmp_path / "corpus", prepare.preprocess

    def stop(files, recipe, prefix, **options):
        if prefix.endswith("validation"):
            raise KeyboardInterrupt
        return preprocess(files, recipe, prefix, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare, "preprocess", stop)
        prepare_corpus(str(out), 300, library)
    return out


def test_an_interrupted_corpus_is_completed(library, interrupted, tmp_path):
    other = tmp_path / "other"
    assert prepare_corpus(str(other), 300, library)
    assert prepare_corpus(str(interrupted), 300, library)
    files = {file.name: file.read_bytes() for file in other.glob("*.*") if not file.name.endswith(".meta.json")}
    assert {name: (interrupted / name).read_bytes() for name in files} == files and len(files) == 5
    assert json.loads((interrupted / "corpus.json").read_text())["settings"]["vocab_size"] == 300
    assert not prepare_corpus(str(interrupted), 300, library)


def test_an_interrupted_corpus_is_not_mixed_with_another(library, interrupted, monkeypatch):
    """Its tokenizer would be taken for one of the other size, or of the other Python's sources."""
    before = sorted(file.name for file in interrupted.iterdir())
    with pytest.raises(BadInput, match="'vocab_size': 300} is there; delete it or choose another"):
        prepare_corpus(str(interrupted), 320, library)
    with monkeypatch.context() as patch, pytest.raises(BadInput, match="begun with Python 3"):
        patch.setattr(prepare.platform, "python_version", lambda: "4.0.0")
        prepare_corpus(str(interrupted), 300, library)
    assert sorted(file.name for file in interrupted.iterdir()) == before
    (interrupted / "corpus.json").unlink()
    with pytest.raises(BadInput, match="nothing says what made it"):
        prepare_corpus(str(interrupted), 300, library)


def test_a_refused_corpus_leaves_nothing_behind(library, tmp_path):
    with pytest.raises(BadInput, match="--vocab-size: 256 is less"):
        prepare_corpus(str(tmp_path / "corpus"), 256, library)
    assert not (tmp_path / "corpus").exists()


def test_a_corpus_of_an_earlier_version_is_complete(library, tmp_path):
    out = tmp_path / "corpus"
    out.mkdir()
    (out / "corpus.json").write_text('{"settings": {"format": 1, "vocab_size": 300}, "python": "3.11.0"}')
    assert not prepare_corpus(str(out), 300, library)


def test_the_corpus_keeps_byte_order_marks_as_it_always_has(library):
    """Runs of the demo are continued on it, and its bytes decide the order of its samples."""
    marked = sorted(library.rglob("module*.py"))[0]
    marked.write_bytes(b"\xef\xbb\xbf" + marked.read_bytes())
    train, validation, _ = split_library(library)
    file = next(file for file in train + validation if file.path == str(marked))
    assert next(texts_of(Block((file,), 1, b"", 0), "text")).startswith("\ufeff")


@pytest.mark.parametrize("content", ['{"settings"', "{}", "[]", '{"settings": {"format": 1}}'])
def test_a_damaged_marker_is_one_sentence(library, tmp_path, content):
    out = tmp_path / "corpus"
    out.mkdir()
    (out / "corpus.json").write_text(content)
    with pytest.raises(BadInput, match="corpus.json is damaged; delete it or choose another"):
        prepare_corpus(str(out), 300, library)

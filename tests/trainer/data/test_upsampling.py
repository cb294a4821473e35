"""Long documents drawn with a share of their own: exact at any moment, continued exactly, else refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

from configs.errors import BadInput
from configs.sections.data import SourceConfig
from trainer.data.blend import Blend, open_blend
from trainer.data.index_file import write_index
from trainer.data.packed_source import LABELS, TOKENS

LENGTHS = [3, 40, 5, 8, 25, 6, 2, 7, 30, 4] * 6
SEQ_LEN = 8


@pytest.fixture
def prefix(tmp_path) -> str:
    """Documents of which every token is the document's number + 1."""
    write_index(tmp_path / "data.idx", np.uint16, [np.array(LENGTHS, dtype=np.int32)])
    (tmp_path / "data.bin").write_bytes(np.repeat(np.arange(1, 61, dtype=np.uint16), LENGTHS).tobytes())
    return str(tmp_path / "data")


def open_one(prefix: str, share: float | None = 0.7, tokens: int | None = 25, packing: str = "concat") -> Blend:
    source = SourceConfig(path=prefix, long_document_tokens=tokens, long_document_share=share)
    return open_blend([source], SEQ_LEN, seed=4, packing=packing)


def documents_in(sample: np.ndarray) -> set[int]:
    """The numbers of the documents of a window `[seq + 1]` or of a packed row `[3, seq]`."""
    return set((sample if sample.ndim == 1 else sample[TOKENS, sample[LABELS] >= 0]).tolist())


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
@pytest.mark.parametrize("share", [0.7, 0.05, 1.0])
def test_long_documents_have_their_share_at_any_moment(prefix, share, packing):
    blend = open_one(prefix, share, packing=packing)
    samples = blend.read(blend.take(2000), np.arange(2000))
    is_long = []
    for sample in samples:
        lengths = {LENGTHS[number - 1] >= 25 for number in documents_in(sample)}
        assert len(lengths) == 1, "a sample holds documents of one kind"
        is_long.append(lengths.pop())
    assert np.abs(np.cumsum(is_long) - share * np.arange(1, 2001)).max() <= 1
    seen = set().union(*map(documents_in, samples))
    assert {number for number in seen if LENGTHS[number - 1] >= 25} == {
        number + 1 for number, length in enumerate(LENGTHS) if length >= 25
    }


def test_the_shares_of_sources_stay_what_they_are(prefix, tmp_path):
    write_index(tmp_path / "other.idx", np.uint16, [np.array([50, 60], dtype=np.int32)])
    (tmp_path / "other.bin").write_bytes(np.full(110, 99, dtype=np.uint16).tobytes())
    upsampled = SourceConfig(path=prefix, weight=1, long_document_tokens=25, long_document_share=0.6)
    blend = open_blend([upsampled, SourceConfig(path=str(tmp_path / "other"), weight=3)], SEQ_LEN, seed=4)
    assert np.bincount(blend.take(1000).source).tolist() == pytest.approx([150, 100, 750], abs=1)


def test_another_share_goes_on_without_repeats_and_another_bound_is_refused(prefix):
    blend = open_one(prefix, 0.5)
    blend.take(20)
    state = json.loads(json.dumps(blend.state_dict()))
    same = open_one(prefix, 0.5)
    same.load_state_dict(state)
    assert np.array_equal(same.take(30).sample, blend.take(30).sample)
    changed = open_one(prefix, 0.9)
    changed.load_state_dict(state)
    taken = changed.take(50)
    for number, count in ((0, 45), (1, 5)):
        assert taken.sample[taken.source == number].tolist() == list(range(10, 10 + count))
    for tokens, share, words in ((30, 0.5, "=30 of .* the 25 of"), (None, None, "=null of .* the 25 of")):
        with pytest.raises(BadInput, match=f"data.train: long_document_tokens{words}.*; use 25, .*init_from"):
            open_one(prefix, share, tokens).load_state_dict(state)
    with pytest.raises(BadInput, match="long_document_tokens=25 of .* the null of .*; use null, or"):
        blend.load_state_dict(open_one(prefix, None, None).state_dict())


def test_sources_without_both_kinds_of_documents_are_refused(prefix):
    with pytest.raises(BadInput, match=r"data.train: .*/data has no document of long_document_tokens=41 .* work: 40"):
        open_one(prefix, tokens=41)
    with pytest.raises(BadInput, match=r"no document of fewer than .*=2 .* shortest has 2; .* long_document_share=1.0"):
        open_one(prefix, tokens=2)
    assert len(open_one(prefix, 1.0, tokens=2).sources) == 1


def test_of_documents_of_one_length_none_can_be_drawn_more_often(tmp_path):
    write_index(tmp_path / "data.idx", np.uint16, [np.full(3, 20, dtype=np.int32)])
    (tmp_path / "data.bin").write_bytes(bytes(120))
    with pytest.raises(BadInput, match="its longest has 20; .* work: null for it and for long_document_share$"):
        open_one(str(tmp_path / "data"), 0.7, tokens=21)
    with pytest.raises(BadInput, match="its longest has 20; .* work: 20$"):
        open_one(str(tmp_path / "data"), 1.0, tokens=21)
    assert len(open_one(str(tmp_path / "data"), 1.0, tokens=20).sources) == 1


def test_what_is_read_how_often_is_told(prefix):
    long, short = open_one(prefix, 0.5, packing="best_fit").describe_order(200)
    assert long.startswith(f"{prefix} (documents of at least 25 tokens): 18 documents of 570 tokens, 50.0% of all ")
    assert "18 documents are longer than a row and split" in long
    assert "(documents of fewer than 25 tokens): 42 documents of" in short and "0 documents are longer" in short
    assert list(open_one(prefix, None, None).describe_order(200)) == []

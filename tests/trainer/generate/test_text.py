"""Samples begin and end as the documents of the data do, and go on where the context is full."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from configs.sections.run import SampleConfig
from trainer.data.tokenizer import Tokenizer
from trainer.generate import text
from trainer.generate.rows import Completion

BOS, EOD, A = 1, 2, 3


class Letters:
    """A backend in which every letter is A."""

    def encode(self, letters: str, add_special_tokens: bool) -> SimpleNamespace:
        return SimpleNamespace(ids=[A] * len(letters))

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return "a" * ids.count(A)


class Writer:
    """Continues any text with A until it is five tokens long, then ends the document, if it is to end."""

    seen: list[tuple[list[int], int]] = []
    ends = True

    def __init__(self, model) -> None:
        self.seen.clear()

    def generate(self, prompts, sampling):
        (prompt,) = prompts
        self.seen.append((list(prompt), sampling.seed))
        if not self.ends:
            return [Completion(0, 0, [A] * sampling.max_new_tokens, [], [], "length")]
        ids = [A] * max(5 - len(prompt), 0) + [EOD]
        assert sampling.stop_tokens == (EOD,) and sampling.max_new_tokens == 10 and sampling.temperature == 0
        return [Completion(0, 0, ids, [], [], "stop_token")]


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setattr(text, "EngineGenerator", Writer)
    return SimpleNamespace(config=SimpleNamespace(model=SimpleNamespace(max_position_embeddings=64)))


def test_a_prompt_begins_with_bos_where_documents_do(model):
    settings = SampleConfig(num_tokens=10, temperature=0.0)
    for bos_id, prompt, expected, written in [
        (None, "aa", [A, A], "aaa"),
        (BOS, "aa", [BOS, A, A], "aa"),
        (BOS, "", [BOS], "aaaa"),
        (None, "", [EOD], "aaaa"),
    ]:
        tokenizer = Tokenizer("d", Letters(), "e", EOD, bos_id)
        assert text.generate_text(model, tokenizer, prompt, settings, 7) == written
        assert Writer.seen == [(expected, 7)]


def test_a_full_context_goes_on_with_its_later_half(model, monkeypatch):
    monkeypatch.setattr(Writer, "ends", False)
    settings = SampleConfig(num_tokens=100)
    written = text.generate_text(model, Tokenizer("d", Letters(), "e", EOD), "aaaa", settings, 7)
    assert written == "a" * 100
    assert [len(prompt) for prompt, _ in Writer.seen] == [4, 32, 32]
    assert len({seed for _, seed in Writer.seen}) == 3

"""Samples begin and end as the documents of the data do."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from configs.sections.run import SampleConfig
from trainer.data.tokenizer import Tokenizer
from trainer.generate import text

BOS, EOD, A = 1, 2, 3


class Letters:
    """A backend in which every letter is A."""

    def encode(self, letters: str, add_special_tokens: bool) -> SimpleNamespace:
        return SimpleNamespace(ids=[A] * len(letters))

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return "a" * ids.count(A)


class Engine:
    """Continues any text with A until it is five tokens long, then ends the document."""

    config = SimpleNamespace(model=SimpleNamespace(max_position_embeddings=64))

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def compute_logits(self, ids: torch.Tensor) -> torch.Tensor:
        self.seen.append(ids[0].tolist())
        token = A if ids.numel() < 5 else EOD
        return torch.nn.functional.one_hot(torch.full_like(ids, token), 4).float()


def test_a_prompt_begins_with_bos_where_documents_do(monkeypatch):
    monkeypatch.setattr(text, "broadcast_object", lambda value: value)
    settings = SampleConfig(num_tokens=10, temperature=0.0)
    for bos_id, prompt, expected, written in [
        (None, "aa", [A, A], "aaa"),
        (BOS, "aa", [BOS, A, A], "aa"),
        (BOS, "", [BOS], "aaaa"),
        (None, "", [EOD], "aaaa"),
    ]:
        engine = Engine()
        assert text.generate_text(engine, Tokenizer("d", Letters(), "e", EOD, bos_id), prompt, settings, 0) == written
        assert engine.seen[0] == expected and engine.seen[-1][-1] == A

"""A reward model among rewards: which texts it reads, and what has no value."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from trainer.data.chat.conversation import BadRow, Conversation
from trainer.data.chat.encode import Sample
from trainer.rl import reward_model
from trainer.rl.reward_model import RewardModel


class Encoder:
    """Makes each character of a source a token, the last but one the end of the answer; refuses `bad`."""

    template = tokenizer = None

    def __init__(self, *arguments: Any) -> None:
        pass

    def encode_batch(self, conversations: Any) -> list[Any]:
        return [self.encode(one.source) for one in conversations]

    def encode(self, text: str) -> Any:
        if text == "bad":
            return BadRow("no template writes it")
        ids = [ord(letter) for letter in text]
        return [Sample(ids, [0] * (len(ids) - 2) + [1, 0], (len(ids) - 2,), (1,), "x", 0)]


def test_equal_conversations_are_read_once_up_to_the_answers_end(monkeypatch):
    """Else rounding, which is another in every row, would be what groups of equal answers learn from."""
    read = []

    def score_placed(model: Any, placed: Any, forward: Any) -> Any:
        [(placement, batches)] = placed
        rows = [[row[row > 0].tolist() for row in batch.tokens] for batch in batches]
        read.extend(text for batch in rows for text in batch if text)
        return [[np.arange(length) + 0.25 * number for number, length in enumerate(placement._lengths)]]

    monkeypatch.setattr(reward_model, "score_placed", score_placed)
    monkeypatch.setattr(reward_model, "ChatEncoder", Encoder)
    mesh = SimpleNamespace(tp_size=1, cp_size=1, pp_size=1, vpp_size=1, dp_size=1, dp_rank=0)
    config: Any = SimpleNamespace(train=SimpleNamespace(seq_len=6, micro_batch_size=1))
    model: Any = SimpleNamespace(mesh=mesh)
    scored = RewardModel(config, model, Encoder())  # type: ignore[arg-type]
    given = ["abcd\n", "bad", "efghi\n", "abcd\n"]
    conversations: list[Any] = [Conversation((), (), text, 0) for text in given]
    found = scored.score([*conversations, BadRow("no turn"), conversations[2]])
    assert found == [3.0, "no template writes it", 4.25, 3.0, "no turn", 4.25]
    assert sorted("".join(map(chr, text)) for text in read) == ["abcd", "efghi"]

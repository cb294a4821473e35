"""The pool in which an environment answers: whatever it does is the fault of one conversation, and named."""

from __future__ import annotations

import time
from typing import Any

import pytest

from configs.errors import BadInput
from tests.trainer.environments.odd_environment import SAID
from trainer.environments import process
from trainer.environments.answering import EnvironmentPool
from trainer.environments.environment import Turn
from trainer.environments.rewards.reply import Reply

ODD = "tests.trainer.environments.odd_environment:Odd"
NO_TURN = "which is no Turn of messages, the assistant's reply first, a finite reward, and is_done=True or False"

RIGHT = Turn((SAID, {"role": "user", "content": "4, 1"}), 1, False)


def reply(text: str) -> Reply:
    return Reply(text, {"answer": "4"}, [{"role": "user", "content": "2 + 2?"}], len(text), 100, False)


@pytest.fixture
def pool() -> Any:
    pool = EnvironmentPool(ODD, 0.5, 2)
    pool.load()
    yield pool
    pool.close()


def test_every_reply_is_answered_and_faults_are_their_own(pool: EnvironmentPool) -> None:
    asked = {
        "raise": "RuntimeError: boom", "none": f"answered None, {NO_TURN}", "text": f"answered 'right', {NO_TURN}",
        "perhaps": NO_TURN,
        "nan": NO_TURN, "word": NO_TURN, "empty": NO_TURN, "letters": NO_TURN, "exit": "its process ended with code 3",
        "hang": "took longer than 0.5 s", "without reply": NO_TURN,
    }  # fmt: skip
    texts = [word for one in asked for word in (one, "go on")]
    began = time.monotonic()
    turns = pool.answer([reply(text) for text in texts])
    assert time.monotonic() - began < 20
    for text, turn in zip(texts, turns, strict=True):
        if text == "go on":
            assert turn == RIGHT
        else:
            assert isinstance(turn, str) and turn.endswith(asked[text]), (text, turn)
    number, unsendable = pool.answer([reply("numpy"), reply("function")])
    assert number == Turn((SAID,), 0.5, True)
    assert isinstance(unsendable, str) and unsendable.startswith("answered a Turn that cannot be sent to the trainer (")
    assert pool.answer([]) == []


def test_a_worker_that_stops_in_the_middle_of_a_message_does_not_stop_the_run(monkeypatch: Any) -> None:
    monkeypatch.setattr(process, "_STALL_SECONDS", 1)
    pool = EnvironmentPool(ODD, 5.0, 1)
    began = time.monotonic()
    try:
        half, whole = pool.answer([reply("half a message"), reply("a")])
        assert isinstance(half, str) and whole == RIGHT
        assert pool.answer([reply("freeze later")]) == [RIGHT]
        time.sleep(0.5)
        assert pool.answer([reply("b" * 1_000_000)]) == [RIGHT], "another worker takes over"
    finally:
        pool.close()
    assert time.monotonic() - began < 30


def test_an_environment_that_cannot_be_made_is_refused_by_its_field() -> None:
    with pytest.raises(BadInput, match=r"grpo\.environment=odd:Odd: cannot be made"):
        EnvironmentPool("odd:Odd", 1.0, 1).load()

"""What those that wait for a process hear of it: that it works, why it failed, that it is gone."""

from __future__ import annotations

import time

import pytest

from trainer.disk import heartbeat
from trainer.disk.heartbeat import Heartbeat, Listener


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Return the file of a heart that beats fast, and is gone soon where it does not."""
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(heartbeat, "SILENCE_SECONDS", 0.5)
    return tmp_path / "beat"


def test_one_that_works_is_heard_for_as_long_as_it_does_and_then_no_more(file):
    listener = Listener(file)
    with Heartbeat(file):
        for _ in range(8):
            time.sleep(0.1)
            assert listener.find_failure() is None and not listener.is_silent
    assert not file.exists() and listener.find_failure() is None
    time.sleep(0.6)
    assert listener.find_failure() is None and listener.is_silent


def test_one_that_fails_says_why_to_those_that_wait_and_to_nobody_later(file):
    waiting = Listener(file)
    with pytest.raises(ValueError, match="row 3"), Heartbeat(file):
        raise ValueError("row 3 is bad")
    later = Listener(file)
    assert (waiting.find_failure(), later.find_failure()) == ("row 3 is bad", None)
    with Heartbeat(file):
        assert later.find_failure() is None
    assert later.find_failure() is None

"""Rewards of an answer's form: a regular expression, and tags in their order."""

from __future__ import annotations

import re
from functools import lru_cache

from configs.errors import BadInput, in_one_line
from trainer.environments.rewards.reply import Reply

_TAG = re.compile(r"[A-Za-z]\w*")


def regex(reply: Reply, pattern: str, full: bool = False) -> float:
    """Return 1.0 where the pattern (Python's `re`) is found in the answer, or matches all of it with `full`, else 0.0.

    A point matches line breaks only behind (?s) at the pattern's beginning.
    """
    compiled = _compile(pattern)
    found = compiled.fullmatch(reply.text) if full else compiled.search(reply.text)
    return float(found is not None)


def tags(reply: Reply, names: tuple[str, ...] = ("think", "answer"), is_open: bool = False) -> float:
    """Return 1.0 where the answer is tags and nothing else, such as <think>..</think> <answer>..</answer>; else 0.0.

    Each of `names` must be opened and closed once, in this order, with white space alone before, between and behind
    them. `is_open` says that the prompt already ends in the first opening tag, which the answer must not repeat.
    """
    wrong = [name for name in names if not _TAG.fullmatch(name)]
    if wrong or not names or len(set(names)) < len(names):
        raise BadInput(f"options.names={list(names)}: must be different names of tags; try [think, answer]")
    text = f"<{names[0]}>{reply.text}" if is_open else reply.text
    if any(text.count(f"<{name}>") != 1 or text.count(f"</{name}>") != 1 for name in names):
        return 0.0
    for name in names:
        before, _, rest = text.partition(f"<{name}>")
        inside, closed, text = rest.partition(f"</{name}>")
        if before.strip() or not closed or any(f"<{other}>" in inside for other in names):
            return 0.0
    return float(not text.strip())


@lru_cache(maxsize=32)
def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise BadInput(f"options.pattern={pattern!r}: does not compile ({in_one_line(error)}); try '\\d+'") from error

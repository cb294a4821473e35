"""The reward of an answer that is mathematically equal to the one of the data, judged by the package math-verify."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import math_verify

from trainer.environments.rewards.reply import Reply, final_answer


def equal_mathematics(reply: Reply, column: str = "answer", after: str = "", strict: bool = True) -> float | None:
    """Return 1.0 where the answer equals what the row's column holds, else 0.0; None where the column is empty.

    Both may be LaTeX or plain: numbers, expressions, equations, sets, intervals, matrices; of an answer the last
    \\boxed counts, else the last expression. The column may be an expression alone, or end in "#### 42" as GSM8K's.
    `strict` keeps variables by name, and sets apart from tuples. `after` is as of `exact_match`. math-verify's own
    time-outs, which use signals, are off: this process is ended at the reward's `time_limit`. Raises ValueError for a
    column that holds no mathematics.
    """
    expected = reply.row.get(column)
    if expected is None:
        return None
    right = _parse_column(str(expected))
    if not right:
        raise ValueError(f"the row's {column} holds no mathematics that math-verify can read")
    final = final_answer(reply.text, after)
    if final is None:
        return 0.0
    found = math_verify.parse(final, parsing_timeout=None)
    return float(math_verify.verify(right, found, strict=strict, timeout_seconds=None))


@lru_cache(maxsize=1024)
def _parse_column(text: str) -> list[Any]:
    text = text.rpartition("####")[2].strip()
    if "$" not in text and "\\boxed" not in text and "\\(" not in text and "\\[" not in text:
        text = f"${text}$"
    return math_verify.parse(text, parsing_timeout=None)

"""The reward of an answer whose last number is the one of the data, as with GSM8K."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

from configs.errors import BadInput
from trainer.environments.rewards.reply import Reply, final_answer

# A sign counts where no term precedes it; digits inside a word, such as x2, and behind a second point are no number.
_NUMBER = re.compile(
    r"(?:(?<![\w)])(?P<sign>[-+\u2212])(?=[$€£]?[\d.]))?[$€£]?"
    r"(?P<size>(?:(?<![A-Za-z_\d])(?<!\d\.)(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w.])\.\d+)"
    r"(?:[eE][-+]?\d{1,4}(?!\w))?)"
)


def numeric(reply: Reply, column: str = "answer", tolerance: float = 0.0, after: str = "") -> float | None:
    """Return 1.0 where the last number of the answer is that of the row's column, else 0.0; None for an empty column.

    Numbers may have commas between thousands, a currency's sign, a point and an exponent. The column holds a number,
    or text of which the last one counts, such as GSM8K's worked answers that end in "#### 42". `tolerance` is how far
    apart they may be; 0 compares them exactly, 42 and 42.0 being one. `after` is the text that precedes the final
    answer, as of `exact_match`. Raises ValueError for a column without a number.
    """
    if not 0 <= tolerance < float("inf"):
        raise BadInput(f"options.tolerance={tolerance}: must be at least 0; try 1e-6")
    expected = _number_of(reply.row.get(column))
    if expected is None:
        if reply.row.get(column) is None:
            return None
        raise ValueError(f"the row's {column} holds no number")
    final = final_answer(reply.text, after)
    found = None if final is None else last_number(final)
    if found is None:
        return 0.0
    return float(found == expected or abs(found - expected) <= Decimal(tolerance))


def last_number(text: str) -> Decimal | None:
    """Return the last number that a text holds, None where there is none."""
    found = list(_NUMBER.finditer(text.replace("{,}", ",")))
    if not found:
        return None
    last = found[-1]
    size = Decimal(last["size"].replace(",", ""))
    return size if last["sign"] in (None, "+") else -size


def _number_of(value: Any) -> Decimal | None:
    if value is None or isinstance(value, str):
        return None if value is None else last_number(value)
    return Decimal(str(value))

"""The reward of an answer that is, letter by letter, the one of the data."""

from __future__ import annotations

from trainer.environments.rewards.reply import Reply, final_answer


def exact_match(
    reply: Reply, column: str = "answer", ignore_case: bool = False, strip: bool = True, after: str = ""
) -> float | None:
    """Return 1.0 where the answer is what the row's column holds, else 0.0; None where the column is empty.

    A list in the column holds several right answers. `strip` leaves out white space around both. `after` is the text
    that precedes the final answer: nothing before its last place counts, and an answer without it is wrong; of an
    opening tag such as <answer> it is what the tag encloses.
    """
    expected = reply.row.get(column)
    if expected is None:
        return None
    final = final_answer(reply.text, after)
    if final is None:
        return 0.0

    def normal(text: str) -> str:
        text = text.strip() if strip else text
        return text.casefold() if ignore_case else text

    right = expected if isinstance(expected, list | tuple) else (expected,)
    return float(normal(final) in {normal(str(one)) for one in right})

"""Small questions in words whose answers can be checked: sums, comparisons, letters, words the other way round.

For demos: a model of a few million parameters can learn them in minutes. Knows nothing of tokens or templates.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

_NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Ida", "Jon", "Kim", "Leo", "Mia")
_THINGS = ("apples", "books", "coins", "eggs", "keys", "nuts", "pens", "shells")
_WORDS = tuple(
    "arm ask bag bed big bit box boy bug bus cap car cat cow cup cut day dog dry ear egg eye fan far fly fox fun gas "
    "gum hat hen hot ice ink jam jar job key kid leg lid lip map mud net nut oak oil old owl pan pen pig pot rag ram "
    "red rib rod rug sad sea sky sun tag tap ten tie tin toe toy van wax web wet wig yak zip".split()
)
ANSWER = "The answer is "
"""What precedes the final answer of a worked one."""


@dataclass(frozen=True)
class SmallTask:
    """A question, a worked answer to learn from, the final answer alone, and a worked answer that is nearly right."""

    kind: str
    question: str
    worked: str
    answer: str
    wrong: str = ""

    @property
    def row(self) -> dict[str, object]:
        """A row of data: the question and its worked answer under `messages`, and the `answer`."""
        messages = [{"role": "user", "content": self.question}, {"role": "assistant", "content": self.worked}]
        return {"messages": messages, "kind": self.kind, "answer": self.answer}

    @property
    def pair(self) -> dict[str, object]:
        """A row of preferences: the question under `prompt`, the right answer `chosen` and the wrong one `rejected`."""
        answers = {"chosen": self.worked, "rejected": self.wrong}
        return {"prompt": self.question, **answers, "kind": self.kind, "answer": self.answer}


def draw_task(source: random.Random) -> SmallTask:
    """Draw a task of any kind."""
    return source.choice(KINDS)(source)


def is_right(task: SmallTask, reply: str) -> bool:
    """Return whether a reply ends in the right answer, after the last `ANSWER` in it; a full stop may follow."""
    _, found, final = reply.rpartition(ANSWER)
    return bool(found) and final.strip().rstrip(".").strip() == task.answer


def _sum(source: random.Random) -> SmallTask:
    first, second = source.randrange(1, 10), source.randrange(1, 10)
    name, thing = source.choice(_NAMES), source.choice(_THINGS)
    question = source.choice((
        f"{name} has {first} {thing} and gets {second} more. How many {thing} are there?",
        f"There are {first} {thing} here and {second} there. How many does {name} see?",
        f"What is {first} plus {second}?",
    ))  # fmt: skip
    steps, right = f"{first} + {second} = ", first + second
    wrong = right + 1 if first < second else right - 1
    return _task("sum", question, (f"{steps}{right}.", right), (f"{steps}{wrong}.", wrong))


def _larger(source: random.Random) -> SmallTask:
    first, second = source.sample(range(1, 30), 2)
    name, thing = source.choice(_NAMES), source.choice(_THINGS)
    question = source.choice((
        f"{name} may take {first} {thing} or {second} {thing}. How many are more?",
        f"Which is larger, {first} or {second}?",
    ))  # fmt: skip
    low, high = sorted((first, second))
    return _task("larger", question, (f"{high} > {low}.", high), (f"{low} > {high}.", low))


def _letter(source: random.Random) -> SmallTask:
    word, place = source.choice(_WORDS), source.randrange(3)
    order = ("first", "second", "last")[place]
    question = source.choice((
        f"What is the {order} letter of {word}?",
        f"{source.choice(_NAMES)} writes {word}. Which letter is {order}?",
    ))  # fmt: skip
    wrong = next(letter for letter in word[place + 1 :] + word if letter != word[place])
    return _task("letter", question, (f"{_spelled(word)}.", word[place]), (f"{_spelled(word)}.", wrong))


def _reverse(source: random.Random) -> SmallTask:
    word = source.choice(_WORDS)
    question = source.choice((
        f"Write {word} the other way round.",
        f"{source.choice(_NAMES)} reads {word} from the end. What does it say?",
    ))  # fmt: skip
    right = word[::-1]
    wrong = next(other for other in (right[1::-1] + right[2], right[0] + right[:0:-1], word) if other != right)
    steps = f"{_spelled(word)}, "
    return _task("reverse", question, (f"{steps}{_spelled(right)}.", right), (f"{steps}{_spelled(wrong)}.", wrong))


KINDS: tuple[Callable[[random.Random], SmallTask], ...] = (_sum, _larger, _letter, _reverse)


def _task(kind: str, question: str, right: tuple[str, int | str], wrong: tuple[str, int | str]) -> SmallTask:
    """Return the task whose right and wrong answers are these steps and ends."""
    worked, nearly = (f"{steps} {ANSWER}{answer}." for steps, answer in (right, wrong))
    return SmallTask(kind, question, worked, str(right[1]), nearly)


def _spelled(word: str) -> str:
    return " ".join(word)

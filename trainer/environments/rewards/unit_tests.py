"""The reward of code that passes the unit tests of its row, run in a sandbox."""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from configs.errors import BadInput, in_one_line
from trainer.environments.rewards.reply import Reply
from trainer.environments.rewards.sandbox import Isolation, Limits, NotContained, check_contained, run_program

_FENCED = re.compile(r"```(?:python3?|py)?[ \t]*\n(.*?)```", re.DOTALL | re.IGNORECASE)
_MOST_OUTPUT = 1 << 20
# Whatever the code prints is thrown away: only what follows the secret word, which it is not told, is believed.
_DRIVER = """
import json, os, sys, types
def run():
    job = json.loads(sys.stdin.read())
    report, null = os.dup(1), os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):
        os.dup2(null, descriptor)
    answer = sys.modules["answer"] = types.ModuleType("answer")
    make, execute, spell, write, leave = compile, exec, json.dumps, os.write, os._exit  # before the code changes them
    def passes(text, name):
        try:
            execute(make(text, name, "exec"), answer.__dict__)
        except BaseException:
            return False
        return True
    passed = passes(job["code"], "answer.py") and [passes(test, "test.py") for test in job["tests"]]
    write(report, (job["word"] + spell(passed)).encode())
    leave(0)
run()
"""


def passes_tests(
    reply: Reply,
    column: str = "tests",
    partial: bool = False,
    seconds: float = 5.0,
    megabytes: int = 512,
    processes: int = 16,
    file_megabytes: int = 16,
    isolation: Isolation = "namespaces",
) -> float | None:
    """Return 1.0 where the last fenced code of the answer passes all tests of the row's column, else 0.0.

    `partial` gives the share of tests passed; None where the column is empty; 0.0 without fenced code. Tests are Python
    text with asserts that runs behind the code in its module, a list of such, a list of {input, output} for
    standard input and output (white space at the ends of lines and of the text does not count), {inputs: [...],
    outputs: [...]}, or JSON of these. `seconds` is for all of them; too slow or too large is wrong, not a fault.

    What is contained is said of `Limits`. With `isolation` namespaces, a machine that does not allow them is refused;
    limits must be asked for, for code that one would run oneself. In both, code that searches its own interpreter can
    find out how its asserts are judged; tests by input and output are judged outside.
    """
    if min(seconds, megabytes, processes, file_megabytes) <= 0:
        raise BadInput("options: seconds, megabytes, processes and file_megabytes must be above 0; try 5, 512, 16, 16")
    _check_isolation(isolation)
    tests = reply.row.get(column)
    if tests is None:
        return None
    statements, pairs = _parse_tests(tests, column)
    blocks = _FENCED.findall(reply.text)
    if not blocks:
        return 0.0
    limits = Limits(seconds, megabytes, processes, file_megabytes, isolation)
    passed = _run_statements(blocks[-1], statements, limits) if statements else _run_pairs(blocks[-1], pairs, limits)
    results = list(passed) if partial else [all(passed)]
    return sum(results) / len(results)


def _run_statements(code: str, tests: list[str], limits: Limits) -> list[bool]:
    """Run all tests in one process, one after the other; all fail where it does not come to its end."""
    word = secrets.token_hex(16)
    job = json.dumps({"code": code, "tests": tests, "word": word})
    outcome = run_program(_DRIVER, job, limits, _MOST_OUTPUT)
    text = outcome.output.decode(errors="replace")
    if outcome.ended != "exit" or not text.startswith(word):
        return [False] * len(tests)
    try:
        passed = json.loads(text.removeprefix(word)) or [False] * len(tests)
    except ValueError:  # the code made copies of its process, and each has written
        passed = [False] * len(tests)
    return [one is True for one in passed]


def _run_pairs(code: str, pairs: list[tuple[str, str]], limits: Limits) -> Iterable[bool]:
    """Yield whether the program writes the output of each input, each in a process of its own."""
    deadline = time.monotonic() + limits.seconds
    for given, wanted in pairs:
        left = deadline - time.monotonic()
        if left <= 0:
            yield False
            continue
        outcome = run_program(code, given, replace(limits, seconds=left), len(wanted) + _MOST_OUTPUT)
        written = outcome.output.decode(errors="replace")
        yield outcome.ended == "exit" and outcome.code == 0 and _lines(written) == _lines(wanted)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _parse_tests(value: Any, column: str) -> tuple[list[str], list[tuple[str, str]]]:
    """Return a row's tests as statements, or else as pairs of input and output. Raises ValueError for anything else."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            value = json.loads(value)
        except ValueError:
            pass  # a program may begin so too
    if isinstance(value, str):
        return [value], []
    if isinstance(value, Mapping) and "inputs" in value and "outputs" in value:
        pairs = zip(value["inputs"], value["outputs"], strict=True)
        value = [{"input": given, "output": wanted} for given, wanted in pairs]
    if isinstance(value, list | tuple) and value:
        if all(isinstance(one, str) for one in value):
            return list(value), []
        if all(isinstance(one, Mapping) and {"input", "output"} <= one.keys() for one in value):
            return [], [(str(one["input"]), str(one["output"])) for one in value]
    raise ValueError(f"the row's {column} holds no tests: neither asserts nor pairs of input and output")


def _check_isolation(isolation: Isolation) -> None:
    try:
        check_contained(isolation)
    except NotContained as error:
        raise BadInput(
            f"options.isolation={isolation}: this machine does not run programs so ({in_one_line(error)}); allow user "
            "namespaces, or set isolation: limits, which keeps code neither from the network nor from your files"
        ) from error

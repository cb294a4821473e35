"""The calculator's arithmetic against values known by hand, its calls right and wrong, and its tasks."""

import json
import random
import time
from fractions import Fraction

import pytest

from configs.errors import BadInput
from trainer.environments.arithmetic import BadExpression, work_out
from trainer.environments.calculator import Calculator, draw_calculator_task
from trainer.environments.environment import load_environment

ROW = {"messages": [{"role": "user", "content": "What is 48213 times 907?"}], "answer": "43729191"}


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("48213 * 907", "43729191"),
        ("(12 + 3) * 4 - -2", "62"),
        ("0.1 + 0.2", "0.3"),
        ("1 / 8", "0.125"),
        ("-7 / 20", "-0.35"),
        ("1 / 3", "0.333333333333"),
        ("7 // 2 + 7 % 2", "4"),
        ("2 ^ 10", "1024"),
        ("2 ** -2", "0.25"),
        ("(0 - 1) ** 3", "-1"),
        ("0 ** 0", "1"),
        ("6 \u00d7 7 \u00f7 2", "21"),
        ("1e3 + 1", "1001"),
        ("1_000.5e1", "10005"),
        ("1234567890123456.7 + 0", "1234567890123456.7"),
        ("(0.1\n + 12345678901234567.8) * 10", "123456789012345679"),
        ("0e999999999", "0"),
        ("2 ** 1000", str(2**1000)),
    ],
)
def test_arithmetic(expression, value):
    assert work_out(expression) == value


@pytest.mark.parametrize(
    ("expression", "why"),
    [
        ("1 / 0", "division by zero"),
        ("0 ** -1", "division by zero"),
        ("9 ** 9 ** 9", "too large"),
        ("2 ** 1030", "too large"),
        ("10 ** 300 * 10 ** 300", "too large"),
        ("1e999", "too large"),
        ("1e-999999999", "too close to 0"),
        ("1.5e-323", "too large"),
        ("2 ** 0.5", "whole exponents"),
        ("1,234 + 1", "without commas"),
        ("__import__('os').system('ls')", "only numbers"),
        ("(1).real", "only numbers"),
        ("[1] * 9", "only numbers"),
        ("'a' * 9", "only numbers"),
        ("True + 1", "only numbers"),
        ("1 << 9", "only [+] - "),
        ("x + 1", "only numbers"),
        ("1 +", "no arithmetic"),
        ("", "no arithmetic"),
        ("(" * 150 + "1" + ")" * 150, "longer than"),
        ("(" * 99 + "1" + ")" * 98, "no arithmetic"),
        ("1\0", "no arithmetic"),
    ],
)
def test_what_is_no_bounded_arithmetic_says_why(expression, why):
    with pytest.raises(BadExpression, match=why):
        work_out(expression)


def call(expression, name="calculate", key="arguments"):
    return json.dumps({"name": name, key: {"expression": expression}})


def test_a_conversation_with_a_call_and_its_answer():
    environment = load_environment("calculator")
    messages = environment.begin(ROW, seed=0)
    assert messages == ROW["messages"]
    reply = f"I ask.\n<tool_call>\n{call('48213 * 907')}\n</tool_call>"
    turn = environment.answer(ROW, messages, reply)
    assert turn.messages == (
        {"role": "assistant", "content": reply}, {"role": "tool", "name": "calculate", "content": "43729191"},
    )  # fmt: skip
    assert (turn.reward, turn.is_done) == (None, False)
    messages = [*messages, *turn.messages]
    for last, reward in (
        ("The answer is 43729191.", 1.0), ("The answer is 43,729,191", 1.0), ("The answer is 4372919.", 0.0),
        ("43729191", 0.0), ("", 0.0),
    ):  # fmt: skip
        turn = environment.answer(ROW, messages, last)
        assert (turn.reward, turn.is_done, len(turn.messages)) == (reward, True, 1)


@pytest.mark.parametrize(
    ("reply", "results"),
    [
        (call("2 + 2", key="parameters"), ["4"]),
        (
            f"<tool_call>{call('2 + 2')}</tool_call><tool_call>{call('1/0')}</tool_call>",
            ["4", "error: division by zero"],
        ),
        ("<tool_call>42</tool_call>", ["error: the only tool is calculate; write a call like"]),
        ("<tool_call>{2 + 2}</tool_call>", ["error: the call is no JSON; write it like"]),
        (f"<tool_call>{call('2 + 2')}", ["4"]),
        (f"<tool_call>{call('2', name='search')}</tool_call>", ["error: the only tool is calculate"]),
        ('<tool_call>{"name": "calculate"}</tool_call>', ["error: the arguments have no expression"]),
        (f"<tool_call>{call('1')}</tool_call>" * 50, ["1", "1", "1", "1", "error: at most 4 calls at once"]),
        ("<tool_call>" + "[" * 100_000 + "</tool_call>", ["error: the call is no JSON"]),
    ],
)
def test_faulty_calls_are_answered(reply, results):
    turn = Calculator().answer(ROW, ROW["messages"], reply)
    assert not turn.is_done and turn.reward is None
    written = [message["content"] for message in turn.messages[1:]]
    assert len(written) == len(results)
    assert all(one.startswith(start) for one, start in zip(written, results, strict=True)), written


@pytest.mark.parametrize("reply", ["<tool_call>" * 100_000, "<tool_call>{</tool_call>" * 100_000, "<tool_call>{" * 9])
def test_a_policy_that_repeats_a_call_without_end_is_answered_at_once(reply):
    began = time.process_time()
    turn = Calculator().answer(ROW, ROW["messages"], reply)
    assert time.process_time() - began < 1 and "the call is no JSON" in turn.messages[1]["content"]


def test_tasks_are_right_and_their_worked_conversations_too():
    source, environment = random.Random(0), Calculator()
    kinds = set()
    for _ in range(200):
        task = draw_calculator_task(source, max_digits=4)
        kinds.add(task.kind)
        numbers = task.expression.split()
        value = Fraction(numbers[0])
        assert "*" not in numbers[2:], "read from left to right"
        for sign, number in zip(numbers[1::2], numbers[2::2], strict=True):
            value = {"+": value + int(number), "-": value - int(number), "*": value * int(number)}[sign]
        assert task.answer == str(value)
        row = json.loads(json.dumps(task.row))
        messages = environment.begin(row, 0)
        assert [message["role"] for message in messages] == ["user"]
        assert environment.answer(row, messages, row["messages"][-1]["content"]).reward == 1.0
        asked = json.dumps(row["messages"][1]["tool_calls"][0]["function"])
        assert (
            environment.answer(row, messages, f"<tool_call>{asked}</tool_call>").messages[1]["content"] == task.answer
        )
    assert kinds == {"product", "sum", "difference", "mixed"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("chess", "grpo.environment=chess: must be calculator, or module:Class"),
        ("no_such_module:Chess", "cannot be made .*no_such_module"),
        ("collections:OrderedDict", "has no tools"),
    ],
)
def test_what_is_no_environment_is_refused(name, message):
    with pytest.raises(BadInput, match=message):
        load_environment(name)


def test_a_row_without_an_answer_is_refused():
    with pytest.raises(BadInput, match="needs rows with messages and answer"):
        Calculator().begin({"messages": []}, 0)

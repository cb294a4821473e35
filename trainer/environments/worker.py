"""A process that scores or answers replies: it imports rewards or an environment once, and sends a message for each.

Started by process.py. Never imports torch by itself.
"""

from __future__ import annotations

import math
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

from configs.errors import BadInput, in_one_line
from parallel.parent_death import end_with
from trainer.environments.environment import Environment, Turn, is_turn, load_environment
from trainer.environments.rewards.registry import LoadedReward, load_reward
from trainer.environments.rewards.reply import Reply


@dataclass(frozen=True)
class Order:
    """A reward as the config has it, without pydantic, whose import would take most of a worker's start."""

    function: str
    options: Mapping[str, Any]
    time_limit: float
    is_environment: bool = False
    """`function` names an environment, which answers replies."""


@dataclass(frozen=True)
class Part:
    """What one reward, or the environment, made of one reply."""

    value: Any
    """A number, None where the reward does not apply or failed; a `Turn` of an environment."""
    fault: str | None = None
    is_refusal: bool = False
    """It refused its options, not this reply."""


@dataclass(frozen=True)
class Loaded:
    """What a worker says once it is ready: the column that each reward reads, and the seconds it gives itself."""

    columns: tuple[str | None, ...]
    seconds: tuple[float | None, ...]


def main(descriptor: int, parent: int) -> None:
    """Serve the parent until it closes the connection: receive lists of replies, send a `Part` for each reward."""
    _die_with(parent)
    os.set_inheritable(descriptor, False)
    connection = Connection(descriptor)
    orders, place = connection.recv()
    loaded = _load(orders, place)
    if isinstance(loaded, str):
        connection.send(loaded)
        return
    process = os.getpid()
    connection.send(Loaded(tuple(one.column for one in loaded), tuple(one.seconds for one in loaded)))
    while True:
        try:
            replies: Sequence[Reply] = connection.recv()
        except EOFError:
            return
        connection.send(time.monotonic())
        for reply in replies:
            for reward, order in zip(loaded, orders, strict=True):
                part = work_out_part(reward, reply, order.time_limit, _turn if order.is_environment else _number)
                if os.getpid() != process:  # a copy of this process that the function has made and not ended
                    os._exit(0)
                connection.send((part, time.monotonic()))


def work_out_part(reward: LoadedReward, reply: Reply, time_limit: float, read: Callable[[Any], Part]) -> Part:
    """Return a reward's value for a reply as `read` takes it; whatever it raises, or returns besides, is a fault."""
    began = time.monotonic()
    try:
        value = read(reward.function(reply, **reward.options))
    except BadInput as error:
        return Part(None, " ".join(str(error).split()), is_refusal=True)
    except BaseException as error:  # of a user's function, also SystemExit and KeyboardInterrupt
        return Part(None, _describe(error))
    if time.monotonic() - began > time_limit:
        return Part(None, too_slow(time_limit))
    return value


def too_slow(time_limit: float) -> str:
    """Return the fault of a reward that is not done within its time limit, in seconds."""
    return f"took longer than {time_limit:g} s"


def _number(value: Any) -> Part:
    """Return what a function returned as a part: None, or a finite number; numpy's and such are numbers too."""
    if value is None:
        return Part(None)
    is_number = hasattr(type(value), "__float__") and getattr(value, "shape", ()) == ()
    number = float(value) if is_number else math.nan
    if not math.isfinite(number):
        return Part(None, f"returned {repr(value)[:40]} ({type(value).__name__}), no finite number")
    return Part(number)


def _turn(value: Any) -> Part:
    """Return what an environment answered as a part; numpy's numbers and such are rewards too."""
    if isinstance(value, Turn) and (reward := _number(value.reward)).fault is None:
        value = replace(value, reward=reward.value)
    if not is_turn(value):
        what = "no Turn of messages, the assistant's reply first, a finite reward, and is_done=True or False"
        return Part(None, f"answered {repr(value)[:80]}, which is {what}")
    try:
        pickle.dumps(value)
    except Exception as error:
        return Part(None, f"answered a Turn that cannot be sent to the trainer ({_describe(error)})")
    return Part(value)


def _describe(error: BaseException) -> str:
    try:
        text = in_one_line(error)
    except BaseException:
        text = ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _load(orders: Sequence[Order], place: str) -> list[LoadedReward] | str:
    """Import all functions; where one cannot be, return what is wrong with each, a line each."""
    loaded, wrong = [], []
    for number, order in enumerate(orders):
        try:
            if order.is_environment:
                loaded.append(_load_answers(load_environment(order.function, place)))
            else:
                loaded.append(load_reward(order.function, order.options, f"{place}[{number}]"))
        except BadInput as error:
            wrong.append(str(error))
    return "\n".join(wrong) if wrong else loaded


def _load_answers(environment: Environment) -> LoadedReward:
    """Return what an environment answers as a function of a reply."""

    def answer(reply: Reply) -> Any:
        return environment.answer(reply.row, reply.messages, reply.text)

    return LoadedReward(answer, {}, column=None, seconds=None)


def _die_with(parent: int) -> None:
    """Have the kernel end this process with the parent, and first of all where memory runs out."""
    is_there = end_with(parent, signal.SIGKILL)
    if sys.platform == "linux":
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
    if not is_there:
        os._exit(1)

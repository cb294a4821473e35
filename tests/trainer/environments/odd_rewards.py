"""Rewards as users may write them, for the tests of the pool, which never import this file: its workers do."""

import os
import re
import signal
import sys
import time

import numpy as np

from configs.errors import BadInput


def odd(reply, scale: float = 1.0):
    """Do what the reply's first word says; of any other text return the length."""
    text = reply.text
    if text == "raise":
        raise KeyError("answer")
    if text == "hang":
        while True:
            time.sleep(10)
    if text == "hang in C":
        re.match(r"(a+)+b", "a" * 60)
    if text == "ignore signals":
        for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_IGN)
        while True:
            pass
    if text == "print":
        for _ in range(100):
            print("x" * (1 << 20))
            os.write(2, b"y" * (1 << 20))
    if text == "exit":
        os._exit(3)
    if text == "leave":
        sys.exit("done")
    if text == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if text == "fork":
        os.fork()
    odd_values = {"nan": float("nan"), "text": "1.0", "list": [1.0], "none": None, "true": True, "numpy": np.float32(2)}
    return odd_values[text] if text in odd_values else scale * len(text)


def has_torch(reply):
    return "torch" in sys.modules or "megatron" in sys.modules


def half(reply):
    return 0.5


def hangs_in_a_child(reply):
    """Hang, with a child that hangs too."""
    os.fork()
    while True:
        time.sleep(10)


def choosy(reply, level: int):
    if level > 3:
        raise BadInput(f"options.level={level}: must be at most 3; try 3")
    return level / 3


text = "no function"


def trl(prompts, completions, **columns):
    """Is what TRL's trainer calls, with lists."""
    return [1.0 for _ in completions]


def has_no_return(reply):
    """Forget to return its value."""
    len(reply.text)

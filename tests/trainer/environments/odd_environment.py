"""An environment that does what the reply asks it for."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trainer.environments.environment import Message, Turn

SAID = {"role": "assistant", "content": "4"}


class Odd:
    tools: Sequence[Mapping[str, Any]] = ()

    def begin(self, row: Mapping[str, Any], seed: int) -> list[Message]:
        return [{"role": "user", "content": row["prompt"]}]

    def answer(self, row: Mapping[str, Any], messages: Sequence[Message], reply: str) -> Any:
        if reply == "raise":
            raise RuntimeError("boom")
        if reply == "hang":
            time.sleep(600)
        if reply == "exit":
            os._exit(3)
        given: dict[str, Any] = {
            "none": None, "text": "right", "empty": Turn((), 1.0, True), "letters": Turn(("4",), 1.0, True),  # type: ignore[arg-type]
            "nan": Turn((SAID,), math.nan, True), "word": Turn((SAID,), "1", True),  # type: ignore[arg-type]
            "numpy": Turn((SAID,), np.float32(0.5), True), "without reply": Turn(({"role": "user"},), 1, False),
            "perhaps": Turn((SAID,), 1.0, "no"),  # type: ignore[arg-type]
            "function": Turn((SAID, {"role": "user", "content": lambda: "4"}), 1.0, False),
        }  # fmt: skip
        if reply == "half a message":  # as where one is killed whose copy lives on
            for descriptor in range(3, 20):
                try:
                    os.write(descriptor, b"\x00\x0f\x00\x00abc")
                except OSError:
                    pass
            time.sleep(600)
        if reply == "freeze later":
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGSTOP)).start()
        heard = {"role": "user", "content": f"{row['answer']}, {len(messages)}"}
        return given.get(reply, Turn((SAID, heard), 1, False))

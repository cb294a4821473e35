"""Turns of templates whose generation prompt opens the reasoning (DeepSeek-R1) and whose conversations leave it out."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

_OPENED = re.compile(r"<think>\s*\Z")
_CLOSE = "</think>"


def behind_thinking_prompt(
    prompt: str, text: str, message: Mapping[str, Any], render_instead: Callable[[Mapping[str, Any]], str]
) -> tuple[str, int, list[str]] | None:
    """Return text, end of the prompt and remarks for a turn that is written without the `<think>` of its prompt.

    With reasoning, the text is what the model generates behind the prompt: the reasoning, `</think>`, the answer; as
    the template writes it where it writes reasoning that stands in the content, else put together around the answer
    that it writes. Without reasoning nothing can be generated behind `<think>`; the turn stays as the template writes
    it, behind the prompt without that tag. None where the prompt is no such one.
    """
    opened = _OPENED.search(prompt)
    if opened is None or not text.startswith(prompt[: opened.start()]):
        return None
    reasoning, answer = _split(message)
    if reasoning is None:
        return text, opened.start(), ["has no reasoning, which the generation prompt opens: trained without <think>"]
    thought = f"{reasoning}\n{_CLOSE}\n\n"
    inline = {key: value for key, value in message.items() if key not in ("reasoning_content", "thinking")}
    written = render_instead({**inline, "content": f"<think>\n{thought}{answer}"})
    if written.startswith(prompt):
        return written, len(prompt), []
    return prompt + thought + text[opened.start() :].lstrip("\n"), len(prompt), []


def _split(message: Mapping[str, Any]) -> tuple[str | None, str]:
    """Return the reasoning of a turn, if any, and its answer."""
    content = message["content"]
    if "reasoning_content" in message:
        return message["reasoning_content"].strip("\n"), content
    if _CLOSE in content:
        reasoning, answer = content.split(_CLOSE, 1)
        return reasoning.replace("<think>", "", 1).strip("\n"), answer.lstrip("\n")
    return None, content

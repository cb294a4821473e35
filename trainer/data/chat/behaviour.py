"""What a chat template does, found by rendering probes: how a turn ends, what frames it, how calls are given to it.

Also the refusal of a template whose chat tokens the tokenizer does not have.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import Any

from configs.errors import BadInput
from trainer.data.chat.conversation import BadRow, Message, ToolCall
from trainer.data.chat.messages import CallForm, to_openai
from trainer.data.chat.template import NAMED_TEMPLATES, ChatTemplate
from trainer.data.tokenizer import Tokenizer

_ANSWER = "Kalmar"
_ASK = Message("user", "Where?")
_PLAIN = (_ASK, Message("assistant", _ANSWER), _ASK)
_CALL = ToolCall("locate_town", {"county": "Småland"})
_IDENTIFIED = ToolCall(_CALL.name, _CALL.arguments, "a1b2c3d4e")
_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": _CALL.name,
        "description": "Find a town.",
        "parameters": {"type": "object", "properties": {"county": {"type": "string", "description": "Where."}}},
    },
}
_CHAT_TOKEN = re.compile(r"<\|[^<>|\s]{1,40}\|>|<｜[^<>｜\s]{1,40}｜>|</?s>|<(?:start|end)_of_[a-z]+>")
# Tags around reasoning are added tokens of some tokenizers, and yet a part of what an answer may hold.
_PARTS_OF_ANSWERS = {"<think>", "</think>"}


@dataclass(frozen=True)
class Behaviour:
    """How a template writes conversations, in terms of one tokenizer's tokens."""

    call_form: CallForm
    writes_calls: bool
    missing_for_calls: tuple[str, ...]
    """Chat tokens that calls and their results need and the tokenizer does not have."""
    end_token: str | None
    """What ends a turn of the assistant; None where the template writes nothing for it."""
    eos_token: str
    """The tokenizer's: added where the template has no end of turn."""
    frame_tokens: tuple[str, ...]
    """Tokens that the template itself writes around turns."""
    special_tokens: tuple[str, ...]

    @cached_property
    def control_tokens(self) -> tuple[str, ...]:
        """What no text of a conversation may forge: special tokens and those that frame turns; the longest first."""
        return tuple(sorted({*self.special_tokens, *self.frame_tokens}, key=lambda token: (-len(token), token)))

    @cached_property
    def control(self) -> re.Pattern[str]:
        """Matches a control token."""
        return re.compile("|".join(map(re.escape, self.control_tokens)))

    def find_end_of_turn(self, completion: str) -> tuple[int, str] | None:
        """Return where the end-of-turn token of a completion ends, and that token; None where there is none.

        It is the template's usual one where that is among the control tokens in which the completion ends, else the
        last of them: a turn that calls a tool may end in another (gpt-oss, Llama 3.1).
        """
        tail = self._tail_of(completion)
        if tail is None:
            return None
        found = list(self.control.finditer(completion, tail))
        usual = [match for match in found if match[0] == self.end_token]
        last = usual[-1] if usual else found[-1]
        return last.end(), last[0]

    def _tail_of(self, completion: str) -> int | None:
        """Return where the control tokens begin in which a completion ends."""
        begin = None
        position = len(completion)
        while True:
            position = len(completion[:position].rstrip())
            if not completion.endswith(self.control_tokens, 0, position):
                return begin
            token = next(token for token in self.control_tokens if completion.endswith(token, 0, position))
            begin = position = position - len(token)


def observe(template: ChatTemplate, tokenizer: Tokenizer, field: str = "sft.template") -> Behaviour:
    """Render probes and say what the template does. Raises BadInput where it does not fit the tokenizer."""
    added = tokenizer.backend.get_added_tokens_decoder().values()
    tokens = {token.content for token in added if token.content.strip()}
    try:
        messages = to_openai(_PLAIN, CallForm())
        alone = template.render(messages[:2]).text
        followed = template.render(messages, add_generation_prompt=True).text
    except BadRow as error:
        raise BadInput(f"{field}: a question with its answer cannot be rendered: {error}; {_others(field)}") from error
    if _ANSWER not in alone or _ANSWER not in followed:
        raise BadInput(f"{field}: template {template.name} leaves out what the assistant says; {_others(field)}")
    missing = _missing(alone + followed, tokens)
    if missing:
        raise BadInput(
            f"{field}: template {template.name} needs the chat token {missing[0]}, which is no special or added token "
            f"of tokenizer {tokenizer.directory}; add it to the tokenizer, or {_others(field)}"
        )
    form, with_calls = _probe_calls(template)
    any_token = re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")
    framing = set(any_token.findall(alone + followed)) - _PARTS_OF_ANSWERS
    end = _end_token(alone.split(_ANSWER, 1)[1], followed.split(_ANSWER, 1)[1], any_token)
    return Behaviour(
        call_form=form,
        writes_calls=with_calls is not None,
        missing_for_calls=_missing(with_calls or "", tokens),
        end_token=end,
        eos_token=template.variables.get("eos_token") or tokenizer.eod_token,
        frame_tokens=tuple(sorted(framing)),
        special_tokens=tuple(token.content for token in added if token.special and token.content.strip()),
    )


def _end_token(alone: str, followed: str, any_token: re.Pattern[str]) -> str | None:
    """Return the token that ends a turn: the last one written behind it whether or not another turn follows.

    Phi-3 closes a conversation with one more token, which no turn ends in. gpt-oss ends the last turn otherwise than
    earlier ones: then it is the first token behind the last turn, for that is what the model generates.
    """
    last, earlier = any_token.findall(alone), any_token.findall(followed)
    shared = [token for token, _ in takewhile(lambda pair: pair[0] == pair[1], zip(last, earlier, strict=False))]
    return (shared or last[:1] or [None])[-1]


def _probe_calls(template: ChatTemplate) -> tuple[CallForm, str | None]:
    """Return the form of calls that the template writes as JSON, and what it writes; None where it writes none."""
    for form in (CallForm(needs_ids=ids, are_arguments_text=text) for ids in (False, True) for text in (False, True)):
        call = _IDENTIFIED if form.needs_ids else _CALL
        turns = (_ASK, Message("assistant", tool_calls=(call,)), Message("tool", "{}", tool_call_id=call.id))
        try:
            text = template.render(to_openai(turns[:2], form), [_TOOL]).text
        except BadRow:
            continue
        # A template that joins text with an object writes Python's spelling of it, in single quotes.
        if text.count(_CALL.name) > _mentions(template) and "Småland" in text and "'county'" not in text:
            return form, text + _render_or_nothing(template, to_openai(turns, form))
    return CallForm(), None


def _mentions(template: ChatTemplate) -> int:
    """Return how often the name of the probe's tool stands in what the template says of the tools alone."""
    return _render_or_nothing(template, to_openai(_PLAIN[:2], CallForm())).count(_CALL.name)


def _render_or_nothing(template: ChatTemplate, messages: list[dict[str, Any]]) -> str:
    try:
        return template.render(messages, [_TOOL]).text
    except BadRow:
        return ""


def _missing(text: str, tokens: set[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(token for token in _CHAT_TOKEN.findall(text) if token not in tokens))


def _others(field: str) -> str:
    return f"set {field} to a template made for it ({', '.join(NAMED_TEMPLATES)}, or a .jinja file)"

"""The rule of what is trained, in characters: from the end of the generation prompt to the end-of-turn token inclusive.

Every turn is rendered as the model will see it at inference; turns that one rendering can hold share a sample.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from trainer.data.chat.behaviour import Behaviour
from trainer.data.chat.conversation import BadRow, Conversation, Message
from trainer.data.chat.messages import to_openai
from trainer.data.chat.spelled import mark, spells
from trainer.data.chat.template import ChatTemplate, Rendered
from trainer.data.chat.thinking import behind_thinking_prompt

TrainOn = Literal["assistant", "last", "all"]
_AS_SEEN = "each stands as the model sees it at inference"


@dataclass
class Turn:
    """A turn of the assistant behind its generation prompt."""

    index: int
    """Of its message in the conversation."""
    text: str
    """The conversation up to it, as rendered."""
    start: int
    """Character at which the generation prompt ends and training begins."""
    end: int
    """Character behind its end-of-turn token."""
    end_token: str
    remarks: list[str] = field(default_factory=list)


@dataclass
class SampleText:
    """The text of one sample, and what is trained of it."""

    text: str
    spans: list[tuple[int, int]]
    """(start, end) in characters, in order."""
    end_tokens: list[str]
    """The end-of-turn token in which each span ends; empty where everything is trained."""
    turns: tuple[int, ...]
    """The messages that are trained."""
    remarks: tuple[str, ...]
    """What is not as the data has it; alike for alike cases, so that they can be counted."""


def render_samples(
    conversation: Conversation, template: ChatTemplate, behaviour: Behaviour, train_on: TrainOn
) -> list[SampleText]:
    """Render a conversation into its samples. Raises BadRow where what is trained could only be guessed."""
    script = _Script(conversation, template, behaviour)
    if train_on == "all":
        return [_everything(script)]
    trained = _trained_turns(conversation, train_on)
    if not trained:
        raise BadRow("nothing in it is trained: it has no turn of the assistant that is to be learnt")
    samples: list[list[Turn]] = []
    for index in trained:
        turn = script.turn(index)
        last = samples[-1][-1] if samples else None
        if last is not None and last.end <= turn.start and turn.text.startswith(last.text[: last.end]):
            samples[-1].append(turn)
        else:
            samples.append([turn])
    return [_sample(turns, script, turns is samples[-1]) for turns in samples]


def render_prompt(conversation: Conversation, template: ChatTemplate, behaviour: Behaviour) -> str:
    """Render a conversation with the generation prompt of the turn that is to follow. Raises BadRow."""
    script = _Script(conversation, template, behaviour)
    return script.render(len(script.messages), add_generation_prompt=True).text


def render_between(messages: Sequence[Message], template: ChatTemplate, behaviour: Behaviour) -> str:
    """Render what stands between a reply and the next one: `messages` that answer it, and the generation prompt.

    Raises BadRow where the template writes them otherwise than behind the reply.
    """
    reply = Message("assistant", "Kalmar")  # whatever it is: what follows it must not depend on it
    script = _Script(Conversation((Message("user", "Where?"), reply, *messages)), template, behaviour)
    turn = script.turn(1)
    text = script.render(len(script.messages), add_generation_prompt=True).text
    if not text.startswith(turn.text[: turn.end]):
        raise script.refusal(1, "is changed by what answers it, so that a conversation cannot go on behind it")
    return text[turn.end :]


def _trained_turns(conversation: Conversation, train_on: TrainOn) -> list[int]:
    turns = [index for index, message in enumerate(conversation.messages) if message.role == "assistant"]
    turns = turns[-1:] if train_on == "last" else turns
    return [index for index in turns if conversation.messages[index].is_trained]


def _sample(turns: list[Turn], script: _Script, is_last: bool) -> SampleText:
    """Make one sample of turns that share their beginning: the last one's rendering, or the whole where that agrees."""
    last = turns[-1]
    text = last.text
    if is_last and last.index + 1 < len(script.messages):
        whole = script.render(len(script.messages)).text
        text = whole if whole.startswith(text[: last.end]) else text
    remarks = dict.fromkeys([*script.remarks, *(remark for turn in turns for remark in turn.remarks)])
    return SampleText(
        text=text,
        spans=[(turn.start, turn.end) for turn in turns],
        end_tokens=[turn.end_token for turn in turns],
        turns=tuple(turn.index for turn in turns),
        remarks=tuple(remarks),
    )


def _everything(script: _Script) -> SampleText:
    """Make one sample in which every token is trained but those of turns that say they are not."""
    text = script.render(len(script.messages)).text
    spans, begin = [], 0
    for index, message in enumerate(script.conversation.messages):
        if message.role == "assistant" and not message.is_trained:
            turn = script.turn(index)
            if not text.startswith(turn.text[: turn.end]):
                raise script.refusal(index, "is not trained, and the template changes it where another follows")
            spans.append((begin, turn.start))
            begin = turn.end
    spans.append((begin, len(text)))
    return SampleText(text, [span for span in spans if span[0] < span[1]], [], (), tuple(script.remarks))


class _Script:
    """A conversation in the template's form, rendered up to any turn."""

    def __init__(self, conversation: Conversation, template: ChatTemplate, behaviour: Behaviour):
        self.conversation, self.template, self.behaviour = conversation, template, behaviour
        if not conversation.messages:
            raise BadRow("it has no messages")
        self.messages = to_openai(conversation.messages, behaviour.call_form)
        self.tools: list[Mapping[str, Any]] = list(conversation.tools)
        self.remarks: list[str] = []
        self._check_calls()
        if any([spells(self.messages, behaviour.control), spells(self.tools, behaviour.control)]):
            self.messages, self.tools = mark(self.messages, behaviour.control), mark(self.tools, behaviour.control)
            self.remarks.append("spells chat tokens, which are encoded as characters")
        if self.tools and not self._writes_tools():
            self.remarks.append(f"template {template.name} leaves out the definitions of tools")

    def render(self, count: int, add_generation_prompt: bool = False, **variables: Any) -> Rendered:
        """Render the first `count` messages."""
        return self.template.render(self.messages[:count], self.tools, add_generation_prompt, **variables)

    def turn(self, index: int) -> Turn:
        """Render the conversation up to a turn of the assistant and find what of it the model generates."""
        rendered = self.render(index + 1)
        text, start, remarks = self._behind_prompt(index, rendered.text)
        found = self.behaviour.find_end_of_turn(text[start:])
        if found is not None:
            end, token = start + found[0], found[1]
        elif self.behaviour.end_token is None:
            token = self.behaviour.eos_token
            text = text[:start] + text[start:].rstrip() + token
            end = len(text)
            remarks.append(f"template {self.template.name} has no end of turn: {token} is added")
        else:
            raise self.refusal(index, "is not ended by an end-of-turn token")
        if rendered.generated and text is rendered.text:
            self._check_tags(index, rendered, start, end)
        self._check_parts(index, text[start:end], remarks)
        return Turn(index, text, start, end, token, remarks)

    def refusal(self, index: int, what: str) -> BadRow:
        """Return the error that says what the template does with a turn."""
        return BadRow(f"template {self.template.name}: message {index + 1} (assistant) {what}")

    def _behind_prompt(self, index: int, text: str) -> tuple[str, int, list[str]]:
        """Return the rendering of a turn and where the prompt that generates it ends, both as at inference."""
        prompts = []
        for variables in self._prompt_variables(index):
            prompt = self._prompt(index, variables)
            if text.startswith(prompt):
                return text, len(prompt), []
            prompts.append(prompt)
        found = behind_thinking_prompt(
            prompts[0], text, self.messages[index], lambda message: self._render_instead(index, message)
        )
        found = found or self._behind_changed_history(index, prompts[0], text)
        if found is not None:
            return found
        same = _shared_length(prompts[0], text)
        raise self.refusal(
            index,
            f"is not written behind its generation prompt: after {prompts[0][max(0, same - 24) : same]!r} the prompt "
            f"goes on with {prompts[0][same : same + 24]!r}, the conversation with {text[same : same + 24]!r}, so "
            "that what the model would see at inference cannot be told",
        )

    def _prompt(self, index: int, variables: Mapping[str, Any]) -> str:
        try:
            return self.render(index, add_generation_prompt=True, **variables).text
        except BadRow as error:
            if index:
                raise
            raise self.refusal(index, "opens the conversation, and it has no prompt for that") from error

    def _behind_changed_history(self, index: int, prompt: str, text: str) -> tuple[str, int, list[str]] | None:
        """Return the same for a turn that changes what the template writes of earlier ones, as gpt-oss's last answer.

        What the turn adds stands behind the text of the message before it and the generation prompt, both found in
        the rendering letter by letter; None where they are not.
        """
        if index < 2:
            return None
        before, history = self.render(index - 1).text, self.render(index).text
        if not history.startswith(before) or not prompt.startswith(history):
            return None
        message, opening = history[len(before) :], prompt[len(history) :]
        place = text.rfind(message + opening)
        if not message or not opening or place < 0:
            return None
        completion = text[place + len(message + opening) :]
        return prompt + completion, len(prompt), [f"template {self.template.name} changes earlier turns: {_AS_SEEN}"]

    def _prompt_variables(self, index: int) -> Iterator[dict[str, Any]]:
        """Yield what generation prompts are asked with: nothing, as usual; then thinking or not, as the turn has it."""
        yield {}
        if "enable_thinking" in self.template.text:
            yield {"enable_thinking": self.conversation.messages[index].reasoning is not None}

    def _render_instead(self, index: int, message: Mapping[str, Any]) -> str:
        return self.template.render([*self.messages[:index], message], self.tools).text

    def _check_calls(self) -> None:
        """Refuse calls that the template cannot write: the turn would be learnt without them."""
        calls = any(message.tool_calls for message in self.conversation.messages)
        if calls and not self.behaviour.writes_calls:
            raise BadRow(f"template {self.template.name} writes no calls of tools; name one that does, such as chatml")
        if calls and self.behaviour.missing_for_calls:
            token = self.behaviour.missing_for_calls[0]
            raise BadRow(f"template {self.template.name} writes calls with {token}, which the tokenizer does not have")

    def _check_parts(self, index: int, completion: str, remarks: list[str]) -> None:
        """Refuse a turn that lacks one of its calls; remark that it lacks its reasoning."""
        message = self.messages[index]
        reasoning = message.get("reasoning_content", "").strip()
        names = [call["function"]["name"] for call in message.get("tool_calls", ())]
        if names:
            calls = completion.replace(reasoning, "", 1).replace(message["content"].strip(), "", 1)
            written = sum(min(names.count(name), _count_word(name, calls)) for name in set(names))
            if written < len(names):
                raise self.refusal(index, f"makes {len(names)} calls, of which the template writes {written}")
        if reasoning not in completion:
            remarks.append(f"template {self.template.name} leaves out the reasoning of turns")

    def _check_tags(self, index: int, rendered: Rendered, start: int, end: int) -> None:
        """Refuse a turn of which the template's own {% generation %} blocks mark nothing: both cannot be right."""
        if not any(begin <= end and start <= finish for begin, finish in rendered.generated):
            raise self.refusal(index, "is left out by the template's {% generation %} blocks")

    def _writes_tools(self) -> bool:
        names = [tool.get("function", tool).get("name", "") for tool in self.tools]
        text = self.render(len(self.messages)).text
        return all(name in text for name in names)


def _count_word(word: str, text: str) -> int:
    """Return how often a name stands in a text, not counting where it is a part of a longer one."""
    return len(re.findall(rf"(?<!\w){re.escape(word)}(?!\w)", text))


def _shared_length(one: str, other: str) -> int:
    """Return how many characters two texts have in common from their beginning."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[:middle] == other[:middle] else (low, middle - 1)
    return low

"""Conversations in the making: tokens as they were seen and drawn, and what an environment makes of each reply."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from configs.errors import BadInput, in_one_line
from trainer.data.chat.conversation import BadRow, Conversation, Message
from trainer.data.chat.encode import ChatEncoder
from trainer.data.chat.messages import CallForm, to_openai
from trainer.data.chat.prompts import Prompt
from trainer.data.chat.turn_forms import parse_turn
from trainer.environments.environment import Environment, Turn
from trainer.environments.rewards.reply import Reply
from trainer.generate.rows import Completion
from trainer.generate.stops import Finish, cut_at_stop


@dataclass
class Talk:
    """One conversation with the policy; the tokens of its replies are never encoded again."""

    prompt: Prompt
    group: int
    sample: int
    token_ids: list[int]
    is_sampled: list[bool]
    messages: list[Any]
    """All turns so far, as OpenAI's messages."""
    log_probs: list[float] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    num_asked: int = 0
    """Turns before the last reply."""
    rewards: list[float] = field(default_factory=list)
    """What the environment gave."""
    finish: Finish = "length"
    fault: str | None = None
    """What the environment failed with."""
    is_over: bool = False

    @classmethod
    def begin(cls, prompt: Prompt, group: int, sample: int) -> Talk:
        """Return a conversation that the policy is to answer."""
        ids = prompt.token_ids
        messages = to_openai(prompt.conversation.messages, CallForm())
        return cls(prompt, group, sample, list(ids), [False] * len(ids), messages)

    def add_reply(self, completion: Completion, text: str) -> None:
        """Add what the policy drew."""
        self.token_ids += completion.token_ids
        self.is_sampled += [True] * len(completion.token_ids)
        self.log_probs += completion.full_logprobs
        self.texts.append(text)
        self.num_asked = len(self.messages)
        self.finish = completion.finish

    def as_reply(self, max_new_tokens: int) -> Reply:
        """Return the last reply with what it answers, as rewards and environments are given it."""
        return Reply(
            text=self.texts[-1],
            row=self.prompt.columns,
            messages=self.messages[: self.num_asked],
            num_tokens=len(self.log_probs),
            max_new_tokens=max_new_tokens,
            is_cut=self.finish == "length",
        )

    def as_conversation(self) -> Conversation | BadRow:
        """Return what was said so far, or why it is no conversation, as what an environment says may be no turn.

        What the policy said stays as it said it, whatever it may be.
        """
        asked = self.prompt.conversation
        said = self.messages[len(asked.messages) :]
        try:
            turns = [Message("assistant", one["content"]) if _is_text(one) else parse_turn(one, {}, {}) for one in said]
        except BadRow as error:
            return error
        return replace(asked, messages=(*asked.messages, *turns))

    def end(self) -> None:
        """End a conversation that nothing answers."""
        self.messages.append({"role": "assistant", "content": self.texts[-1]})
        self.is_over = True

    def add_turn(self, turn: Turn | str, encoder: ChatEncoder, end_id: int, room: int) -> None:
        """Add what the environment made of the last reply, or its fault; over is what has no room for another.

        `room` is how many tokens the conversation may have before the next reply.
        """
        if isinstance(turn, str):
            self.fault, self.is_over = turn, True
            return
        self.messages += turn.messages
        if turn.reward is not None:
            self.rewards.append(turn.reward)
        self.is_over = turn.is_done or self.finish == "length"
        if self.is_over:
            return
        ended = [] if self.token_ids[-1] == end_id else [end_id]
        try:
            between = ended + encoder.encode_between([parse_turn(one, {}, {}) for one in turn.messages[1:]])
        except BadRow as error:
            self.fault, self.is_over = str(error), True
            return
        if len(self.token_ids) + len(between) > room:
            self.is_over = True
            return
        self.token_ids += between
        self.is_sampled += [False] * len(between)


def _is_text(turn: Mapping[str, Any]) -> bool:
    return turn["role"] == "assistant" and set(turn) == {"role", "content"} and isinstance(turn["content"], str)


def spoken(completion: Completion, spell: Any, stop_strings: Sequence[str]) -> str:
    """Return the text of an answer without what stopped it."""
    text: str = spell(completion.answer_ids)
    return cut_at_stop(text, stop_strings) if completion.finish == "stop_string" else text


def begin_conversation(
    environment: Environment, row: Mapping[str, Any], path: str, number: int, *, seed: int
) -> Conversation:
    """Return what the policy answers first in an environment. Raises BadRow for a row that it cannot use."""
    try:
        turns = [dict(turn) for turn in environment.begin(row, seed + number)]
    except BadInput as error:
        raise BadRow(str(error)) from error
    except Exception as error:
        raise BadRow(f"grpo.environment cannot begin: {type(error).__name__}: {in_one_line(error)}") from error
    return Conversation(tuple(parse_turn(turn, {}, {}) for turn in turns), tuple(environment.tools or ()), path, number)

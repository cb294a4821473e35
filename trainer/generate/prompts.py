"""What a model is asked -> token ids, and what ends its answer: conversations by a chat template, or text as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from configs.errors import BadInput
from trainer.data.chat.conversation import BadRow, Conversation, Message
from trainer.data.chat.encode import ChatEncoder
from trainer.data.chat.template import load_template
from trainer.data.tokenizer import Tokenizer, template_prefix


def end_tokens(encoder: ChatEncoder) -> tuple[int, ...]:
    """Return the ids that end a turn of the assistant: the template's, and what ends texts."""
    behaviour, tokenizer = encoder.behaviour, encoder.tokenizer
    ends = (behaviour.end_token, behaviour.eos_token)
    known = (tokenizer.backend.token_to_id(token) for token in ends if token is not None)
    return tuple({tokenizer.eod_id, *(one for one in known if one is not None)})


class RawPrompts:
    """Text that is continued, begun as the tokenizer begins texts."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.stop_tokens: tuple[int, ...] = (tokenizer.eod_id,)

    def encode(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """Return the ids of the last message's text; of none at all, the end of the document before."""
        ids = template_prefix(self._tokenizer.backend) + self._tokenizer.encode(messages[-1].content)
        return ids or [self._tokenizer.eod_id]


class ChatPrompts:
    """Conversations that the assistant answers next."""

    def __init__(self, tokenizer: Tokenizer, template: str | None = None, field: str = "template") -> None:
        """`template` is a name, a .jinja file, or None for the tokenizer's own. Raises BadInput that names `field`."""
        self._encoder = ChatEncoder(load_template(template, tokenizer.directory, field), tokenizer, field=field)
        self.stop_tokens: tuple[int, ...] = end_tokens(self._encoder)

    def encode(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """Return the ids of the conversation and of what begins an answer; no message can forge a chat token.

        `tools` are the definitions of those that the assistant may call (`Conversation.tools`).

        Raises BadInput where the template cannot write it.
        """
        try:
            return self._encoder.encode_prompt(Conversation(tuple(messages), tuple(tools)))
        except BadRow as error:
            raise BadInput(f"conversation: {error}") from error

"""Conversations become samples: token ids, and which of them are trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trainer.data.chat.behaviour import observe
from trainer.data.chat.conversation import BadRow, Conversation, Message
from trainer.data.chat.spelled import unmark
from trainer.data.chat.template import ChatTemplate
from trainer.data.chat.token_spans import SpanTokenizer, Tokens
from trainer.data.chat.turns import SampleText, TrainOn, render_between, render_prompt, render_samples
from trainer.data.tokenizer import Tokenizer

SPLIT_REMARK = "a token would span prompt and answer: tokenised apart, as at inference"


@dataclass(frozen=True, slots=True)
class Sample:
    """One sequence of tokens."""

    input_ids: list[int]
    loss_mask: list[int]
    """1 where the token is trained as a target, else 0; as long as input_ids. The first token is never a target."""
    ends: tuple[int, ...]
    """Places of the end-of-turn tokens of the trained turns; empty where everything is trained."""
    turns: tuple[int, ...]
    """Messages that are trained, by their place in the conversation; empty where everything is."""
    source: str
    row: int
    remarks: tuple[str, ...] = ()
    """What is not as the data has it; alike for alike cases, so that they can be counted."""


@dataclass(frozen=True)
class _Prepared:
    """A sample's text without marks, in characters."""

    sample: SampleText
    text: str
    spans: list[tuple[int, int]]
    cuts: tuple[int, ...]


class ChatEncoder:
    """Turns conversations into samples with one template, tokenizer and rule; built once a process."""

    def __init__(
        self,
        template: ChatTemplate,
        tokenizer: Tokenizer,
        train_on: TrainOn = "assistant",
        field: str = "sft.template",
    ):
        """Raises BadInput where the tokenizer lacks a chat token of the template, or it writes no answers."""
        self.template, self.tokenizer, self.train_on = template, tokenizer, train_on
        self.behaviour = observe(template, tokenizer, field)
        self._spans = SpanTokenizer(tokenizer.backend, self.behaviour.frame_tokens)

    def encode(self, conversation: Conversation) -> list[Sample]:
        """Encode one conversation: into several samples where its template shows earlier turns otherwise later on.

        Raises BadRow where the template cannot render it, or what is trained could only be guessed.
        """
        [result] = self.encode_batch([conversation])
        if isinstance(result, BadRow):
            raise result
        return result

    def encode_batch(self, conversations: Sequence[Conversation]) -> list[list[Sample] | BadRow]:
        """Encode conversations; the error of one that has to be refused stands in its place."""
        results: list[list[Sample] | BadRow] = []
        prepared: list[tuple[int, _Prepared]] = []
        for place, conversation in enumerate(conversations):
            try:
                texts = render_samples(conversation, self.template, self.behaviour, self.train_on)
            except BadRow as error:
                results.append(error)
            else:
                results.append([])
                prepared.extend((place, _prepare(sample)) for sample in texts)
        encoded = self._spans.encode_batch([each.text for _, each in prepared], [each.cuts for _, each in prepared])
        for (place, each), tokens in zip(prepared, encoded, strict=True):
            samples = results[place]
            if isinstance(samples, list):
                try:
                    samples.append(self._sample(each, tokens, conversations[place]))
                except BadRow as error:
                    results[place] = error
        return results

    def encode_prompt(self, conversation: Conversation) -> list[int]:
        """Return the tokens behind which the model generates the next turn. Raises BadRow."""
        prompt = unmark(render_prompt(conversation, self.template, self.behaviour))
        [tokens] = self._spans.encode_batch([prompt.text], [prompt.cuts])
        return tokens.ids

    def encode_between(self, messages: Sequence[Message]) -> list[int]:
        """Return the tokens from behind a reply's end of turn to where the next begins, `messages` in between.

        Raises BadRow where the template cannot write them there.
        """
        between = unmark(render_between(messages, self.template, self.behaviour))
        [tokens] = self._spans.encode_batch([between.text], [between.cuts])
        return tokens.ids

    def _sample(self, prepared: _Prepared, tokens: Tokens, conversation: Conversation) -> Sample:
        sample, remarks = prepared.sample, prepared.sample.remarks
        if sample.end_tokens:
            prompts = [start for start, _ in prepared.spans]
            split = self._spans.find_split_prompts(prepared.text, tokens, prompts, prepared.cuts)
            if split:
                tokens = self._spans.encode_pieces(prepared.text, sorted({*prepared.cuts, *split}))
                remarks = (*remarks, SPLIT_REMARK)
        mask = [0] * len(tokens.ids)
        ends = []
        for start, end in prepared.spans:
            first, behind = tokens.first_from(start), tokens.first_from(end)
            mask[first:behind] = [1] * (behind - first)
            ends.append(behind - 1)
        for token, place in zip(sample.end_tokens, ends, strict=bool(sample.end_tokens)):
            if tokens.ids[place] != self.tokenizer.backend.token_to_id(token):
                raise BadRow(f"the tokenizer does not encode the end of a turn, {token}, as that one token")
        return Sample(
            tokens.ids,
            mask,
            tuple(ends) if sample.end_tokens else (),
            sample.turns,
            conversation.source,
            conversation.row,
            remarks,
        )


def _prepare(sample: SampleText) -> _Prepared:
    plain = unmark(sample.text)
    spans = [(plain.position(start), plain.position(end)) for start, end in sample.spans]
    return _Prepared(sample, plain.text, spans, plain.cuts)

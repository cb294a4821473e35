"""Sources of prompts, drawn in an order of their own: what reinforcement learning asks, and the rows it is scored by.

A draw depends on (seed, source, number) alone. Torch-free.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.errors import BadInput
from configs.sections.sft import ConversationSource
from trainer.data.blend import Blend
from trainer.data.chat.conversation import BadRow, Conversation
from trainer.data.chat.encode import ChatEncoder
from trainer.data.chat.forms import parse_prompt
from trainer.data.chat.rows import open_rows
from trainer.data.permutation import permute

log = logging.getLogger(__name__)
Parse = Callable[[Mapping[str, Any], str, int], Conversation]
"""A row, its file and its number there -> what is to be answered; raises BadRow."""
_NUM_CHECKED = 1000  # prompts of each source that are rendered before a run begins
_NUM_TRIES = 1000  # prompts in a row that may be too long


@dataclass(frozen=True)
class Prompt:
    """What the policy answers."""

    source: str
    """Name of its source."""
    row: int
    """Its number in the source, from 0."""
    token_ids: list[int]
    """To the end of the generation prompt."""
    conversation: Conversation
    columns: Mapping[str, Any]
    """The whole row of the file, which rewards read."""


class PromptFile:
    """The rows of one source, and each as a prompt."""

    def __init__(
        self, source: ConversationSource, field: str, encoder: ChatEncoder, longest: int, parse: Parse | None = None
    ) -> None:
        """Read all rows; prompts of more than `longest` tokens are none. `parse` is what makes a conversation of a row.

        Raises BadInput that names `field`, file and row for one that cannot be answered; of large files the rendering
        of the first rows alone is tried.
        """
        self.prefix = self.origin = source.path
        self.name = source.name
        self._encoder, self._longest, self._field = encoder, longest, field
        self.rows: list[tuple[Conversation, Mapping[str, Any]]] = []
        content = hashlib.sha256()
        for path, number, row in open_rows(source, field):
            try:
                conversation = parse(row, path, number) if parse else parse_prompt(row, source, path, number)[0]
                self.rows.append((conversation, row))
            except BadRow as error:
                raise BadInput(f"{field}: row {number} of {path}: {error}") from error
            content.update(json.dumps(row, sort_keys=True, default=str).encode())
        self.identity = content.hexdigest()
        """What the data is: the order of its rows depends on it."""
        lengths = [len(self._try(number)) for number in range(min(len(self.rows), _NUM_CHECKED))]
        shortest, num_longer = min(lengths), sum(length > longest for length in lengths)
        if shortest > longest:
            raise BadInput(
                f"{field}: no prompt of {source.path} has at most the {longest} tokens that train.seq_len less "
                f"rollout.max_new_tokens leaves; the shortest has {shortest}"
            )
        if num_longer:
            log.warning(
                "%s: %d of the first %d prompts of %s have more than the %d tokens that train.seq_len less "
                "rollout.max_new_tokens leaves, and are left out",
                *(field, num_longer, len(lengths), source.path, longest),
            )

    def read(self, number: int) -> Prompt | None:
        """Return a row as a prompt; None where it is too long or, with a warning, the template cannot write it."""
        try:
            ids = self._encode(number)
        except BadRow as error:
            log.warning("%s: row %d of %s is left out: %s", self._field, number, self.prefix, error)
            return None
        conversation, row = self.rows[number]
        return Prompt(self.name, number, ids, conversation, row) if len(ids) <= self._longest else None

    def first(self, num_prompts: int) -> list[Prompt]:
        """Return the first prompts that are not too long, at most so many."""
        read = (self.read(number) for number in range(len(self.rows)))
        return list(islice((prompt for prompt in read if prompt is not None), num_prompts))

    def _encode(self, number: int) -> list[int]:
        return self._encoder.encode_prompt(self.rows[number][0])

    def _try(self, number: int) -> list[int]:
        conversation, _ = self.rows[number]
        try:
            return self._encode(number)
        except BadRow as error:
            raise BadInput(f"{self._field}: row {conversation.row} of {conversation.source}: {error}") from error


class PromptOrder:
    """The numbers of a file's rows in the order of drawing, shuffled anew each epoch: a source of `Blend`."""

    packing = "prompts"
    seq_len = 0

    def __init__(self, dataset: PromptFile, seed: int) -> None:
        self.dataset, self._seed = dataset, seed
        self.num_samples = len(dataset.rows)

    def read(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the rows of draws (any number >= 0): int64 [len(samples)]."""
        rows = np.empty(len(samples), dtype=np.int64)
        epochs = samples // self.num_samples
        for epoch in np.unique(epochs):
            mine = epochs == epoch
            key = f"{self._seed}/{self.dataset.identity}/{epoch}/prompts"
            rows[mine] = permute(samples[mine] % self.num_samples, self.num_samples, key)
        return rows


class PromptReader:
    """Draws prompts from a blend of sources, in an order that resumes exactly; the same on every rank."""

    def __init__(
        self, files: Sequence[PromptFile], weights: Sequence[float | None], seed: int, field: str = "grpo.prompts"
    ) -> None:
        """Draw by `weights`, by default each source in proportion to its rows; errors name `field`."""
        self._files, self._field = list(files), field
        orders: list[Any] = [PromptOrder(file, seed) for file in files]  # a ledger asks nothing of their data but names
        self._blend = Blend(
            orders,
            [float(len(file.rows)) if weight is None else weight for file, weight in zip(files, weights, strict=True)],
            field=field,
        )
        self.num_too_long = 0
        """Draws that were left out so far, too long or not to be written."""

    def draw(self, num_prompts: int) -> list[Prompt]:
        """Return the next prompts that are not too long. Raises BadInput where none is in sight."""
        prompts: list[Prompt] = []
        num_tries = 0
        while len(prompts) < num_prompts:
            assignment = self._blend.take(1)
            file = self._files[int(assignment.source[0])]
            row = int(self._blend.read(assignment, np.arange(1))[0])
            prompt = file.read(row)
            if prompt is not None:
                prompts.append(prompt)
                num_tries = 0
                continue
            self.num_too_long, num_tries = self.num_too_long + 1, num_tries + 1
            if num_tries == _NUM_TRIES:
                raise BadInput(
                    f"{self._field}: {_NUM_TRIES} prompts in a row, the last of {file.prefix}, have too many tokens "
                    "for train.seq_len less rollout.max_new_tokens, or cannot be written; make train.seq_len larger"
                )
        return prompts

    def state_dict(self) -> dict[str, Any]:
        """Return the cursor as plain data."""
        return {"blend": self._blend.state_dict(), "num_too_long": self.num_too_long}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a cursor. Raises BadInput where a source is no longer what it was."""
        self._blend.load_state_dict(state["blend"])
        self.num_too_long = state["num_too_long"]

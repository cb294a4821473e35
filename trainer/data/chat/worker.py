"""What one process does with a block of rows: conversations, their samples, what is left out and why. Torch-free."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.errors import BadInput
from configs.sections.comparisons import ComparisonsSection
from configs.sections.sft import ConversationSource, SftSection
from configs.stages import ComparisonsConfig, SftConfig
from trainer.data.chat.check import check_samples, find_problem
from trainer.data.chat.conversation import BadRow, Conversation
from trainer.data.chat.encode import ChatEncoder, Sample
from trainer.data.chat.forms import parse_conversation
from trainer.data.chat.rows import RowBlock, read_block
from trainer.data.chat.template import load_template
from trainer.data.making.workers import token_dtype
from trainer.data.tokenizer import load_tokenizer

NOTHING_TRAINED_IN_REACH = "nothing trained within train.seq_len"
TOO_LONG = "longer than train.seq_len"


@dataclass(frozen=True)
class Recipe:
    """How the conversations of a source become samples."""

    source: ConversationSource
    field: str
    """Of the config, which errors name."""
    tokenizer: str
    """Its directory."""
    chats: SftSection | ComparisonsSection
    seq_len: int
    section: str = "sft"
    """The section of the config that says how, which errors name."""

    @classmethod
    def of(cls, config: SftConfig | ComparisonsConfig, field: str, source: ConversationSource) -> Recipe:
        """Return the recipe of one of the config's sources."""
        tokenizer, seq_len = str(config.data.tokenizer), config.train.seq_len
        if isinstance(config, SftConfig):
            return cls(source, field, tokenizer, config.sft, seq_len)
        return cls(source, field, tokenizer, config.comparisons, seq_len, config.section)


@dataclass(frozen=True)
class EncodedRow:
    """What became of one row."""

    file: str
    row: int
    """Its number in the file, from 0."""
    samples: tuple[Sample, ...] = ()
    """One, or one for each trained turn where the template shows earlier turns otherwise."""
    dropped: str | None = None
    """Why the row, or a part of it, is left out."""
    lengths: tuple[int, ...] = ()
    """Tokens of each sample before it was cut at its end."""
    margins: tuple[float, ...] = ()
    """Of comparisons, of each sample: by how much the better answer of its pair is."""

    @property
    def num_truncated(self) -> int:
        """Samples that are cut."""
        pairs = zip(self.samples, self.lengths, strict=True)
        return sum(len(sample.input_ids) < length for sample, length in pairs)


@dataclass(frozen=True)
class EncodedBlock:
    """The samples of a block, end to end."""

    tokens: bytes  # of the dataset's dtype
    mask: bytes  # a byte a token, not 0 where it is trained
    lengths: NDArray[np.int32]  # [num_samples] tokens of each
    num_rows: int
    num_truncated: int
    dropped: Counter[str]
    """Rows left out, by reason."""
    remarks: Counter[str]
    """Samples in which something is not as the data has it, by what."""
    margins: NDArray[np.float32]
    """Of comparisons alone, `[num_samples]`."""


class _Unmeant(BadRow):
    """A sample whose mask cannot be meant."""

    def __init__(self, sample: Sample, message: str) -> None:
        super().__init__(message)
        self.sample = sample


class ConversationWorker:
    """A tokenizer, a template, and what is done with them."""

    def __init__(self, recipe: Recipe) -> None:
        """Load what the recipe names. Raises BadInput."""
        self._recipe = recipe
        self.tokenizer = load_tokenizer(recipe.tokenizer)
        field = f"{recipe.section}.template"
        template = load_template(recipe.chats.template, recipe.tokenizer, field)
        self._encoder = ChatEncoder(template, self.tokenizer, recipe.chats.train_on, field)
        self._dtype = token_dtype(self.tokenizer.vocab_size)

    def encode(self, block: RowBlock) -> list[EncodedRow]:
        """Return what becomes of every row of a block. Raises BadInput for the first bad one, unless bad rows drop."""
        return list(self._encode(block))

    def pack(self, block: RowBlock) -> EncodedBlock:
        """Return the samples of a block as they are stored."""
        rows = self.encode(block)
        samples = [sample for row in rows for sample in row.samples]
        return EncodedBlock(
            b"".join(np.array(sample.input_ids, self._dtype).tobytes() for sample in samples),
            b"".join(np.array(sample.loss_mask, np.uint8).tobytes() for sample in samples),
            np.array([len(sample.input_ids) for sample in samples], np.int32),
            len(rows),
            sum(row.num_truncated for row in rows),
            Counter(row.dropped for row in rows if row.dropped is not None),
            Counter(remark for sample in samples for remark in sample.remarks),
            np.array([margin for row in rows for margin in row.margins], np.float32),
        )

    def _encode(self, block: RowBlock) -> Iterator[EncodedRow]:
        rows = read_block(block)
        parsed = [self._parse(block.path, number, row) for number, row in rows]
        encoded = iter(self._encoder.encode_batch([one for one in parsed if isinstance(one, Conversation)]))
        for (number, _), one in zip(rows, parsed, strict=True):
            samples = self._judge(one if isinstance(one, BadRow) else next(encoded))
            if not isinstance(samples, BadRow):
                yield self._fit(block.path, number, samples)
            else:
                yield self._leave_out(block.path, number, samples)

    def _leave_out(self, path: str, number: int, fault: BadRow) -> EncodedRow:
        """Return a row that is left out. Raises BadInput where such rows are refused."""
        if self._recipe.chats.bad_rows == "drop":
            return EncodedRow(path, number, dropped=str(fault))
        if isinstance(fault, _Unmeant):
            check_samples([fault.sample], self._recipe.chats.train_on, self.tokenizer, self._recipe.field)
        raise BadInput(
            f"{self._recipe.field}: row {number} of {path}: {fault}; mend the row, or leave such rows out with "
            f"{self._recipe.section}.bad_rows=drop"
        )

    def _parse(self, path: str, number: int, row: dict[str, Any]) -> Conversation | BadRow:
        try:
            return parse_conversation(row, self._recipe.source, path, number)
        except BadRow as error:
            return error

    def _judge(self, samples: list[Sample] | BadRow) -> list[Sample] | BadRow:
        """Return the samples, or the fault of the first whose mask cannot be meant."""
        if isinstance(samples, BadRow):
            return samples
        for sample in samples:
            problem = find_problem(sample, self._recipe.chats.train_on)
            if problem is not None:
                return _Unmeant(sample, f"it {problem}")
        return samples or BadRow("nothing of it is trained")

    def _fit(self, file: str, number: int, found: list[Sample]) -> EncodedRow:
        """Return the row with samples that a row of `train.seq_len` predictions holds."""
        chats, longest = self._recipe.chats, self._recipe.seq_len + 1
        assert isinstance(chats, SftSection)
        kept, dropped = [], None
        for sample in found:
            if len(sample.input_ids) <= longest:
                kept.append((sample, len(sample.input_ids)))
            elif chats.too_long == "drop":
                dropped = TOO_LONG
            elif not any(sample.loss_mask[:longest]):
                dropped = NOTHING_TRAINED_IN_REACH
            else:
                cut = {"input_ids": sample.input_ids[:longest], "loss_mask": sample.loss_mask[:longest]}
                kept.append((replace(sample, **cut), len(sample.input_ids)))  # type: ignore[arg-type]
        samples, lengths = tuple(sample for sample, _ in kept), tuple(length for _, length in kept)
        return EncodedRow(file, number, samples, dropped, lengths)

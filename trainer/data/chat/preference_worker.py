"""What one process does with a block of rows of preferences: two samples side by side for each comparison. Torch-free.

The mask of a sample holds which side it is on (`trainer.data.packed_source`) where it is trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from configs.sections.comparisons import ComparisonsSection
from trainer.data.chat.conversation import BadRow, Conversation
from trainer.data.chat.encode import Sample
from trainer.data.chat.preferences import Judged, answered, parse_judged, parse_pairs
from trainer.data.chat.rows import RowBlock, read_block
from trainer.data.chat.worker import TOO_LONG, ConversationWorker, EncodedRow, Recipe
from trainer.data.packed_source import CHOSEN, MISMATCHED, REJECTED

_Sided = tuple[Conversation, int]
"""A conversation and the side that its answer is on."""


@dataclass(frozen=True)
class _Unit:
    """What is compared."""

    both: tuple[_Sided, _Sided]
    margin: float = 0.0


class PreferenceWorker(ConversationWorker):
    """The same for pairs, or for single answers, each with another's answer to its prompt beside it (`loss: kto`)."""

    def _encode(self, block: RowBlock) -> Iterator[EncodedRow]:
        parsed = self._parse_block(block)
        conversations = [
            one for _, units in parsed if not isinstance(units, BadRow) for unit in units for one, _ in unit.both
        ]
        encoded = iter(self._encoder.encode_batch(conversations))
        for number, units in parsed:
            if isinstance(units, BadRow):
                yield self._leave_out(block.path, number, units)
                continue
            samples = [[self._take_side(self._judge(next(encoded)), side) for _, side in unit.both] for unit in units]
            fault = next((one for unit in samples for one in unit if isinstance(one, BadRow)), None)
            fault = fault or _find_alike(samples)
            margins = [unit.margin for unit in units]
            fitting = fault or self._fit_units(block.path, number, samples, margins)
            yield fitting if isinstance(fitting, EncodedRow) else self._leave_out(block.path, number, fitting)

    def _parse_block(self, block: RowBlock) -> list[tuple[int, list[_Unit] | BadRow]]:
        """Return what is compared in each row, or what is wrong with the row."""
        chats = self._recipe.chats
        assert isinstance(chats, ComparisonsSection)
        rows = read_block(block)
        if not chats.is_single:
            pairs = [(number, _try(parse_pairs, row, self._recipe.source, block.path, number)) for number, row in rows]
            return [
                (number, found)
                if isinstance(found, BadRow)
                else (number, [_Unit(((one.chosen, CHOSEN), (one.rejected, REJECTED)), one.margin) for one in found])
                for number, found in pairs
            ]
        judged = [(number, _try(parse_judged, row, self._recipe.source, block.path, number)) for number, row in rows]
        others = iter(_rotate([one for _, found in judged if not isinstance(found, BadRow) for one in found]))
        return [
            (number, found) if isinstance(found, BadRow) else (number, [_beside(one, next(others)) for one in found])
            for number, found in judged
        ]

    def _take_side(self, samples: list[Sample] | BadRow, side: int) -> Sample | BadRow:
        """Return an answer's one sample with its side in the mask."""
        if isinstance(samples, BadRow):
            return samples
        if len(samples) > 1:
            return BadRow("its template shows earlier turns of an answer otherwise later on; give answers of one turn")
        return replace(samples[0], loss_mask=[side * is_trained for is_trained in samples[0].loss_mask])

    def _fit_units(
        self, file: str, number: int, units: Sequence[Sequence[Any]], margins: Sequence[float]
    ) -> EncodedRow:
        """Return the row with those comparisons that a row of `train.seq_len` places holds whole.

        The last token of an answer needs a place where it is read, and none where it is only predicted.
        """
        chats = self._recipe.chats
        unread = 0 if chats.rows == "scored_pairs" else 1
        kept = [
            (unit, margin)
            for unit, margin in zip(units, margins, strict=True)
            if sum(len(one.input_ids) - unread for one in unit) <= self._recipe.seq_len
        ]
        samples = tuple(one for unit, _ in kept for one in unit)
        dropped = TOO_LONG if len(kept) < len(units) else None
        lengths = tuple(len(one.input_ids) for one in samples)
        return EncodedRow(file, number, samples, dropped, lengths, tuple(margin for unit, margin in kept for _ in unit))


def open_worker(recipe: Recipe) -> ConversationWorker:
    """Return the worker of conversations or of preferences, as the recipe says. Raises BadInput."""
    return PreferenceWorker(recipe) if isinstance(recipe.chats, ComparisonsSection) else ConversationWorker(recipe)


def _find_alike(units: Sequence[Sequence[Any]]) -> BadRow | None:
    """Return what is wrong where the template makes one of two answers: of spaces at their ends, for instance."""
    sides = (CHOSEN, REJECTED)
    for unit in units:
        if unit[0].input_ids == unit[1].input_ids and tuple(max(one.loss_mask) for one in unit) == sides:
            return BadRow(
                "chosen and rejected are the same tokens as the template writes them, and such a pair says nothing; "
                "drop the row"
            )
    return None


def _try(parse: Any, *arguments: Any) -> Any:
    try:
        return parse(*arguments)
    except BadRow as error:
        return error


def _rotate(judged: Sequence[Judged]) -> list[Judged]:
    """Return behind each answer that of another prompt, the next one's with another answer where there is such."""
    others = []
    for place, one in enumerate(judged):
        later = (judged[(place + step) % len(judged)] for step in range(1, len(judged)))
        others.append(next((other for other in later if other.prompt.messages != one.prompt.messages), one))
    return others


def _beside(one: Judged, other: Judged) -> _Unit:
    """Return an answer, and another prompt's answer to its prompt, whose log-ratio estimates the divergence (KTO)."""
    side = CHOSEN if one.is_good else REJECTED
    return _Unit(((one.whole, side), (answered(one.prompt, other.answer), MISMATCHED)))

"""Questions out of validation samples: the last answer, whole, behind all that the model sees before it."""

from __future__ import annotations

import numpy as np

from trainer.evaluate.answers import read_questions

SEQ_LEN = 8


class MaskedDataset:
    """Documents that count up, each with a mask."""

    def __init__(self, masks: list[str]) -> None:
        self._masks = [np.array([int(one) for one in mask], np.uint8) for mask in masks]
        self.lengths = np.array([len(mask) for mask in masks], np.int32)

    def read(self, document: int, start: int, length: int) -> np.ndarray:
        return 100 * document + np.arange(start, start + length)

    def read_mask(self, document: int, start: int, length: int) -> np.ndarray:
        return self._masks[document][start : start + length]


def asked(*masks: str, longest: int = 99) -> list[tuple[list[int], list[int]]]:
    questions = read_questions(MaskedDataset(list(masks)), 9, longest, SEQ_LEN)  # type: ignore[arg-type]
    return [(question.prompt_ids, question.answer_ids) for question in questions]


def test_the_last_answer_is_asked_for_behind_all_before_it():
    assert asked("0011010", "00110") == [([0, 1, 2, 3, 4], [5]), ([100, 101], [102, 103])]


def test_an_answer_cut_at_the_end_of_a_row_is_not_asked_for():
    # Its last token would end the answers to all other questions.
    assert asked("000000111", "000000110", "0011") == [
        ([100 + n for n in range(6)], [106, 107]),
        ([200, 201], [202, 203]),
    ]


def test_what_the_model_has_no_places_for_is_not_asked():
    assert asked("000011", "0011", longest=5) == [([100, 101], [102, 103])]

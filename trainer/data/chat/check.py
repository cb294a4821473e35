"""The guard over encoded samples: none without a trained token, none trained whole, no end of turn left out."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

from configs.errors import BadInput
from trainer.data.chat.encode import Sample
from trainer.data.chat.turns import TrainOn
from trainer.data.tokenizer import Tokenizer

_SHOWN_AT_EACH_END = 800


def check_samples(samples: Iterable[Sample], train_on: TrainOn, tokenizer: Tokenizer, field: str = "sft.train") -> None:
    """Refuse samples whose mask cannot be meant, before any is cut to length.

    Raises BadInput, which shows the first such sample.
    """
    for sample in samples:
        problem = find_problem(sample, train_on)
        if problem is not None:
            raise BadInput(
                f"{field}: row {sample.row} of {sample.source} {problem}; mend that row or leave it out. "
                f"The sample, with [[ ]] around what is trained:\n{show_sample(sample, tokenizer)}"
            )


def find_problem(sample: Sample, train_on: TrainOn) -> str | None:
    """Return what is wrong with a sample's mask; None where nothing is."""
    mask = sample.loss_mask
    if len(mask) != len(sample.input_ids):
        return f"has {len(sample.input_ids)} tokens and a mask for {len(mask)}"
    if not any(mask[1:]):
        return "has no trained token"
    if train_on == "all":
        return None
    if all(mask):
        return f"is trained from its first token to its last, which only sft.train_on=all allows, not {train_on}"
    if len(sample.ends) != len(sample.turns) or not all(mask[place] for place in sample.ends):
        return "has a turn whose end-of-turn token is not trained"
    stretches = _last_places(mask)
    if not set(stretches) <= set(sample.ends):
        return "has a stretch of trained tokens that does not end in an end-of-turn token"
    return None


def show_sample(sample: Sample, tokenizer: Tokenizer) -> str:
    """Return a sample as text with [[ ]] around its trained tokens, the middle of a long one left out."""
    parts = []
    pairs = zip(sample.input_ids, sample.loss_mask, strict=False)
    for is_trained, group in groupby(pairs, key=lambda pair: pair[1]):
        text = tokenizer.backend.decode([number for number, _ in group], skip_special_tokens=False)
        parts.append(f"[[{text}]]" if is_trained else text)
    shown = "".join(parts)
    if len(shown) <= 2 * _SHOWN_AT_EACH_END:
        return shown
    return f"{shown[:_SHOWN_AT_EACH_END]} [...] {shown[-_SHOWN_AT_EACH_END:]}"


def _last_places(mask: list[int]) -> list[int]:
    """Return the last place of every stretch of ones."""
    return [place for place, value in enumerate(mask) if value and (place + 1 == len(mask) or not mask[place + 1])]

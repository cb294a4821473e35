"""Rules of learning from preferences: fields that the loss does not read, questions that nobody asks. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator

from configs.rules.model import check_unused
from configs.sections.preference import PairLossSection
from configs.stages import Config, PreferenceConfig

_OF_ONE_LOSS = {
    "label_smoothing": "cdpo",
    "length_penalty": "rdpo",
    "target_margin": "simpo",
    "desirable_weight": "kto",
    "undesirable_weight": "kto",
}


def unread_fields(section: PairLossSection) -> list[str]:
    """Return the fields that the section's loss does not read; orpo has an SFT term, and answers of kto may be bad."""
    names = [name for name, loss in _OF_ONE_LOSS.items() if loss != section.loss and hasattr(section, name)]
    return [*names, "sft_weight"] if section.loss in ("kto", "orpo") else names


def check_preference(config: Config) -> Iterator[str]:
    """Yield every rule of losses of preferences and of their validation that the config breaks."""
    if not isinstance(config, PreferenceConfig):
        return
    preference = config.preference
    reason = f"with preference.loss={preference.loss}"
    yield from check_unused(preference, "preference", unread_fields(preference), reason)
    asked = ("num_answers", "max_answer_tokens")
    if preference.loss == "kto":
        yield from check_unused(preference, "preference", asked, reason)
    elif not preference.validation and preference.num_answers:
        reason = "without preference.validation, where its questions are"
        yield from check_unused(preference, "preference", asked, reason)

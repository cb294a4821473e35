"""Rules of learning from preferences: fields that the loss does not read, questions that nobody asks. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator

from configs.rules.model import check_unused
from configs.stages import Config, PreferenceConfig

_OF_ONE_LOSS = {
    "label_smoothing": "cdpo",
    "length_penalty": "rdpo",
    "target_margin": "simpo",
    "desirable_weight": "kto",
    "undesirable_weight": "kto",
}


def check_preference(config: Config) -> Iterator[str]:
    """Yield every rule of losses of preferences and of their validation that the config breaks."""
    if not isinstance(config, PreferenceConfig):
        return
    preference = config.preference
    reason = f"with preference.loss={preference.loss}"
    yield from check_unused(
        preference, "preference", [name for name, loss in _OF_ONE_LOSS.items() if loss != preference.loss], reason
    )
    if preference.loss in ("kto", "orpo"):
        why = "which has its own" if preference.loss == "orpo" else "whose answers may be bad"
        yield from check_unused(preference, "preference", ("sft_weight",), f"{reason}, {why}")
    asked = ("num_answers", "max_answer_tokens")
    if preference.loss == "kto":
        yield from check_unused(preference, "preference", asked, reason)
    elif not preference.validation and preference.num_answers:
        reason = "without preference.validation, where its questions are"
        yield from check_unused(preference, "preference", asked, reason)

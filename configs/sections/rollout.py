"""The `rollout` section: how answers are generated while training. Torch-free."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from configs.sections.base import Count, PositiveFloat, Section


class RolloutSection(Section):
    """How the policy answers."""

    max_new_tokens: Count = 512
    """Tokens of an answer at most, the one that ends it included."""
    temperature: PositiveFloat = 1.0
    """What logits are divided by when answers are drawn; the policy that is trained is this distribution."""
    top_k: Count | None = None
    """Draw from so many likeliest tokens; null for all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Of these, draw from the fewest likeliest that together have this probability. Log-probabilities, ratios and the
    gate are of softmax(logits / temperature) over all ids, whatever top_k and top_p leave to draw from."""
    stop_strings: tuple[str, ...] = ()
    """Texts that end an answer beside the template's end of turn."""
    max_rows: Count = 64
    """Answers that a replica of the model generates at once, at most."""
    cache_gib: PositiveFloat | None = None
    """GiB of each rank that the keys and values of answers under way may take; null for what `max_rows` takes."""

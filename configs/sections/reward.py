"""What scores an answer: a function with weight, options and time limit, or a reward model. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from configs.sections.base import PathText, PositiveFloat, Section


class RewardConfig(Section):
    """A function that scores an answer."""

    function: Annotated[str, Field(min_length=1, examples=["exact_match"])]
    """exact_match, numeric, math, regex, format, json, length, code, reasoning_gym, small_tasks, or module:function of
    one's own, which is called with a `Reply` and the options and returns a number, or None where it does not apply."""
    weight: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    """What its value is multiplied by in the sum of all rewards."""
    options: Mapping[str, Any] = {}
    """Further arguments of the function, by name; text is converted to the types of its parameters."""
    time_limit: PositiveFloat = 10.0
    """Seconds that it may take for one answer; beyond that its process is ended and the answer counts as failed."""


class RewardModelSource(Section):
    """A trained model that scores a conversation where it reads the end of the last turn."""

    init_from: Annotated[PathText, Field(examples=["runs/demo_reward"])]
    """A reward model of the same tokenizer: a checkpoint, a run directory, or a Hugging Face model."""
    weight: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    """What its value is multiplied by in the sum of all rewards."""

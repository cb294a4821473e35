"""The `rft` section: which sampled answers become data of supervised fine-tuning. Torch-free."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from configs.sections.base import Count, PositiveInt, Section


class RftSection(Section):
    """Rejection sampling: what of the answers to each prompt is accepted. None of it changes what is sampled."""

    min_score: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    """Least score of an answer that is accepted; an answer whose rewards failed has none."""
    max_per_prompt: Count | None = 4
    """Different answers accepted for each prompt at most, those of the highest score first; null for all."""
    num_prompts: PositiveInt | None = None
    """Prompts that are answered, the first ones of grpo.prompts in the order of the files; null for all, once."""

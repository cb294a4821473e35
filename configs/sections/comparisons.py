"""What the sections of stages that read compared answers have alike: sources, template, cache. Torch-free."""

from __future__ import annotations

from typing import Literal

from configs.sections.base import Count, PathText, Section
from configs.sections.sft import ConversationSource


class ComparisonsSection(Section):
    """Answers of which it is known which are better."""

    template: str | None = None
    """Chat template: a name (chatml, llama3, qwen, mistral, gemma, alpaca) or a .jinja file; null: the tokenizer's."""
    train: tuple[ConversationSource, ...] = ()
    """Blend of training sources."""
    validation: tuple[ConversationSource, ...] = ()
    """Validation sources; each is evaluated on its own and logged under its file name without suffix."""
    bad_rows: Literal["refuse", "drop"] = "refuse"
    """What becomes of a row that is no preference or that the template cannot render; dropped ones are counted, as are
    pairs that train.seq_len does not hold together."""
    cache: PathText = "data/preference_cache"
    """Directory of tokenised sources, one folder for each content, template, tokenizer and rule."""
    num_workers: Count | None = None
    """Processes that tokenise; null for one a core."""

    @property
    def train_on(self) -> Literal["assistant"]:
        """What is trained of an answer."""
        return "assistant"

    @property
    def is_single(self) -> bool:
        """Whether answers have a label each, and no partner."""
        return False

    @property
    def rows(self) -> Literal["pairs", "scored_pairs"]:
        """How rows are made of samples: whole pairs, best-fit; scored ones with every token of theirs read."""
        return "pairs"

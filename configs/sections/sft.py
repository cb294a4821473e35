"""The `sft` section: which conversations are learnt, what of them is trained, and how samples weigh. Torch-free."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from configs.sections.base import Count, NonNegativeFloat, NonNegativeInt, PathText, PositiveFloat, Section

ChatColumn = Literal[
    "messages", "conversations", "system", "tools", "role", "content",
    "instruction", "input", "output", "history", "prompt", "completion", "query", "response",
    "chosen", "rejected", "margin", "ranked", "scores", "label",
]  # fmt: skip
_FORMAT_SUFFIXES = (".gz", ".zst", ".jsonl", ".ndjson", ".json", ".parquet", ".arrow")
ChatRole = Literal["system", "user", "assistant", "tool", "function_call"]


class ConversationSource(Section):
    """One source of conversations."""

    path: Annotated[PathText, Field(examples=["data/chats.jsonl"])]
    """JSON, JSONL or Parquet file, a folder of such, or a Hugging Face dataset directory."""
    weight: PositiveFloat | None = None
    """Share of rows drawn from this source, relative to the other weights; null for all: as many as it fills."""
    columns: Mapping[ChatColumn, str] = {}
    """The file's own name of a column that has another here; `role` and `content` are keys of a turn. As in
    LLaMA-Factory, with query or response among them prompt, query and response are instruction, input and output."""
    roles: Mapping[str, ChatRole] = {}
    """What the file's own names of roles stand for; function_call is an assistant's turn that holds a call as JSON."""

    @property
    def name(self) -> str:
        """Name of the file without what tells its format, or of the folder: under it validation is logged."""
        name = os.path.basename(os.path.abspath(self.path))
        for suffix in _FORMAT_SUFFIXES:
            name = name.removesuffix(suffix)
        return name or "source"


class SftSection(Section):
    """Supervised fine-tuning on conversations."""

    template: str | None = None
    """Chat template: a name (chatml, llama3, qwen, mistral, gemma, alpaca) or a .jinja file; null: the tokenizer's."""
    train: tuple[ConversationSource, ...] = ()
    """Blend of training sources."""
    validation: tuple[ConversationSource, ...] = ()
    """Validation sources; each is evaluated on its own and logged under its file name without suffix."""
    train_on: Literal["assistant", "last", "all"] = "assistant"
    """What is trained: every turn of the assistant, its last one, or every token."""
    bad_rows: Literal["refuse", "drop"] = "refuse"
    """What becomes of a row that is no conversation or that the template cannot render; dropped ones are counted."""
    too_long: Literal["truncate", "drop"] = "truncate"
    """What becomes of a sample of more than train.seq_len tokens: cut at its end (left out where nothing trained is
    left), or left out; both are counted."""
    packing: bool = True
    """Pack several samples into a row (best-fit, attention within each) instead of padding each to train.seq_len."""
    weighting: Literal["token", "sample"] = "token"
    """What weighs alike in a step: every trained token, or every sample, whatever its length."""
    neftune_alpha: NonNegativeFloat = 0.0
    """Strength of uniform noise on embeddings while training (NEFTune, arXiv:2310.05914); 0 for none."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the target spread evenly over the vocabulary; 0 for none. The training loss is of that target then, and
    cross_entropy beside it is the loss without; validation has none."""
    num_answers: NonNegativeInt = 4
    """Questions of each validation source that are answered, greedily, at each validation; 0 for none, as with
    train_on=all, which does not say where answers begin. Samples cut at train.seq_len are not asked."""
    max_answer_tokens: Count = 128
    """Tokens of such an answer at most."""
    cache: PathText = "data/sft_cache"
    """Directory of tokenised sources, one folder for each content, template, tokenizer and rule."""
    num_workers: Count | None = None
    """Processes that tokenise; null for one a core."""

    @property
    def rows(self) -> Literal["best_fit", "padded"]:
        """How rows are made of samples, as `data.packing` names it."""
        return "best_fit" if self.packing else "padded"

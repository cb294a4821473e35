"""The `distill` section: who teaches, how far from it is measured, and whose text is judged. Torch-free."""

from __future__ import annotations

from pydantic import Field

from configs.sections.base import Count, Fraction, PathText, PositiveFloat, Section


class DistillSection(Section):
    """Learning from the distributions of another model."""

    teacher: PathText | None = Field(default=None, examples=["runs/demo_sft"])
    """The model to learn from, of any size and of the same tokenizer: a checkpoint, a run directory or a Hugging Face
    model's. Ids that one of the two models lacks are not compared. It is held frozen on the run's ranks; null with
    distill.cache."""
    cache: PathText | None = None
    """Directory of what a teacher says of the conversations, its likeliest ids of every trained token: written by
    launch/teacher_cache.py, and read in place of a teacher; null for none."""
    beta: Fraction = 0.0
    """Which generalised Jensen-Shannon divergence is minimised (GKD, arXiv:2306.13649), as TRL's beta: 0 for
    KL(teacher || student), 1 for KL(student || teacher), between them both, from their mixture beta teacher + (1 -
    beta) student."""
    temperature: PositiveFloat = 1.0
    """What the logits of both are divided by before they are compared; the divergence is multiplied by its square
    (arXiv:1503.02531), so that it weighs alike against the labels. With a cache, that of the cache."""
    top_k: Count | None = None
    """The teacher's likeliest ids of each token that are compared, and all others together as one further class; null
    for the whole vocabulary. Of a cache it says how many are written."""
    label_weight: Fraction = 0.0
    """Share of the labels' cross-entropy in the loss; the divergence has the rest."""
    lmbda: Fraction = 0.0
    """Share of steps that learn from the student's own answers to the conversations' prompts, by its distance to the
    teacher alone (GKD's lambda); the others learn from the answers in the data."""

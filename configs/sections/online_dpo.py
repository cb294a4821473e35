"""The `online_dpo` section: rounds of answers, pairs of the best and the worst, and updates by them. Torch-free."""

from __future__ import annotations

from typing import Literal

from configs.sections.base import Count
from configs.sections.preference import PairLoss, PairLossSection


class OnlineDpoSection(PairLossSection):
    """Learning from pairs of the policy's own answers: round by round, or step by step."""

    loss: PairLoss = "dpo"
    """That of a pair, as in launch/preference.py: dpo, cdpo, rdpo, ipo, slic, apo_zero, apo_down, orpo or simpo."""
    reference: Literal["start", "round"] = "start"
    """What the policy is held to: the model that the run starts from (as TRL's OnlineDPOTrainer; arXiv:2312.11456), or
    the policy as the round begins (arXiv:2401.10020, arXiv:2404.19733); of orpo and simpo nothing."""
    prompts_per_round: Count = 512
    """Prompts that are answered when a round begins, grpo.group_size times each; of each group the answer of the
    highest score is chosen and that of the lowest rejected. A group of one score gives no pair."""
    steps_per_round: Count = 32
    """Updates by a round's pairs, train.global_batch_size packed rows of them each, in an order shuffled anew whenever
    all have been read; 1 for answers of the present policy alone."""

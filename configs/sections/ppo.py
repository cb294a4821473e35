"""The `ppo` section: the critic, how its values become advantages, and the divergence in the rewards. Torch-free."""

from __future__ import annotations

from configs.sections.base import Fraction, NonNegativeFloat, NonNegativeInt, PathText, PositiveFloat, Section
from configs.sections.optimizer import OptimizerConfig


class CriticOptimizerConfig(OptimizerConfig):
    """AdamW of the critic, with warm-up and decay as `schedule` says for both models."""

    lr: PositiveFloat = 1e-5
    """Peak learning rate."""
    min_lr: NonNegativeFloat = 1e-6
    """Learning rate at the end of the decay."""


class CriticSection(Section):
    """The model that says what a token is worth, with a scalar head in place of the output layer."""

    init_from: PathText | None = None
    """Where its weights come from: the critic of a run of PPO or a reward model, with their heads, or a language model,
    whose head is drawn anew; a checkpoint, a run directory or a Hugging Face model. Null for the place that the policy
    starts from."""
    optimizer: CriticOptimizerConfig = CriticOptimizerConfig()
    """Its own optimizer."""
    value_clip: PositiveFloat | None = 0.2
    """How far an update may move a value before its loss no longer falls; null for no limit."""
    warmup_steps: NonNegativeInt = 0
    """First steps, in which the critic alone is trained, on answers of the policy as it is: value pretraining (VC-PPO,
    arXiv:2503.01491, and VAPO, arXiv:2504.05118)."""


LARGEST_ERROR = 0.2
"""The share of its target that a divergence is off by, beyond which the coefficient adapts no faster."""


class AdaptiveKlSection(Section):
    """A coefficient of the divergence that keeps it near a target (arXiv:1909.08593, section 2.2)."""

    target: PositiveFloat = 6.0
    """Divergence of an answer, summed over its tokens, in nats."""
    horizon: PositiveFloat = 10000.0
    """Answers in which an error of the target changes the coefficient by as much, but a fifth at most."""


class PpoSection(Section):
    """Proximal policy optimization (arXiv:1707.06347) with a critic; `grpo` has what it shares with GRPO."""

    critic: CriticSection = CriticSection()
    """The critic."""
    gamma: Fraction = 1.0
    """Discount of rewards, a token."""
    gae_lambda: Fraction = 0.95
    """Of advantages, which the policy learns from (GAE, arXiv:1506.02438)."""
    length_alpha: PositiveFloat | None = None
    """Lambda of each answer by its length instead of gae_lambda, 1 - 1 / (length_alpha times tokens), at least 0; 0.05
    in VAPO (arXiv:2504.05118). Null for gae_lambda."""
    critic_lambda: Fraction = 1.0
    """Of returns, which the critic learns; 1 for the sums of rewards themselves (arXiv:2503.01491)."""
    whiten_advantages: bool = True
    """Whether advantages of all tokens of a step are brought to mean 0 and deviation 1."""
    adaptive_kl: AdaptiveKlSection | None = None
    """Adapt the coefficient of the divergence in the rewards, which begins as grpo.kl.coefficient; null to keep it."""

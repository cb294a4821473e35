"""The `grpo` section: prompts, rewards, and the policy-gradient method with its published defaults. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from configs.sections.base import Count, NonNegativeFloat, NonNegativeInt, PositiveFloat, Section
from configs.sections.reward import RewardConfig, RewardModelSource
from configs.sections.sft import ConversationSource

Algorithm = Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce_pp", "reinforce_pp_baseline", "ppo"]
Advantage = Literal["group_std", "group_mean", "leave_one_out", "batch", "group_mean_batch"]
Normalisation = Literal["token_mean", "sequence_mean", "sequence_sum", "constant"]


class KlSection(Section):
    """The penalty for leaving the reference, which is the model that the run starts from."""

    coefficient: NonNegativeFloat | None = None
    """What the divergence is multiplied by; 0 for no reference at all; null for the algorithm's own."""
    estimator: Literal["k1", "k2", "k3"] | None = None
    """Of the divergence for a token (Schulman 2020, "Approximating KL divergence"): with d = log policy - log
    reference, k1 = d, k2 = d^2 / 2, k3 = exp(-d) + d - 1; null for the algorithm's own."""
    place: Literal["loss", "reward"] | None = None
    """Where it stands: added to the loss, or taken from the reward; null for the algorithm's own."""


class GrpoSection(Section):
    """Reinforcement learning from rewards that can be computed; `algorithm` says what the fields that are null are."""

    algorithm: Algorithm = "grpo"
    """GRPO (arXiv:2402.03300), Dr. GRPO (arXiv:2503.20783), DAPO (arXiv:2503.14476), GSPO (arXiv:2507.18071), CISPO
    (arXiv:2506.13585), RLOO (arXiv:2402.14740), REINFORCE++ and its baseline variant (arXiv:2501.03262); ppo
    (arXiv:1707.06347) in the stage of that name, whose advantages come from a critic."""
    template: str | None = None
    """Chat template: a name (chatml, llama3, qwen, mistral, gemma, alpaca) or a .jinja file; null: the tokenizer's."""
    prompts: tuple[ConversationSource, ...] = ()
    """Blend of sources of prompts; a last turn of the assistant is left off."""
    validation: tuple[ConversationSource, ...] = ()
    """Prompts that are answered greedily and scored at each validation."""
    num_validation_prompts: Count = 200
    """Prompts of each validation source, its first ones."""
    rewards: tuple[RewardConfig, ...] = ()
    """What answers are scored by; the score is the sum of the rewards times their weights."""
    reward_model: RewardModelSource | None = None
    """A trained model whose value of the conversation with the answer is one more reward; null for none."""
    environment: str | None = None
    """Who the policy talks to over several turns: calculator, or module:Class; null for one answer a prompt."""
    max_turns: Count = 4
    """Answers of the policy in one conversation with an environment, at most."""
    environment_time_limit: PositiveFloat = 10.0
    """Seconds that the environment may take to answer; beyond that the conversation counts as failed."""
    num_reward_workers: Count | None = None
    """Processes that score, and as many in which the environment answers, on each rank that does; null for one a core
    of the host, shared by its ranks."""
    group_size: Count = 8
    """Answers to each prompt."""
    num_minibatches: Count = 1
    """Updates made of a step's answers in each pass over them; each takes train.global_batch_size of them."""
    num_epochs: Count = 1
    """Passes over a step's answers."""
    advantage: Advantage | None = None
    """What is compared: with the mean of the group, divided by its standard deviation (group_std) or not (group_mean),
    with the mean of the others in the group (leave_one_out), with mean and deviation over all tokens of the step
    (batch), or first with the group, then with the step (group_mean_batch); null for the algorithm's own."""
    ratio: Literal["token", "sequence"] | None = None
    """What importance ratios are of: tokens, or whole answers by their mean token; null for the algorithm's own."""
    surrogate: Literal["clip", "cispo"] | None = None
    """PPO's clipped objective, or the likelihood weighted by a clipped ratio; null for the algorithm's own."""
    clip_low: Annotated[float, Field(gt=0, le=1)] | None = None
    """Ratios below 1 - clip_low are clipped; null for the algorithm's own."""
    clip_high: PositiveFloat | None = None
    """Ratios above 1 + clip_high are clipped; null for the algorithm's own."""
    normalisation: Normalisation | None = None
    """What weighs alike in an update: every token (token_mean), every answer by its mean token (sequence_mean) or by
    the sum over its tokens (sequence_sum), which constant divides by rollout.max_new_tokens; null: the algorithm's."""
    kl: KlSection = KlSection()
    """The penalty for leaving the reference."""
    entropy_bonus: NonNegativeFloat = 0.0
    """What the entropy of each token is multiplied by and taken from the loss, weighed as `normalisation` says."""
    importance_cap: PositiveFloat | None = None
    """Weigh tokens by the ratio of the training forward pass's probability to that of generation, truncated at this
    (truncated importance sampling; 2 is usual); null for no weights."""
    cut_answers: Literal["train", "leave_out"] = "train"
    """What becomes of answers that the limit of tokens cut: trained, or left out of the loss (DAPO's overlong
    filtering); their rewards count for their groups in both."""
    num_refills: NonNegativeInt | None = None
    """Times that groups whose answers all have one reward, which teach nothing, are replaced by new prompts before the
    step goes on with those it has (DAPO's dynamic sampling); null for the algorithm's own, 0 for never."""
    gate_tolerance: PositiveFloat | None = None
    """How far log-probabilities of generation and of the training forward pass may be apart before the first update,
    in nats, on average over the answers; null for 1e-4 in fp32, 0.05 in bf16 and fp16, 0.2 in FP8."""

    @property
    def method(self) -> PolicyMethod:
        """Return the method with everything that the algorithm decides where the config does not."""
        own = _ALGORITHMS[self.algorithm]
        names = ("advantage", "ratio", "surrogate", "clip_low", "clip_high", "normalisation", "num_refills")
        chosen = {name: _either(getattr(self, name), own[name]) for name in names}
        for name, field in (("kl_coefficient", "coefficient"), ("kl_estimator", "estimator"), ("kl_place", "place")):
            chosen[name] = _either(getattr(self.kl, field), own[name])
        return PolicyMethod(**chosen, entropy_bonus=self.entropy_bonus, importance_cap=self.importance_cap)


@dataclass(frozen=True)
class PolicyMethod:
    """A policy-gradient method in full; the fields are those of `GrpoSection` and `KlSection`."""

    advantage: Advantage
    ratio: Literal["token", "sequence"]
    surrogate: Literal["clip", "cispo"]
    clip_low: float
    clip_high: float
    normalisation: Normalisation
    num_refills: int
    kl_coefficient: float
    kl_estimator: Literal["k1", "k2", "k3"]
    kl_place: Literal["loss", "reward"]
    entropy_bonus: float = 0.0
    importance_cap: float | None = None


_GRPO: dict[str, Any] = {
    "advantage": "group_std", "ratio": "token", "surrogate": "clip", "clip_low": 0.2, "clip_high": 0.2,
    "normalisation": "sequence_mean", "num_refills": 0, "kl_coefficient": 0.04, "kl_estimator": "k3",
    "kl_place": "loss",
}  # fmt: skip
_NO_KL: dict[str, Any] = {"kl_coefficient": 0.0}
_ALGORITHMS: Mapping[str, Mapping[str, Any]] = {
    "grpo": _GRPO,
    "dr_grpo": _GRPO | _NO_KL | {"advantage": "group_mean", "normalisation": "constant"},
    "dapo": _GRPO | _NO_KL | {"clip_high": 0.28, "normalisation": "token_mean", "num_refills": 10},
    "gspo": _GRPO | _NO_KL | {"ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4},
    "cispo": _GRPO | _NO_KL | {"surrogate": "cispo", "clip_low": 1.0, "clip_high": 4.0, "normalisation": "token_mean"},
    "rloo": _GRPO | {
        "advantage": "leave_one_out", "normalisation": "sequence_sum", "kl_coefficient": 0.05, "kl_estimator": "k1",
        "kl_place": "reward",
    },
    "reinforce_pp": _GRPO | {
        "advantage": "batch", "normalisation": "token_mean", "kl_coefficient": 0.01, "kl_estimator": "k1",
        "kl_place": "reward",
    },
    "reinforce_pp_baseline": _GRPO | {
        "advantage": "group_mean_batch", "normalisation": "token_mean", "kl_coefficient": 0.01, "kl_estimator": "k2",
    },
    "ppo": _GRPO | {
        "advantage": "batch", "normalisation": "token_mean", "kl_coefficient": 0.05, "kl_estimator": "k1",
        "kl_place": "reward",
    },
}  # fmt: skip
"""What each paper uses; DAPO's refills are at most 10 as in its authors' code, CISPO has no lower bound, and where a
paper leaves the divergence's coefficient open (RLOO, REINFORCE++, PPO) it is that of TRL and OpenRLHF."""


def _either(value: Any, default: Any) -> Any:
    return default if value is None else value

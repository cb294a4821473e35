"""The `preference` section: which answers are preferred to which, and by which loss that is learnt. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal

from pydantic import Field

from configs.sections.base import Count, NonNegativeFloat, NonNegativeInt, PositiveFloat, Section
from configs.sections.comparisons import ComparisonsSection

PairLoss = Literal["dpo", "cdpo", "rdpo", "ipo", "slic", "apo_zero", "apo_down", "orpo", "simpo"]
PreferenceLoss = Literal[PairLoss, "kto"]
_OWN_BETA = {"simpo": 2.0}
_WITHOUT_REFERENCE = ("orpo", "simpo")


@dataclass(frozen=True)
class PreferenceMethod:
    """A loss in full; the fields are those of `PreferenceSection`."""

    loss: PreferenceLoss
    beta: float
    label_smoothing: float
    length_penalty: float
    target_margin: float
    sft_weight: float
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    @property
    def has_reference(self) -> bool:
        """Whether the policy is held to a reference."""
        return self.loss not in _WITHOUT_REFERENCE


class PairLossSection(Section):
    """What is learnt of a pair of answers; the fields that every stage of preferences has."""

    loss: PreferenceLoss = "dpo"
    """DPO (arXiv:2305.18290), cDPO (with label_smoothing), R-DPO (arXiv:2403.19159), IPO (arXiv:2310.12036), SLiC
    (arXiv:2305.10425), APO-zero and APO-down (arXiv:2408.06266), ORPO (arXiv:2403.07691), SimPO (arXiv:2405.14734), or,
    in launch/preference.py, KTO (arXiv:2402.01306), whose answers need no partner. All but orpo and simpo hold the
    policy to a reference, which is the model that the run starts from."""
    beta: PositiveFloat | None = None
    """What log-ratios or, of orpo and simpo, mean log-probabilities are multiplied by to be rewards; the weight of
    orpo's odds ratio, and ipo's tau; null for 2 with simpo, 0.1 else."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.1
    """Share of pairs that are taken to be the wrong way round; of cdpo."""
    length_penalty: NonNegativeFloat = 0.05
    """Reward for a token of length that is not counted for an answer; of rdpo, its alpha."""
    target_margin: NonNegativeFloat = 1.0
    """By how much the reward of the chosen answer shall be above the other's; of simpo, its gamma."""
    sft_weight: NonNegativeFloat = 0.0
    """What the chosen answer's mean cross-entropy a token is multiplied by and added to the loss of its pair
    (arXiv:2404.19733); 0 for none."""

    @property
    def method(self) -> PreferenceMethod:
        """The loss with everything that it decides where the config does not."""
        beta = _OWN_BETA.get(self.loss, 0.1) if self.beta is None else self.beta
        return PreferenceMethod(
            self.loss, beta, self.label_smoothing, self.length_penalty, self.target_margin, self.sft_weight
        )


class PreferenceSection(ComparisonsSection, PairLossSection):
    """Learning from answers of which it is known which are better."""

    desirable_weight: NonNegativeFloat = 1.0
    """What the loss of good answers is multiplied by; of kto, its lambda."""
    undesirable_weight: NonNegativeFloat = 1.0
    """What the loss of bad answers is multiplied by; of kto."""
    num_answers: NonNegativeInt = 4
    """Questions of each validation source that are answered, greedily, at each validation, and compared with the
    chosen answer; 0 for none, as with kto."""
    max_answer_tokens: Count = 128
    """Tokens of such an answer at most."""

    @property
    def method(self) -> PreferenceMethod:
        """The loss with everything that it decides where the config does not."""
        return replace(
            super().method, desirable_weight=self.desirable_weight, undesirable_weight=self.undesirable_weight
        )

    @property
    def is_single(self) -> bool:
        """Whether answers have a label each, and no partner."""
        return self.loss == "kto"

"""The models of a stage by their roles, and what a config says of those beside the policy. Torch-free plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from configs.sections.optimizer import OptimizerConfig

POLICY = "policy"
"""Role of the model that the run is about: it starts from `checkpoint.init_from`, is saved, exported and sampled."""
CRITIC = "critic"
"""Role of the model that says what is still to come of a reward."""
REWARD = "reward"
"""Role of the model that scores answers."""
TEACHER = "teacher"
"""Role of the model whose distributions are learned."""

HeadKind = Literal["vocabulary", "scalar"]
"""What a model says of a token: logits of the vocabulary, or one value (reward models, critics)."""
HEAD = "output_layer.weight"
"""The weight of either head, by its name in the last chunk and in checkpoints."""


@dataclass(frozen=True)
class SecondModel:
    """A model beside the policy: its architecture is that of the place, its layout and number formats are the run's."""

    field: str
    """The field of the config that names the place."""
    place: str
    """A checkpoint, a run directory or a Hugging Face model."""
    head: HeadKind = "vocabulary"
    optimizer: OptimizerConfig | None = None
    """Of a model that is trained, from which it is seen that it is; None for a frozen one."""
    is_start: bool = False
    """The place is where the policy starts from too, so that what the run's `model` section says of the use of these
    weights, such as a stretched rotation, holds for both."""

    @property
    def is_trained(self) -> bool:
        """Whether the run changes its weights, which its checkpoints then hold."""
        return self.optimizer is not None

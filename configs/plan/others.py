"""Memory of a stage with models beside the policy: all on the device at once, or by turns. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from configs.plan.derive import Layout
from configs.plan.estimate import MemoryEstimate, count_parameters, estimate_memory, estimate_stages
from configs.roles import HeadKind
from configs.stages import Config, RewardModelConfig


@dataclass(frozen=True)
class OtherModel:
    """A model beside the policy: what it is, on whatever layout the run is planned for."""

    config: Config
    head: HeadKind
    is_trained: bool

    def on_layout(self, config: Config) -> Config:
        """Return its config with the layout and the batches of the run's; with a scalar head, as of a reward model."""
        own = self.config.model_copy(update={"parallel": config.parallel, "train": config.train})
        if self.head == "vocabulary":
            return own
        return RewardModelConfig.model_construct(**{name: getattr(own, name) for name in Config.model_fields})

    def estimate(self, config: Config, layout: Layout) -> list[MemoryEstimate]:
        """Estimate the bytes of a rank of each pipeline stage; a frozen model has no gradients and keeps no layers."""
        stages = estimate_stages(self.on_layout(config), layout)
        if not self.is_trained:
            stages = [replace(stage, gradients=0, optimizer=0, activations=0) for stage in stages]
        return stages

    def describe(self) -> str:
        """Return its size and what becomes of it, in words."""
        kind = "trained" if self.is_trained else "frozen"
        head = ", a scalar head" if self.head == "scalar" else ""
        return f"{count_parameters(self.config.model, self.head).total:,} parameters, {kind}{head}"


Others = Mapping[str, OtherModel]
"""By role."""


def estimate_together(
    config: Config, layout: Layout, others: Others, parameters: Sequence[tuple[int, int]] | None = None
) -> MemoryEstimate:
    """Estimate the bytes of the fullest rank, those of the models beside the policy among them.

    All at once, the states of all models and the activations of one of them are there. By turns
    (`parallel.offload_models`) one model is whole, beside the weights of the policy.
    """
    if not others:
        return estimate_memory(config, layout, parameters)
    stages = []
    rows = [other.estimate(config, layout) for other in others.values()]
    for own, *rest in zip(estimate_stages(config, layout, parameters), *rows, strict=True):
        if config.parallel.offload_models:
            total = max(own.total, own.weights + max(one.total for one in rest))
        else:
            total = sum(map(_state, (own, *rest))) + max(one.total - _state(one) for one in (own, *rest))
        stages.append(replace(own, other_models=total - own.total))
    return max(stages, key=lambda stage: stage.total)


def _state(stage: MemoryEstimate) -> int:
    return stage.weights + stage.gradients + stage.optimizer

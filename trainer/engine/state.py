"""Where a run is: counts that grow with every step and go into checkpoints. Knows nothing of how a step is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did; the same on every rank."""

    loss: float
    """Mean loss over what the objective counts in the global batch, in nats for language models; 0 if it is empty."""
    count: int
    """What the loss was divided by: counted tokens, sequences or pairs of the global batch."""
    num_tokens: int
    """Tokens of the global batch whose loss counted."""
    num_input_tokens: int
    """Tokens of the global batch that went through the model."""
    num_attended_pairs: int
    """Pairs of tokens (`configs.plan.flops`) in what attention sees at once, samples or documents, over all layers."""
    num_samples: int
    """Samples of the global batch."""
    grad_norm: float
    """Global L2 norm of the gradient before clipping."""
    learning_rate: float
    is_applied: bool
    """False where nothing counted, or a non-finite loss or gradient, left the weights as they were."""
    is_overflow_expected: bool
    """The skip is part of fp16's search for a loss scale."""
    loss_scale: float
    next_loss_scale: float
    metrics: dict[str, float]
    """Further means."""
    phase_seconds: dict[str, float]
    """Seconds by phase, in order: data, forward_backward, optimizer, or what else a stage's step consists of."""
    rollouts: Sequence[Mapping[str, Any]] = ()
    """What was generated in the step, where anything was, as it is written down."""

    @property
    def is_empty(self) -> bool:
        """Whether nothing of the global batch counted, so that there was nothing to learn from."""
        return self.count == 0

    @property
    def is_fault(self) -> bool:
        """Whether the update was skipped for a number that should have been finite."""
        return not (self.is_applied or self.is_overflow_expected or self.is_empty)


@dataclass(frozen=True)
class TrainState:
    """Progress of a run."""

    step: int = 0
    """Optimizer steps taken, skipped ones included."""
    consumed_samples: int = 0
    consumed_tokens: int = 0
    """Tokens whose loss counted."""
    num_skipped_steps: int = 0
    """Steps that were not applied, over the whole run."""
    num_nonfinite_in_a_row: int = 0
    num_empty_steps: int = 0
    """Steps of which nothing counted; they are among the skipped ones."""
    lowest_validation_loss: float | None = None
    """Of all validations, that before the first step too, the mean over sources in nats."""
    best_step: int | None = None
    """Steps taken before the validation with that loss; None: there was none, or before this was written down."""
    num_stale_validations: int = 0
    """Validations in a row, up to the last one, that were no lower than the lowest before."""

    def after(self, result: StepResult) -> TrainState:
        """Return the state after one more step."""
        if result.is_fault:
            num_in_a_row = self.num_nonfinite_in_a_row + 1
        else:  # an empty batch says nothing about the weights
            num_in_a_row = self.num_nonfinite_in_a_row if result.is_empty else 0
        return replace(
            self,
            step=self.step + 1,
            consumed_samples=self.consumed_samples + result.num_samples,
            consumed_tokens=self.consumed_tokens + result.num_tokens,
            num_skipped_steps=self.num_skipped_steps + (not result.is_applied),
            num_nonfinite_in_a_row=num_in_a_row,
            num_empty_steps=self.num_empty_steps + result.is_empty,
        )

    def after_validation(self, loss: float) -> TrainState:
        """Return the state after a validation with this mean loss; one that is NaN is no lower than any."""
        if self.lowest_validation_loss is None or loss < self.lowest_validation_loss:
            return replace(self, lowest_validation_loss=loss, best_step=self.step, num_stale_validations=0)
        return replace(self, num_stale_validations=self.num_stale_validations + 1)

    def without_validations(self) -> TrainState:
        """Return the state as if nothing had been validated: what comes next is measured on other data."""
        return replace(self, lowest_validation_loss=None, best_step=None, num_stale_validations=0)

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for a checkpoint."""
        return asdict(self)

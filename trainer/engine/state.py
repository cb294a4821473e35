"""Where a run is: counts that grow with every step and go into checkpoints. Knows nothing of how a step is made."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did; the same on every rank."""

    loss: float
    """Mean loss over all counted tokens of the global batch, in nats."""
    num_tokens: int
    """Counted tokens of the global batch."""
    num_samples: int
    """Samples of the global batch."""
    grad_norm: float
    """Global L2 norm of the gradient before clipping."""
    learning_rate: float
    is_applied: bool
    """False where a non-finite loss or gradient left the weights as they were."""
    is_overflow_expected: bool
    """The skip is part of fp16's search for a loss scale."""
    loss_scale: float
    metrics: dict[str, float]
    """Further means over the counted tokens."""
    phase_seconds: dict[str, float]
    """Seconds by phase: forward_backward, optimizer."""


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

    def after(self, result: StepResult) -> TrainState:
        """Return the state after one more step."""
        is_fault = not result.is_applied and not result.is_overflow_expected
        return replace(
            self,
            step=self.step + 1,
            consumed_samples=self.consumed_samples + result.num_samples,
            consumed_tokens=self.consumed_tokens + result.num_tokens,
            num_skipped_steps=self.num_skipped_steps + (not result.is_applied),
            num_nonfinite_in_a_row=self.num_nonfinite_in_a_row + 1 if is_fault else 0,
        )

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for a checkpoint."""
        return asdict(self)

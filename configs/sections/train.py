"""The `train` section: length and shape of training. Torch-free plain data."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from configs.sections.base import PositiveFloat, PositiveInt, Samples, Section

STEPS_OF_EPOCHS = 10**12
"""What `num_steps` is until the data has said how many steps `num_epochs` are."""


class RecomputeConfig(Section):
    """Activation recomputation in the backward pass (arXiv:2205.05198)."""

    granularity: Literal["none", "selective", "full"] = "none"
    """none, selective (the listed modules) or full (whole layers)."""
    modules: tuple[Literal["core_attn", "mlp", "moe", "moe_act", "layernorm", "mla_up_proj"], ...] = ("core_attn",)
    """Modules recomputed when selective."""
    method: Literal["uniform", "block"] = "uniform"
    """full only: checkpoint every group of layers (uniform), or the first layers alone (block)."""
    num_layers: PositiveInt = 1
    """full only: layers per group (uniform), or layers recomputed per pipeline stage (block)."""


class BatchRampConfig(Section):
    """Batch-size ramp-up: the global batch grows by `increment` from `start` over `num_samples` samples."""

    start: Samples
    """First global batch size in samples."""
    increment: Samples
    """Samples added at each increase."""
    num_samples: PositiveInt
    """Samples over which the batch grows to `train.global_batch_size`."""


class TrainConfig(Section):
    """Length and shape of training."""

    num_steps: Annotated[int, Field(ge=0, le=STEPS_OF_EPOCHS, examples=[1000])]
    """Optimizer updates of the whole run; 0 writes the initial weights as a seed checkpoint and ends. May be left out,
    or null, where train.num_epochs is set."""
    num_epochs: PositiveFloat | None = None
    """Passes over the training data instead of train.num_steps, which then follows from the data, in whole steps: the
    last one begins the next pass where it is not full; null for steps."""
    seq_len: PositiveInt = 4096
    """Tokens per sample."""
    global_batch_size: Samples = 256
    """Samples per optimizer update over all data-parallel ranks."""
    micro_batch_size: Samples = 1
    """Samples per forward pass on one data-parallel rank."""
    batch_ramp: BatchRampConfig | None = None
    """Batch-size ramp-up; null for a constant batch."""
    log_every: PositiveInt = 1
    """Steps between log lines (metrics.jsonl has every step)."""
    eval_every: PositiveInt | None = None
    """Steps between validations; null for only before the first and after the last step."""
    eval_num_samples: Samples = 256
    """Samples per validation source at each validation."""
    max_nonfinite_steps: PositiveInt = 5
    """Steps in a row with a non-finite loss or gradient that are skipped before the run stops (exit code 4)."""
    patience: PositiveInt | None = None
    """End the run after this many validations in a row without a lower mean validation loss, and keep the checkpoint of
    the lowest as `<run.dir>/checkpoints/best`; null to go on, and keep none for that."""
    recompute: RecomputeConfig = RecomputeConfig()
    """Activation recomputation."""

    @model_validator(mode="before")
    @classmethod
    def _leave_steps_to_epochs(cls, fields: Any) -> Any:
        """Let `num_epochs` stand alone: how many steps they are is known when the data is open."""
        if isinstance(fields, dict) and fields.get("num_epochs") is not None and fields.get("num_steps") is None:
            return {**fields, "num_steps": STEPS_OF_EPOCHS}
        return fields

"""The `train` section: length and shape of training. Torch-free plain data."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from configs.sections.base import PositiveInt, Samples, Section


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

    num_steps: Annotated[int, Field(ge=0, le=10**12, examples=[1000])]
    """Optimizer updates of the whole run; 0 writes the initial weights as a seed checkpoint and ends."""
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
    recompute: RecomputeConfig = RecomputeConfig()
    """Activation recomputation."""

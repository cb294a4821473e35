"""The `precision` section: number formats. Torch-free plain data; recipes are in `configs.fp8`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from configs.sections.base import Count, NonNegativeInt, PositiveFloat, PositiveInt, Section


class Fp8Config(Section):
    """8-bit floating point in the matrix multiplications of the layers (arXiv:2209.05433), forward and backward.

    Embedding, output layer, router, attention core and norms stay in `precision.compute`.
    """

    recipe: Literal["delayed", "tensorwise", "rowwise", "blockwise", "mxfp8"]
    """What shares a scale: the tensor, from the history of its largest value (delayed) or its present one
    (tensorwise); a row; 1x128 elements and 128x128 of the weights (blockwise, arXiv:2412.19437); 1x32 (mxfp8)."""
    format: Literal["e4m3", "hybrid"] | None = None
    """e4m3 for all operands, or hybrid: e5m2 for gradients. Default hybrid; e4m3 for blockwise and mxfp8."""
    backend: Literal["auto", "te", "torch", "emulated"] = "auto"
    """te (Transformer Engine), torch (its own FP8 kernels, without te), emulated (the same numerics on any device,
    for study), or auto: te where it is installed, else torch."""
    num_first_layers_kept: NonNegativeInt = 0
    """First layers that stay in `precision.compute`."""
    num_last_layers_kept: NonNegativeInt = 0
    """Last layers that stay in `precision.compute`."""
    param_gather: bool = False
    """te only: hold the weights in FP8 and gather them so over the data-parallel ranks."""
    amax_history_len: Count = 1024
    """delayed only: steps whose largest values are remembered."""
    amax_compute: Literal["max", "most_recent"] = "max"
    """delayed only: scale by the largest value of the history, or of the last step."""


class PrecisionConfig(Section):
    """Number formats of compute; main weights, gradient reduction and optimizer state are always fp32."""

    compute: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Format of weights and activations in forward and backward."""
    fp8: Fp8Config | None = None
    """FP8 matrix multiplications; null for none."""
    initial_loss_scale: Annotated[float, Field(gt=0, le=2.0**32)] = 4096.0
    """fp16 only: first dynamic loss scale."""
    min_loss_scale: PositiveFloat = 1.0
    """fp16 only: smallest dynamic loss scale."""
    loss_scale_window: PositiveInt = 1000
    """fp16 only: finite steps before the loss scale doubles."""
    loss_scale_hysteresis: PositiveInt = 2
    """fp16 only: overflows tolerated before the loss scale halves."""

"""Number formats: config -> what Megatron-Core's model and optimizer configs want."""

from __future__ import annotations

from typing import Any

import torch

from configs.fp8 import fp8_format
from configs.sections.precision import Fp8Config, PrecisionConfig
from configs.stages import Config

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def model_precision(config: Config, *, use_te: bool) -> dict[str, Any]:
    """Return the precision fields of `TransformerConfig`; FP8 is among them where Transformer Engine runs it."""
    precision = config.precision
    dtype = DTYPES[precision.compute]
    fp8 = _te_fp8(precision.fp8) if precision.fp8 is not None and use_te else {}
    return fp8 | {
        "bf16": dtype is torch.bfloat16,
        "fp16": dtype is torch.float16,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "attention_softmax_in_fp32": True,
    }


def _te_fp8(fp8: Fp8Config) -> dict[str, Any]:
    kept = fp8.num_first_layers_kept + fp8.num_last_layers_kept > 0
    fields: dict[str, Any] = {
        "fp8": fp8_format(fp8),
        "fp8_recipe": fp8.recipe,
        "fp8_param": fp8.param_gather,
        "first_last_layers_bf16": kept,
    }
    if kept:
        fields |= {
            "num_layers_at_start_in_bf16": fp8.num_first_layers_kept,
            "num_layers_at_end_in_bf16": fp8.num_last_layers_kept,
        }
    if fp8.recipe == "delayed":
        fields |= {"fp8_amax_history_len": fp8.amax_history_len, "fp8_amax_compute_algo": fp8.amax_compute}
    return fields


def gathers_fp8(precision: PrecisionConfig) -> bool:
    """Return whether the data-parallel ranks gather the weights in FP8."""
    return precision.fp8 is not None and precision.fp8.param_gather


def optimizer_precision(precision: PrecisionConfig) -> dict[str, Any]:
    """Return the precision fields of Megatron-Core's `OptimizerConfig`."""
    fields: dict[str, Any] = {
        "bf16": precision.compute == "bf16",
        "fp16": precision.compute == "fp16",
        "params_dtype": DTYPES[precision.compute],
    }
    if precision.fp8 is not None and gathers_fp8(precision):
        fields["fp8_recipe"] = precision.fp8.recipe
    if precision.compute == "fp16":
        fields |= {
            "initial_loss_scale": precision.initial_loss_scale,
            "min_loss_scale": precision.min_loss_scale,
            "loss_scale_window": precision.loss_scale_window,
            "hysteresis": precision.loss_scale_hysteresis,
        }
    return fields

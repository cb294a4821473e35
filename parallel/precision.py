"""Number formats: config -> what Megatron-Core's model and optimizer configs want."""

from __future__ import annotations

from typing import Any

import torch

from configs.schema import PrecisionConfig

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def model_precision(precision: PrecisionConfig) -> dict[str, Any]:
    """Return the precision fields of `TransformerConfig`."""
    dtype = DTYPES[precision.compute]
    return {
        "bf16": dtype is torch.bfloat16,
        "fp16": dtype is torch.float16,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "attention_softmax_in_fp32": True,
    }


def optimizer_precision(precision: PrecisionConfig) -> dict[str, Any]:
    """Return the precision fields of Megatron-Core's `OptimizerConfig`."""
    fields: dict[str, Any] = {
        "bf16": precision.compute == "bf16",
        "fp16": precision.compute == "fp16",
        "params_dtype": DTYPES[precision.compute],
    }
    if precision.compute == "fp16":
        fields |= {
            "initial_loss_scale": precision.initial_loss_scale,
            "min_loss_scale": precision.min_loss_scale,
            "loss_scale_window": precision.loss_scale_window,
            "hysteresis": precision.loss_scale_hysteresis,
        }
    return fields

"""The auxiliary losses of Megatron-Core's MoE routers: their weight in the gradient, and their values for the log."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker, get_moe_metrics_tracker

from configs.sections.model import ModelConfig
from parallel.mesh import Mesh


def router_loss_names(model: ModelConfig) -> list[str]:
    """Return the names under which Megatron-Core records the losses that this model's routers have."""
    moe = model.moe
    if moe is None:
        return []
    return ["load_balancing_loss"] * (moe.balancing == "aux_loss") + ["z_loss"] * (moe.z_loss_coeff > 0)


def scale_router_losses(
    chunks: list[Any], scale_loss: Callable[[torch.Tensor], torch.Tensor], divisor_per_token: torch.Tensor
) -> None:
    """Let the routers' losses weigh the same in the gradient whatever share of the tokens counts in the main loss.

    Megatron-Core multiplies each microbatch's router loss by its number of tokens, expecting gradients to be divided by
    all tokens of the global batch; they are divided by what the objective counts. `divisor_per_token` is that divisor
    over all tokens, fp32 scalar. What then remains is coefficient x mean over microbatches and replicas of the loss of
    Fedus et al. 2021 (arXiv:2101.03961, eq. 4) and of Zoph et al. 2022 (arXiv:2202.08906, eq. 5).
    """
    scale = divisor_per_token.reshape(1)
    for chunk in chunks:
        chunk.config.moe_grad_scale_func = lambda: scale_loss(scale)


def read_router_losses(model: ModelConfig, mesh: Mesh, num_microbatches: int) -> dict[str, float]:
    """Return the step's mean load-balancing and z-loss per MoE layer and microbatch, and forget them.

    Collective: all ranks of the world must call this.
    """
    moe, names = model.moe, router_loss_names(model)
    if moe is None or not names:
        return {}
    tracker = get_moe_metrics_tracker()
    num_moe_layers = model.num_layers - moe.num_dense_layers
    losses = {}
    for name in names:
        tracker.ensure_initialized(name, model.num_layers, mesh.device)  # a pipeline stage may have no MoE layer
        entry = tracker.metrics[name]
        values = entry.values.clone()  # [num_layers]
        if entry.reduce_group is not None:
            dist.all_reduce(values, group=entry.reduce_group)
        for group in (mesh.pp_group, mesh.dp_group):
            dist.all_reduce(values, group=group)
        losses[f"moe_{name}"] = float(values.sum()) / (num_moe_layers * num_microbatches * mesh.dp_size)
    destroy_moe_metrics_tracker()  # its tables are as long as this model has layers, another may have more
    return losses

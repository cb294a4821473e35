"""Reads the auxiliary losses that Megatron-Core's MoE routers recorded during a step, for the log."""

from __future__ import annotations

import torch.distributed as dist
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

from configs.sections.model import ModelConfig
from parallel.mesh import Mesh


def read_router_losses(model: ModelConfig, mesh: Mesh, num_microbatches: int) -> dict[str, float]:
    """Return the step's mean load-balancing and z-loss per MoE layer and microbatch, and forget them.

    Collective: all ranks of the world must call this.
    """
    moe = model.moe
    if moe is None:
        return {}
    names = ["load_balancing_loss"] * (moe.balancing == "aux_loss") + ["z_loss"] * (moe.z_loss_coeff > 0)
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
    tracker.clear()
    return losses

"""Config -> Megatron-Core's distributed optimizer (ZeRO-1), and one update with clipping that refuses non-finites."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from configs.stages import Config
from parallel.collectives import any_rank
from parallel.mesh import Mesh
from parallel.platform.base import Platform
from parallel.precision import optimizer_precision
from parallel.replicate import resolve_overlap


@dataclass(frozen=True)
class UpdateResult:
    """What one call of `update_weights` did."""

    is_applied: bool
    grad_norm: float
    loss_scale: float
    next_loss_scale: float
    is_overflow_expected: bool
    """fp16 found an infinity while the loss scale can still shrink: part of its search, not a fault."""


def build_optimizer(config: Config, chunks: list[Any], platform: Platform) -> Any:
    """Return Megatron-Core's (chained) distributed optimizer over the replicated chunks."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    settings = config.optimizer
    overlap = resolve_overlap(config.parallel, platform.overlaps_communication)
    optimizer_config = OptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        adam_eps=settings.eps,
        clip_grad=settings.clip_grad,
        use_distributed_optimizer=True,
        overlap_param_gather=overlap.param_gather,
        **optimizer_precision(config.precision),
    )
    return get_megatron_optimizer(optimizer_config, chunks, use_gloo_process_groups=False)


def set_rates(optimizer: Any, learning_rate: float, weight_decay: float) -> None:
    """Set learning rate and weight decay of every parameter group, times the group's own factors.

    Megatron-Core gives norms and biases a decay factor of 0 and leaves it to a scheduler, which is not used here, to
    apply it.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_mult", 1.0)
        group["weight_decay"] = weight_decay * group.get("wd_mult", 1.0)


def update_weights(optimizer: Any, config: Config, mesh: Mesh, *, is_loss_finite: bool) -> UpdateResult:
    """Unscale, measure, clip and apply the gradients, or leave the weights alone if anything is not finite.

    Collective: all ranks of the world must call this, with the same `is_loss_finite`; all take the same decision,
    because the norm is reduced over all of them.
    """
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

    scaler = optimizer.chained_optimizers[0].grad_scaler
    loss_scale = float(scaler.scale) if scaler else 1.0
    can_shrink = scaler is not None and loss_scale > float(scaler.min_scale)
    if _prepare_gradients(optimizer):
        next_scale = float(scaler.scale) if scaler else 1.0
        return UpdateResult(False, math.nan, loss_scale, next_scale, is_overflow_expected=can_shrink and is_loss_finite)
    grad_norm = float(optimizer.get_grad_norm())
    # With sp these gradients are summed over tp, so that the norm has seen them.
    if config.parallel.tp > 1 and not config.parallel.sp and any_rank(has_non_finite_duplicate(optimizer), mesh.device):
        grad_norm = math.nan
    if not (is_loss_finite and math.isfinite(grad_norm)):
        return UpdateResult(False, grad_norm, loss_scale, loss_scale, is_overflow_expected=False)
    clip_grad = config.optimizer.clip_grad
    if clip_grad > 0:
        for part in optimizer.chained_optimizers:
            if not part.is_stub_optimizer:
                clip_grad_by_total_norm_fp32(part.get_parameters(), max_norm=clip_grad, total_norm=grad_norm)
    optimizer.step_with_ready_grads()
    return UpdateResult(True, grad_norm, loss_scale, loss_scale, is_overflow_expected=False)


def _prepare_gradients(optimizer: Any) -> bool:
    """Unscale the gradients and adjust the loss scale; return whether an infinity was found.

    Under expert parallelism the experts have an optimizer of their own, and Megatron-Core lets each adjust a scale by
    what itself has found, while the loss is scaled by the first: here all adjust by what any has found.
    """
    parts = optimizer.chained_optimizers
    before = [part.grad_scaler.state_dict() if part.grad_scaler else None for part in parts]
    found = [part.prepare_grads() for part in parts]
    if any(found) and not all(found):
        for part, state in zip(parts, before, strict=True):
            part.grad_scaler.load_state_dict(state)
            part.grad_scaler.update(True)
    return any(found)


def init_optimizer_state(optimizer: Any) -> None:
    """Create zero moments where there are none yet, so that weights can be saved before the first update."""
    for part in optimizer.chained_optimizers:
        if not part.is_stub_optimizer:
            part.init_state_fn(part.optimizer, part.config)


def has_non_finite_duplicate(optimizer: Any) -> bool:
    """Return whether a gradient that the norm leaves out, as tp rank 0 has the same parameter, is not finite."""
    from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate

    gradients = [
        parameter.grad
        for part in optimizer.chained_optimizers
        if not part.is_stub_optimizer
        for parameter in part.get_parameters()
        if parameter.grad is not None and not param_is_not_tensor_parallel_duplicate(parameter)
    ]
    return bool(gradients) and not bool(torch.stack(torch._foreach_norm(gradients)).isfinite().all())


def has_non_finite_gradient(chunks: list[Any]) -> bool:
    """Return whether this rank's reduced gradient buffers hold a NaN or infinity (reads all gradients)."""
    buffers = [buffer for chunk in chunks for buffer in chunk.buffers + chunk.expert_parallel_buffers]
    return any(not bool(torch.isfinite(buffer.grad_data).all()) for buffer in buffers)

"""A frozen model's scores and logits, which must agree, and the names of Megatron-Core replaced on the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tools.device_checks.engine import build_config, made_up_batches
from tools.device_checks.outcome import Outcome, judge

if TYPE_CHECKING:
    from parallel.mesh import Mesh

TOLERANCE = 1e-4
"""Largest difference of a token's log-probability in nats, in fp32."""


def check_scores(mesh: Mesh) -> Outcome:
    """Compare the log-probabilities of tokens by a model without an optimizer with those that its logits give.

    The logits come of a forward pass without labels, and are made into log-probabilities in float64 on the host.
    """
    from trainer.engine.build import ModelPlan, build_models
    from trainer.stages.forward import forward_language_model

    config = build_config("fp32")
    batches = made_up_batches(config)
    model = build_models({"reference": ModelPlan(config, is_trained=False)}, mesh)["reference"]
    problems, worst = [], 0.0
    for batch, losses in zip(batches, model.score(batches, forward_language_model), strict=True):
        logits = model.compute_logits(batch.tokens).cpu().double()  # [batch, seq, vocab]
        expected = logits.log_softmax(-1).gather(-1, batch.labels.unsqueeze(-1).long()).squeeze(-1)
        worst = max(worst, float((-losses.cpu().double().view_as(expected) - expected).abs().max()))
    # `not <=`, so that a NaN is a problem too
    if not worst <= TOLERANCE:
        problems.append(f"log-probabilities differ by {worst:.1e} nats from those of the logits (limit {TOLERANCE:g})")
    if any(parameter.requires_grad for chunk in model.chunks for parameter in chunk.parameters()):
        problems.append("the weights of a frozen model ask for gradients")
    model.close()
    return judge("scores", problems, f"largest difference {worst:.1e} nats", {"difference": worst})


def check_replaced_names(mesh: Mesh) -> Outcome:
    """Look whether every replacement is in place, and tell those that depend on the device or on what is installed."""
    from parallel.replaced_names import resolve
    from trainer.engine.kernels import replace_kernels
    from trainer.optim.adam import has_fused_adam

    patches = replace_kernels(mesh.platform)
    # A method is looked up as the function in it.
    ours = [(one.target, getattr(one.replacement, "__func__", one.replacement)) for one in patches]
    problems = [f"{target} is not ours" for target, function in ours if resolve(target)[2] is not function]
    rotation = "compiled" if mesh.platform.fuses_kernels else "in few passes"
    adam = has_fused_adam() or "torch's"
    found = f"{len(patches)} names; rotation {rotation}, Adam and gradient norm {adam}"
    return judge("replaced names", problems, found, {"names": float(len(patches))})

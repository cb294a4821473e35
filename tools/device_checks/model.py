"""A frozen model's scores, logits and packed documents, which must agree, and names replaced on the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tools.device_checks.engine import SMALL_MODEL, build_config, made_up_batches
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


def check_rotation(mesh: Mesh) -> Outcome:
    """Compare the losses of packed documents with each in a row of its own, in the scalings of rotation that they try.

    yarn has a factor on attention, and dynamic an angle for each token by the length of its document.
    """
    problems, figures = [], {}
    for scaling in ("yarn", "dynamic"):
        worst = figures[scaling] = _rotate_both_ways(mesh, scaling)
        if not worst <= TOLERANCE:
            problems.append(f"{scaling}: losses differ by {worst:.1e} nats (limit {TOLERANCE:g})")
    found = ", ".join(f"{scaling} {worst:.1e}" for scaling, worst in figures.items())
    return judge("rotation", problems, f"largest difference in nats: {found}", figures)


def _rotate_both_ways(mesh: Mesh, scaling: str) -> float:
    """Return the largest difference of a token's loss in nats, of documents on either side of the original length."""
    import torch

    from trainer.data.batch import Batch, Documents
    from trainer.engine.build import ModelPlan, build_models
    from trainer.stages.forward import forward_language_model

    rope = {"scaling": scaling, "factor": 4.0, "original_max_position_embeddings": 16}
    config = build_config("fp32", {**SMALL_MODEL, "rope": rope}, data={"document_mask": True})
    lengths = (5, 40, 19, 64)  # two rows
    (whole, *_) = made_up_batches(config)
    positions = torch.cat([torch.arange(length) for length in lengths])
    documents = Documents.build(torch.tensor([0, *lengths]).cumsum(0))
    packed = Batch(whole.tokens, whole.labels, positions.view_as(whole.tokens), whole.loss_mask, documents)
    columns = (whole.tokens, whole.labels, positions, whole.loss_mask)
    pieces = zip(*(column.flatten().split(lengths) for column in columns), strict=True)
    model = build_models({"reference": ModelPlan(config, is_trained=False)}, mesh)["reference"]
    (found,) = model.score([packed], forward_language_model)
    alone = [model.score([Batch(*(part[None] for part in piece))], forward_language_model)[0] for piece in pieces]
    worst = float((found.flatten() - torch.cat([losses.flatten() for losses in alone])).abs().max())
    model.close()
    return worst


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

"""Distillation on the device: divergences against float64 from logits, and a student that nears a deeper teacher."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from tools.device_checks.engine import SMALL_MODEL, build_config, made_up_batches
from tools.device_checks.outcome import Outcome, judge
from tools.one_rank import open_engine

if TYPE_CHECKING:
    from parallel.mesh import Mesh

TOLERANCES = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 5e-3}
"""Relative, of divergences; in half precision the logits themselves are rounded."""
NUM_STEPS = 20
LARGEST_SHARE = 0.9
"""Of its first value, the divergence after the steps on one repeated batch."""
_CASES: tuple[dict[str, Any], ...] = ({"beta": 0.0}, {"beta": 0.5, "top_k": 16}, {"beta": 1.0, "temperature": 2.0})


def check_distillation(mesh: Mesh, compute: str) -> Outcome:
    """Compare each divergence with float64 on the host, then train by it, by the whole vocabulary or likeliest ids."""
    from configs.sections.distill import DistillSection
    from configs.sections.sft import SftSection
    from trainer.engine.build import ModelPlan, build_models
    from trainer.rl.teacher import LiveTeacher
    from trainer.stages.distill import DIVERGENCE, DistillObjective

    config = build_config(compute)
    deeper = build_config(compute, SMALL_MODEL | {"num_layers": 4, "hidden_size": 64, "init_std": 0.2}, run={"seed": 3})
    problems, worst = [], 0.0
    with open_engine(config, mesh) as engine:
        model = build_models({"teacher": ModelPlan(deeper, is_trained=False)}, mesh)["teacher"]
        for fields in _CASES:
            section = DistillSection.model_validate({"teacher": "made-up", **fields})
            teacher = LiveTeacher(model, section.temperature, section.top_k)
            batches = teacher.annotate(engine, made_up_batches(config))
            objective = DistillObjective(SimpleNamespace(sft=SftSection(), distill=section), teacher)  # type: ignore[arg-type]
            exact = sum(_define(engine, model, batch, section) for batch in batches) / len(batches)
            found = engine.sum_losses(batches, objective).means[DIVERGENCE]
            worst = max(worst, abs(found - exact) / exact)
            losses = [engine.train_step(batches, objective, 3e-3).loss for _ in range(NUM_STEPS)]
            if not losses[-1] < LARGEST_SHARE * losses[0]:
                problems.append(f"by {fields} the loss went from {losses[0]:.4f} to {losses[-1]:.4f}")
        model.close()
    # `not <=`, so that a NaN is a problem too
    if not worst <= TOLERANCES[compute]:
        problems.append(f"divergences differ by {worst:.1e} of them from float64 (limit {TOLERANCES[compute]:g})")
    return judge(f"{compute} distillation", problems, f"largest relative difference {worst:.1e}", {"difference": worst})


def _define(engine: Any, model: Any, batch: Any, section: Any) -> float:
    """Return the mean divergence of a batch from the logits of both, in float64."""
    import torch

    p, q = (
        (one.compute_logits(batch.tokens).cpu().double() / section.temperature).softmax(-1) for one in (model, engine)
    )
    if section.top_k is not None:
        order = p.argsort(-1, descending=True)
        p, q = (one.gather(-1, order) for one in (p, q))
        k = section.top_k
        p, q = (torch.cat([one[..., :k], one[..., k:].sum(-1, keepdim=True)], -1) for one in (p, q))
    m = section.beta * p + (1 - section.beta) * q
    if section.beta in (0, 1):
        p, q = (p, q) if section.beta == 0 else (q, p)
        return float((p * (p / q).log()).sum(-1).mean())
    kl_p, kl_q = ((one * (one / m).log()).sum(-1) for one in (p, q))
    return float((section.beta * kl_p + (1 - section.beta) * kl_q).mean())

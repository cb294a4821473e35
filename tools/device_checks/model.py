"""A frozen model's scores, logits and packed documents, which must agree, and names replaced on the device."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

from tools.device_checks.engine import SMALL_MODEL, build_config, made_up_batches
from tools.device_checks.outcome import Outcome, judge

if TYPE_CHECKING:
    import torch

    from parallel.mesh import Mesh
    from trainer.data.batch import Batch

TOLERANCE = 1e-4
"""Largest difference of a token's log-probability or entropy in nats, in fp32."""
TEMPERATURE = 0.7
ROUNDING_LIMIT = 0.05
"""The same for generation in 16 bits."""
GENERATING_MODELS: dict[str, dict[str, Any]] = {
    "grouped": {},
    "window and sinks": {"window_size": 16, "window_pattern": [True, False], "attention_sinks": True},
}


def check_scores(mesh: Mesh) -> Outcome:
    """Compare log-probabilities, entropies and greedy hits by a model without an optimizer with what its logits give.

    The logits come of a forward pass without labels, and are made into these in float64 on the host.
    """
    from trainer.engine.build import ModelPlan, build_models
    from trainer.engine.forward import forward_language_model, score_language_model

    config = build_config("fp32")
    batches = made_up_batches(config)
    model = build_models({"reference": ModelPlan(config, is_trained=False)}, mesh)["reference"]
    problems, worst = [], 0.0
    every_logits = [model.compute_logits(batch.tokens).cpu().double() for batch in batches]  # [batch, seq, vocab]
    batches = [_answer_greedily(*both) for both in zip(batches, every_logits, strict=True)]
    asked = functools.partial(score_language_model, temperature=TEMPERATURE, entropy=True, is_greedy=True)
    found = zip(model.score(batches, forward_language_model), model.score(batches, asked), strict=True)
    for batch, logits, (losses, scores) in zip(batches, every_logits, found, strict=True):
        plain, tempered = logits.log_softmax(-1), (logits / TEMPERATURE).log_softmax(-1)
        labels = batch.labels.unsqueeze(-1)
        for one, expected in (
            (-losses, plain.gather(-1, labels).squeeze(-1)),
            (scores.log_probs, tempered.gather(-1, labels).squeeze(-1)),
            (scores.entropy, -(tempered.exp() * tempered).sum(-1)),
        ):
            worst = max(worst, float((one.cpu().double() - expected).abs().max()))
        if not scores.is_greedy.cpu().equal(logits.argmax(-1) == batch.labels):
            problems.append("the labels that have the largest logit are not those that are said to")
    # `not <=`, so that a NaN is a problem too
    if not worst <= TOLERANCE:
        problems.append(f"scores differ by {worst:.1e} nats from those of the logits (limit {TOLERANCE:g})")
    if any(parameter.requires_grad for chunk in model.chunks for parameter in chunk.parameters()):
        problems.append("the weights of a frozen model ask for gradients")
    model.close()
    return judge("scores", problems, f"largest difference {worst:.1e} nats", {"difference": worst})


def _answer_greedily(batch: Batch, logits: torch.Tensor) -> Batch:
    """Return the batch with the ids of the largest logits as every other label."""
    labels = batch.labels.clone()
    labels[:, ::2] = logits.argmax(-1)[:, ::2]
    return dataclasses.replace(batch, labels=labels)


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
    from trainer.engine.forward import forward_language_model

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


def check_generation(mesh: Mesh, compute: str) -> Outcome:
    """Compare what is generated greedily with the cache with what a forward pass over the whole text says.

    Rows of unequal lengths, windows and sinks too. In fp32 every token must be the one with the largest logit, and its
    log-probability the same; 16 bits round otherwise in both, so that a token may lie a little below the largest.
    """
    problems, figures = [], {}
    limit = TOLERANCE if compute == "fp32" else ROUNDING_LIMIT
    for name, changes in GENERATING_MODELS.items():
        worst = figures[name] = _largest_shortfall(mesh, compute, {**SMALL_MODEL, **changes})
        if not worst <= limit:
            problems.append(f"{name}: differs by {worst:.1e} nats from the pass over the whole text (limit {limit:g})")
    found = ", ".join(f"{name} {worst:.1e}" for name, worst in figures.items())
    return judge(f"{compute} generation", problems, f"largest difference in nats: {found}", figures)


def _largest_shortfall(mesh: Mesh, compute: str, shape: dict[str, Any]) -> float:
    """Return the most by which a token's log-probability differs, or it falls short of the likeliest's."""
    import torch

    from trainer.engine.build import ModelPlan, build_models
    from trainer.generate.generator import EngineGenerator
    from trainer.generate.sampling import Sampling

    model = build_models({"policy": ModelPlan(build_config(compute, shape), is_trained=False)}, mesh)["policy"]
    prompts = [[7] * 3, list(range(1, 20)), [5, 6] * 6, list(range(30, 70))]
    answers = EngineGenerator(model, max_rows=3).generate(prompts, Sampling(24, temperature=0.0))
    worst = 0.0
    for prompt, answer in zip(prompts, answers, strict=True):
        logits = model.compute_logits(torch.tensor([prompt + answer.token_ids]))[0, len(prompt) - 1 : -1]
        expected = logits.cpu().double().log_softmax(-1)
        chosen = expected.gather(-1, torch.tensor(answer.token_ids).unsqueeze(-1)).squeeze(-1)
        below, apart = expected.amax(-1) - chosen, (chosen - torch.tensor(answer.logprobs)).abs()
        worst = max(worst, float(below.max()), float(apart.max()))
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

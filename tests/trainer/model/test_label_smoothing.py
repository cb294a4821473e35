"""Label smoothing and noise on embeddings on one rank and two, against their definitions."""

from __future__ import annotations

from typing import Any

import pytest

from configs.sections.sft import SftSection
from tests.pool import Place
from tests.small_runs import open_engine, small_config

SMOOTHING, ALPHA = 0.2, 5.0


def losses_and_logits(place: Place, parallel: dict[str, Any], smoothing: float) -> tuple[Any, ...]:
    """Return labels, logits of all real ids, losses with label smoothing and without, and the result of a step."""
    import torch

    from tools.device_checks.engine import made_up_batches
    from trainer.engine.forward import forward_language_model
    from trainer.stages.sft import ConversationObjective

    with open_engine(place, small_config(place.world_size, parallel=parallel)) as engine:
        batch = made_up_batches(engine.config)[0]
        with torch.no_grad():
            losses = forward_language_model(engine.chunks[0], batch, label_smoothing=smoothing)
        logits = engine.compute_logits(batch.tokens).double()
        objective = ConversationObjective(SftSection(label_smoothing=smoothing))
        return batch.labels, logits, losses, engine.train_step([batch], objective, 1e-3)


@pytest.mark.parametrize(("world", "parallel"), [(1, {}), (2, {"tp": 2, "sp": True})])
def test_losses_are_those_of_a_smoothed_target(ranks, world, parallel):
    import torch

    found = ranks.run(losses_and_logits, parallel, SMOOTHING, world=world)
    for labels, logits, both, step in found:
        for losses, smoothing in zip(both, (SMOOTHING, 0.0), strict=True):
            chosen = torch.nn.CrossEntropyLoss(reduction="none", label_smoothing=smoothing)  # torch's own, in float64
            expected = chosen(logits.flatten(0, 1), labels.flatten()).view_as(losses)
            torch.testing.assert_close(losses.double(), expected, rtol=2e-6, atol=2e-6)
        means = [float(losses.double().mean()) for losses in both]  # all tokens count
        assert [step.loss, step.metrics["cross_entropy"]] == pytest.approx(means, rel=1e-5)


def smooth_by_hand(place: Place) -> float:
    """Return the norm of the gradient of the mean loss, by autograd from whole logits and torch's own loss."""
    import torch

    from tools.device_checks.engine import made_up_batches

    with open_engine(place, small_config()) as engine:
        batch, chunk = made_up_batches(engine.config)[0], engine.chunks[0]
        logits = chunk(batch.tokens, batch.position_ids, None)[..., : engine.config.model.vocab_size]
        chosen = torch.nn.CrossEntropyLoss(label_smoothing=SMOOTHING)(
            logits.flatten(0, 1).float(), batch.labels.flatten()
        )
        parameters = [one for one in chunk.parameters() if one.requires_grad]
        gradients = torch.autograd.grad(chosen, parameters, allow_unused=True)
        added = [getattr(one, "main_grad", None) for one in parameters]  # where a linear layer adds its own
        total = 0.0
        for gradient, main in zip(gradients, added, strict=True):
            part = main if main is not None and main.any() else gradient
            total += 0.0 if part is None else float(part.double().square().sum())
        return total**0.5


def test_the_gradient_is_that_of_torch(ranks):
    (by_hand,) = ranks.run(smooth_by_hand)
    ((*_, step),) = ranks.run(losses_and_logits, {}, SMOOTHING)
    assert step.grad_norm == pytest.approx(by_hand, rel=1e-5)


def add_noise(place: Place, parallel: dict[str, Any], alpha: float) -> tuple[Any, Any]:
    """Return the noise over alpha that two documents of 4 and 28 tokens get, and what no noise adds."""
    import torch

    from tools.device_checks.engine import made_up_batches
    from trainer.model.embedding_noise import noisy_embeddings

    with open_engine(place, small_config(place.world_size, parallel=parallel)) as engine:
        batch, chunk = made_up_batches(engine.config)[0], engine.chunks[0]
        lengths = torch.tensor([4.0] * 4 + [28.0] * 28).expand(batch.tokens.shape)

        def embed(strength: float) -> Any:
            with noisy_embeddings(chunk, lengths, strength), torch.no_grad():
                return chunk.embedding(batch.tokens, batch.position_ids)  # [seq/tp with sp, batch, hidden]

        plain = embed(0.0)
        return (embed(alpha) - plain) / alpha, embed(0.0) - plain


@pytest.mark.parametrize(("world", "parallel"), [(1, {}), (2, {"tp": 2}), (2, {"tp": 2, "sp": True})])
def test_noise_is_uniform_and_scaled_by_length(ranks, world, parallel):
    import torch

    found = ranks.run(add_noise, parallel, ALPHA, world=world)
    noise = torch.cat([one for one, _ in found]) if "sp" in parallel else found[0][0]
    assert not any(nothing.any() for _, nothing in found)
    if world == 2 and "sp" not in parallel:
        assert torch.equal(found[0][0], found[1][0]), "tp ranks hold the same tokens"
    for place, length in ((slice(0, 4), 4), (slice(4, 32), 28)):
        bound = (length * noise.shape[-1]) ** -0.5  # arXiv:2310.05914, algorithm 1
        part = noise[place]
        assert part.abs().max() <= bound * 1.001 and part.abs().max() > 0.95 * bound
        assert abs(float(part.mean())) < 0.1 * bound and abs(float(part.std()) / bound - 3**-0.5) < 0.05

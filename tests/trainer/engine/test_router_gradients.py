"""The routers' losses against their formulas in float64: their weight must not depend on how many tokens count."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from configs.stages import Config
from tests.pool import Place
from tests.small_runs import build_stage, open_engine, small_config

NUM_EXPERTS, TOP_K, BALANCE, Z = 4, 2, 0.02, 0.003


def router_gradients(place: Place, config: Config, share: float) -> tuple[Any, Any, int]:
    """Return the gradient of the last router's weight from its own losses alone, the formulas', and what counted."""
    import torch

    from trainer.losses.loss import Loss

    with open_engine(place, config) as engine:
        router = engine.chunks[-1].decoder.layers[-1].mlp.router
        inputs: list[Any] = []
        router.register_forward_pre_hook(lambda module, given: inputs.append(given[0].detach().double()))
        stage = build_stage(engine)
        batches = stage.reader.read_step()
        for batch in batches:
            batch.loss_mask[:, int(batch.tokens.shape[1] * share) :] = 0
        stage.objective.loss = lambda output, batch: Loss(output.float().sum() * 0.0)
        result = engine.train_step(batches, stage.objective, 0.0)
        weight = router.weight.detach().double().requires_grad_()
        losses = [formulas((one.flatten(0, 1)) @ weight.t()) for one in inputs]
        assert len(losses) == len(batches)
        torch.stack(losses).mean().backward()
        return router.weight.main_grad.numpy().copy(), weight.grad.numpy(), result.count


def formulas(logits: Any) -> Any:
    """Balance (arXiv:2101.03961 eq. 4, of k choices) and z-loss (arXiv:2202.08906 eq. 5) of `[tokens, experts]`."""
    import torch

    chosen = torch.zeros_like(logits).scatter(1, logits.topk(TOP_K, dim=1).indices, 1.0)
    fractions, probabilities = chosen.mean(0) / TOP_K, logits.softmax(1).mean(0)
    balance = NUM_EXPERTS * (fractions * probabilities).sum()
    return BALANCE * balance + Z * logits.logsumexp(1).square().mean()


@pytest.mark.parametrize("share", [1.0, 0.5, 0.125])
def test_router_gradients_are_the_formulas_whatever_counts(ranks, share):
    moe = {"num_experts": NUM_EXPERTS, "top_k": TOP_K, "ffn_hidden_size": 64, "aux_loss_coeff": BALANCE}
    config = small_config(model={"moe": moe | {"z_loss_coeff": Z}}, optimizer={"clip_grad": 0.0})
    ((found, expected, count),) = ranks.run(router_gradients, config, share)
    assert count == 8 * 32 * share
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())

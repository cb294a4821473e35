"""The gradient of a router's own losses, with half of the tokens masked, against their formulas in float64 on the host.

It must not depend on how many tokens count in the main loss, though that is what the gradient is divided by.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tools.device_checks.engine import SMALL_MODEL, build_config, made_up_batches
from tools.device_checks.outcome import Outcome, judge
from tools.one_rank import open_engine

if TYPE_CHECKING:
    import torch

    from parallel.mesh import Mesh

NUM_EXPERTS, TOP_K, BALANCE, Z = 4, 2, 0.02, 0.003
TOLERANCE = 1e-4
"""Largest error relative to the largest element of the gradient, in fp32."""


def check_router_gradient(mesh: Mesh) -> Outcome:
    """Take a step with the routers' losses alone and compare the last router's gradient with the formulas'."""
    import torch

    from trainer.losses.loss import Loss
    from trainer.stages.next_token import NextTokenObjective

    class RouterLossesAlone(NextTokenObjective):
        """A main loss of zero, over the tokens that count."""

        def loss(self, output: torch.Tensor, batch: Any) -> Loss:
            return Loss(output.float().sum() * 0.0)

    moe = {"num_experts": NUM_EXPERTS, "top_k": TOP_K, "ffn_hidden_size": 96, "aux_loss_coeff": BALANCE}
    config = build_config("fp32", SMALL_MODEL | {"moe": moe | {"z_loss_coeff": Z}}, optimizer={"clip_grad": 0.0})
    batches = made_up_batches(config)
    for batch in batches:
        batch.loss_mask[:, : batch.tokens.shape[1] // 2] = 0
    inputs: list[torch.Tensor] = []  # of the router, [seq, batch, hidden] a microbatch
    with open_engine(config, mesh) as engine:
        router = engine.chunks[-1].decoder.layers[-1].mlp.router
        router.register_forward_pre_hook(lambda module, given: inputs.append(given[0].detach().cpu().double()))
        result = engine.train_step(batches, RouterLossesAlone(), 0.0)
        weight = router.weight.detach().cpu().double().requires_grad_()
        found = router.weight.main_grad.cpu().double()
    torch.stack([_formulas(one.flatten(0, 1) @ weight.t()) for one in inputs]).mean().backward()
    assert weight.grad is not None
    error = float((found - weight.grad).abs().max() / weight.grad.abs().max())
    problems = [] if error <= TOLERANCE else [f"the router's gradient is off by {error:.1e} (limit {TOLERANCE:g})"]
    detail = f"{result.count} of {result.num_input_tokens} tokens count, error {error:.1e}"
    return judge("router losses", problems, detail, {"error": error})


def _formulas(logits: torch.Tensor) -> torch.Tensor:
    """Return balance (arXiv:2101.03961 eq. 4, of k choices) and z-loss (arXiv:2202.08906 eq. 5) of logits."""
    import torch

    chosen = torch.zeros_like(logits).scatter(1, logits.topk(TOP_K, dim=1).indices, 1.0)
    fractions, probabilities = chosen.mean(0) / TOP_K, logits.softmax(1).mean(0)
    balance = NUM_EXPERTS * (fractions * probabilities).sum()
    return BALANCE * balance + Z * logits.logsumexp(1).square().mean()

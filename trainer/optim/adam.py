"""AdamW with the step count in the parameter group, on torch's fused kernel: used where neither TE nor apex is there.

Megatron-Core can reshard the optimizer state of TE's and apex's FusedAdam but not that of `torch.optim.AdamW`, which
counts steps per parameter.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim.adam import adam


class GroupStepAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2) with FusedAdam's arguments and state layout."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        if not adam_w_mode or capturable:
            raise NotImplementedError("GroupStepAdamW decouples weight decay and is not captured in CUDA graphs")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; moments are fp32 zeros at the first step."""
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            for parameter in parameters:
                if not self.state[parameter]:
                    self.state[parameter]["exp_avg"] = torch.zeros_like(parameter)
                    self.state[parameter]["exp_avg_sq"] = torch.zeros_like(parameter)
            # The fused kernel counts up a step tensor per parameter; they are throw-away copies of the group's.
            before = float(group["step"] - 1)
            steps = list(torch.full((len(parameters),), before, device=parameters[0].device).unbind())
            adam(
                parameters,
                [parameter.grad for parameter in parameters],
                [self.state[parameter]["exp_avg"] for parameter in parameters],
                [self.state[parameter]["exp_avg_sq"] for parameter in parameters],
                [],
                steps,
                fused=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
                decoupled_weight_decay=True,
            )


def has_fused_adam() -> str | None:
    """Return which FusedAdam Megatron-Core will find (`transformer-engine` or `apex`), or None."""
    if importlib.util.find_spec("transformer_engine") is not None:
        return "transformer-engine"
    # PyPI's `apex` is an unrelated package without this module.
    if importlib.util.find_spec("apex") is not None and importlib.util.find_spec("apex.optimizers") is not None:
        return "apex"
    return None

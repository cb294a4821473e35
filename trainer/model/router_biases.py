"""The expert biases of routers, which Megatron-Core moves with the gradients, before anyone knows if these are used."""

from __future__ import annotations

from typing import Any

import torch

from configs.sections.model import ModelConfig


class RouterBiases:
    """The biases as they were before a step (Wang et al. 2024, arXiv:2408.15664), for one that is not taken."""

    def __init__(self, chunks: list[Any], model: ModelConfig) -> None:
        """Copy them, where the model has any."""
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        if model.moe is not None and model.moe.balancing == "bias":
            modules = (module for chunk in chunks for module in chunk.modules())
            biases = (getattr(module, "expert_bias", None) for module in modules)
            self._copies = [(bias, bias.clone()) for bias in biases if bias is not None]

    def restore(self) -> None:
        """Put them back."""
        for bias, before in self._copies:
            bias.copy_(before)

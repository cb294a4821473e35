"""All adapters of a model's chunks: switched off and on, merged into the frozen weights and taken out again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from trainer.model.lora.linear import LoraLinear

ADAPTERS = "lora."
"""What the names of a chunk's adapters begin with, in the chunk and in checkpoints."""
AdaptedLinears = Mapping[str, tuple[LoraLinear, Any]]
"""Adapters and the linears beside which they lie, by the linear's name in the whole model."""


class Adapter:
    """The adapters of this rank."""

    def __init__(self, of_chunks: Sequence[AdaptedLinears]) -> None:
        self.of_chunks = of_chunks
        self.is_on = True

    def matrices(self, chunk: int) -> dict[str, tuple[LoraLinear, str]]:
        """Return each matrix of a chunk's adapters, `a` or `b` of one, by the parameter's name in the chunk."""
        return {
            f"{ADAPTERS}{path.replace('.', '/')}.{matrix}": (module, matrix)
            for path, (module, _) in self.of_chunks[chunk].items()
            for matrix in module.split_dims
        }

    @torch.no_grad()
    def load(self, of_chunks: Sequence[Mapping[str, torch.Tensor]]) -> None:
        """Put matrices in place, given by the names of `matrices`."""
        for chunk, loaded in enumerate(of_chunks):
            for name, (module, matrix) in self.matrices(chunk).items():
                getattr(module, matrix).copy_(loaded[name])

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Let the frozen model compute alone within the context: the reference of a policy that is trained by LoRA."""
        was_on, self.is_on = self.is_on, False
        try:
            yield
        finally:
            self.is_on = was_on

    @contextmanager
    def merged(self) -> Iterator[None]:
        """Compute with merged weights within the context: no adapters beside the linears, which saves their time.

        The frozen weights are kept in host memory meanwhile and are afterwards what they were, bit for bit.
        """
        kept = [(linear.weight, linear.weight.detach().to("cpu", copy=True)) for _, linear in self._pairs()]
        try:
            self.merge()
            with self.disabled():
                yield
        finally:
            with torch.no_grad():
                for weight, before in kept:
                    weight.copy_(before)

    @torch.no_grad()
    def merge(self) -> None:
        """Add every adapter's product to its frozen weight for good, in fp32 and rounded once."""
        for module, linear in self._pairs():
            linear.weight.copy_(linear.weight.float() + module.delta())

    def modules(self) -> Iterator[LoraLinear]:
        """Yield every adapter."""
        for module, _ in self._pairs():
            yield module

    def _pairs(self) -> Iterator[tuple[LoraLinear, Any]]:
        for found in self.of_chunks:
            yield from found.values()

"""LoRA adapters as Hugging Face's modules have them, one for each, and merged into the weights that they belong to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from configs.plan.adapters import AdaptedLinear, adapted_linears, linear_path
from configs.roles import HEAD
from configs.sections.lora import LoraConfig
from configs.sections.model import ModelConfig
from trainer.checkpoint.tensors import CheckpointTensors
from trainer.hf.rules import Rule
from trainer.hf.source import HfModel


class TensorStore(Protocol):
    """Whole tensors by their names in the engine's model."""

    path: Path

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of a tensor; None if there is none of that name."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """Return the number format of a tensor that is there."""
        ...

    def read(self, name: str) -> torch.Tensor:
        """Return a whole tensor."""
        ...


@dataclass(frozen=True)
class ModuleAdapter:
    """The adapter of one module of a Hugging Face model."""

    module: str
    """Its name, such as `model.layers.0.self_attn.q_proj`."""
    a: torch.Tensor  # [rank, in]
    b: torch.Tensor  # [out, rank]


class HfTensors:
    """The tensors of a Hugging Face model."""

    def __init__(self, model: HfModel) -> None:
        self.path = model.directory
        self._model = model

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of a tensor; None if there is none of that name."""
        rule = self._model.rules.get(name)
        return None if rule is None else rule.megatron.shape

    def dtype(self, name: str) -> torch.dtype:
        """Return the number format in which a tensor is read."""
        return self._model.dtype_of(name)

    def read(self, name: str) -> torch.Tensor:
        """Return a whole tensor."""
        return self._model.read(name)


class StoredAdapters:
    """The adapters in a checkpoint, and a scalar head that was trained beside them."""

    def __init__(self, stored: CheckpointTensors, model: ModelConfig, lora: LoraConfig) -> None:
        self.path = stored.path
        self._stored, self._lora = stored, lora
        self._adapted = adapted_by_weight(model, lora)

    def dtype(self, rule: Rule) -> torch.dtype:
        """Return the number format of the adapters of a rule's weight."""
        return self._stored.dtype(_key(rule, "a"))

    @property
    def head(self) -> torch.Tensor | None:
        """The scalar head's weight `[1, hidden]`; None of a language model's adapters."""
        return self._stored.read(HEAD) if HEAD in self._stored.keys else None

    def has(self, weight: str) -> bool:
        """Return whether a weight of the engine's model has adapters."""
        return weight in self._adapted

    def read(self, rule: Rule) -> list[ModuleAdapter | None]:
        """Return the adapter of each module of a rule whose weight has some; None of a module without one."""
        adapted = self._adapted[rule.megatron.name]
        a = iter(self._stored.read(_key(rule, "a")).split(self._lora.rank))
        b = rule.conversion.split(self._stored.read(_key(rule, "b")).flatten(0, -2))
        return [
            ModuleAdapter(hf.name.removesuffix(".weight"), next(a), rows) if part.is_adapted else None
            for hf, part, rows in zip(rule.hf, adapted.parts, b, strict=True)
        ]

    def delta(self, rule: Rule) -> torch.Tensor:
        """Return what the adapters add to a rule's weight, in fp32."""
        parts = []
        for hf, adapter in zip(rule.hf, self.read(rule), strict=True):
            product = torch.zeros(hf.shape) if adapter is None else adapter.b.float() @ adapter.a.float()
            parts.append(self._lora.scaling * product)
        return rule.conversion.merge(parts)


class MergedTensors:
    """The tensors of a base with adapters added to its weights, in fp32 and rounded once, and their scalar head."""

    def __init__(self, base: TensorStore, adapters: StoredAdapters, rules: dict[str, Rule]) -> None:
        self.path = adapters.path
        self._base, self._adapters, self._rules = base, adapters, rules
        self._head = adapters.head

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of a tensor; None if there is none of that name."""
        own = self._own(name)
        return self._base.shape(name) if own is None else tuple(own.shape)

    def dtype(self, name: str) -> torch.dtype:
        """Return the number format of a tensor: the base's, of a head its own."""
        own = self._own(name)
        return self._base.dtype(name) if own is None else own.dtype

    def read(self, name: str) -> torch.Tensor:
        """Return a whole tensor."""
        own = self._own(name)
        if own is not None:
            return own
        tensor = self._base.read(name)
        if not self._adapters.has(name):
            return tensor
        return (tensor.float() + self._adapters.delta(self._rules[name])).to(tensor.dtype)

    def _own(self, name: str) -> torch.Tensor | None:
        return self._head if name == HEAD else None


def adapted_by_weight(model: ModelConfig, lora: LoraConfig) -> dict[str, AdaptedLinear]:
    """Return the linears with adapters by the names of their weights in the engine's model."""
    return {
        f"{linear_path(layer, adapted.linear.name, expert)}.weight": adapted
        for layer in range(model.num_layers)
        for adapted in adapted_linears(model, lora, layer)
        for expert in ([None] if adapted.linear.num_experts is None else range(adapted.linear.num_experts))
    }


def _key(rule: Rule, matrix: str) -> str:
    return f"lora.{rule.megatron.name.removesuffix('weight')}{matrix}"

"""Freezes a model, a scalar head apart, and puts adapters beside the linears of its layers: which, how they begin."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

from configs.plan.adapters import adapted_linears
from configs.sections.lora import LoraConfig
from configs.sections.model import ModelConfig
from parallel.mesh import Mesh
from trainer.model.lora.adapter import Adapter
from trainer.model.lora.linear import LoraLinear, Site
from trainer.model.scalar_head import ScalarHead

_LOCAL_EXPERT = re.compile(r"\.local_experts\.(\d+)\.")


def attach_lora(chunks: list[Any], lora: LoraConfig, model: ModelConfig, mesh: Mesh, seed: int) -> Adapter:
    """Freeze the chunks, add an adapter to each linear that `lora` names, and return them all.

    A scalar head, which no language model brings, stays to be trained. Each A is drawn from the run's seed and the
    linear's name, alike on every layout.
    """
    adapter = build_adapter(chunks, lora, model, mesh, seed)
    for chunk, found in zip(chunks, adapter.of_chunks, strict=True):
        chunk.requires_grad_(False)
        chunk.lora = torch.nn.ModuleDict({path.replace(".", "/"): module for path, (module, _) in found.items()})
        for module, linear in found.values():
            _add_to_output(linear, module, adapter)
        if chunk.pre_process:  # recomputed layers pass a gradient on only if their input asks for one
            chunk.embedding.register_forward_hook(_ask_for_gradient)
        for part in chunk.modules():
            if isinstance(part, ScalarHead):
                part.requires_grad_(True)
            if hasattr(part, "expert_bias"):
                part.frozen_expert_bias = True  # Megatron-Core's name for a router that learns nothing
    return adapter


def build_adapter(chunks: list[Any], lora: LoraConfig, model: ModelConfig, mesh: Mesh, seed: int) -> Adapter:
    """Return new adapters of the linears that `lora` names, of which the chunks know nothing yet."""
    of_chunks = []
    for chunk in chunks:
        found = {}
        for layer in chunk.decoder.layers:
            number = layer.layer_number - 1
            adapted = {one.linear.name: one for one in adapted_linears(model, lora, number)}
            for site, linear in _find_linears(layer, number, model, mesh):
                if site.name in adapted:
                    module = LoraLinear(site, adapted[site.name], lora, linear)
                    _draw(module, lora, seed)
                    found[site.path] = (module, linear)
        of_chunks.append(found)
    return Adapter(of_chunks)


def _find_linears(layer: Any, number: int, model: ModelConfig, mesh: Mesh) -> Iterator[tuple[Site, Any]]:
    """Yield the parallel linears of a layer by their places in the whole model."""
    num_local_experts = model.moe.num_experts // mesh.ep_size if model.moe is not None else 0
    for name, module in layer.named_modules():
        if isinstance(module, ColumnParallelLinear | RowParallelLinear):
            local = _LOCAL_EXPERT.search(name)
            expert = None if local is None else mesh.ep_rank * num_local_experts + int(local.group(1))
            yield Site(number, _LOCAL_EXPERT.sub(".", name), expert), module


def _draw(module: LoraLinear, lora: LoraConfig, seed: int) -> None:
    """Draw A as PEFT does, uniformly within 1 / sqrt(inputs) (Kaiming with a = sqrt(5)); B stays zero."""
    num_inputs = module.adapted.linear.input.total
    bound = 1.0 / math.sqrt(num_inputs)
    names = [part.module for part in module.adapted.parts if part.is_adapted]
    parts = []
    for name in names:
        digest = hashlib.sha256(f"{seed} {module.site.path} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
        parts.append(torch.empty(lora.rank, num_inputs).uniform_(-bound, bound, generator=generator))
    module.fill(torch.cat(parts), torch.zeros(module.adapted.linear.output.total, lora.rank))


def _add_to_output(linear: Any, module: LoraLinear, adapter: Adapter) -> None:
    frozen: Callable[..., tuple[torch.Tensor, torch.Tensor | None]] = linear.forward

    def forward(inputs: torch.Tensor, *args: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        output, bias = frozen(inputs, *args, **options)
        return (output + module(inputs), bias) if adapter.is_on else (output, bias)

    linear.forward = forward


def _ask_for_gradient(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() else output

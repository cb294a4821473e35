"""Puts FP8 into the linears of a model's layers: which of them, and how each lies across its tp group."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

from configs.fp8 import RECIPES, fp8_format
from configs.plan.tensors import Linear, layer_linears
from configs.sections.model import ModelConfig
from configs.sections.precision import Fp8Config
from parallel.mesh import Mesh
from trainer.model.fp8.history import AmaxHistory, Site
from trainer.model.fp8.linear import Fp8Linear, Scheme
from trainer.model.fp8.multiply import MULTIPLIES
from trainer.model.fp8.quantize import FORMATS

_EXPERT = re.compile(r"\.local_experts\.(\d+)\.")
# Which dimension of x [tokens, in], W [out, in] and dy [tokens, out] lies across the tp ranks.
_COLUMN_SPLIT = {"input": None, "weight": 0, "gradient": 1}
_ROW_SPLIT = {"input": 1, "weight": 1, "gradient": None}


class Fp8State:
    """The FP8 side of a model: told when weights change, asked for what a checkpoint must hold."""

    def __init__(self, scheme: Scheme, mesh: Mesh, linears: Sequence[Fp8Linear] = ()) -> None:
        self._scheme, self._mesh, self._linears = scheme, mesh, linears

    @property
    def history(self) -> AmaxHistory | None:
        """What delayed scaling remembers; None for the other recipes."""
        return self._scheme.history

    def weights_changed(self) -> None:
        """Let the quantised weights be made anew."""
        self._scheme.weights_version += 1

    def free_weights(self) -> None:
        """Free the memory of the quantised weights, which are made anew when they are asked for."""
        for linear in self._linears:
            linear.free_weight()

    def close_step(self, *, is_applied: bool) -> None:
        """Take note that an update was made, or skipped. Collective: all ranks of the pipeline stage must call this."""
        self.weights_changed()  # after a skipped step too, so that the next one records them
        if self._scheme.history is not None:
            self._scheme.history.close_step(self._mesh.stage_group, is_applied=is_applied)


def attach_fp8(chunks: list[Any], fp8: Fp8Config, model: ModelConfig, mesh: Mesh, backend: str) -> Fp8State:
    """Let the layers' linears multiply in FP8, and return their common state."""
    linears: dict[Site, Any] = {
        site: module for chunk in chunks for site, module in _find_linears(chunk, model, mesh).items()
    }
    table = {site.layer: _fp8_linears(model, site.layer) for site in linears}
    recipe, gradient = RECIPES[fp8.recipe], "e4m3" if fp8_format(fp8) == "e4m3" else "e5m2"
    history = None
    if recipe.has_history:
        sites = _sites_of_stage(table)
        history = AmaxHistory(sites, fp8.amax_history_len, fp8.amax_compute, mesh.device)
    dtypes = {"input": FORMATS["e4m3"], "weight": FORMATS["e4m3"], "gradient": FORMATS[gradient]}
    scheme = Scheme(recipe, dtypes, MULTIPLIES[backend], history)
    if backend == "torch" and mesh.platform.fuses_kernels:
        from trainer.model.fp8.cast import cast_both  # imports Triton

        scheme.cast_both = cast_both
    kept = {*range(fp8.num_first_layers_kept), *range(model.num_layers - fp8.num_last_layers_kept, model.num_layers)}
    attached = []
    for site, module in linears.items():
        if site.layer not in kept:
            split = _ROW_SPLIT if table[site.layer][site.name].split == "row" else _COLUMN_SPLIT
            cp_group = mesh.cp_group if site.expert is None else None
            module._forward_impl = Fp8Linear(scheme, site, split, module.tp_group, cp_group)
            attached.append(module._forward_impl)
    return Fp8State(scheme, mesh, attached)


def _find_linears(chunk: Any, model: ModelConfig, mesh: Mesh) -> dict[Site, torch.nn.Module]:
    """Return the parallel linears of a chunk's layers by their place in the whole model."""
    found: dict[Site, torch.nn.Module] = {}
    num_local_experts = model.moe.num_experts // mesh.ep_size if model.moe is not None else 0
    for layer in chunk.decoder.layers:
        for name, module in layer.named_modules():
            if not isinstance(module, (ColumnParallelLinear, RowParallelLinear)):
                continue
            local = _EXPERT.search(name)
            expert = None if local is None else mesh.ep_rank * num_local_experts + int(local.group(1))
            found[Site(layer.layer_number - 1, _EXPERT.sub(".", name), expert)] = module
    return found


def _fp8_linears(model: ModelConfig, layer: int) -> dict[str, Linear]:
    """Return the linears of a layer (0-based) that FP8 may multiply, by their names."""
    return {linear.name: linear for linear in layer_linears(model, layer) if not linear.is_router}


def _sites_of_stage(table: dict[int, dict[str, Linear]]) -> list[Site]:
    """Return the places of all linears of the pipeline stage in one order, experts of other ranks included."""
    sites: list[Site] = []
    for layer, linears in sorted(table.items()):
        for name, linear in sorted(linears.items()):
            experts = [None] if linear.num_experts is None else range(linear.num_experts)
            sites += [Site(layer, name, expert) for expert in experts]
    return sites

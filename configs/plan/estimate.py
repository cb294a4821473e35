"""Pure arithmetic on a config: parameters, and bytes per rank by kind. Torch-free, nothing is measured.

Sources: Korthikanti et al. 2022 (arXiv:2205.05198) for activations, Rajbhandari et al. 2020 (arXiv:1910.02054) for
ZeRO-1. Model FLOPs are `configs.plan.flops`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from configs.plan.activations import Activations, stage_activations
from configs.plan.adapters import adapter_parameters_of_stage, trained_parameters_of_stage
from configs.plan.derive import (
    Layout,
    chunk_layers,
    first_layer_with_experts,
    head_dim,
    num_microbatches,
    padded_vocab_size,
)
from configs.plan.flops import active_part
from configs.plan.tensors import Linear, layer_linears
from configs.roles import HeadKind
from configs.sections.model import ModelConfig
from configs.stages import Config


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model with its true vocabulary, as published counts have it."""

    total: int
    active: int
    """Parameters a token passes through: of the routed experts only the `top_k`."""
    embedding: int
    """Vocabulary matrices: the input embedding, and the output layer where it is not tied."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on a rank of one pipeline stage; without allocator fragmentation, communication and temporary buffers."""

    pp_rank: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    other_models: int = 0
    """What models beside this one add (`configs.plan.others`)."""

    @property
    def total(self) -> int:
        own = self.weights + self.gradients + self.optimizer + self.activations + self.logits
        return own + self.other_models


_Kind = Literal["none", "tp", "expert"]


@dataclass(frozen=True)
class _Weight:
    """Parameters of one kind in a layer: how many, how many a token passes through, over which ranks they are split."""

    count: int
    active: int
    split: _Kind = "none"
    is_trained: bool = True


def count_parameters(model: ModelConfig, head: HeadKind = "vocabulary") -> ParameterCount:
    """Count the parameters without vocabulary padding; a router's expert bias counts, as in published checkpoints."""
    embedding = model.vocab_size * model.hidden_size
    if head == "scalar":
        embedding += model.hidden_size
    elif not model.tie_embeddings:
        embedding *= 2
    total = active = embedding + _norm(model, model.hidden_size).count
    for layer in range(model.num_layers):
        for weight in _layer_weights(model, layer):
            total += weight.count
            active += weight.active
    return ParameterCount(total, active, embedding)


def parameters_per_rank(config: Config, layout: Layout) -> int:
    """Return the trained parameters of the fullest rank: all, padded vocabulary included, or those of LoRA."""
    if config.lora is not None:
        return max(sum(trained_parameters_of_stage(config, layout, pp_rank)) for pp_rank in range(layout.pp))
    return max(map(sum, parameters_of_stages(config, layout)))


def estimate_memory(
    config: Config, layout: Layout, parameters: Sequence[tuple[int, int]] | None = None
) -> MemoryEstimate:
    """Estimate the bytes of the fullest rank by kind; `parameters` as in `estimate_stages`."""
    return max(estimate_stages(config, layout, parameters), key=lambda estimate: estimate.total)


def estimate_stages(
    config: Config, layout: Layout, parameters: Sequence[tuple[int, int]] | None = None
) -> list[MemoryEstimate]:
    """Estimate the bytes of a rank of each pipeline stage by kind.

    Weights in the compute format (and in FP8, unless they are gathered so), gradients in fp32, ZeRO-1
    optimizer state: two fp32 moments, and an fp32 main copy where compute is not fp32, sharded over dp*cp (over edp for
    experts). With LoRA gradients and optimizer state are those of the adapters and of a scalar head. Activations:
    `configs.plan.activations`; logits are those of the last stage. Where nothing is trained there are weights alone.
    `parameters` are those of `parameters_of_stages`, if they are known.
    """
    is_trained = config.is_training
    weight_bytes = 4 if config.precision.compute == "fp32" else 2
    state_bytes = 8 if config.precision.compute == "fp32" else 12
    microbatches = num_microbatches(config, layout, config.train.global_batch_size)
    activations = stage_activations(config, layout, microbatches) if is_trained else [Activations(0, 0)] * layout.pp
    estimates = []
    for pp_rank, (dense, expert) in enumerate(parameters or parameters_of_stages(config, layout)):
        if config.lora is not None:
            trained_dense, trained_expert = trained_parameters_of_stage(config, layout, pp_rank)
        else:
            trained_dense, trained_expert = dense, expert
        if not is_trained:
            trained_dense = trained_expert = 0
        adapters = 0 if config.lora is None else sum(adapter_parameters_of_stage(config, layout, pp_rank))
        estimates.append(
            MemoryEstimate(
                pp_rank=pp_rank,
                weights=(dense + expert + adapters) * weight_bytes
                + 2 * _in_fp8(config) * (dense + expert - _vocabulary_parameters(config, layout, pp_rank)),
                gradients=(trained_dense + trained_expert) * 4,
                optimizer=-(-trained_dense * state_bytes // (layout.dp * layout.cp))
                - (-trained_expert * state_bytes // layout.edp),
                activations=activations[pp_rank].layers,
                logits=activations[pp_rank].logits,
            )
        )
    return estimates


def parameters_of_stages(config: Config, layout: Layout) -> list[tuple[int, int]]:
    """Return one rank's parameters that are trained without LoRA, outside and inside the experts, by pipeline stage."""
    model = config.model
    first_with_experts = first_layer_with_experts(model)
    # all layers of a kind are alike: the first is dense if one is, the last has experts if one has
    kinds = {
        layer >= first_with_experts: _layer_parameters(model, layer, layout) for layer in (0, model.num_layers - 1)
    }
    found = []
    for pp_rank, chunks in enumerate(chunk_layers(model, config.parallel)):
        dense = _vocabulary_parameters(config, layout, pp_rank)
        dense += _norm(model, model.hidden_size).count * (pp_rank == layout.pp - 1)
        expert = 0
        for layer in (layer for chunk in chunks for layer in chunk):
            dense += kinds[layer >= first_with_experts][0]
            expert += kinds[layer >= first_with_experts][1]
        found.append((dense, expert))
    return found


def _layer_parameters(model: ModelConfig, layer: int, layout: Layout) -> tuple[int, int]:
    """Return one rank's trained parameters of a layer, outside and inside the experts."""
    dense = expert = 0
    for weight in _layer_weights(model, layer):
        if not weight.is_trained:
            continue
        if weight.split == "expert":
            expert += -(-weight.count // (layout.ep * layout.etp))
        else:
            dense += -(-weight.count // layout.tp) if weight.split == "tp" else weight.count
    return dense, expert


def _vocabulary_parameters(config: Config, layout: Layout, pp_rank: int) -> int:
    """Return one rank's parameters of the embedding and the output layer, or the scalar head, which is not split."""
    one = padded_vocab_size(config.model) * config.model.hidden_size // layout.tp
    is_first, is_last = pp_rank == 0, pp_rank == layout.pp - 1
    if config.head == "scalar":
        return one * is_first + config.model.hidden_size * is_last
    # A tied output layer is a second copy unless the first stage is also the last one.
    return one * is_first + one * (is_last and not (config.model.tie_embeddings and is_first))


def _in_fp8(config: Config) -> bool:
    """Return whether the layers' weights and their transposes are kept in FP8 beside those in `precision.compute`.

    Gathered in FP8, the weights are in no other format, and take as much with their transposes.
    """
    return config.precision.fp8 is not None and not config.precision.fp8.param_gather


def _layer_weights(model: ModelConfig, layer: int) -> Iterator[_Weight]:
    """Yield the weights of one transformer layer (0-based)."""
    for linear in layer_linears(model, layer):
        yield from _linear_weights(model, linear)
    yield from (_norm(model, size) for size in _norm_sizes(model))
    if model.attention_sinks:
        yield _Weight(model.num_attention_heads, model.num_attention_heads, "tp")
    if model.moe is not None and layer >= model.moe.num_dense_layers and model.moe.balancing == "bias":
        yield _Weight(model.moe.num_experts, model.moe.num_experts, is_trained=False)


def _linear_weights(model: ModelConfig, linear: Linear) -> Iterator[_Weight]:
    """Yield weight and bias; what is split and gathered counts as whole, as it is in Transformer Engine's layers."""
    for count, splits in ((linear.num_weights, ("column", "row")), (linear.num_biases, ("column",))):
        dense: _Kind = "tp" if linear.split in splits else "none"
        kind = dense if linear.num_experts is None else "expert"
        yield _Weight(count, active_part(model, linear, count), kind)


def _norm(model: ModelConfig, size: int) -> _Weight:
    count = size if model.norm == "rmsnorm" else 2 * size
    return _Weight(count, count)


def _norm_sizes(model: ModelConfig) -> Iterator[int]:
    """Yield the sizes of a layer's norms: before attention and MLP, and of queries and keys or of the latents."""
    yield from (model.hidden_size, model.hidden_size)
    if model.mla is not None:
        yield model.mla.kv_lora_rank
        if model.mla.q_lora_rank is not None:
            yield model.mla.q_lora_rank
    elif model.qk_norm:
        yield from (head_dim(model), head_dim(model))

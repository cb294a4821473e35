"""Pure arithmetic on a config: parameters, bytes per rank by kind, model FLOPs. Torch-free, nothing is measured.

Sources: Korthikanti et al. 2022 (arXiv:2205.05198) for activations, Rajbhandari et al. 2020 (arXiv:1910.02054) for
ZeRO-1, Chowdhery et al. 2022 (arXiv:2204.02311, appendix B) for model FLOPs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from configs.plan.activations import activation_bytes
from configs.plan.derive import (
    Layout,
    chunk_layers,
    head_dim,
    is_gated,
    num_microbatches,
    num_query_groups,
    padded_vocab_size,
)
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

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class _Weight:
    """Parameters of one kind in a layer: how many, how they are split, whether tokens are multiplied by them."""

    count: int
    split: Literal["none", "tp", "expert"] = "none"
    multiplies: bool = True
    trained: bool = True


def count_parameters(model: ModelConfig) -> ParameterCount:
    """Count the parameters without vocabulary padding; a router's expert bias counts, as in published checkpoints."""
    embedding = model.vocab_size * model.hidden_size * (1 if model.tie_embeddings else 2)
    total = active = embedding + _norm(model, model.hidden_size).count
    for layer in range(model.num_layers):
        for weight in _layer_weights(model, layer):
            total += weight.count
            active += _active_count(model, weight)
    return ParameterCount(total, active, embedding)


def parameters_per_rank(config: Config, layout: Layout) -> int:
    """Return the trained parameters of the fullest rank, padded vocabulary included."""
    return max(sum(_stage_parameters(config, layout, pp_rank)) for pp_rank in range(layout.pp))


def estimate_memory(config: Config, layout: Layout) -> MemoryEstimate:
    """Estimate the bytes of the fullest rank by kind."""
    return max(estimate_stages(config, layout), key=lambda estimate: estimate.total)


def estimate_stages(config: Config, layout: Layout) -> list[MemoryEstimate]:
    """Estimate the bytes of a rank of each pipeline stage by kind.

    Weights in the compute format (and in FP8, unless they are gathered so), gradients in fp32, ZeRO-1
    optimizer state: two fp32 moments, and an fp32 main copy where compute is not fp32, sharded over dp*cp (over edp for
    experts). Activations: `configs.plan.activations`.
    """
    weight_bytes = 4 if config.precision.compute == "fp32" else 2
    state_bytes = 8 if config.precision.compute == "fp32" else 12
    microbatches = num_microbatches(config, layout, config.train.global_batch_size)
    chunks = chunk_layers(config.model, config.parallel)
    estimates = []
    for pp_rank in range(layout.pp):
        dense, expert = _stage_parameters(config, layout, pp_rank)
        estimates.append(
            MemoryEstimate(
                pp_rank=pp_rank,
                weights=(dense + expert) * weight_bytes
                + 2 * _in_fp8(config) * (dense + expert - _vocabulary_parameters(config, layout, pp_rank)),
                gradients=(dense + expert) * 4,
                optimizer=-(-dense * state_bytes // (layout.dp * layout.cp)) - (-expert * state_bytes // layout.edp),
                activations=activation_bytes(config, layout, pp_rank, chunks[pp_rank], microbatches),
            )
        )
    return estimates


def model_flops(model: ModelConfig, num_tokens: int, num_attended_pairs: int) -> float:
    """Return the FLOPs of forward and backward: 3 x the forward matrix multiplications.

    Two FLOPs per token and parameter that multiplies it (active experts, router and the output layer over the true
    vocabulary; embedding look-up, norms and biases are free). `num_attended_pairs` is the sum of the squared lengths of
    what attention sees at once (samples, or documents): 2 heads (d_qk + d_v) FLOPs a pair and layer, of which half is
    counted, since the mask is causal: PaLM appendix B counts it whole, Megatron-LM half, and so do we. Recomputation
    is not counted: this is model, not hardware, FLOPs.
    """
    multiplied = model.vocab_size * model.hidden_size
    for layer in range(model.num_layers):
        multiplied += sum(_active_count(model, weight) for weight in _layer_weights(model, layer) if weight.multiplies)
    value_dim = model.mla.v_head_dim if model.mla is not None else head_dim(model)
    core = model.num_attention_heads * (head_dim(model) + value_dim) * model.num_layers
    return 3.0 * (2 * multiplied * num_tokens + core * num_attended_pairs)


def model_flops_per_token(model: ModelConfig, seq_len: int) -> float:
    """Return the model FLOPs of a token of a sample that is attended whole."""
    return model_flops(model, seq_len, seq_len**2) / seq_len


def flops_per_step(config: Config, global_batch: int) -> float:
    """Return the model FLOPs of a step of `global_batch` samples that are attended whole, over all ranks."""
    seq_len = config.train.seq_len
    return model_flops(config.model, global_batch * seq_len, global_batch * seq_len**2)


def _active_count(model: ModelConfig, weight: _Weight) -> int:
    if weight.split != "expert" or model.moe is None:
        return weight.count
    return weight.count * model.moe.top_k // model.moe.num_experts


def _stage_parameters(config: Config, layout: Layout, pp_rank: int) -> tuple[int, int]:
    """Return one rank's trained parameters outside and inside the experts."""
    model = config.model
    dense = expert = 0
    for chunk in chunk_layers(model, config.parallel)[pp_rank]:
        for layer in chunk:
            for weight in _layer_weights(model, layer):
                if not weight.trained:
                    continue
                if weight.split == "expert":
                    expert += -(-weight.count // (layout.ep * layout.etp))
                else:
                    dense += -(-weight.count // layout.tp) if weight.split == "tp" else weight.count
    dense += _vocabulary_parameters(config, layout, pp_rank)
    if pp_rank == layout.pp - 1:
        dense += _norm(model, model.hidden_size).count
    return dense, expert


def _vocabulary_parameters(config: Config, layout: Layout, pp_rank: int) -> int:
    """Return one rank's parameters of the embedding and the output layer."""
    one = padded_vocab_size(config.model) * config.model.hidden_size // layout.tp
    is_first, is_last = pp_rank == 0, pp_rank == layout.pp - 1
    # A tied output layer is a second copy unless the first stage is also the last one.
    return one * is_first + one * (is_last and not (config.model.tie_embeddings and is_first))


def _in_fp8(config: Config) -> bool:
    """Return whether the layers' weights and their transposes are kept in FP8 beside those in `precision.compute`.

    Gathered in FP8, the weights are in no other format, and take as much with their transposes.
    """
    return config.precision.fp8 is not None and not config.precision.fp8.param_gather


def _layer_weights(model: ModelConfig, layer: int) -> Iterator[_Weight]:
    """Yield the weights of one transformer layer (0-based)."""
    yield _norm(model, model.hidden_size)
    yield from _mla_weights(model) if model.mla is not None else _attention_weights(model)
    yield _norm(model, model.hidden_size)
    if model.moe is not None and layer >= model.moe.num_dense_layers:
        yield from _moe_weights(model)
    else:
        yield from _mlp_weights(model, model.ffn_hidden_size, "tp")


def _norm(model: ModelConfig, size: int) -> _Weight:
    return _Weight(size if model.norm == "rmsnorm" else 2 * size, multiplies=False)


def _attention_weights(model: ModelConfig) -> Iterator[_Weight]:
    hidden, heads, size = model.hidden_size, model.num_attention_heads, head_dim(model)
    qkv_size = (heads + 2 * num_query_groups(model)) * size
    yield _Weight(hidden * qkv_size, "tp")
    if model.qkv_bias or model.linear_bias:
        yield _Weight(qkv_size, "tp", multiplies=False)
    if model.qk_norm:
        yield _norm(model, size)
        yield _norm(model, size)
    yield _Weight(heads * size * hidden, "tp")
    if model.linear_bias:
        yield _Weight(hidden, multiplies=False)


def _mla_weights(model: ModelConfig) -> Iterator[_Weight]:
    """Yield the projections of arXiv:2405.04434, section 2.1; the down-projections are on every tp rank."""
    mla, hidden, heads = model.mla, model.hidden_size, model.num_attention_heads
    assert mla is not None
    query_size = heads * head_dim(model)
    if mla.q_lora_rank is None:
        yield _Weight(hidden * query_size, "tp")
    else:
        yield _Weight(hidden * mla.q_lora_rank)
        yield _norm(model, mla.q_lora_rank)
        yield _Weight(mla.q_lora_rank * query_size, "tp")
    yield _Weight(hidden * (mla.kv_lora_rank + mla.qk_rope_head_dim))
    yield _norm(model, mla.kv_lora_rank)
    yield _Weight(mla.kv_lora_rank * heads * (mla.qk_nope_head_dim + mla.v_head_dim), "tp")
    yield _Weight(heads * mla.v_head_dim * hidden, "tp")


def _mlp_weights(
    model: ModelConfig, ffn_size: int, split: Literal["tp", "expert"], copies: int = 1
) -> Iterator[_Weight]:
    first_size = ffn_size * (2 if is_gated(model) else 1)
    yield _Weight(copies * model.hidden_size * first_size, split)
    yield _Weight(copies * ffn_size * model.hidden_size, split)
    if model.linear_bias:
        yield _Weight(copies * first_size, split, multiplies=False)
        yield _Weight(copies * model.hidden_size, "expert" if split == "expert" else "none", multiplies=False)


def _moe_weights(model: ModelConfig) -> Iterator[_Weight]:
    moe = model.moe
    assert moe is not None
    yield _Weight(model.hidden_size * moe.num_experts)
    if moe.balancing == "bias":
        yield _Weight(moe.num_experts, multiplies=False, trained=False)
    yield from _mlp_weights(model, moe.ffn_hidden_size, "expert", moe.num_experts)
    if moe.shared_expert_ffn_hidden_size is not None:
        yield from _mlp_weights(model, moe.shared_expert_ffn_hidden_size, "tp")

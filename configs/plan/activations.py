"""Bytes of activations that one rank keeps for the backward pass, after Korthikanti et al. 2022 (arXiv:2205.05198).

Torch-free. The attention core is assumed to be a fused one (flash attention, SDPA): no seq x seq scores are kept, only
the log-sum-exp of each row. Experts are assumed to be evenly loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from configs.plan.derive import (
    Layout,
    chunk_layers,
    first_layer_with_experts,
    head_dim,
    is_gated,
    num_query_groups,
    padded_vocab_size,
)
from configs.plan.logits import num_logit_pieces
from configs.stages import Config


@dataclass(frozen=True)
class _Sizes:
    """What every formula below needs: tokens of one microbatch on this rank, bytes per value, and the splits."""

    tokens: int
    value_bytes: int
    stream_split: int
    """Ranks that share the residual stream: tp with sequence parallelism, else 1."""

    def stream(self, width: int) -> float:
        """Bytes of a [tokens, width] tensor of the residual stream."""
        return self.tokens * width * self.value_bytes / self.stream_split


@dataclass(frozen=True)
class Activations:
    """Peak bytes of activations on one rank of a pipeline stage."""

    layers: int
    """Kept by the layers for the backward pass, and what their recomputation holds for a moment."""
    logits: int
    """Logits of one piece of a microbatch, in the compute format and in fp32, where they are part of the peak."""


@dataclass(frozen=True)
class _LayerBytes:
    """Bytes of one layer a microbatch: kept, and held for a moment while its gradients are computed."""

    kept: float
    gradients: float


def stage_activations(config: Config, layout: Layout, num_microbatches: int) -> list[Activations]:
    """Return the peak bytes of kept activations on one rank of each pipeline stage.

    In flight are, in 1F1B, pp - pp_rank microbatches of the stage; in the interleaved schedule
    2 (pp - pp_rank - 1) + (vpp - 1) pp + 1 of its chunks; never more than there are. The last stage adds its final
    norm and the logits of one microbatch, or of a piece of it, in the compute format and in fp32.
    """
    model = config.model
    sizes = _Sizes(
        tokens=config.train.micro_batch_size * config.train.seq_len // layout.cp,
        value_bytes=4 if config.precision.compute == "fp32" else 2,
        stream_split=layout.tp if layout.sp else 1,
    )
    num_dense = first_layer_with_experts(model)
    kinds = {
        has_experts: _LayerBytes(
            _layer_bytes(config, layout, sizes, has_experts), _gradient_bytes(config, layout, sizes, has_experts)
        )
        for has_experts in {layer >= num_dense for layer in (0, model.num_layers - 1)}
    }
    found = []
    for pp_rank, chunks in enumerate(chunk_layers(model, config.parallel)):
        layers = [[kinds[layer >= num_dense] for layer in chunk] for chunk in chunks]
        found.append(_stage_bytes(config, layout, sizes, pp_rank, layers, num_microbatches))
    return found


def _stage_bytes(
    config: Config,
    layout: Layout,
    sizes: _Sizes,
    pp_rank: int,
    chunks: Sequence[Sequence[_LayerBytes]],
    num_microbatches: int,
) -> Activations:
    """Return the peak of one stage, whose chunks have these layers."""
    kept, working, first_kept = 0.0, 0.0, 0.0
    for chunk, in_flight in zip(chunks, _in_flight(layout, pp_rank, num_microbatches), strict=True):
        chunk_kept, chunk_working = _chunk_bytes(config, sizes, chunk)
        kept += in_flight * chunk_kept
        working = max(working, chunk_working)
        first_kept = first_kept or in_flight
    total, model = kept, config.model
    if pp_rank == 0 and model.hidden_dropout > 0:
        total += first_kept * sizes.tokens * model.hidden_size / sizes.stream_split
    if pp_rank != layout.pp - 1:
        return Activations(round(total + working), 0)
    total += 2 * sizes.stream(model.hidden_size)
    logits = _logit_bytes(config, layout, sizes)
    # gone before the backward pass computes the first layer again
    return Activations(round(total), round(logits)) if logits >= working else Activations(round(total + working), 0)


def _in_flight(layout: Layout, pp_rank: int, num_microbatches: int) -> list[int]:
    """Return how many microbatches of each chunk are kept: the schedule takes pp of them chunk after chunk."""
    if layout.vpp == 1:
        return [min(layout.pp - pp_rank, num_microbatches)]
    total = 2 * (layout.pp - pp_rank - 1) + (layout.vpp - 1) * layout.pp + 1
    total = min(total, num_microbatches * layout.vpp)
    rounds, rest = divmod(total, layout.pp * layout.vpp)
    return [rounds * layout.pp + min(max(rest - chunk * layout.pp, 0), layout.pp) for chunk in range(layout.vpp)]


def _logit_bytes(config: Config, layout: Layout, sizes: _Sizes) -> float:
    """Logits of one piece of a microbatch, in the compute format and in fp32; of a scalar head its input in fp32."""
    if config.head == "scalar":
        return 4 * sizes.tokens * config.model.hidden_size / sizes.stream_split
    vocabulary_part = padded_vocab_size(config.model) // layout.tp
    piece = -(-sizes.tokens // num_logit_pieces(sizes.tokens, vocabulary_part))
    return (sizes.value_bytes + 4) * piece * vocabulary_part


def _chunk_bytes(config: Config, sizes: _Sizes, layers: Sequence[_LayerBytes]) -> tuple[float, float]:
    """Return the bytes a chunk keeps per microbatch, and the extra bytes while a layer's gradients are computed."""
    recompute = config.train.recompute
    whole = [layer.kept for layer in layers]
    gradients = max((layer.gradients for layer in layers), default=0.0)
    if recompute.granularity != "full":
        again = recompute.granularity == "selective" and not {"mlp", "moe"}.isdisjoint(recompute.modules)
        return sum(whole), gradients * (1 + again)
    layer_input = sizes.stream(config.model.hidden_size)
    if recompute.method == "block":
        count = min(recompute.num_layers, len(whole))
        return count * layer_input + sum(whole[count:]), max(whole[:count], default=0.0) + gradients
    groups = [whole[start : start + recompute.num_layers] for start in range(0, len(whole), recompute.num_layers)]
    return len(groups) * layer_input, max((sum(group) for group in groups), default=0.0) + gradients


def _gradient_bytes(config: Config, layout: Layout, sizes: _Sizes, has_experts: bool) -> float:
    """Gradients inside a layer's MLP and of its input and output: what its backward pass holds for a moment."""
    model = config.model
    if has_experts:
        inner = _moe_bytes(config, layout, sizes, activation_dropped=False)
    else:
        inner = _mlp_bytes(config, layout, sizes, model.ffn_hidden_size)
    return inner + 2 * sizes.stream(model.hidden_size)


def _layer_bytes(config: Config, layout: Layout, sizes: _Sizes, has_experts: bool) -> float:
    """Return the bytes one layer keeps per microbatch, less what selective recomputation drops."""
    model, recompute = config.model, config.train.recompute
    dropped = recompute.modules if recompute.granularity == "selective" else ()
    total = 2 * sizes.stream(model.hidden_size)  # inputs of the two norms
    if "layernorm" not in dropped:
        total += 2 * sizes.stream(model.hidden_size)  # their outputs, the inputs of the linear layers
    if model.hidden_dropout > 0:
        total += 2 * sizes.tokens * model.hidden_size / sizes.stream_split  # two masks of one byte
    total += (
        _mla_bytes(config, layout, sizes, "mla_up_proj" in dropped)
        if model.mla
        else _attention_bytes(config, layout, sizes)
    )
    if has_experts:
        return total if "moe" in dropped else total + _moe_bytes(config, layout, sizes, "moe_act" in dropped)
    return total if "mlp" in dropped else total + _mlp_bytes(config, layout, sizes, model.ffn_hidden_size)


def _attention_bytes(config: Config, layout: Layout, sizes: _Sizes) -> float:
    """Query, key, value, the core's output, and its log-sum-exp in fp32; all split over tp.

    The norms of queries and keys keep their inputs, and with these the projection's whole output.
    """
    heads, groups, size = config.model.num_attention_heads, num_query_groups(config.model), head_dim(config.model)
    widths = 2 * heads + 2 * groups + (heads + 2 * groups if config.model.qk_norm else 0)
    kept = widths * size * sizes.value_bytes + 4 * heads
    return sizes.tokens * kept / layout.tp


def _mla_bytes(config: Config, layout: Layout, sizes: _Sizes, up_projection_dropped: bool) -> float:
    """The latents before and after their norms, then per-head query, key, value, output and log-sum-exp."""
    mla, heads = config.model.mla, config.model.num_attention_heads
    assert mla is not None
    total = sizes.stream(2 * (mla.q_lora_rank or 0) + 2 * mla.kv_lora_rank + mla.qk_rope_head_dim)
    per_head = mla.v_head_dim * sizes.value_bytes + 4
    if not up_projection_dropped:
        per_head += (2 * head_dim(config.model) + mla.v_head_dim) * sizes.value_bytes
    return total + sizes.tokens * heads * per_head / layout.tp


def _mlp_bytes(config: Config, layout: Layout, sizes: _Sizes, ffn_size: int) -> float:
    """Output of the first linear layer (twice as wide when gated) and of the activation.

    Geglu is not fused: it keeps the factors of its product too, the activated half and a copy of the other.
    """
    widths = (3 if is_gated(config.model) else 2) + 2 * (config.model.activation == "geglu")
    return sizes.tokens * widths * ffn_size * sizes.value_bytes / layout.tp


def _moe_bytes(config: Config, layout: Layout, sizes: _Sizes, activation_dropped: bool) -> float:
    """fp32 router scores, the dispatched tokens, the experts' inner activations, and the shared experts'."""
    model, moe = config.model, config.model.moe
    assert moe is not None
    router = 2 * 4 * sizes.tokens * moe.num_experts / sizes.stream_split
    dispatched = sizes.tokens * moe.top_k * model.hidden_size * sizes.value_bytes * layout.etp / layout.tp
    widths = (2 if is_gated(model) else 1) + (0 if activation_dropped else 1 + 2 * (model.activation == "geglu"))
    inner = sizes.tokens * moe.top_k * widths * moe.ffn_hidden_size * sizes.value_bytes / layout.tp
    shared = moe.shared_expert_ffn_hidden_size
    return router + dispatched + inner + (_mlp_bytes(config, layout, sizes, shared) if shared else 0.0)

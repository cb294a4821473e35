"""Every linear of an architecture's layers: its name in Megatron-Core, its widths, how it lies over ranks. Torch-free.

The one table of them: weights and FLOPs, sizes that must divide, what FP8 multiplies, and the shapes of tensors in
Hugging Face models follow from it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from configs.plan.derive import head_dim, is_gated, num_query_groups
from configs.sections.model import MlaConfig, ModelConfig, MoeConfig

Split = Literal["none", "column", "row", "gathered"]
"""How a weight `[output, input]` lies over the tp ranks (etp of a routed expert): whole on each, its output split, its
input split; or split and gathered behind it, which Transformer Engine's layers keep whole on each."""


@dataclass(frozen=True)
class Width:
    """A dimension of a linear."""

    field: str
    """What of the config says it."""
    size: int
    times: int = 1
    """2 where two of them, gate and up, lie side by side."""

    @property
    def total(self) -> int:
        return self.size * self.times


@dataclass(frozen=True)
class Linear:
    """One linear of a layer, or that of each of its routed experts."""

    name: str
    """Within the layer, in Megatron-Core."""
    input: Width
    output: Width
    split: Split
    has_bias: bool = False
    num_experts: int | None = None
    """Routed experts that have one each; None for a linear outside them."""

    @property
    def num_weights(self) -> int:
        """Weights in the whole layer, without the bias."""
        return self.input.total * self.output.total * (self.num_experts or 1)

    @property
    def num_biases(self) -> int:
        """Biases in the whole layer."""
        return self.output.total * (self.num_experts or 1) if self.has_bias else 0

    @property
    def is_router(self) -> bool:
        """Whether it chooses experts: it is computed in fp32."""
        return self.name == _ROUTER

    @property
    def split_width(self) -> Width | None:
        """The dimension that is split over ranks, if one is."""
        if self.split == "none":
            return None
        return self.input if self.split == "row" else self.output


_ROUTER = "mlp.router"


def layer_linears(model: ModelConfig, layer: int) -> Iterator[Linear]:
    """Yield the linears of one layer (0-based) in the order in which it computes them."""
    yield from _attention(model) if model.mla is None else _latent_attention(model, model.mla)
    if model.moe is not None and layer >= model.moe.num_dense_layers:
        yield from _experts(model, model.moe)
    else:
        yield from _mlp(model, "mlp", Width("model.ffn_hidden_size", model.ffn_hidden_size))


def distinct_linears(model: ModelConfig) -> tuple[Linear, ...]:
    """Return every linear that some layer has, once: the first layer is dense if one is, the last has experts."""
    return tuple(dict.fromkeys(linear for layer in (0, model.num_layers - 1) for linear in layer_linears(model, layer)))


def _hidden(model: ModelConfig) -> Width:
    return Width("model.hidden_size", model.hidden_size)


def _attention(model: ModelConfig) -> Iterator[Linear]:
    heads, groups, size = model.num_attention_heads, num_query_groups(model), head_dim(model)
    channels = Width("model.head_dim * (num_attention_heads + 2 * num_query_groups)", (heads + 2 * groups) * size)
    has_bias = model.qkv_bias or model.linear_bias
    yield Linear("self_attention.linear_qkv", _hidden(model), channels, "column", has_bias)
    output = Width("model.head_dim * num_attention_heads", heads * size)
    yield Linear("self_attention.linear_proj", output, _hidden(model), "row", model.linear_bias)


def _latent_attention(model: ModelConfig, mla: MlaConfig) -> Iterator[Linear]:
    """Yield the projections of arXiv:2405.04434, section 2.1."""
    heads, hidden, path = model.num_attention_heads, _hidden(model), "model.mla."
    nope, rope, value = mla.qk_nope_head_dim, mla.qk_rope_head_dim, mla.v_head_dim
    query = Width(f"{path}qk_nope_head_dim + qk_rope_head_dim, times heads", heads * (nope + rope))
    if mla.q_lora_rank is None:
        yield Linear("self_attention.linear_q_proj", hidden, query, "column")
    else:
        latent = Width(f"{path}q_lora_rank", mla.q_lora_rank)
        yield Linear("self_attention.linear_q_down_proj", hidden, latent, "gathered")
        yield Linear("self_attention.linear_q_up_proj", latent, query, "column")
    down = Width(f"{path}kv_lora_rank + qk_rope_head_dim", mla.kv_lora_rank + rope)
    yield Linear("self_attention.linear_kv_down_proj", hidden, down, "gathered")
    up = Width(f"{path}qk_nope_head_dim + v_head_dim, times heads", heads * (nope + value))
    yield Linear("self_attention.linear_kv_up_proj", Width(f"{path}kv_lora_rank", mla.kv_lora_rank), up, "column")
    output = Width(f"{path}v_head_dim, times heads", heads * value)
    yield Linear("self_attention.linear_proj", output, hidden, "row")


def _experts(model: ModelConfig, moe: MoeConfig) -> Iterator[Linear]:
    yield Linear(_ROUTER, _hidden(model), Width("model.moe.num_experts", moe.num_experts), "none")
    inner = Width("model.moe.ffn_hidden_size", moe.ffn_hidden_size)
    yield from _mlp(model, "mlp.experts", inner, moe.num_experts)
    if moe.shared_expert_ffn_hidden_size is not None:
        inner = Width("model.moe.shared_expert_ffn_hidden_size", moe.shared_expert_ffn_hidden_size)
        yield from _mlp(model, "mlp.shared_experts", inner)


def _mlp(model: ModelConfig, name: str, inner: Width, num_experts: int | None = None) -> Iterator[Linear]:
    first = Width(inner.field, inner.size, times=2 if is_gated(model) else 1)
    yield Linear(f"{name}.linear_fc1", _hidden(model), first, "column", model.linear_bias, num_experts)
    yield Linear(f"{name}.linear_fc2", inner, _hidden(model), "row", model.linear_bias, num_experts)

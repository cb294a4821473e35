"""Rules of the architecture alone: fields of `model:` that contradict each other or would be silently ignored."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from configs.fields import value_text
from configs.plan.derive import head_dim, layer_windows, num_query_groups
from configs.sections.base import Section
from configs.sections.model import ModelConfig, MoeConfig


def check_model(model: ModelConfig) -> list[str]:
    """Return every rule the architecture breaks, one sentence each with the field and a value that would work."""
    parts = (_check_attention, _check_window, _check_mla, _check_rope, _check_moe)
    return [problem for check in parts for problem in check(model)]


def check_unused(section: Section, path: str, names: Iterable[str], reason: str) -> Iterator[str]:
    """Yield a sentence for each field that differs from its default though nothing reads it.

    Compared with the default, not with whether it was set, so that a resolved config loads back, and an override can
    undo what a base file says.
    """
    for name in names:
        default = type(section).model_fields[name].default
        if getattr(section, name) != default:
            yield f"{path}.{name}: has no effect {reason}; a value that would work: {value_text(default)}"


def _check_attention(model: ModelConfig) -> Iterator[str]:
    heads, groups = model.num_attention_heads, num_query_groups(model)
    if model.mla is None and model.head_dim is None and model.hidden_size % heads:
        yield (
            f"model.head_dim: model.hidden_size={model.hidden_size} is not divisible by "
            f"model.num_attention_heads={heads}; a value that would work: {_even(model.hidden_size // heads)}"
        )
    if model.mla is None and heads % groups:
        works = ", ".join(str(size) for size in range(1, heads + 1) if heads % size == 0)
        yield (
            f"model.num_query_groups: {groups} does not divide model.num_attention_heads={heads}; values that would "
            f"work: {works}"
        )
    if model.linear_bias and model.qkv_bias:
        yield "model.qkv_bias: model.linear_bias already gives it; a value that would work: false"


def _check_window(model: ModelConfig) -> Iterator[str]:
    window, longest = model.window_size, model.max_position_embeddings
    if window is None:
        yield from check_unused(model, "model", ("window_pattern",), "without model.window_size")
    elif len(model.window_pattern) > model.num_layers:
        works = value_text(model.window_pattern[: model.num_layers])
        yield (
            f"model.window_pattern: has {len(model.window_pattern)} entries for model.num_layers={model.num_layers}; a "
            f"value that would work: {works}"
        )
    elif not any(layer_windows(model)):
        yield "model.window_pattern: gives no layer the window; a value that would work: [true]"
    if window is not None and window >= longest:
        yield (
            f"model.window_size: {window} hides nothing within model.max_position_embeddings={longest}; a value that "
            "would work: null"
        )
    if model.attention_dropout > 0 and (window is not None or model.attention_sinks):
        field = "window_size" if window is not None else "attention_sinks"
        yield f"model.attention_dropout: is not drawn with model.{field}; a value that would work: 0.0"


def _check_mla(model: ModelConfig) -> Iterator[str]:
    """Refuse the fields of ordinary attention: latent attention has projections, norms and rotation of its own."""
    mla = model.mla
    if mla is None:
        return
    reason = "with model.mla, which has its own"
    yield from check_unused(model, "model", ("qk_norm", "qkv_bias", "head_dim"), reason)
    if model.num_query_groups not in (None, model.num_attention_heads):
        yield "model.num_query_groups: has no effect with model.mla; a value that would work: null"
    if model.linear_bias:
        yield "model.linear_bias: latent attention has no biases; a value that would work: false"
    if not model.rope.interleaved:
        yield "model.rope.interleaved: latent attention rotates neighbouring pairs; a value that would work: true"
    if model.rope.fraction != 1.0:
        yield "model.rope.fraction: model.mla.qk_rope_head_dim says what is rotated; a value that would work: 1.0"
    if model.rope.scaling in ("linear", "dynamic", "llama3"):
        yield f"model.rope.scaling: latent attention has no {model.rope.scaling}; values that would work: none, yarn"


def _check_rope(model: ModelConfig) -> Iterator[str]:
    rope = model.rope
    rotated = model.mla.qk_rope_head_dim if model.mla is not None else head_dim(model) * rope.fraction
    if rotated % 2:
        field = "model.mla.qk_rope_head_dim" if model.mla is not None else "model.head_dim"
        works = _even(int(rotated)) if rope.fraction == 1.0 else _even(head_dim(model))
        yield (
            f"{field}: {rotated:g} dimensions cannot be rotated in pairs; a value that would work: {works}"
            + ("" if rope.fraction == 1.0 else " with model.rope.fraction=1.0")
        )
    if rope.scaling == "yarn" and rope.interleaved and model.mla is None:
        yield "model.rope.interleaved: yarn rotates the two halves; a value that would work: false"
    if rope.scaling == "yarn" and rope.fraction != 1.0 and model.mla is None:
        yield "model.rope.fraction: yarn rotates whole heads; a value that would work: 1.0"
    if rope.scaling == "dynamic" and rotated == 2:
        yield (
            "model.rope.scaling: dynamic stretches what lies between the first and the last of the rotated pairs, here "
            "is one; values that would work: none, linear, llama3, yarn"
        )
    yield from _check_rope_unused(model)
    if rope.scaling == "none":
        return
    if rope.factor <= 1.0:
        yield f"model.rope.factor: {rope.factor:g} extends nothing; a value that would work: 8.0"
    original = rope.original_max_position_embeddings
    if rope.scaling in ("dynamic", "llama3", "yarn") and original > model.max_position_embeddings:
        yield (
            f"model.rope.original_max_position_embeddings: {original} exceeds model.max_position_embeddings="
            f"{model.max_position_embeddings}; a value that would work: {model.max_position_embeddings}"
        )
    if rope.scaling == "llama3" and rope.low_freq_factor >= rope.high_freq_factor:
        yield (
            f"model.rope.high_freq_factor: {rope.high_freq_factor:g} must be above model.rope.low_freq_factor="
            f"{rope.low_freq_factor:g}; a value that would work: {4 * rope.low_freq_factor:g}"
        )
    if rope.scaling == "yarn" and rope.beta_slow > rope.beta_fast:
        yield (
            f"model.rope.beta_fast: {rope.beta_fast:g} must be at least model.rope.beta_slow={rope.beta_slow:g}; "
            f"a value that would work: {32 * rope.beta_slow:g}"
        )


def _check_rope_unused(model: ModelConfig) -> Iterator[str]:
    rope, path = model.rope, "model.rope"
    reason = f"with model.rope.scaling={rope.scaling}"
    if rope.scaling == "none":
        yield from check_unused(rope, path, ("factor",), reason)
    if rope.scaling in ("none", "linear"):
        yield from check_unused(rope, path, ("original_max_position_embeddings",), reason)
    if rope.scaling != "llama3":
        yield from check_unused(rope, path, ("low_freq_factor", "high_freq_factor"), reason)
    if rope.scaling != "yarn":
        names = ("beta_fast", "beta_slow", "truncate", "mscale", "mscale_all_dim", "attention_factor")
        yield from check_unused(rope, path, names, reason)
    elif rope.attention_factor is not None:
        yield from check_unused(rope, path, ("mscale",), "with model.rope.attention_factor")
        if model.mla is None:  # latent attention also scales its softmax, by mscale_all_dim alone
            yield from check_unused(rope, path, ("mscale_all_dim",), "with model.rope.attention_factor")


def _check_moe(model: ModelConfig) -> Iterator[str]:
    moe, path = model.moe, "model.moe"
    if moe is None:
        return
    if moe.top_k > moe.num_experts:
        yield f"{path}.top_k: {moe.top_k} exceeds the {moe.num_experts} experts; a value that would work: 2"
    if moe.num_dense_layers >= model.num_layers:
        yield (
            f"{path}.num_dense_layers: {moe.num_dense_layers} leaves no layer of model.num_layers={model.num_layers} "
            f"with experts; a value that would work: {model.num_layers - 1}"
        )
    if moe.score_function == "softmax" and moe.top_k == 1 and not moe.softmax_before_topk:
        yield (
            f"{path}.softmax_before_topk: a softmax over one chosen expert is always 1 and trains no router; a value "
            "that would work: true"
        )
    if moe.score_function != "softmax":
        yield from check_unused(moe, path, ("softmax_before_topk",), f"with {path}.score_function=sigmoid")
    if moe.balancing == "bias" and moe.score_function != "sigmoid":
        yield f"{path}.balancing: bias needs {path}.score_function=sigmoid; a value that would work: aux_loss"
    if moe.balancing != "aux_loss":
        yield from check_unused(moe, path, ("aux_loss_coeff",), f"with {path}.balancing={moe.balancing}")
    if moe.balancing != "bias":
        yield from check_unused(moe, path, ("bias_update_rate",), f"with {path}.balancing={moe.balancing}")
    if model.linear_bias and moe.shared_expert_ffn_hidden_size is not None:
        yield "model.linear_bias: shared experts have no biases; a value that would work: false"
    yield from _check_expert_groups(moe)


def _check_expert_groups(moe: MoeConfig) -> Iterator[str]:
    """Group-limited routing ranks each group by its best top_k / group_top_k experts (arXiv:2412.19437, 2.1.2)."""
    path = "model.moe"
    if (moe.num_groups is None) != (moe.group_top_k is None):
        missing = "group_top_k" if moe.group_top_k is None else "num_groups"
        yield f"{path}.{missing}: num_groups and group_top_k go together; give both, or null for both"
    if moe.num_groups is None or moe.group_top_k is None:
        return
    if moe.num_experts % moe.num_groups:
        divisors = [str(size) for size in range(1, moe.num_experts + 1) if moe.num_experts % size == 0]
        yield (
            f"{path}.num_groups: {moe.num_groups} does not divide {moe.num_experts} experts; values that would work: "
            f"{', '.join(divisors)}"
        )
        return
    if moe.group_top_k > moe.num_groups:
        yield f"{path}.group_top_k: {moe.group_top_k} exceeds {path}.num_groups; a value that would work: 1"
        return
    if moe.top_k % moe.group_top_k or moe.top_k // moe.group_top_k > moe.num_experts // moe.num_groups:
        works = [
            size
            for size in range(1, moe.num_groups + 1)
            if moe.top_k % size == 0 and moe.top_k // size <= moe.num_experts // moe.num_groups
        ]
        yield (
            f"{path}.group_top_k: {moe.group_top_k} groups cannot share {path}.top_k={moe.top_k} experts evenly; "
            f"values that would work: {', '.join(map(str, works)) or 'null, with num_groups null'}"
        )


def _even(value: int) -> int:
    return max(2, value + value % 2)

"""The rules of a whole model: every tensor of its Megatron-Core checkpoint and the Hugging Face tensors it holds.

What there is follows from the architecture alone (shapes of linears from the one table of them); only the Hugging Face
names differ from family to family.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from configs.plan.derive import head_dim, num_query_groups, padded_vocab_size
from configs.plan.tensors import Linear, layer_linears
from configs.roles import HeadKind
from configs.sections.model import ModelConfig, MoeConfig
from trainer.hf.names import TensorNames
from trainer.hf.rules import Conversion, GateUp, GroupedQkv, HfTensor, MegatronTensor, PaddedRows, Rule, Same

_Linears = Mapping[str, Linear]
"""Of one layer, by name."""


def model_rules(
    model: ModelConfig, names: TensorNames, head: HeadKind = "vocabulary", num_stored_ids: int | None = None
) -> Iterator[Rule]:
    """Yield the rules of every tensor of a model with that head, in the order of the model.

    Where the Hugging Face side has more ids than the model, `num_stored_ids`, those beyond are left out.
    """
    num_ids = num_stored_ids or model.vocab_size
    vocabulary = (num_ids, model.hidden_size)
    padded = PaddedRows(num_ids, padded_vocab_size(model))
    padded_shape = (padded.num_rows, model.hidden_size)
    yield _rule("embedding.word_embeddings.weight", padded_shape, {names.embedding: vocabulary}, padded)
    for layer in range(model.num_layers):
        yield from _layer_rules(model, names, layer)
    yield _rule("decoder.final_layernorm.weight", (model.hidden_size,), {names.final_norm: (model.hidden_size,)})
    if head == "scalar":
        yield _rule("output_layer.weight", (1, model.hidden_size), {names.score: (1, model.hidden_size)})
    elif not model.tie_embeddings:
        yield _rule("output_layer.weight", padded_shape, {names.output: vocabulary}, padded)


def _layer_rules(model: ModelConfig, names: TensorNames, layer: int) -> Iterator[Rule]:
    ours, theirs = f"decoder.layers.{layer}.", names.layer.format(layer=layer)
    hidden, linears = (model.hidden_size,), {linear.name: linear for linear in layer_linears(model, layer)}
    if model.mla is None:
        norm = "self_attention.linear_qkv.layer_norm_weight"
        yield _rule(ours + norm, hidden, {theirs + names.input_norm: hidden})
        yield from _attention_rules(model, names, linears, ours, theirs)
    else:
        yield _rule(ours + "input_layernorm.weight", hidden, {theirs + names.input_norm: hidden})
        yield from _latent_attention_rules(names, linears, ours, theirs)
    is_dense = model.moe is None or layer < model.moe.num_dense_layers
    norm = "mlp.linear_fc1.layer_norm_weight" if is_dense else "pre_mlp_layernorm.weight"
    yield _rule(ours + norm, hidden, {theirs + names.mlp_norm: hidden})
    if model.moe is None or is_dense:
        parts = tuple(theirs + names.mlp + part for part in (names.gate, names.up, names.down))
        yield from _mlp_rules(linears, "mlp", ours + "mlp.", parts)
    else:
        yield from _moe_rules(model.moe, names, linears, ours, theirs)


def _attention_rules(
    model: ModelConfig, names: TensorNames, linears: _Linears, ours: str, theirs: str
) -> Iterator[Rule]:
    heads, groups, size = model.num_attention_heads, num_query_groups(model), head_dim(model)
    qkv, rows = linears["self_attention.linear_qkv"], (heads * size, groups * size, groups * size)
    for kind, shape in _weight_and_bias(qkv):
        parts = zip((names.query, names.key, names.value), rows, strict=True)
        shapes = {f"{theirs}{name}{kind}": (count, *shape[1:]) for name, count in parts}
        yield _rule(f"{ours}{qkv.name}.{kind}", shape, shapes, GroupedQkv(heads, groups, size))
    if model.qk_norm:
        for name, norm in (("q_layernorm", names.query_norm), ("k_layernorm", names.key_norm)):
            yield _rule(f"{ours}self_attention.{name}.weight", (size,), {theirs + norm: (size,)})
    yield from _linear_rules(linears["self_attention.linear_proj"], ours, theirs + names.attention_output)


def _latent_attention_rules(names: TensorNames, linears: _Linears, ours: str, theirs: str) -> Iterator[Rule]:
    weights = {
        "linear_q_proj": names.query + "weight",
        "linear_q_down_proj": names.query_down,
        "linear_q_up_proj": names.query_up,
        "linear_kv_down_proj": names.key_value_down,
        "linear_kv_up_proj": names.key_value_up,
        "linear_proj": names.attention_output + "weight",
    }
    norms = {"linear_q_up_proj": names.query_latent_norm, "linear_kv_up_proj": names.key_value_latent_norm}
    for name, linear in linears.items():
        block, _, last = name.partition(".")
        if block != "self_attention":
            continue
        if last in norms:
            latent = (linear.input.total,)
            yield _rule(f"{ours}{name}.layer_norm_weight", latent, {theirs + norms[last]: latent})
        yield from _linear_rules(linear, ours, (theirs + weights[last]).removesuffix("weight"))


def _mlp_rules(linears: _Linears, name: str, ours: str, parts: Sequence[str]) -> Iterator[Rule]:
    """Yield the rules of one gated MLP whose Hugging Face projections are `parts`: gate, up and down."""
    first, second = linears[f"{name}.linear_fc1"], linears[f"{name}.linear_fc2"]
    gate, up, down = parts
    assert first.output.times == 2  # no family here has another kind
    for kind, shape in _weight_and_bias(first):
        half = (first.output.size, *shape[1:])
        yield _rule(f"{ours}linear_fc1.{kind}", shape, {gate + kind: half, up + kind: half}, GateUp())
    for kind, shape in _weight_and_bias(second):
        yield _rule(f"{ours}linear_fc2.{kind}", shape, {down + kind: shape})


def _moe_rules(moe: MoeConfig, names: TensorNames, linears: _Linears, ours: str, theirs: str) -> Iterator[Rule]:
    yield from _linear_rules(linears["mlp.router"], ours, (theirs + names.router).removesuffix("weight"))
    if moe.balancing == "bias":
        bias = (moe.num_experts,)
        yield _rule(f"{ours}mlp.router.expert_bias", bias, {theirs + names.router_bias: bias})
    for expert in range(moe.num_experts):
        base = theirs + names.expert.format(expert=expert)
        parts = tuple(base + part for part in (names.expert_gate, names.expert_up, names.expert_down))
        yield from _mlp_rules(linears, "mlp.experts", f"{ours}mlp.experts.experts.{expert}.", parts)
    if moe.shared_expert_ffn_hidden_size is not None:
        base = theirs + names.shared_expert
        parts = tuple(base + part for part in (names.gate, names.up, names.down))
        yield from _mlp_rules(linears, "mlp.shared_experts", f"{ours}mlp.shared_experts.", parts)


def _linear_rules(linear: Linear, ours: str, theirs: str) -> Iterator[Rule]:
    for kind, shape in _weight_and_bias(linear):
        yield _rule(f"{ours}{linear.name}.{kind}", shape, {theirs + kind: shape})


def _weight_and_bias(linear: Linear) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the shapes of what a linear (or that of one expert) has, `[output, input]` for the weight."""
    yield "weight", (linear.output.total, linear.input.total)
    if linear.has_bias:
        yield "bias", (linear.output.total,)


def _rule(
    name: str, shape: tuple[int, ...], parts: dict[str, tuple[int, ...]], conversion: Conversion | None = None
) -> Rule:
    hf = tuple(HfTensor(part, part_shape) for part, part_shape in parts.items())
    return Rule(MegatronTensor(name, shape), hf, conversion or Same())

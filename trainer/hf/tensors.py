"""The rules of a whole model: every tensor of its Megatron-Core checkpoint and the Hugging Face tensors it holds.

What there is follows from the architecture alone; only the Hugging Face names differ from family to family.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from configs.plan.derive import head_dim, is_gated, num_query_groups, padded_vocab_size
from configs.sections.model import MlaConfig, ModelConfig, MoeConfig
from trainer.hf.names import TensorNames
from trainer.hf.rules import Conversion, GateUp, GroupedQkv, HfTensor, MegatronTensor, PaddedRows, Rule, Same


def model_rules(model: ModelConfig, names: TensorNames) -> Iterator[Rule]:
    """Yield the rules of every tensor, in the order of the model."""
    vocabulary = (model.vocab_size, model.hidden_size)
    padded = PaddedRows(model.vocab_size, padded_vocab_size(model))
    padded_shape = (padded.num_rows, model.hidden_size)
    yield _rule("embedding.word_embeddings.weight", padded_shape, {names.embedding: vocabulary}, padded)
    for layer in range(model.num_layers):
        yield from _layer_rules(model, names, layer)
    yield _rule("decoder.final_layernorm.weight", (model.hidden_size,), {names.final_norm: (model.hidden_size,)})
    if not model.tie_embeddings:
        yield _rule("output_layer.weight", padded_shape, {names.output: vocabulary}, padded)


def _layer_rules(model: ModelConfig, names: TensorNames, layer: int) -> Iterator[Rule]:
    ours, theirs = f"decoder.layers.{layer}.", names.layer.format(layer=layer)
    hidden = (model.hidden_size,)
    is_dense = model.moe is None or layer < model.moe.num_dense_layers
    if model.mla is None:
        norm = "self_attention.linear_qkv.layer_norm_weight"
        yield _rule(ours + norm, hidden, {theirs + names.input_norm: hidden})
        yield from _attention_rules(model, names, ours, theirs)
    else:
        yield _rule(ours + "input_layernorm.weight", hidden, {theirs + names.input_norm: hidden})
        yield from _latent_attention_rules(model, model.mla, names, ours, theirs)
    norm = "mlp.linear_fc1.layer_norm_weight" if is_dense else "pre_mlp_layernorm.weight"
    yield _rule(ours + norm, hidden, {theirs + names.mlp_norm: hidden})
    if model.moe is None or is_dense:
        parts = tuple(theirs + names.mlp + part for part in (names.gate, names.up, names.down))
        yield from _mlp_rules(model, model.ffn_hidden_size, ours + "mlp.", parts)
    else:
        yield from _moe_rules(model, model.moe, names, ours, theirs)


def _attention_rules(model: ModelConfig, names: TensorNames, ours: str, theirs: str) -> Iterator[Rule]:
    heads, groups, size = model.num_attention_heads, num_query_groups(model), head_dim(model)
    qkv = GroupedQkv(heads, groups, size)
    rows = {names.query: heads * size, names.key: groups * size, names.value: groups * size}
    for kind, rest in _weight_and_bias(model, (model.hidden_size,), has_bias=model.qkv_bias or model.linear_bias):
        shapes = {f"{theirs}{name}{kind}": (count, *rest) for name, count in rows.items()}
        yield _rule(f"{ours}self_attention.linear_qkv.{kind}", (sum(rows.values()), *rest), shapes, qkv)
    if model.qk_norm:
        for name, norm in (("q_layernorm", names.query_norm), ("k_layernorm", names.key_norm)):
            yield _rule(f"{ours}self_attention.{name}.weight", (size,), {theirs + norm: (size,)})
    shape = (model.hidden_size, heads * size)
    yield from _linear_rules(model, f"{ours}self_attention.linear_proj.", theirs + names.attention_output, shape)


def _latent_attention_rules(
    model: ModelConfig, mla: MlaConfig, names: TensorNames, ours: str, theirs: str
) -> Iterator[Rule]:
    heads, hidden = model.num_attention_heads, model.hidden_size
    query_rows = heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim)
    if mla.q_lora_rank is None:
        table: dict[str, tuple[str, tuple[int, ...]]] = {
            "linear_q_proj.weight": (names.query + "weight", (query_rows, hidden))
        }
    else:
        table = {
            "linear_q_down_proj.weight": (names.query_down, (mla.q_lora_rank, hidden)),
            "linear_q_up_proj.layer_norm_weight": (names.query_latent_norm, (mla.q_lora_rank,)),
            "linear_q_up_proj.weight": (names.query_up, (query_rows, mla.q_lora_rank)),
        }
    up_rows = heads * (mla.qk_nope_head_dim + mla.v_head_dim)
    table |= {
        "linear_kv_down_proj.weight": (names.key_value_down, (mla.kv_lora_rank + mla.qk_rope_head_dim, hidden)),
        "linear_kv_up_proj.layer_norm_weight": (names.key_value_latent_norm, (mla.kv_lora_rank,)),
        "linear_kv_up_proj.weight": (names.key_value_up, (up_rows, mla.kv_lora_rank)),
        "linear_proj.weight": (names.attention_output + "weight", (hidden, heads * mla.v_head_dim)),
    }
    for name, (theirs_name, shape) in table.items():
        yield _rule(f"{ours}self_attention.{name}", shape, {theirs + theirs_name: shape})


def _mlp_rules(model: ModelConfig, ffn: int, ours: str, parts: Sequence[str]) -> Iterator[Rule]:
    """Yield the rules of one gated MLP whose Hugging Face projections are `parts`: gate, up and down."""
    gate, up, down = parts
    assert is_gated(model)  # no family here has another kind
    for kind, rest in _weight_and_bias(model, (model.hidden_size,), has_bias=model.linear_bias):
        shapes = {gate + kind: (ffn, *rest), up + kind: (ffn, *rest)}
        yield _rule(f"{ours}linear_fc1.{kind}", (2 * ffn, *rest), shapes, GateUp())
    yield from _linear_rules(model, f"{ours}linear_fc2.", down, (model.hidden_size, ffn))


def _moe_rules(model: ModelConfig, moe: MoeConfig, names: TensorNames, ours: str, theirs: str) -> Iterator[Rule]:
    shape = (moe.num_experts, model.hidden_size)
    yield _rule(f"{ours}mlp.router.weight", shape, {theirs + names.router: shape})
    if moe.balancing == "bias":
        bias = (moe.num_experts,)
        yield _rule(f"{ours}mlp.router.expert_bias", bias, {theirs + names.router_bias: bias})
    for expert in range(moe.num_experts):
        base = theirs + names.expert.format(expert=expert)
        parts = tuple(base + part for part in (names.expert_gate, names.expert_up, names.expert_down))
        yield from _mlp_rules(model, moe.ffn_hidden_size, f"{ours}mlp.experts.experts.{expert}.", parts)
    if moe.shared_expert_ffn_hidden_size is not None:
        base = theirs + names.shared_expert
        parts = tuple(base + part for part in (names.gate, names.up, names.down))
        yield from _mlp_rules(model, moe.shared_expert_ffn_hidden_size, f"{ours}mlp.shared_experts.", parts)


def _linear_rules(model: ModelConfig, ours: str, theirs: str, shape: tuple[int, int]) -> Iterator[Rule]:
    yield _rule(f"{ours}weight", shape, {f"{theirs}weight": shape})
    if model.linear_bias:
        yield _rule(f"{ours}bias", shape[:1], {f"{theirs}bias": shape[:1]})


def _weight_and_bias(
    model: ModelConfig, columns: tuple[int, ...], *, has_bias: bool
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield what follows the rows in a shape: the columns for the weight, nothing for the bias."""
    yield "weight", columns
    if has_bias:
        yield "bias", ()


def _rule(
    name: str, shape: tuple[int, ...], parts: dict[str, tuple[int, ...]], conversion: Conversion | None = None
) -> Rule:
    hf = tuple(HfTensor(part, part_shape) for part, part_shape in parts.items())
    return Rule(MegatronTensor(name, shape), hf, conversion or Same())

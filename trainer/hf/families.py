"""One declarative table a Hugging Face family: keys of `config.json`, tensor names, and what the engine cannot do.

`architectures` in `config.json` chooses the table. To add a family: one `Family` here, one case in
`tests/parity/test_parity_hf.py`. Torch-free.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from configs.errors import BadInput
from configs.sections.model import ModelConfig
from trainer.hf.names import TensorNames
from trainer.hf.windows_json import (
    LAYER_KEYS,
    read_layer_windows,
    read_switched_window,
    read_window,
    refuse_window,
    write_layer_windows,
    write_switched_window,
    write_window,
)


@dataclass(frozen=True)
class Option:
    """A key of `config.json` that is a field of ours."""

    key: str
    field: str
    """Dotted path below `model`."""
    default: Any = None
    """What `transformers` takes where the key is missing."""
    is_required: bool = False


@dataclass(frozen=True)
class Only:
    """A key of which the engine does only some values; the first is the plain one."""

    key: str
    values: tuple[Any, ...]
    default: Any


def _nothing_read(config: Mapping[str, Any], fields: dict[str, Any]) -> list[str]:
    return []


def _nothing_written(model: ModelConfig) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Family:
    """What one `architectures` entry means."""

    architecture: str
    model_type: str
    options: tuple[Option, ...]
    only: tuple[Only, ...]
    names: TensorNames = TensorNames()
    known: frozenset[str] = frozenset()
    """Further keys that `read` and `write` deal with."""
    read: Callable[[Mapping[str, Any], dict[str, Any]], list[str]] = _nothing_read
    """Fill in fields that no single key gives; return what cannot be expressed."""
    write: Callable[[ModelConfig], dict[str, Any]] = _nothing_written
    """Return the keys that `options` does not give."""
    rope_theta: float = 10000.0
    """What `transformers` takes where the config names no base."""
    is_rope_interleaved: bool = False
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Other names that `transformers` takes for some of the keys."""
    further_types: tuple[str, ...] = ()
    """Values of `model_type` beside its own under which models of this architecture are published."""
    has_prediction_layers: bool = False
    """Layers of multi-token prediction may follow, which `transformers` too leaves aside."""

    @property
    def handled(self) -> frozenset[str]:
        """The keys of `config.json` that this table gives a meaning, with their other names."""
        keys = {option.key for option in self.options} | {only.key for only in self.only}
        return frozenset(keys | self.known | self.aliases.keys())


def _basic(max_position_embeddings: int, rms_norm_eps: float = 1e-6) -> tuple[Option, ...]:
    """Return what all families have, with the family's own defaults."""
    return (
        Option("vocab_size", "vocab_size", is_required=True),
        Option("hidden_size", "hidden_size", is_required=True),
        Option("num_hidden_layers", "num_layers", is_required=True),
        Option("num_attention_heads", "num_attention_heads", is_required=True),
        Option("max_position_embeddings", "max_position_embeddings", max_position_embeddings),
        Option("rms_norm_eps", "norm_eps", rms_norm_eps),
        Option("tie_word_embeddings", "tie_embeddings", False),
        Option("initializer_range", "init_std", 0.02),
        Option("attention_dropout", "attention_dropout", 0.0),
    )


_DENSE_MLP = Option("intermediate_size", "ffn_hidden_size", is_required=True)
_GROUPED = (Option("num_key_value_heads", "num_query_groups"), Option("head_dim", "head_dim"))
_SILU = Only("hidden_act", ("silu",), "silu")
_NO_ATTENTION_BIAS = Only("attention_bias", (False,), False)
_NO_MLP_BIAS = Only("mlp_bias", (False,), False)


def _read_llama(config: Mapping[str, Any], fields: dict[str, Any]) -> list[str]:
    biases = (bool(config.get("attention_bias", False)), bool(config.get("mlp_bias", False)))
    if biases[0] != biases[1]:
        return [f"attention_bias, mlp_bias: {biases} is not supported, only both or neither"]
    fields["linear_bias"] = biases[0]
    return refuse_window(config, fields)


def _write_llama(model: ModelConfig) -> dict[str, Any]:
    return {"attention_bias": model.linear_bias, "mlp_bias": model.linear_bias}


def _read_mistral(config: Mapping[str, Any], fields: dict[str, Any]) -> list[str]:
    return read_window(config, fields, default=4096)


def _read_qwen2(config: Mapping[str, Any], fields: dict[str, Any]) -> list[str]:
    fields["qkv_bias"] = True
    return read_layer_windows(config, fields)


def _read_qwen3(config: Mapping[str, Any], fields: dict[str, Any]) -> list[str]:
    fields["qk_norm"] = True
    return read_layer_windows(config, fields)


def _read_mixtral(config: Mapping[str, Any], fields: dict[str, Any]) -> list[str]:
    fields["moe"]["ffn_hidden_size"] = fields["ffn_hidden_size"]
    return read_window(config, fields)


def _write_mixtral(model: ModelConfig) -> dict[str, Any]:
    assert model.moe is not None
    return {"intermediate_size": model.moe.ffn_hidden_size} | write_window(model)


def _read_qwen3_moe(config: Mapping[str, Any], fields: dict[str, Any]) -> list[str]:
    fields["qk_norm"] = True
    dense = sorted(config.get("mlp_only_layers") or ())
    fields["moe"] |= {
        "num_experts": config.get("num_experts", 128),
        "num_dense_layers": len(dense),
        "softmax_before_topk": not config.get("norm_topk_prob", False),
    }
    if dense != list(range(len(dense))):
        return [f"mlp_only_layers: {dense} is not supported, only the first layers"]
    return read_switched_window(config, fields)


def _write_qwen3_moe(model: ModelConfig) -> dict[str, Any]:
    moe = model.moe
    assert moe is not None
    return {
        "num_experts": moe.num_experts,
        "mlp_only_layers": list(range(moe.num_dense_layers)),
        "norm_topk_prob": not moe.softmax_before_topk,
        **write_switched_window(model),
    }


def _read_deepseek(config: Mapping[str, Any], fields: dict[str, Any], num_shared_experts: int) -> list[str]:
    """Read what both have, `num_shared_experts` being the family's own default."""
    moe = fields["moe"]
    shared = config.get("n_shared_experts", num_shared_experts)
    if shared:
        moe["shared_expert_ffn_hidden_size"] = shared * moe["ffn_hidden_size"]
    if moe.get("num_groups") == 1:
        moe.pop("num_groups")
        moe.pop("group_top_k", None)
    if not math.isclose(fields["norm_eps"], _LATENT_EPSILON):
        fields["mla"]["norm_eps"] = _LATENT_EPSILON
    heads, groups = fields["num_attention_heads"], config.get("num_key_value_heads")
    problems = refuse_window(config, fields)
    if groups not in (None, heads):
        problems.append(f"num_key_value_heads: {groups} with {heads} heads is not supported, only as many")
    if moe["num_dense_layers"] >= fields["num_layers"]:
        problems.append(f"first_k_dense_replace: {moe['num_dense_layers']} leaves no layer with experts")
    return problems


def _read_deepseek_v2(config: Mapping[str, Any], fields: dict[str, Any]) -> list[str]:
    problems = _read_deepseek(config, fields, 2)
    moe = fields["moe"] | {"softmax_before_topk": True}
    method = config.get("topk_method", "greedy")
    if method == "greedy":
        moe.pop("num_groups", None)
        moe.pop("group_top_k", None)
    elif method != "group_limited_greedy" or moe.get("top_k") != moe.get("group_top_k"):
        # Megatron-Core ranks a group by the sum of its best top_k / group_top_k experts, DeepSeek-V2 by its best.
        problems.append(f"topk_method: {method} is not supported, only greedy, or one expert from each of topk_group")
    fields["moe"] = moe
    return problems


def _read_deepseek_v3(config: Mapping[str, Any], fields: dict[str, Any]) -> list[str]:
    problems = _read_deepseek(config, fields, 1)
    moe = fields["moe"]
    moe |= {"score_function": "sigmoid", "balancing": "bias"}
    if "num_groups" in moe and moe["top_k"] != 2 * moe["group_top_k"]:
        # Megatron-Core ranks a group by the sum of its best top_k / group_top_k experts, DeepSeek-V3 by its best two.
        works = max(1, moe["top_k"] // 2)
        problems.append(
            f"topk_group: {moe['group_top_k']} is not supported, only num_experts_per_tok / 2, here {works}"
        )
    if moe["top_k"] == 1:
        problems.append("num_experts_per_tok: 1 is not supported, only more")
    if config.get("head_dim") not in (None, fields["mla"]["qk_rope_head_dim"]):
        problems.append(f"head_dim: {config['head_dim']} is not supported, only qk_rope_head_dim")
    return problems


def _write_deepseek(model: ModelConfig) -> dict[str, Any]:
    moe, mla = model.moe, model.mla
    assert moe is not None and mla is not None
    shared, rest = divmod(moe.shared_expert_ffn_hidden_size or 0, moe.ffn_hidden_size)
    if rest:
        raise BadInput(
            "model.moe.shared_expert_ffn_hidden_size: DeepSeek's shared experts are as large as the routed ones; a "
            f"value that would work: {max(1, shared) * moe.ffn_hidden_size}"
        )
    keys: dict[str, Any] = {"n_shared_experts": shared, "num_key_value_heads": model.num_attention_heads}
    keys |= {"q_lora_rank": mla.q_lora_rank, "routed_scaling_factor": moe.scaling_factor or 1.0}
    if moe.num_groups is None:
        keys |= {"n_group": 1, "topk_group": 1}
    return keys


def _write_deepseek_v3(model: ModelConfig) -> dict[str, Any]:
    """The layers of multi-token prediction are not exported, so there are none to announce."""
    return _write_deepseek(model) | {"num_nextn_predict_layers": 0}


def _write_deepseek_v2(model: ModelConfig) -> dict[str, Any]:
    is_grouped = model.moe is not None and model.moe.num_groups is not None
    return _write_deepseek(model) | {"topk_method": "group_limited_greedy" if is_grouped else "greedy"}


_LATENT = (
    Option("q_lora_rank", "mla.q_lora_rank"),
    Option("kv_lora_rank", "mla.kv_lora_rank", 512),
    Option("qk_nope_head_dim", "mla.qk_nope_head_dim", 128),
    Option("qk_rope_head_dim", "mla.qk_rope_head_dim", 64),
    Option("v_head_dim", "mla.v_head_dim", 128),
)


def _deepseek_moe(
    num_dense_layers: int, scaling_factor: float, num_groups: int | None, group_top_k: int | None
) -> tuple[Option, ...]:
    """Return the keys of the experts, with the family's own defaults."""
    return (
        Option("n_routed_experts", "moe.num_experts", is_required=True),
        Option("num_experts_per_tok", "moe.top_k", is_required=True),
        Option("moe_intermediate_size", "moe.ffn_hidden_size", is_required=True),
        Option("first_k_dense_replace", "moe.num_dense_layers", num_dense_layers),
        Option("routed_scaling_factor", "moe.scaling_factor", scaling_factor),
        Option("n_group", "moe.num_groups", num_groups),
        Option("topk_group", "moe.group_top_k", group_top_k),
    )


# What the norms of the latents have in DeepSeek's own code and in transformers, whatever `rms_norm_eps` is.
_LATENT_EPSILON = 1e-6
# transformers computes one way whatever some of these say (below: scoring_func, topk_method, norm_topk_prob); the code
# that DeepSeek published beside the weights heeds them, so that other values are refused all the same.
_DEEPSEEK_ONLY = (_SILU, _NO_ATTENTION_BIAS, Only("moe_layer_freq", (1,), 1))
_DEEPSEEK_KNOWN = frozenset(
    "n_shared_experts num_key_value_heads topk_method aux_loss_alpha seq_aux ep_size head_dim qk_head_dim "
    "sliding_window".split()
)

_LLAMA = Family(
    "LlamaForCausalLM", "llama", (*_basic(2048), _DENSE_MLP, *_GROUPED), (_SILU,),
    known=frozenset({"attention_bias", "mlp_bias", "sliding_window"}), read=_read_llama, write=_write_llama,
)  # fmt: skip
_MISTRAL = Family(
    "MistralForCausalLM", "mistral", (*_basic(131072), _DENSE_MLP, Option("num_key_value_heads", "num_query_groups", 8),
                                      Option("head_dim", "head_dim")), (_SILU,),
    known=frozenset({"sliding_window"}), read=_read_mistral, write=write_window,
)  # fmt: skip
_QWEN2 = Family(
    "Qwen2ForCausalLM", "qwen2", (*_basic(32768), _DENSE_MLP, *_GROUPED), (_SILU,),
    known=LAYER_KEYS, read=_read_qwen2, write=write_layer_windows,
)  # fmt: skip
_QWEN3 = Family(
    "Qwen3ForCausalLM", "qwen3", (*_basic(32768), _DENSE_MLP, Option("num_key_value_heads", "num_query_groups", 32),
                                  Option("head_dim", "head_dim", 128)), (_SILU, _NO_ATTENTION_BIAS),
    known=LAYER_KEYS, read=_read_qwen3, write=write_layer_windows,
)  # fmt: skip
_MIXTRAL = Family(
    "MixtralForCausalLM", "mixtral",
    (*_basic(131072, 1e-5), _DENSE_MLP, Option("num_key_value_heads", "num_query_groups", 8),
     Option("head_dim", "head_dim"),
     Option("num_local_experts", "moe.num_experts", 8), Option("num_experts_per_tok", "moe.top_k", 2),
     Option("router_aux_loss_coef", "moe.aux_loss_coeff", 0.001)),
    (_SILU, Only("router_jitter_noise", (0.0,), 0.0)),
    names=TensorNames(router="block_sparse_moe.gate.weight", expert="block_sparse_moe.experts.{expert}.",
                      expert_gate="w1.", expert_up="w3.", expert_down="w2."),
    known=frozenset({"sliding_window"}), read=_read_mixtral, write=_write_mixtral, rope_theta=1e6,
    aliases={"num_experts": "num_local_experts"},
)  # fmt: skip
_QWEN3_MOE = Family(
    "Qwen3MoeForCausalLM", "qwen3_moe",
    (*_basic(32768), _DENSE_MLP, Option("num_key_value_heads", "num_query_groups", 4), Option("head_dim", "head_dim"),
     Option("num_experts_per_tok", "moe.top_k", 8), Option("moe_intermediate_size", "moe.ffn_hidden_size", 768),
     Option("router_aux_loss_coef", "moe.aux_loss_coeff", 0.001)),
    (_SILU, _NO_ATTENTION_BIAS, Only("decoder_sparse_step", (1,), 1)),
    known=frozenset("num_experts mlp_only_layers norm_topk_prob use_sliding_window sliding_window".split()),
    read=_read_qwen3_moe, write=_write_qwen3_moe, aliases={"num_local_experts": "num_experts"},
)  # fmt: skip
_DEEPSEEK_V2 = Family(
    "DeepseekV2ForCausalLM", "deepseek_v2",
    (*_basic(2048), _DENSE_MLP, dataclasses.replace(_LATENT[0], default=1536), *_LATENT[1:],
     *_deepseek_moe(0, 1.0, None, None)),
    (*_DEEPSEEK_ONLY, _NO_MLP_BIAS, Only("norm_topk_prob", (False,), False),
     Only("scoring_func", ("softmax",), "softmax")),
    known=_DEEPSEEK_KNOWN, read=_read_deepseek_v2, write=_write_deepseek_v2, is_rope_interleaved=True,
    aliases={"num_experts": "n_routed_experts"},
)  # fmt: skip
_DEEPSEEK_V3 = Family(
    "DeepseekV3ForCausalLM", "deepseek_v3",
    (*_basic(4096), _DENSE_MLP, dataclasses.replace(_LATENT[0], default=1536), *_LATENT[1:],
     *_deepseek_moe(3, 2.5, 8, 4)),
    (*_DEEPSEEK_ONLY, Only("norm_topk_prob", (True,), True), Only("scoring_func", ("sigmoid",), "sigmoid"),
     Only("topk_method", ("noaux_tc",), "noaux_tc"), Only("rope_interleave", (True,), True)),
    known=_DEEPSEEK_KNOWN | {"num_nextn_predict_layers"}, read=_read_deepseek_v3, write=_write_deepseek_v3,
    is_rope_interleaved=True, has_prediction_layers=True, further_types=("kimi_k2",),
    aliases={"num_local_experts": "n_routed_experts", "num_mtp_layers": "num_nextn_predict_layers"},
)  # fmt: skip

FAMILIES: dict[str, Family] = {
    family.architecture: family
    for family in (_LLAMA, _MISTRAL, _QWEN2, _QWEN3, _MIXTRAL, _QWEN3_MOE, _DEEPSEEK_V2, _DEEPSEEK_V3)
}


def choose_family(model: ModelConfig) -> Family:
    """Return the family that a model of our own is written as; `write_model` checks that it says everything."""
    if model.mla is not None and model.moe is not None:
        return _DEEPSEEK_V3 if model.moe.score_function == "sigmoid" else _DEEPSEEK_V2
    if model.mla is not None:
        raise BadInput("model.mla: no Hugging Face family here has latent attention without experts (model.moe).")
    if model.moe is not None:
        return _QWEN3_MOE if model.qk_norm else _MIXTRAL
    if model.qk_norm:
        return _QWEN3
    if model.qkv_bias:
        return _QWEN2
    return _LLAMA if model.window_size is None else _MISTRAL

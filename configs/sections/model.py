"""The `model` section: what the architecture is. Torch-free plain data; rules are in `configs.rules.model`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from configs.sections.base import Count, Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section


class RopeConfig(Section):
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864) and its scaling to longer contexts."""

    base: Annotated[float, Field(gt=1, allow_inf_nan=False)] = 10000.0
    """Base of the geometric frequencies, `theta` in HF configs."""
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Part of each head's dimensions that is rotated (`partial_rotary_factor` in HF configs)."""
    interleaved: bool = False
    """Rotate neighbouring pairs (GPT-J, DeepSeek) instead of the two halves (Llama, NeoX)."""
    scaling: Literal["none", "linear", "dynamic", "llama3", "yarn"] = "none"
    """Kind of context extension; configs/README.md says which one when."""
    factor: PositiveFloat = 1.0
    """Context extension factor of every scaling kind."""
    original_max_position_embeddings: PositiveInt = 4096
    """Context length in tokens before extension (dynamic, llama3, yarn)."""
    low_freq_factor: PositiveFloat = 1.0
    """llama3 only: wavelengths above original_max_position_embeddings / low_freq_factor are fully scaled."""
    high_freq_factor: PositiveFloat = 4.0
    """llama3 only: wavelengths below original_max_position_embeddings / high_freq_factor are left as they are."""
    beta_fast: PositiveFloat = 32.0
    """yarn only: rotations over the original context above which a dimension is not interpolated."""
    beta_slow: PositiveFloat = 1.0
    """yarn only: rotations over the original context below which a dimension is fully interpolated."""
    truncate: bool = True
    """yarn only: round the bounds between the dimensions that are interpolated and those that are not."""
    mscale: NonNegativeFloat = 1.0
    """yarn only: attention temperature coefficient (arXiv:2309.00071, eq. 22)."""
    mscale_all_dim: NonNegativeFloat = 0.0
    """yarn only: coefficient applied to all dimensions (DeepSeek)."""
    attention_factor: PositiveFloat | None = None
    """yarn only: factor on the rotated queries and keys itself; null for the one of factor, mscale, mscale_all_dim."""


class MlaConfig(Section):
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1)."""

    q_lora_rank: PositiveInt | None = None
    """Rank of the query compression; null for none."""
    kv_lora_rank: PositiveInt
    """Rank of the joint key-value compression (the size of the cached latent)."""
    qk_nope_head_dim: PositiveInt
    """Per-head dimensions of query and key without rotation."""
    qk_rope_head_dim: PositiveInt
    """Per-head dimensions of query and key with rotation (the key's are shared by all heads)."""
    v_head_dim: PositiveInt
    """Per-head dimensions of the value."""
    norm_eps: PositiveFloat | None = None
    """Epsilon of the latents' norms; default `model.norm_eps`."""


class MoeConfig(Section):
    """Mixture of experts in place of the dense MLP."""

    num_experts: Annotated[int, Field(ge=2, le=10**5)]
    """Routed experts per layer."""
    top_k: PositiveInt = 2
    """Routed experts per token."""
    ffn_hidden_size: PositiveInt
    """Hidden size of each routed expert's MLP."""
    num_dense_layers: NonNegativeInt = 0
    """First layers that keep a dense MLP of `model.ffn_hidden_size`."""
    shared_expert_ffn_hidden_size: PositiveInt | None = None
    """Total hidden size of the shared experts, which see every token; null for none."""
    score_function: Literal["softmax", "sigmoid"] = "softmax"
    """Router score (DeepSeek-V3 uses sigmoid)."""
    softmax_before_topk: bool = False
    """Take the softmax over all experts and keep the top-k of it unnormalised, instead of a softmax over the top-k."""
    balancing: Literal["aux_loss", "bias", "none"] = "aux_loss"
    """Load balancing: auxiliary loss (arXiv:2101.03961), or the aux-loss-free expert bias (arXiv:2408.15664)."""
    aux_loss_coeff: NonNegativeFloat = 0.01
    """Weight of the auxiliary loss when `balancing: aux_loss`."""
    z_loss_coeff: NonNegativeFloat = 0.0
    """Weight of the router z-loss (arXiv:2202.08906); 0 for none."""
    bias_update_rate: PositiveFloat = 1e-3
    """Step of the expert bias when `balancing: bias`."""
    num_groups: PositiveInt | None = None
    """Groups of experts for group-limited routing (DeepSeek-V3); null for none."""
    group_top_k: PositiveInt | None = None
    """Groups each token may use when `num_groups` is set."""
    scaling_factor: PositiveFloat | None = None
    """Factor on the routed experts' output (`routed_scaling_factor` in HF configs); null for none."""


class ModelConfig(Section):
    """Architecture of the model; weights and behaviour follow from these fields alone."""

    num_layers: Annotated[Count, Field(examples=[32])]
    """Transformer layers."""
    hidden_size: Annotated[PositiveInt, Field(examples=[4096])]
    """Width of the residual stream."""
    ffn_hidden_size: Annotated[PositiveInt, Field(examples=[14336])]
    """Hidden size of the dense MLP."""
    num_attention_heads: Annotated[Count, Field(examples=[32])]
    """Query heads."""
    num_query_groups: PositiveInt | None = None
    """Key-value heads: 1 is MQA, fewer than the query heads is GQA; default `num_attention_heads` (MHA)."""
    head_dim: PositiveInt | None = None
    """Dimensions per head; default `hidden_size / num_attention_heads`."""
    vocab_size: Annotated[PositiveInt, Field(examples=[128256])]
    """Token ids the model can produce: the tokenizer's size, without padding."""
    vocab_pad_multiple: PositiveInt = 128
    """The embedding is padded to a multiple of this; padded ids get no probability and never leave the trainer."""
    max_position_embeddings: PositiveInt = 4096
    """Longest sequence in tokens the model is meant for; `train.seq_len` may not exceed it."""
    rope: RopeConfig = RopeConfig()
    """Rotary position embedding."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """Normalisation layer."""
    norm_eps: PositiveFloat = 1e-5
    """Epsilon of the normalisation."""
    activation: Literal["swiglu", "geglu", "gelu", "squared_relu"] = "swiglu"
    """MLP activation; swiglu and geglu are gated (arXiv:2002.05202)."""
    tie_embeddings: bool = False
    """Use the input embedding as the output layer too."""
    linear_bias: bool = False
    """Bias in every linear layer."""
    qkv_bias: bool = False
    """Bias in the query-key-value projection alone (Qwen2)."""
    qk_norm: bool = False
    """Normalise each head's query and key (Qwen3)."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of initial weights; output projections use init_std / sqrt(2 num_layers)."""
    hidden_dropout: Fraction = 0.0
    """Dropout probability on the residual branches."""
    attention_dropout: Fraction = 0.0
    """Dropout probability on the attention weights."""
    window_size: PositiveInt | None = None
    """Keys that a query sees, itself among them (`sliding_window` in HF configs); null for all before it."""
    window_pattern: Annotated[tuple[bool, ...], Field(min_length=1)] = (True,)
    """Which layers have the window, repeated over all of them: [true, false] is every other one, beginning with it."""
    attention_sinks: bool = False
    """A learned logit per head, with a value of zero, that takes attention from the keys (arXiv:2508.10925)."""
    mla: MlaConfig | None = None
    """Multi-head latent attention instead of MHA/GQA; null for none."""
    moe: MoeConfig | None = None
    """Mixture of experts; null for a dense model."""

"""Every config class of a run: frozen, typed, unknown keys refused, each field documented with its unit.

Torch-free plain data. Reading YAML is `configs.load`, what follows from the values is `configs.derive`, rules that
span fields are `configs.check`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

# The upper bounds are far beyond any real run; a typo's extra zeros end in a sentence, not in an endless plan.
PositiveInt = Annotated[int, Field(ge=1, le=10**12)]
NonNegativeInt = Annotated[int, Field(ge=0, le=10**12)]
Count = Annotated[int, Field(ge=1, le=10**5)]
Samples = Annotated[int, Field(ge=1, le=10**7)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """Base of every section: immutable after validation, and a key it does not know is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())


class RunConfig(Section):
    """Identity of the run and where it writes."""

    name: str = "run"
    """Name of the run; the default of `run.dir` is `runs/<name>`."""
    dir: str | None = None
    """Run directory: everything the run writes. Default `runs/<run.name>`."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 1234
    """Seed of the weights, of dropout and of the data order."""


class RopeConfig(Section):
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864) and its scaling to longer contexts."""

    base: Annotated[float, Field(gt=1, allow_inf_nan=False)] = 10000.0
    """Base of the geometric frequencies, `theta` in HF configs."""
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Part of each head's dimensions that is rotated (`partial_rotary_factor` in HF configs)."""
    interleaved: bool = False
    """Rotate neighbouring pairs (GPT-J, DeepSeek) instead of the two halves (Llama, NeoX)."""
    scaling: Literal["none", "linear", "llama3", "yarn"] = "none"
    """Kind of context extension."""
    factor: PositiveFloat = 1.0
    """Context extension factor of every scaling kind."""
    original_max_position_embeddings: PositiveInt = 4096
    """Context length in tokens before extension (llama3, yarn)."""
    low_freq_factor: PositiveFloat = 1.0
    """llama3 only: wavelengths above original_max_position_embeddings / low_freq_factor are fully scaled."""
    high_freq_factor: PositiveFloat = 4.0
    """llama3 only: wavelengths below original_max_position_embeddings / high_freq_factor are left as they are."""
    beta_fast: PositiveFloat = 32.0
    """yarn only: rotations over the original context above which a dimension is not interpolated."""
    beta_slow: PositiveFloat = 1.0
    """yarn only: rotations over the original context below which a dimension is fully interpolated."""
    mscale: NonNegativeFloat = 1.0
    """yarn only: attention temperature coefficient (arXiv:2309.00071, eq. 22)."""
    mscale_all_dim: NonNegativeFloat = 0.0
    """yarn only: coefficient applied to all dimensions (DeepSeek)."""


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
    mla: MlaConfig | None = None
    """Multi-head latent attention instead of MHA/GQA; null for none."""
    moe: MoeConfig | None = None
    """Mixture of experts; null for a dense model."""


class ParallelConfig(Section):
    """Sizes of the parallel axes; the data-parallel size is what remains of the world."""

    tp: Count = 1
    """Tensor-parallel size."""
    pp: Count = 1
    """Pipeline-parallel size."""
    vpp: Count = 1
    """Virtual pipeline stages (model chunks) per rank; 1 is plain 1F1B, more is the interleaved schedule."""
    cp: Count = 1
    """Context-parallel size: ranks that share one sequence."""
    ep: Count = 1
    """Expert-parallel size: ranks that share a layer's experts, taken from dp*cp*tp / etp."""
    etp: Count | None = None
    """Tensor-parallel size inside each expert; default `tp`."""
    sp: bool = False
    """Megatron sequence parallelism: split norms and dropouts along the sequence over the tp ranks."""
    num_layers_in_first_pp_stage: PositiveInt | None = None
    """Layers of the first pipeline stage when uneven; default an even split."""
    num_layers_in_last_pp_stage: PositiveInt | None = None
    """Layers of the last pipeline stage when uneven; default an even split."""
    overlap_grad_reduce: bool | None = None
    """Reduce gradients while the backward pass runs; default true on CUDA, false on CPU."""
    overlap_param_gather: bool | None = None
    """Gather updated parameters while the forward pass runs; default true on CUDA, false on CPU."""
    timeout_seconds: Annotated[int, Field(ge=1, le=7 * 24 * 3600)] = 600
    """Seconds a collective may wait before the run ends with exit code 5."""


class RecomputeConfig(Section):
    """Activation recomputation in the backward pass (arXiv:2205.05198)."""

    granularity: Literal["none", "selective", "full"] = "none"
    """none, selective (the listed modules) or full (whole layers)."""
    modules: tuple[Literal["core_attn", "mlp", "moe", "moe_act", "layernorm", "mla_up_proj"], ...] = ("core_attn",)
    """Modules recomputed when selective."""
    method: Literal["uniform", "block"] = "uniform"
    """full only: checkpoint every group of layers (uniform), or the first layers alone (block)."""
    num_layers: PositiveInt = 1
    """full only: layers per group (uniform), or layers recomputed per pipeline stage (block)."""


class PrecisionConfig(Section):
    """Number formats of compute; main weights, gradient reduction and optimizer state are always fp32."""

    compute: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Format of weights and activations in forward and backward."""
    initial_loss_scale: Annotated[float, Field(gt=0, le=2.0**32)] = 4096.0
    """fp16 only: first dynamic loss scale."""
    min_loss_scale: PositiveFloat = 1.0
    """fp16 only: smallest dynamic loss scale."""
    loss_scale_window: PositiveInt = 1000
    """fp16 only: finite steps before the loss scale doubles."""
    loss_scale_hysteresis: PositiveInt = 2
    """fp16 only: overflows tolerated before the loss scale halves."""


class SourceConfig(Section):
    """One tokenized source of a blend."""

    path: Annotated[str, Field(min_length=1, examples=["data/corpus_train"])]
    """Prefix of a Megatron dataset: `<path>.bin` and `<path>.idx` must exist."""
    weight: PositiveFloat = 1.0
    """Share of samples drawn from this source, relative to the other weights."""


class DataConfig(Section):
    """What the model reads."""

    tokenizer: str | None = None
    """Directory of the Hugging Face tokenizer the data was made with; its vocabulary hash is checked."""
    train: tuple[SourceConfig, ...] = ()
    """Blend of training sources."""
    validation: tuple[SourceConfig, ...] = ()
    """Validation sources; each is evaluated on its own and logged under its file name."""
    document_mask: bool = False
    """Keep attention inside documents, with positions starting at 0 in each, instead of across the whole sample."""
    prefetch_steps: PositiveInt = 2
    """Steps read ahead by a background thread."""


class BatchRampConfig(Section):
    """Batch-size ramp-up: the global batch grows by `increment` from `start` over `num_samples` samples."""

    start: Samples
    """First global batch size in samples."""
    increment: Samples
    """Samples added at each increase."""
    num_samples: PositiveInt
    """Samples over which the batch grows to `train.global_batch_size`."""


class TrainConfig(Section):
    """Length and shape of training."""

    num_steps: Annotated[int, Field(ge=0, le=10**12, examples=[1000])]
    """Optimizer updates of the whole run; 0 writes the initial weights as a seed checkpoint and ends."""
    seq_len: PositiveInt = 4096
    """Tokens per sample."""
    global_batch_size: Samples = 256
    """Samples per optimizer update over all data-parallel ranks."""
    micro_batch_size: Samples = 1
    """Samples per forward pass on one data-parallel rank."""
    batch_ramp: BatchRampConfig | None = None
    """Batch-size ramp-up; null for a constant batch."""
    log_every: PositiveInt = 1
    """Steps between log lines (metrics.jsonl has every step)."""
    eval_every: PositiveInt | None = None
    """Steps between validations; null for only before the first and after the last step."""
    eval_num_samples: Samples = 256
    """Samples per validation source at each validation."""
    max_nonfinite_steps: PositiveInt = 5
    """Steps in a row with a non-finite loss or gradient that are skipped before the run stops (exit code 4)."""
    recompute: RecomputeConfig = RecomputeConfig()
    """Activation recomputation."""


class OptimizerConfig(Section):
    """AdamW (arXiv:1711.05101); weight decay is not applied to biases and norm weights."""

    lr: PositiveFloat = 3e-4
    """Peak learning rate."""
    min_lr: NonNegativeFloat = 3e-5
    """Learning rate at the end of the decay."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay."""
    beta1: Fraction = 0.9
    """Decay of the first moment."""
    beta2: Fraction = 0.95
    """Decay of the second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the denominator."""
    clip_grad: NonNegativeFloat = 1.0
    """Largest global L2 norm of the gradient; 0 for no clipping."""


class ScheduleConfig(Section):
    """Learning rate over steps: linear warm-up, then the decay; weight decay stays constant."""

    kind: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Shape after warm-up; wsd is warm-up, stable, decay (arXiv:2404.06395)."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up from 0 to `optimizer.lr`."""
    decay_steps: PositiveInt | None = None
    """Step at which `optimizer.min_lr` is reached; default `train.num_steps`."""
    wsd_decay_steps: PositiveInt | None = None
    """wsd only: steps of the final decay; default a tenth of `decay_steps`."""
    wsd_decay: Literal["linear", "cosine", "exponential"] = "linear"
    """wsd only: shape of the final decay."""


class CheckpointConfig(Section):
    """Saving and loading; a checkpoint of any layout loads on any other."""

    save_every: PositiveInt | None = None
    """Steps between checkpoints; null for only after the last step and on SIGTERM or SIGUSR1."""
    keep_last: PositiveInt = 3
    """Newest checkpoints kept."""
    keep_every: PositiveInt | None = None
    """Checkpoints at multiples of this many steps are kept for good; null for none."""
    async_save: bool = True
    """Write in the background while training goes on."""
    resume: str = "auto"
    """auto: continue from `<run.dir>/checkpoints/latest` if there is one; never: refuse to continue;
    or a checkpoint's path."""
    init_from: str | None = None
    """Warm start: weights alone from this checkpoint (or run directory); step, optimizer and data start anew."""
    init_from_hf: str | None = None
    """Warm start from the directory of a Hugging Face model, onto any layout; `model` must say the same as its
    config.json (`python tools/convert_hf.py model DIR` prints it)."""
    export_hf: bool = False
    """Write each checkpoint as a Hugging Face model too, under `hf/` in its directory; training waits for it."""


class SampleConfig(Section):
    """Text generated after training, so that a person can see what was learnt."""

    prompts: tuple[str, ...] = ()
    """Prompts to continue; none for no sample."""
    num_tokens: Count = 64
    """Tokens generated per prompt."""
    temperature: NonNegativeFloat = 0.8
    """Sampling temperature; 0 is greedy."""
    top_k: PositiveInt | None = 50
    """Sample from this many likeliest tokens; null for all."""


class LogConfig(Section):
    """What is written beside metrics.jsonl."""

    tensorboard: bool = True
    """Write TensorBoard event files under `<run.dir>/tensorboard`."""
    device_peak_tflops: PositiveFloat | None = None
    """Dense BF16 peak of one device in TFLOP/s for MFU; default looked up by the device's name, none on CPU."""


class Config(Section):
    """A whole run. One YAML file with a `base:` chain, and dotted overrides on the command line."""

    run: RunConfig = RunConfig()
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    precision: PrecisionConfig = PrecisionConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    sample: SampleConfig = SampleConfig()
    log: LogConfig = LogConfig()

"""Every config class of a run: frozen, typed, unknown keys refused, each field documented with its unit.

Torch-free plain data. Reading YAML is `configs.load`, what follows from the values is `configs.derive`, rules that
span fields are `configs.check`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from configs.model_schema import ModelConfig
from configs.section import (
    Count,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Samples,
    Section,
)


class RunConfig(Section):
    """Identity of the run and where it writes."""

    name: str = "run"
    """Name of the run; the default of `run.dir` is `runs/<name>`."""
    dir: str | None = None
    """Run directory: everything the run writes. Default `runs/<run.name>`."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 1234
    """Seed of the weights, of dropout and of the data order."""


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
    vocabulary_counts_as_layers: bool = False
    """Divide the layers over the model chunks as if embedding and output layer were one layer each."""
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


class Fp8Config(Section):
    """8-bit floating point in the matrix multiplications of the layers (arXiv:2209.05433), forward and backward.

    Embedding, output layer, router, attention core and norms stay in `precision.compute`.
    """

    recipe: Literal["delayed", "tensorwise", "rowwise", "blockwise", "mxfp8"]
    """What shares a scale: the tensor, from the history of its largest value (delayed) or its present one
    (tensorwise); a row; 1x128 elements and 128x128 of the weights (blockwise, arXiv:2412.19437); 1x32 (mxfp8)."""
    format: Literal["e4m3", "hybrid"] | None = None
    """e4m3 for all operands, or hybrid: e5m2 for gradients. Default hybrid; e4m3 for blockwise and mxfp8."""
    backend: Literal["auto", "te", "torch", "emulated"] = "auto"
    """te (Transformer Engine), torch (its own FP8 kernels, without te), emulated (the same numerics on any device,
    for study), or auto: te where it is installed, else torch."""
    num_first_layers_kept: NonNegativeInt = 0
    """First layers that stay in `precision.compute`."""
    num_last_layers_kept: NonNegativeInt = 0
    """Last layers that stay in `precision.compute`."""
    param_gather: bool = False
    """te only: hold the weights in FP8 and gather them so over the data-parallel ranks."""
    amax_history_len: Count = 1024
    """delayed only: steps whose largest values are remembered."""
    amax_compute: Literal["max", "most_recent"] = "max"
    """delayed only: scale by the largest value of the history, or of the last step."""


class PrecisionConfig(Section):
    """Number formats of compute; main weights, gradient reduction and optimizer state are always fp32."""

    compute: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Format of weights and activations in forward and backward."""
    fp8: Fp8Config | None = None
    """FP8 matrix multiplications; null for none."""
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

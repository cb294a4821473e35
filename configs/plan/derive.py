"""What follows from a config by arithmetic alone: layout, padded vocabulary, layers per stage, batches, tokens.

Torch-free. Whether the values fit each other is `configs.rules`; what it takes, `estimate` and `flops`.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from functools import partial

from configs.errors import BadInput
from configs.sections.model import ModelConfig
from configs.sections.parallel import ParallelConfig
from configs.sections.train import TrainConfig
from configs.stages import Config


@dataclass(frozen=True)
class Layout:
    """Sizes of every parallel axis of one world; `dp` and `edp` are what remains of it."""

    world_size: int
    tp: int
    pp: int
    vpp: int
    cp: int
    ep: int
    etp: int
    dp: int
    """Data-parallel size outside the experts: world_size / (tp * pp * cp)."""
    edp: int
    """Data-parallel size of the experts: world_size / (etp * ep * pp)."""
    sp: bool


def derive_layout(config: Config, world_size: int) -> Layout:
    """Return the sizes of every axis for `world_size` ranks; raise BadInput where they do not divide it."""
    parallel = config.parallel
    etp = parallel.etp if parallel.etp is not None else parallel.tp
    for product, names in (
        (parallel.tp * parallel.pp * parallel.cp, "tp*pp*cp"),
        (etp * parallel.ep * parallel.pp, "etp*ep*pp"),
    ):
        if world_size < 1 or world_size % product:
            sizes = ", ".join(str(product * times) for times in (1, 2, 3))
            raise BadInput(f"parallel: {world_size} ranks are no multiple of {names} = {product}; start {sizes}, ...")
    return Layout(
        world_size=world_size,
        tp=parallel.tp,
        pp=parallel.pp,
        vpp=parallel.vpp,
        cp=parallel.cp,
        ep=parallel.ep,
        etp=etp,
        dp=world_size // (parallel.tp * parallel.pp * parallel.cp),
        edp=world_size // (etp * parallel.ep * parallel.pp),
        sp=parallel.sp,
    )


def padded_vocab_size(model: ModelConfig) -> int:
    """Return `vocab_size` rounded up to `vocab_pad_multiple`: the same on every layout, so checkpoints move freely."""
    return -(-model.vocab_size // model.vocab_pad_multiple) * model.vocab_pad_multiple


def head_dim(model: ModelConfig) -> int:
    """Return the dimensions of one query head (rotated and unrotated ones together for MLA)."""
    if model.mla is not None:
        return model.mla.qk_nope_head_dim + model.mla.qk_rope_head_dim
    return model.head_dim if model.head_dim is not None else model.hidden_size // model.num_attention_heads


def num_query_groups(model: ModelConfig) -> int:
    """Return the number of key-value heads."""
    return model.num_query_groups if model.num_query_groups is not None else model.num_attention_heads


def layer_windows(model: ModelConfig) -> tuple[int | None, ...]:
    """Return for each layer how many keys a query sees, itself among them; None for all before it."""
    pattern = model.window_pattern
    return tuple(model.window_size if pattern[layer % len(pattern)] else None for layer in range(model.num_layers))


def first_layer_with_experts(model: ModelConfig) -> int:
    """Return the first layer (0-based) whose MLP is a mixture of experts; `num_layers` where none is."""
    return model.num_layers if model.moe is None else model.moe.num_dense_layers


def is_gated(model: ModelConfig) -> bool:
    """Return whether the MLP's first linear layer is twice as wide, one half gating the other (arXiv:2002.05202)."""
    return model.activation in ("swiglu", "geglu")


def layers_per_pp_stage(model: ModelConfig, parallel: ParallelConfig) -> tuple[int, ...]:
    """Return the number of layers of each pipeline stage, uneven first and last stages included.

    The rule is megatron-core's `get_num_layers_to_build`. Raises BadInput where the layers do not divide.
    """
    first, last = parallel.num_layers_in_first_pp_stage, parallel.num_layers_in_last_pp_stage
    if parallel.vocabulary_counts_as_layers:
        return _stages_with_vocabulary(model, parallel)
    if parallel.pp == 1 and (first or last):
        name = "num_layers_in_first_pp_stage" if first else "num_layers_in_last_pp_stage"
        raise BadInput(f"parallel.{name}: has no meaning with parallel.pp=1; a value that would work: null")
    num_middle_stages = parallel.pp - (first is not None) - (last is not None)
    num_middle_layers = model.num_layers - (first or 0) - (last or 0)
    if num_middle_stages == 0:
        if parallel.vpp > 1:  # get_transformer_layer_offset divides by the number of middle stages
            raise BadInput(
                "parallel.num_layers_in_last_pp_stage: two interleaved pipeline stages take the first one's layers "
                "alone; a value that would work: null"
            )
        if num_middle_layers != 0:
            raise BadInput(
                f"parallel.num_layers_in_last_pp_stage: the two stages hold {first} + {last} layers, not the "
                f"{model.num_layers} of model.num_layers; a value that would work: {_remaining_layers(model, first)}"
            )
        middle = 0
    else:
        if (first or last) and num_middle_layers < num_middle_stages:
            raise BadInput(
                f"parallel.num_layers_in_{'first' if first else 'last'}_pp_stage: {first or last} leaves too few of "
                f"model.num_layers={model.num_layers} for the other stages of parallel.pp={parallel.pp}; a value that "
                "would work: null"
            )
        middle, rest = divmod(num_middle_layers, num_middle_stages)
        if rest or middle < 1:
            raise BadInput(_uneven_sentence(model, parallel, num_middle_layers, num_middle_stages))
    stages = [middle] * parallel.pp
    if first is not None:
        stages[0] = first
    if last is not None:
        stages[-1] = last
    for pp_rank, num_layers in enumerate(stages):
        if num_layers % parallel.vpp:
            works = [size for size in range(1, num_layers + 1) if all(n % size == 0 for n in stages)]
            raise BadInput(
                f"parallel.vpp: {parallel.vpp} does not divide the {num_layers} layers of pipeline stage {pp_rank}; "
                f"values that would work: {', '.join(map(str, works))}"
            )
    return tuple(stages)


def chunk_layers(model: ModelConfig, parallel: ParallelConfig) -> tuple[tuple[range, ...], ...]:
    """Return the layers (0-based) that each model chunk holds, indexed [pp_rank][vpp_rank].

    Chunks are dealt to the stages in turn, as megatron-core's `get_transformer_layer_offset` does.
    """
    stages = layers_per_pp_stage(model, parallel)
    chunks: list[list[range]] = [[] for _ in stages]
    start = 0
    for vpp_rank in range(parallel.vpp):
        for pp_rank, num_layers in enumerate(stages):
            size = num_layers // parallel.vpp
            if parallel.vocabulary_counts_as_layers:
                place = (pp_rank, vpp_rank)
                size = _layers_per_full_chunk(model, parallel)
                size -= (place == (0, 0)) + (place == (parallel.pp - 1, parallel.vpp - 1))
            stop = start + size
            chunks[pp_rank].append(range(start, stop))
            start = stop
    return tuple(tuple(chunk) for chunk in chunks)


def ramp_batch_sizes(train: TrainConfig) -> tuple[int, ...]:
    """Return every global batch size in samples that the run passes through, in order."""
    ramp = train.batch_ramp
    if ramp is None:
        return (train.global_batch_size,)
    return (*range(ramp.start, train.global_batch_size, ramp.increment), train.global_batch_size)


def global_batch_size_at(train: TrainConfig, consumed_samples: int) -> int:
    """Return the global batch size in samples of the step that starts after `consumed_samples`.

    Megatron-LM's ramp-up: the samples of the ramp are shared evenly among its increments.
    """
    ramp = train.batch_ramp
    if ramp is None or consumed_samples >= ramp.num_samples:
        return train.global_batch_size
    sizes = ramp_batch_sizes(train)
    return sizes[consumed_samples * (len(sizes) - 1) // ramp.num_samples]


def consumed_samples_after(train: TrainConfig, num_steps: int) -> int:
    """Return the samples consumed by the first `num_steps` steps; one pass per stage of the ramp, not per step."""
    ramp, consumed = train.batch_ramp, 0
    num_increments = len(ramp_batch_sizes(train)) - 1
    while num_steps > 0:
        batch = global_batch_size_at(train, consumed)
        if ramp is None or consumed >= ramp.num_samples:
            return consumed + num_steps * batch
        ramp_stage = consumed * num_increments // ramp.num_samples
        stage_end = -(-(ramp_stage + 1) * ramp.num_samples // num_increments) if num_increments else ramp.num_samples
        steps = min(num_steps, -(-(stage_end - consumed) // batch))
        consumed += steps * batch
        num_steps -= steps
    return consumed


def steps_of_samples(train: TrainConfig, num_samples: int) -> int:
    """Return the fewest steps that consume at least `num_samples`."""
    smallest = ramp_batch_sizes(train)[0]
    return bisect_left(range(num_samples // smallest + 1), num_samples, key=partial(consumed_samples_after, train))


def num_microbatches(config: Config, layout: Layout, global_batch: int) -> int:
    """Return the microbatches of one step on each dp rank; raise BadInput where the batch does not divide."""
    per_microbatch = config.train.micro_batch_size * layout.dp
    if global_batch % per_microbatch:
        raise BadInput(
            f"train.global_batch_size: {global_batch} is no multiple of train.micro_batch_size * dp = "
            f"{config.train.micro_batch_size} * {layout.dp}; a value that would work: "
            f"{nearest_multiple(global_batch, per_microbatch)}"
        )
    return global_batch // per_microbatch


def nearest_multiple(value: int, step: int) -> int:
    """Return the multiple of `step` nearest to `value`, and at least `step`."""
    return max(step, (value + step // 2) // step * step)


def sequence_pieces(parallel: ParallelConfig) -> int:
    """Return of how many equal pieces a sample consists: two a cp rank, one from either end, times tp with sp."""
    return (2 * parallel.cp if parallel.cp > 1 else 1) * (parallel.tp if parallel.sp else 1)


def tokens_per_step(train: TrainConfig) -> int:
    """Return the tokens of one step at the full global batch."""
    return train.global_batch_size * train.seq_len


def tokens_after(train: TrainConfig, num_steps: int) -> int:
    """Return the tokens consumed by the first `num_steps` steps, ramp-up included."""
    return consumed_samples_after(train, num_steps) * train.seq_len


def _remaining_layers(model: ModelConfig, first: int | None) -> int | str:
    left = model.num_layers - (first or 0)
    return left if left > 0 else "null, with a smaller parallel.num_layers_in_first_pp_stage"


def _layers_per_full_chunk(model: ModelConfig, parallel: ParallelConfig) -> int:
    """Return the layers of a chunk without embedding and output layer, which count as one each."""
    return (model.num_layers + 2) // (parallel.pp * parallel.vpp)


def _stages_with_vocabulary(model: ModelConfig, parallel: ParallelConfig) -> tuple[int, ...]:
    """Return the layers of each pipeline stage where the first and the last chunk hold one less."""
    field, num_chunks = "parallel.vocabulary_counts_as_layers", parallel.pp * parallel.vpp
    if parallel.pp == 1:
        raise BadInput(f"{field}: has no meaning with parallel.pp=1; a value that would work: false")
    if parallel.num_layers_in_first_pp_stage or parallel.num_layers_in_last_pp_stage:
        raise BadInput(f"{field}: the layers of the first or last stage are given too; a value that would work: false")
    size = _layers_per_full_chunk(model, parallel)
    if (model.num_layers + 2) % num_chunks or size < 2:
        fits = [ways for ways in range(2, model.num_layers // 2 + 2) if (model.num_layers + 2) % ways == 0]
        raise BadInput(
            f"{field}: {model.num_layers} layers and two more do not divide among pp*vpp = {num_chunks} chunks of two "
            f"or more; products that would work: {', '.join(map(str, fits)) or 'none, so false'}"
        )
    stages = [size * parallel.vpp] * parallel.pp
    stages[0] -= 1
    stages[-1] -= 1
    return tuple(stages)


def _uneven_sentence(model: ModelConfig, parallel: ParallelConfig, num_layers: int, num_stages: int) -> str:
    """Say why the layers do not divide among the stages and which values would work."""
    divisors = [size for size in range(1, model.num_layers + 1) if model.num_layers % size == 0]
    sentence = (
        f"parallel.pp: {num_layers} layers do not divide evenly among {num_stages} pipeline stages "
        f"(model.num_layers={model.num_layers}, parallel.pp={parallel.pp}); values that would work: "
        f"{', '.join(map(str, divisors))} with even stages"
    )
    middle = -(-model.num_layers // parallel.pp)
    last = model.num_layers - middle * (parallel.pp - 1)
    if parallel.pp > 1 and last >= 1:
        sentence += f", or parallel.num_layers_in_last_pp_stage={last} and first null"
    return sentence

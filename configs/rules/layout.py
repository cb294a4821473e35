"""Rules of layout and batch: axes against the world, the model and each other. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Literal

from configs.context_parallel import check_cp_attention
from configs.errors import BadInput
from configs.plan.derive import (
    Layout,
    chunk_layers,
    derive_layout,
    head_dim,
    layers_per_pp_stage,
    nearest_multiple,
    num_microbatches,
    num_query_groups,
    padded_vocab_size,
    ramp_batch_sizes,
    sequence_pieces,
)
from configs.plan.tensors import distinct_linears
from configs.sections.model import ModelConfig
from configs.stages import Config


def check_layout(config: Config, world_size: int, *, platform: Literal["cpu", "cuda"], has_te: bool) -> list[str]:
    """Return every rule of layout and batch that the config breaks on `world_size` ranks, one sentence each.

    `has_te` says whether the layers are Transformer Engine's; some layouts and recomputations need it.
    """
    problems = [
        *_check_world(config, world_size),
        *_check_tensor_axis(config, has_te),
        *_check_sequence(config),
        *check_cp_attention(config, has_te=has_te),
        *_check_pipeline(config),
        *_check_experts(config, has_te),
        *_check_recompute(config, has_te),
        *_check_overlap(config, platform),
    ]
    try:
        layout = derive_layout(config, world_size)
    except BadInput:
        return problems  # the world is already reported, and without dp no batch can be judged
    return problems + list(_check_batches(config, layout))


def _check_world(config: Config, world_size: int) -> Iterator[str]:
    parallel = config.parallel
    model_size = parallel.tp * parallel.pp * parallel.cp
    if world_size % model_size:
        tp = math.gcd(parallel.tp, world_size)
        pp = math.gcd(parallel.pp, world_size // tp)
        cp = math.gcd(parallel.cp, world_size // (tp * pp))
        yield (
            f"parallel: world size {world_size} is no multiple of tp*pp*cp = {parallel.tp}*{parallel.pp}*{parallel.cp}"
            f" = {model_size}; start {model_size}, {2 * model_size}, {3 * model_size}, ... ranks, or set "
            f"parallel.tp={tp} parallel.pp={pp} parallel.cp={cp}"
        )
        return
    etp = parallel.etp if parallel.etp is not None else parallel.tp
    ranks_per_stage = world_size // parallel.pp
    if ranks_per_stage % (parallel.ep * etp):
        works = _divisors(ranks_per_stage // math.gcd(ranks_per_stage, etp))
        if config.model.moe is not None:
            works = [size for size in works if config.model.moe.num_experts % size == 0]
        yield (
            f"parallel.ep: ep*etp = {parallel.ep}*{etp} does not divide dp*cp*tp = {ranks_per_stage}; values that "
            f"would work: {_listed(works)}" + ("" if ranks_per_stage % etp == 0 else ", with parallel.etp=1")
        )


def _check_tensor_axis(config: Config, has_te: bool) -> Iterator[str]:
    model, tp = config.model, config.parallel.tp
    works = [size for size in _divisors(model.num_attention_heads) if padded_vocab_size(model) % size == 0]
    if model.num_attention_heads % tp:
        yield (
            f"parallel.tp: {tp} does not divide model.num_attention_heads={model.num_attention_heads}; values that "
            f"would work: {_listed(works)}"
        )
    groups = num_query_groups(model)
    if model.mla is None and groups % tp and tp % groups:
        fits = [size for size in works if groups % size == 0 or size % groups == 0]
        yield (
            f"parallel.tp: {tp} is neither a divisor nor a multiple of model.num_query_groups={groups}; values that "
            f"would work: {_listed(fits)}"
        )
    elif model.mla is None and 2 * groups * head_dim(model) % tp:
        yield (
            f"parallel.tp: {tp} does not divide the {2 * groups * head_dim(model)} key and value channels; values "
            f"that would work: {_listed(size for size in works if 2 * groups * head_dim(model) % size == 0)}"
        )
    for name, size in _widths_split_alone(model, has_te):
        if size % tp:
            yield f"{name}: {size} is not divisible by parallel.tp={tp}; a value that would work: {_round_up(size, tp)}"
    if padded_vocab_size(model) % tp:
        multiple = math.lcm(model.vocab_pad_multiple, tp)
        yield (
            f"model.vocab_pad_multiple: the padded vocabulary of {padded_vocab_size(model)} is not divisible by "
            f"parallel.tp={tp}; a value that would work: {multiple}"
        )


def _widths_split_alone(model: ModelConfig, has_te: bool) -> list[tuple[str, int]]:
    """Return the widths that tp splits and that no rule of heads or experts covers: of MLPs and of what is gathered."""
    widths = {}
    for linear in distinct_linears(model):
        is_split = linear.name.startswith("mlp.") if linear.split != "gathered" else not has_te
        if linear.num_experts is None and is_split and linear.split_width is not None:
            widths[linear.split_width.field] = linear.split_width.size
    return list(widths.items())


def _check_sequence(config: Config) -> Iterator[str]:
    parallel, train, model = config.parallel, config.train, config.model
    if parallel.sp and parallel.tp == 1:
        yield "parallel.sp: there is nothing to split the sequence over with parallel.tp=1; set parallel.sp=false"
    if model.moe is not None and parallel.tp > 1 and not parallel.sp:
        yield (
            f"parallel.sp: mixture of experts with parallel.tp={parallel.tp} needs the sequence split; "
            "set parallel.sp=true"
        )
    pieces, longest, reasons = sequence_pieces(parallel), model.max_position_embeddings, []
    if train.seq_len % pieces:
        reasons.append(f"is not divisible by {pieces} (tp with parallel.sp, times 2*cp with parallel.cp > 1)")
    if train.seq_len > longest:
        reasons.append(f"exceeds model.max_position_embeddings={longest}")
    if reasons:
        works = _seq_lens_that_work(train.seq_len, pieces, longest)
        yield f"train.seq_len: {train.seq_len} {' and '.join(reasons)}; a value that would work: {works}"


def _seq_lens_that_work(seq_len: int, pieces: int, longest: int) -> str:
    """Return a length that breaks no rule of the sequence: no longer than asked for, so that the data has it too."""
    values = []
    if longest >= pieces:
        values.append(str(max(pieces, min(seq_len, longest) // pieces * pieces)))
    if max(seq_len, pieces) > longest:
        wanted = _round_up(seq_len, pieces)
        values.append(f"{wanted} with model.max_position_embeddings={wanted}")
    return ", or ".join(values)


def _check_pipeline(config: Config) -> Iterator[str]:
    model, parallel = config.model, config.parallel
    if parallel.vpp > 1 and parallel.pp == 1:
        yield f"parallel.vpp: {parallel.vpp} virtual stages need parallel.pp > 1; a value that would work: 1"
        return
    try:
        layers_per_pp_stage(model, parallel)
    except BadInput as error:
        yield str(error)


def _check_experts(config: Config, has_te: bool) -> Iterator[str]:
    moe, parallel = config.model.moe, config.parallel
    if moe is None:
        if parallel.ep > 1:
            yield f"parallel.ep: {parallel.ep} needs a mixture of experts (model.moe); a value that would work: 1"
        if parallel.etp is not None and parallel.etp != parallel.tp:
            yield "parallel.etp: has no effect without model.moe; a value that would work: null"
        return
    if moe.num_experts % parallel.ep:
        yield (
            f"parallel.ep: {parallel.ep} does not divide model.moe.num_experts={moe.num_experts}; values that would "
            f"work: {_listed(_divisors(moe.num_experts))}"
        )
    etp = parallel.etp if parallel.etp is not None else parallel.tp
    if moe.ffn_hidden_size % etp:
        yield (
            f"parallel.etp: {etp} does not divide model.moe.ffn_hidden_size={moe.ffn_hidden_size}; a value that "
            f"would work: {math.gcd(etp, moe.ffn_hidden_size)}"
        )
    if config.model.linear_bias and not has_te:
        yield (
            "model.linear_bias: experts with a bias need Transformer Engine, which is not installed here; a value that "
            "would work: false"
        )
    elif config.model.linear_bias and etp > 1:
        yield "model.linear_bias: experts with a bias need parallel.etp=1; a value that would work: false"


def _check_recompute(config: Config, has_te: bool) -> Iterator[str]:
    recompute, model, parallel = config.train.recompute, config.model, config.parallel
    if recompute.granularity == "full":
        try:
            longest = max(len(chunk) for chunks in chunk_layers(model, parallel) for chunk in chunks)
        except BadInput:
            return
        if recompute.num_layers > longest:
            yield (
                f"train.recompute.num_layers: {recompute.num_layers} exceeds the {longest} layers of the largest "
                f"model chunk; a value that would work: {longest}"
            )
    if recompute.granularity != "selective":
        return
    if not recompute.modules:
        yield "train.recompute.modules: is empty with selective recomputation; a value that would work: [core_attn]"
    for module in ("layernorm", "moe_act", "mla_up_proj"):
        # These drop an output and compute it again, which Megatron-Core writes on Transformer Engine's state.
        if module in recompute.modules and not has_te:
            yield (
                f"train.recompute.modules: {module} needs Transformer Engine, which is not installed here; values that "
                "would work: core_attn, mlp, moe"
            )


def _check_overlap(config: Config, platform: str) -> Iterator[str]:
    parallel = config.parallel
    reduces = platform != "cpu" if parallel.overlap_grad_reduce is None else parallel.overlap_grad_reduce
    if parallel.overlap_param_gather and not reduces:
        yield (
            "parallel.overlap_param_gather: needs parallel.overlap_grad_reduce=true; a value that would work "
            "without it: false"
        )


def _check_batches(config: Config, layout: Layout) -> Iterator[str]:
    """Judge every global batch size the run passes through; a ramp that does not fit itself is reported elsewhere."""
    train = config.train
    per_microbatch = train.micro_batch_size * layout.dp
    needed = per_microbatch * (layout.pp if layout.vpp > 1 else 1)
    if train.batch_ramp is not None and (train.global_batch_size - train.batch_ramp.start) % train.batch_ramp.increment:
        sizes: tuple[int, ...] = (train.global_batch_size,)
    else:
        sizes = ramp_batch_sizes(train)
    for size in sizes:
        is_final = size == train.global_batch_size
        field = "train.global_batch_size" if is_final else "train.batch_ramp"
        try:
            microbatches = num_microbatches(config, layout, size)
        except BadInput:
            yield (
                f"{field}: {size} is no multiple of train.micro_batch_size * dp = {train.micro_batch_size} * "
                f"{layout.dp}; {_batch_that_works(size, needed, is_final)}"
            )
            continue
        if layout.vpp > 1 and microbatches % layout.pp:
            yield (
                f"{field}: {size} makes {microbatches} microbatches, and parallel.vpp > 1 needs a multiple of "
                f"parallel.pp={layout.pp}; {_batch_that_works(size, needed, is_final)}"
            )


def _batch_that_works(size: int, needed: int, is_final: bool) -> str:
    if is_final:
        return f"a value that would work: {nearest_multiple(size, needed)}"
    return f"multiples of {needed} would work for its start and increment"


def _divisors(value: int) -> list[int]:
    return [size for size in range(1, value + 1) if value % size == 0]


def _listed(values: Iterable[int]) -> str:
    return ", ".join(map(str, values))


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step

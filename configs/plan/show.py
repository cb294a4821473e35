"""Text for people: every field for `--help`, and for `--dry-run` the resolved config and what follows from it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from types import MappingProxyType

import yaml

from configs.fields import schema_fields
from configs.load import resolved_dict
from configs.plan.adapters import count_adapter_parameters
from configs.plan.derive import (
    Layout,
    chunk_layers,
    layer_windows,
    num_microbatches,
    padded_vocab_size,
    ramp_batch_sizes,
    tokens_after,
    tokens_per_step,
)
from configs.plan.estimate import count_parameters, parameters_per_rank
from configs.plan.flops import flops_per_step
from configs.plan.kv_cache import plan_cache
from configs.plan.others import Others, estimate_together
from configs.stages import (
    STAGE_CONFIGS,
    Config,
    DistillConfig,
    GrpoConfig,
    OnlineDpoConfig,
    PpoConfig,
    RftConfig,
    Split,
    TeacherCacheConfig,
)

_MIB, _GIB = 2**20, 2**30
_DEVICE_GB = (24, 40, 48, 80, 141, 180)


def field_help(stage: str) -> str:
    """Return every field of a stage's config: dotted path, type, default, and what it means with its unit."""
    lines: list[str] = []
    for field in schema_fields(STAGE_CONFIGS[stage]):
        if field.section is not None:
            default = "" if field.required or field.default_text != "null" else " (default null)"
            summary = field.doc or " ".join((field.section.__doc__ or "").split())
            lines += ["", f"{field.path}:{default} {summary}"]
            continue
        has_no_steps = field.path == "train.num_steps" and not STAGE_CONFIGS[stage].is_training
        default = "0" if has_no_steps else field.default_text
        lines.append(f"  {field.path} = {default}   <{field.type_text}>")
        lines.append(f"      {field.doc}")
    return "\n".join(lines).strip() + "\n"


def describe(config: Config, layout: Layout, *, is_fewest: bool = False, others: Others = MappingProxyType({})) -> str:
    """Return the resolved config as YAML and, below it, what follows from it on this layout.

    `is_fewest` says that nobody asked for this number of ranks: it is the least that the layout fits. `others` are the
    models beside the policy that are on this machine.
    """
    resolved = yaml.safe_dump(resolved_dict(config), sort_keys=False, allow_unicode=True, width=120)
    rows = [
        *_layout_rows(config, layout, is_fewest),
        *_batch_rows(config, layout),
        *_size_rows(config, layout, others),
        *data_rows(config),
    ]
    width = max(len(name) for name, _ in rows)
    derived = "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
    return f"# Resolved config\n{resolved}\n# What follows from it\n{derived}\n"


def _layout_rows(config: Config, layout: Layout, is_fewest: bool) -> Iterable[tuple[str, str]]:
    yield "ranks", f"{layout.world_size} = dp {layout.dp} x tp {layout.tp} x pp {layout.pp} x cp {layout.cp}"
    if is_fewest:
        ranks = f"{layout.world_size} rank{'s' if layout.world_size > 1 else ''}"
        yield "planned for", f"{ranks}, the fewest of this layout; --world-size N plans for more"
    if layout.vpp > 1:
        yield "virtual stages", f"{layout.vpp} model chunks per pipeline stage (interleaved schedule)"
    if layout.sp:
        yield "sequence parallelism", f"over the {layout.tp} tp ranks"
    if config.model.moe is not None:
        yield "expert ranks", f"ep {layout.ep} x etp {layout.etp} x edp {layout.edp} x pp {layout.pp}"
    for pp_rank, chunks in enumerate(chunk_layers(config.model, config.parallel)):
        held = ", ".join(f"{chunk.start}-{chunk.stop - 1}" if len(chunk) > 1 else str(chunk.start) for chunk in chunks)
        yield f"layers of pipeline stage {pp_rank}", f"{sum(map(len, chunks))} ({held})"


def _batch_rows(config: Config, layout: Layout) -> Iterable[tuple[str, str]]:
    train = config.train
    if isinstance(config, TeacherCacheConfig):
        yield "a pass", f"over all data, {config.distill.top_k} ids of each trained token written down"
        return
    if isinstance(config, RftConfig):
        answers = f"{config.prompts_per_step} prompts x {config.grpo.group_size} answers"
        yield "a round", f"{answers}, which are then written down"
        return
    if isinstance(config, OnlineDpoConfig):
        section = config.online_dpo
        answers = f"{section.prompts_per_round:,} prompts x {config.grpo.group_size} answers, a pair of each group"
        yield "a round", f"{answers}; then {section.steps_per_round:,} steps by the pairs"
        held = {"start": "the model that the run starts from", "round": "the policy as each round begins"}
        yield "held to", held[section.reference] if section.method.has_reference else "nothing"
    elif isinstance(config, GrpoConfig):
        yield from _update_rows(config, layout)
        return
    sizes = ramp_batch_sizes(train)
    if len(sizes) > 1 and train.batch_ramp is not None:
        ramp = train.batch_ramp
        yield "batch ramp", f"{sizes[0]} to {sizes[-1]} samples, {ramp.increment} at a time, over {ramp.num_samples:,}"
    microbatches = [num_microbatches(config, layout, size) for size in (sizes[0], sizes[-1])]
    first = f"{microbatches[0]} rising to " if len(sizes) > 1 else ""
    yield "microbatches per step", f"{first}{microbatches[-1]} of {train.micro_batch_size} x {train.seq_len} tokens"
    yield "tokens per step", f"{tokens_per_step(train):,}" + (" at the full batch" if len(sizes) > 1 else "")
    if train.num_epochs is not None:
        yield "length", f"{train.num_epochs:g} epochs; the start of a run counts their steps when the data is open"
    else:
        yield "total tokens", f"{tokens_after(train, train.num_steps):,} in {train.num_steps:,} steps"


def _update_rows(config: GrpoConfig, layout: Layout) -> Iterable[tuple[str, str]]:
    """Say what a step of reinforcement learning takes, and the method with everything that its algorithm decides."""
    grpo, method = config.grpo, config.grpo.method
    count = grpo.num_epochs * grpo.num_minibatches
    updates = f"{count} update{'s' if count > 1 else ''}"
    answers = f"{config.prompts_per_step} prompts x {grpo.group_size} answers"
    batch = config.train.global_batch_size
    yield "a step", f"{answers}, {updates} of {batch} answers; {config.train.num_steps:,} steps"
    most = num_microbatches(config, layout, batch)
    size = f"{config.train.micro_batch_size} x {config.train.seq_len} tokens"
    yield "microbatches per update", f"{most} of {size} at most; answers are packed"
    held = f"divergence {method.kl_coefficient:g} x {method.kl_estimator} in the {method.kl_place}"
    advantages: str = method.advantage
    if isinstance(config, PpoConfig):
        ppo = config.ppo
        own = f"{ppo.gae_lambda:g}" if ppo.length_alpha is None else f"1 - 1 / ({ppo.length_alpha:g} tokens)"
        advantages = f"of a critic, gamma {ppo.gamma:g}, lambda {own}"
        first = f"; alone in the first {ppo.critic.warmup_steps} steps" if ppo.critic.warmup_steps else ""
        yield "updates of the critic", f"lr {ppo.critic.optimizer.lr:g}, lambda {ppo.critic_lambda:g}{first}"
    clip = f"{method.surrogate} of {method.ratio} ratios below {1 - method.clip_low:g}, above {1 + method.clip_high:g}"
    yield (
        "method",
        (
            f"advantages {advantages}; {clip}; {method.normalisation}; "
            f"{held if method.kl_coefficient else 'no divergence'}; {method.num_refills} refills"
        ),
    )


def _size_rows(config: Config, layout: Layout, others: Others) -> Iterable[tuple[str, str]]:
    model = config.model
    count, memory = count_parameters(model, config.head), estimate_together(config, layout, others)
    padded = padded_vocab_size(model)
    yield "vocabulary", f"{model.vocab_size:,} ids, padded to {padded:,}"
    yield "parameters", f"{count.total:,} ({count.embedding:,} in the vocabulary)"
    if count.active != count.total:
        yield "active parameters", f"{count.active:,} per token"
    if config.lora is not None:
        trained = count_adapter_parameters(model, config.lora, config.head)
        what = "LoRA and the head" if config.head == "scalar" else "LoRA"
        yield "trained parameters", f"{trained:,} of {what}, {trained / count.total:.3%} of the model's"
    name = "parameters per rank" if config.lora is None else "trained per rank"
    yield name, f"{parameters_per_rank(config, layout):,} on the fullest rank"
    fullest = f"on the fullest rank (pipeline stage {memory.pp_rank}), without buffers and fragmentation"
    yield "estimated memory", f"{_size_text(memory.total)} {fullest}"
    for kind in ("weights", "gradients", "optimizer", "activations", "logits", "other_models"):
        if getattr(memory, kind):
            yield f"  {kind.replace('_', ' ')}", _size_text(getattr(memory, kind))
    yield from _other_rows(config, layout, others)
    needed = memory.total
    if isinstance(config, GrpoConfig):
        num_rows, cache = plan_cache(config)
        answers = f"{num_rows} of up to {config.train.seq_len + 1:,} tokens at once on each of {layout.dp * layout.cp}"
        yield "cache of answers", f"{_size_text(cache)} while answers are drawn: {answers} replicas of the model"
        if config.keeps_reference and config.is_training:
            yield "reference", f"{_size_text(memory.weights)} of the host's memory for each rank"
        needed += max(0, cache - memory.activations - memory.logits)  # which are not there at the same time
    yield "fits in", _fitting_device(needed)
    batch = config.train.global_batch_size
    if model.window_size is not None:
        windowed = sum(window is not None for window in layer_windows(model))
        yield "sliding window", f"{model.window_size:,} keys in {windowed} of {model.num_layers} layers"
    if config.is_training:
        yield (
            f"model TFLOPs per {'update' if isinstance(config, GrpoConfig) else 'step'}",
            f"{flops_per_step(config, batch) / 1e12:,.3f} over all ranks at a batch of {batch}",
        )


def _other_rows(config: Config, layout: Layout, others: Others) -> Iterable[tuple[str, str]]:
    """Say of each model beside the policy what it is and takes, and what all take at once and by turns."""
    for role, second in config.second_models.items():
        if role in others:
            fullest = max(others[role].estimate(config, layout), key=lambda stage: stage.total)
            yield role, f"{others[role].describe()}, {_size_text(fullest.total)} ({second.field}: {second.place})"
        else:
            yield role, f"{second.field}: {second.place} is not on this machine, and not counted"
    if not others:
        return
    parallel = config.parallel
    for is_by_turns, name in ((False, "all at once"), (True, "by turns")):
        update = {"parallel": parallel.model_copy(update={"offload_models": is_by_turns})}
        total = estimate_together(config.model_copy(update=update), layout, others).total
        chosen = ", as here" if is_by_turns == parallel.offload_models else ""
        yield f"  {name}", f"{_size_text(total)} (parallel.offload_models={str(is_by_turns).lower()}{chosen})"


def _fitting_device(num_bytes: int) -> str:
    """Say which of the usual GPUs holds this much and has a tenth left for buffers and fragmentation."""
    sizes = ", ".join(str(size) for size in _DEVICE_GB)
    for size in _DEVICE_GB:
        if num_bytes <= size * _GIB * 0.9:
            return f"a GPU of {size} GB (of the usual {sizes}), a tenth left for buffers and fragmentation"
    return f"no GPU of the usual {sizes} GB; what takes less: more ranks (--world-size), a larger parallel.tp or pp"


def data_rows(config: Config) -> Iterable[tuple[str, str]]:
    """Say which data is on this machine; a plan for another one may name what is not here yet."""
    data = config.data
    places = [("data.tokenizer", data.tokenizer, data.tokenizer)] if data.tokenizer else []
    splits: tuple[Split, ...] = ("train", "validation")
    for split in splits:
        field = config.source_field(split)
        ending = ".bin" if field.startswith("data.") else ""
        places += [(field, each.path, f"{each.path}{ending}") for each in config.sources(split)]
    if config.checkpoint.init_from_hf is not None:
        path = config.checkpoint.init_from_hf
        places.append(("checkpoint.init_from_hf", path, os.path.join(path, "config.json")))
    if config.checkpoint.init_from is not None:
        places.append(("checkpoint.init_from", config.checkpoint.init_from, config.checkpoint.init_from))
    if config.lora is not None and config.lora.init_from is not None:
        path = config.lora.init_from
        places.append(("lora.init_from", path, os.path.join(path, "adapter_config.json")))
    if config.checkpoint.resume not in ("auto", "never"):
        places.append(("checkpoint.resume", config.checkpoint.resume, config.checkpoint.resume))
    if isinstance(config, DistillConfig) and config.is_training and config.distill.cache is not None:
        places.append(("distill.cache", config.distill.cache, os.path.join(config.distill.cache, "cache.json")))
    for name, path, file in places:
        found = "found" if os.path.exists(file) else "not on this machine"
        is_data = name.endswith((".train", ".prompts", ".validation")) and os.path.isfile(file)
        size = f", {_size_text(os.path.getsize(file))}" if is_data else ""
        yield name, f"{path}: {found}{size}"


def _size_text(num_bytes: float) -> str:
    return f"{num_bytes / _GIB:.2f} GiB" if num_bytes >= _GIB / 10 else f"{num_bytes / _MIB:.1f} MiB"

"""Rules of training, schedule and checkpoints: fields that contradict each other or would be ignored."""

from __future__ import annotations

import math
from collections.abc import Iterator

from configs.rules.model import check_unused
from configs.sections.optimizer import OptimizerConfig, ScheduleConfig
from configs.stages import Config


def check_training(config: Config) -> list[str]:
    """Return every rule broken outside architecture and layout, one sentence each with a value that would work."""
    return [
        *_check_ramp(config),
        *_check_recompute_fields(config),
        *_check_precision(config),
        *_check_fp8_fields(config),
        *check_decay(config.schedule, config.optimizer),
        *_check_schedule_fields(config),
        *(() if config.train.num_epochs is not None else check_schedule_length(config)),
        *_check_checkpoint(config),
        *_check_sample(config),
    ]


def _check_ramp(config: Config) -> Iterator[str]:
    train, ramp = config.train, config.train.batch_ramp
    if ramp is None:
        return
    gap = train.global_batch_size - ramp.start
    if gap <= 0:
        yield (
            f"train.batch_ramp.start: {ramp.start} is not below train.global_batch_size={train.global_batch_size}; "
            f"a value that would work: {max(1, train.global_batch_size // 2)}"
        )
    elif gap % ramp.increment:
        works = next(size for size in range(min(ramp.increment, gap), 0, -1) if gap % size == 0)
        yield (
            f"train.batch_ramp.increment: steps of {ramp.increment} do not lead from {ramp.start} to "
            f"train.global_batch_size={train.global_batch_size}; a value that would work: {works}"
        )


def _check_recompute_fields(config: Config) -> Iterator[str]:
    recompute, model = config.train.recompute, config.model
    path, reason = "train.recompute", f"with train.recompute.granularity={config.train.recompute.granularity}"
    if recompute.granularity != "full":
        yield from check_unused(recompute, path, ("method", "num_layers"), reason)
    if recompute.granularity != "selective":
        yield from check_unused(recompute, path, ("modules",), reason)
        return
    if "mlp" in recompute.modules and model.linear_bias:
        # Megatron-Core 0.19.2 hands the bias out of what is recomputed, whose backward pass then calls itself for ever.
        yield (
            f"{path}.modules: an MLP with the biases of model.linear_bias cannot be recomputed alone; a value that "
            "would work: [core_attn]"
        )
    has_dense = model.moe is None or model.moe.num_dense_layers > 0
    applies = {
        "mlp": (has_dense, "a dense MLP"),
        "moe": (model.moe is not None, "model.moe"),
        "moe_act": (model.moe is not None, "model.moe"),
        "mla_up_proj": (model.mla is not None, "model.mla"),
    }
    for module in dict.fromkeys(recompute.modules):
        is_there, needed = applies.get(module, (True, ""))
        if not is_there:
            yield (
                f"{path}.modules: {module} needs {needed}, which this model lacks; a value that would work: [core_attn]"
            )


def _check_precision(config: Config) -> Iterator[str]:
    precision = config.precision
    fp16_fields = ("initial_loss_scale", "min_loss_scale", "loss_scale_window", "loss_scale_hysteresis")
    if precision.compute != "fp16":
        yield from check_unused(precision, "precision", fp16_fields, f"with precision.compute={precision.compute}")
    elif precision.min_loss_scale > precision.initial_loss_scale:
        yield (
            f"precision.min_loss_scale: {precision.min_loss_scale:g} exceeds precision.initial_loss_scale="
            f"{precision.initial_loss_scale:g}; a value that would work: 1.0"
        )


def _check_fp8_fields(config: Config) -> Iterator[str]:
    fp8 = config.precision.fp8
    if fp8 is not None and fp8.recipe != "delayed":
        reason = f"with precision.fp8.recipe={fp8.recipe}"
        yield from check_unused(fp8, "precision.fp8", ("amax_history_len", "amax_compute"), reason)


def check_decay(schedule: ScheduleConfig, optimizer: OptimizerConfig, path: str = "optimizer") -> Iterator[str]:
    """Yield every rule that an optimizer, which the config has at `path`, and the schedule of its rate break."""
    for name, works in (("beta1", 0.9), ("beta2", 0.95)):
        if getattr(optimizer, name) >= 1.0:
            yield f"{path}.{name}: 1.0 never forgets and divides by zero; a value that would work: {works}"
    if schedule.kind != "constant" and optimizer.min_lr > optimizer.lr:
        yield (
            f"{path}.min_lr: {optimizer.min_lr:g} exceeds {path}.lr={optimizer.lr:g}; a value that would work: "
            f"{optimizer.lr / 10:g}"
        )
    if schedule.kind == "wsd" and schedule.wsd_decay == "exponential" and optimizer.min_lr == 0:
        yield f"{path}.min_lr: an exponential decay never reaches 0; a value that would work: {optimizer.lr / 10:g}"


def _check_schedule_fields(config: Config) -> Iterator[str]:
    schedule = config.schedule
    if schedule.warmup_fraction is not None and schedule.warmup_steps > 0:
        yield (
            f"schedule.warmup_fraction: schedule.warmup_steps={schedule.warmup_steps} says too how long it is; "
            "a value that would work: null, or schedule.warmup_steps=0"
        )
    if schedule.kind != "wsd":
        reason = f"with schedule.kind={schedule.kind}"
        yield from check_unused(schedule, "schedule", ("wsd_decay_steps", "wsd_decay"), reason)
    if schedule.kind == "constant":
        yield from check_unused(schedule, "schedule", ("decay_steps",), "with schedule.kind=constant")


def check_schedule_length(config: Config) -> Iterator[str]:
    """Yield where the schedule is longer than the run, whose steps are those of its data with `train.num_epochs`."""
    schedule, num_steps = config.schedule, config.train.num_steps
    if num_steps == 0:
        return
    end, warmup_steps = schedule.decay_steps or num_steps, schedule.count_warmup_steps(num_steps)
    if warmup_steps >= end:
        limit = f"schedule.decay_steps={end}"
        if schedule.decay_steps is None:
            epochs = config.train.num_epochs
            limit = f"train.num_steps={end}" if epochs is None else f"the {end} steps of train.num_epochs={epochs:g}"
        field, given, works = "warmup_steps", f"{warmup_steps} is", f"{end // 10}"
        if schedule.warmup_fraction is not None:
            works = f"{min(0.03, math.floor(100 * (end - 1) / num_steps) / 100):g}"
            field, given = "warmup_fraction", f"{schedule.warmup_fraction:g} makes {warmup_steps} steps, which is"
        yield f"schedule.{field}: {given} not below {limit}; a value that would work: {works}"
        return
    decay = schedule.wsd_decay_steps
    if schedule.kind == "wsd" and decay is not None and warmup_steps + decay > end:
        yield (
            f"schedule.wsd_decay_steps: {decay} do not fit between the {warmup_steps} warm-up steps and step "
            f"{end}; a value that would work: {end - warmup_steps}"
        )


def _check_checkpoint(config: Config) -> Iterator[str]:
    checkpoint = config.checkpoint
    for name in ("init_from", "init_from_hf"):
        if checkpoint.resume not in ("auto", "never") and getattr(checkpoint, name) is not None:
            yield (
                f"checkpoint.{name}: checkpoint.resume names a checkpoint too, and a run starts from one; a value that "
                "would work: null (to continue), or checkpoint.resume=auto (for a warm start)"
            )
    if checkpoint.init_from is not None and checkpoint.init_from_hf is not None:
        yield "checkpoint.init_from_hf: checkpoint.init_from names weights too; a value that would work: null"
    if checkpoint.keep_every is None:
        return
    if checkpoint.save_every is None:
        yield (
            "checkpoint.keep_every: has no effect without checkpoint.save_every; a value that would work: null, or "
            f"checkpoint.save_every={checkpoint.keep_every}"
        )
    elif checkpoint.keep_every % checkpoint.save_every:
        times = max(1, round(checkpoint.keep_every / checkpoint.save_every))
        yield (
            f"checkpoint.keep_every: {checkpoint.keep_every} is no multiple of checkpoint.save_every="
            f"{checkpoint.save_every}; a value that would work: {times * checkpoint.save_every}"
        )


def _check_sample(config: Config) -> Iterator[str]:
    sample, model = config.sample, config.model
    if not sample.prompts:
        return
    if config.data.tokenizer is None:
        yield "data.tokenizer: sample.prompts need a tokenizer directory; set it, or sample.prompts=[]"
    if sample.num_tokens >= model.max_position_embeddings:
        yield (
            f"sample.num_tokens: {sample.num_tokens} leaves no room for a prompt in model.max_position_embeddings="
            f"{model.max_position_embeddings}; a value that would work: {max(1, model.max_position_embeddings // 2)}"
        )
    if sample.top_k is not None and sample.top_k > model.vocab_size:
        yield f"sample.top_k: {sample.top_k} exceeds model.vocab_size={model.vocab_size}; a value that would work: null"

"""Rules of rejection sampling: what it needs of a recipe, and the fields of training that mean nothing to it."""

from __future__ import annotations

from collections.abc import Iterator

from configs.rules.model import check_unused
from configs.sections.base import Section
from configs.stages import Config, RftConfig

_REASON = "in rejection sampling, which trains nothing"
_READ_OF_GRPO = {
    "template", "prompts", "rewards", "reward_model", "environment", "environment_time_limit", "num_reward_workers",
    "group_size", "kl", "max_turns",
}  # fmt: skip
_READ_OF_TRAIN = {"num_steps", "seq_len", "global_batch_size", "recompute"}


def check_rft(config: Config) -> Iterator[str]:
    """Yield every rule of rejection sampling that the config breaks."""
    if not isinstance(config, RftConfig):
        return
    grpo = config.grpo
    if not grpo.prompts:
        yield "grpo.prompts: there is nothing to answer; a value that would work: [{path: data/prompts.jsonl}]"
    if not grpo.rewards and grpo.reward_model is None:
        yield "grpo.rewards: answers need at least one; a value that would work: [{function: exact_match}]"
    for number, source in enumerate(grpo.prompts):
        yield from check_unused(source, f"grpo.prompts[{number}]", ("weight",), "where every prompt is answered once")
    if grpo.environment is not None:
        yield "grpo.environment: answers of one turn are sampled; a value that would work: null"
    if config.lora is not None:
        yield (
            "lora: has no effect in rejection sampling, which trains nothing, and a run of LoRA is sampled with its "
            "adapters anyway; a value that would work: null"
        )
    yield from _check_training(config)


def _check_training(config: RftConfig) -> Iterator[str]:
    """Yield the fields of training and of its methods that differ from their defaults."""
    if config.train.num_steps:
        yield f"train.num_steps: has no effect {_REASON}; a value that would work: 0"
    unread: list[tuple[Section, str, set[str]]] = [
        (config.train, "train", _READ_OF_TRAIN),
        (config.train.recompute, "train.recompute", {"method", "num_layers", "modules"}),
        (config.optimizer, "optimizer", set()),
        (config.schedule, "schedule", set()),
        (config.checkpoint, "checkpoint", {"init_from", "init_from_hf"}),
        (config.sample, "sample", set()),
        (config.log, "log", set()),
        (config.grpo, "grpo", _READ_OF_GRPO),
        (config.grpo.kl, "grpo.kl", set()),
    ]
    for section, path, read in unread:
        names = [name for name in type(section).model_fields if name not in read]
        yield from check_unused(section, path, names, _REASON)
    yield from check_unused(config.data, "data", ("prefetch_steps",), _REASON)

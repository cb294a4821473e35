"""Rules of online DPO: what it does not read of reinforcement learning and of its loss, pairs that fit. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator

from configs.rules.model import check_unused
from configs.rules.preference import unread_fields
from configs.stages import Config, OnlineDpoConfig

_NOT_READ_OF_GRPO = (
    "algorithm", "num_minibatches", "num_epochs", "advantage", "ratio", "surrogate", "clip_low", "clip_high",
    "normalisation", "entropy_bonus", "importance_cap", "num_refills", "gate_tolerance",
)  # fmt: skip


def check_online_dpo(config: Config) -> Iterator[str]:
    """Yield every rule of online DPO that the config breaks."""
    if not isinstance(config, OnlineDpoConfig):
        return
    section, grpo, seq_len = config.online_dpo, config.grpo, config.train.seq_len
    reason = f"with online_dpo.loss={section.loss}"
    yield from check_unused(section, "online_dpo", unread_fields(section), reason)
    if not section.method.has_reference:
        yield from check_unused(section, "online_dpo", ("reference",), f"{reason}, which has none")
    reason = "in online DPO, whose loss is online_dpo.loss"
    yield from check_unused(grpo, "grpo", _NOT_READ_OF_GRPO, reason)
    yield from check_unused(grpo.kl, "grpo.kl", tuple(type(grpo.kl).model_fields), reason)
    if grpo.group_size < 2:
        yield "grpo.group_size: a pair takes two answers to a prompt; a value that would work: 4"
    if config.longest_prompt < 1:
        yield (
            f"rollout.max_new_tokens: two answers of {config.rollout.max_new_tokens} leave no room for their prompt in "
            f"train.seq_len={seq_len}, which holds both; a value that would work: {max(seq_len // 4, 1)}"
        )

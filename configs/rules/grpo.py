"""Rules of reinforcement learning: groups and updates, rewards, and methods whose parts do not fit. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator

from configs.errors import BadInput
from configs.plan.kv_cache import bytes_of_token, slot_length
from configs.rules.model import check_unused
from configs.stages import Config, GrpoConfig, OnlineDpoConfig, PpoConfig, RftConfig


def check_grpo(config: Config) -> Iterator[str]:
    """Yield every rule of rollouts, rewards and policy-gradient methods that the config breaks."""
    if not isinstance(config, GrpoConfig):
        return
    is_pairing = isinstance(config, OnlineDpoConfig)
    if not is_pairing:
        yield from _check_groups(config)
        yield from _check_lengths(config)
    yield from _check_cache(config)
    if not isinstance(config, RftConfig):
        if not is_pairing:
            yield from _check_comparison(config)
            yield from _check_method(config)
        yield from _check_length_of_run(config)
    grpo = config.grpo
    if config.train.num_steps > 0 and not grpo.rewards and grpo.reward_model is None and grpo.environment is None:
        yield "grpo.rewards: answers need at least one; a value that would work: [{function: exact_match}]"
    top_k = config.rollout.top_k
    if top_k is not None and top_k > config.model.vocab_size:
        yield f"rollout.top_k: {top_k} exceeds model.vocab_size={config.model.vocab_size}; a value that would work: 50"
    if "" in config.rollout.stop_strings:
        yield "rollout.stop_strings: an empty text would stop every answer at once; a value that would work: []"
    if config.grpo.environment is None:
        names = ("max_turns", "environment_time_limit")
        yield from check_unused(config.grpo, "grpo", names, "without grpo.environment")


def _check_groups(config: GrpoConfig) -> Iterator[str]:
    grpo, batch = config.grpo, config.train.global_batch_size
    answers = batch * grpo.num_minibatches
    if answers % grpo.group_size:
        works = next(size for size in range(min(grpo.group_size, answers), 0, -1) if answers % size == 0)
        yield (
            f"grpo.group_size: {grpo.group_size} does not divide the {answers} answers of a step "
            f"(train.global_batch_size={batch} times grpo.num_minibatches={grpo.num_minibatches}); a value that would "
            f"work: {works}"
        )


def _check_comparison(config: GrpoConfig) -> Iterator[str]:
    grpo = config.grpo
    is_compared = grpo.method.advantage != "batch" and not isinstance(config, PpoConfig)
    if grpo.group_size == 1 and is_compared:
        yield (
            f"grpo.group_size: a group of one is compared with itself, and grpo.advantage={grpo.method.advantage} is "
            "then 0; a value that would work: 8"
        )
    elif grpo.group_size == 1 and grpo.method.num_refills:
        yield "grpo.num_refills: a group of one has equal rewards always; a value that would work: 0"


def _check_lengths(config: GrpoConfig) -> Iterator[str]:
    seq_len, new = config.train.seq_len, config.rollout.max_new_tokens
    if new >= seq_len:
        yield (
            f"rollout.max_new_tokens: {new} leaves no room for a prompt in train.seq_len={seq_len}; a value that would "
            f"work: {max(seq_len // 2, 1)}"
        )


def _check_cache(config: GrpoConfig) -> Iterator[str]:
    if config.rollout.cache_gib is None:
        return
    try:
        each = bytes_of_token(config)
    except BadInput:
        return  # of the layout, which has rules of its own
    needed = (slot_length(config.train.seq_len + 1) + 1) * each / 2**30
    if config.rollout.cache_gib < needed:
        yield (
            f"rollout.cache_gib: {config.rollout.cache_gib:g} hold no answer of train.seq_len={config.train.seq_len} "
            f"tokens with its prompt, which takes {needed:.3g} GiB on a rank; a value that would work: {8 * needed:.2g}"
        )


def _check_method(config: GrpoConfig) -> Iterator[str]:
    method = config.grpo.method
    if method.kl_coefficient and method.kl_place == "loss" and method.kl_estimator == "k1":
        yield (
            "grpo.kl.estimator: k1 in the loss has a gradient that is 0 on average, and holds nothing; a value that "
            "would work: k2 (or grpo.kl.place=reward)"
        )
    if config.grpo.cut_answers == "leave_out" and method.kl_coefficient and method.kl_place == "reward":
        yield (
            "grpo.cut_answers: leave_out spares the forward passes that a divergence in the rewards needs; a value "
            "that would work: train (or grpo.kl.place=loss)"
        )
    if method.ratio == "sequence" and method.surrogate == "cispo":
        yield "grpo.ratio: cispo clips the ratios of tokens; a value that would work: token"
    if method.clip_low == 1 and method.surrogate == "clip" and config.grpo.clip_low is not None:
        yield "grpo.clip_low: 1 never clips a ratio from below; a value that would work: 0.2"


def _check_length_of_run(config: GrpoConfig) -> Iterator[str]:
    train = config.train
    reason = "in reinforcement learning, whose data grows with every step"
    yield from check_unused(train, "train", ("batch_ramp", "patience"), reason)
    reason = "in reinforcement learning, which is validated on grpo.num_validation_prompts"
    yield from check_unused(train, "train", ("eval_num_samples",), reason)
    if train.num_epochs is not None:
        yield (
            "train.num_epochs: a step of reinforcement learning takes as many prompts as have something to teach; a "
            "value that would work: null, with train.num_steps=200"
        )

"""Rules of PPO: the algorithm that has a critic and the stage that trains one, fields that cannot act. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator

from configs.rules.model import check_unused
from configs.rules.training import check_decay
from configs.sections.ppo import LARGEST_ERROR
from configs.stages import Config, GrpoConfig, PpoConfig, RftConfig


def check_ppo(config: Config) -> Iterator[str]:
    """Yield every rule of critics and of what is made of their values that the config breaks."""
    if not isinstance(config, PpoConfig):
        if isinstance(config, GrpoConfig) and not isinstance(config, RftConfig) and config.grpo.algorithm == "ppo":
            yield "grpo.algorithm: ppo has a critic, which launch/ppo.py trains; a value that would work: grpo"
        return
    grpo, ppo, critic = config.grpo, config.ppo, config.ppo.critic
    if grpo.algorithm != "ppo":
        yield (
            f"grpo.algorithm: {grpo.algorithm} has no critic; a value that would work: ppo (or {grpo.algorithm} with "
            "launch/grpo.py)"
        )
    yield from check_unused(grpo, "grpo", ("advantage",), "with ppo, whose advantages come from the critic")
    if ppo.length_alpha is not None:
        yield from check_unused(ppo, "ppo", ("gae_lambda",), "with ppo.length_alpha, which gives each answer its own")
    method = grpo.method
    if ppo.adaptive_kl is not None and not (method.kl_coefficient and method.kl_place == "reward"):
        yield (
            "ppo.adaptive_kl: there is no divergence in the rewards whose coefficient could adapt; a value that would "
            "work: null (or grpo.kl.place=reward with a grpo.kl.coefficient above 0)"
        )
    yield from _check_horizon(config)
    if critic.warmup_steps and critic.warmup_steps >= config.train.num_steps:
        yield (
            f"ppo.critic.warmup_steps: the policy learns nothing in {critic.warmup_steps} of train.num_steps="
            f"{config.train.num_steps}; a value that would work: {config.train.num_steps // 10}"
        )
    yield from check_decay(config.schedule, critic.optimizer, "ppo.critic.optimizer")


def _check_horizon(config: PpoConfig) -> Iterator[str]:
    """Yield where one step could take the adapting coefficient to 0 or below, which rewards divergence."""
    adaptive = config.ppo.adaptive_kl
    answers = config.train.global_batch_size * config.grpo.num_minibatches
    if adaptive is not None and LARGEST_ERROR * answers >= adaptive.horizon:
        yield (
            f"ppo.adaptive_kl.horizon: in {adaptive.horizon:g} answers an error of {LARGEST_ERROR:g}, the largest that "
            f"counts, would take the coefficient below 0 with the {answers} answers of one step; a value that would "
            f"work: {10 * answers}"
        )

"""Rules of reward models: what one without a vocabulary to speak in cannot do. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator

from configs.rules.model import check_unused
from configs.stages import Config, RewardModelConfig


def check_reward_model(config: Config) -> Iterator[str]:
    """Yield every rule of reward models that the config breaks."""
    if not isinstance(config, RewardModelConfig):
        return
    yield from check_unused(config.sample, "sample", ("prompts",), "in a reward model, which writes nothing")

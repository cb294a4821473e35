"""Cross-field rules of a whole run: every problem at once, before any process group exists. Torch-free.

Each sentence names the field to change and a value that would work.
"""

from __future__ import annotations

from typing import Literal

from configs.fp8 import uses_te_layers
from configs.rules.data import check_data
from configs.rules.distill import check_distill
from configs.rules.fp8 import check_fp8
from configs.rules.grpo import check_grpo
from configs.rules.layout import check_layout
from configs.rules.lora import check_lora
from configs.rules.model import check_model
from configs.rules.online_dpo import check_online_dpo
from configs.rules.ppo import check_ppo
from configs.rules.preference import check_preference
from configs.rules.reward_model import check_reward_model
from configs.rules.rft import check_rft
from configs.rules.stages import check_stage
from configs.rules.training import check_training
from configs.stages import Config


def check_config(config: Config, world_size: int, *, platform: Literal["cpu", "cuda"], has_te: bool) -> list[str]:
    """Return every rule the config breaks on `world_size` ranks, one sentence each; none means it can run.

    `has_te` says whether Transformer Engine is installed.
    """
    return [
        *check_model(config.model),
        *check_data(config),
        *check_training(config),
        *check_stage(config),
        *check_distill(config),
        *check_grpo(config),
        *check_ppo(config),
        *check_preference(config),
        *check_reward_model(config),
        *check_rft(config),
        *check_online_dpo(config),
        *check_fp8(config),
        *check_lora(config, has_te=has_te),
        *check_layout(config, world_size, platform=platform, has_te=uses_te_layers(config, has_te=has_te)),
    ]

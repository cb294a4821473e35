"""Stage name -> how it is built; a new stage adds one entry, and its config class to `configs.stages`."""

from __future__ import annotations

from functools import partial

from trainer.stages.base import BuildStage
from trainer.stages.distill import build_distill_stage
from trainer.stages.grpo import build_grpo_stage
from trainer.stages.next_token import build_next_token_stage
from trainer.stages.online_dpo import build_online_dpo_stage
from trainer.stages.ppo import build_ppo_stage
from trainer.stages.preference import build_preference_stage
from trainer.stages.reward import build_reward_stage
from trainer.stages.sft import build_sft_stage

STAGES: dict[str, BuildStage] = {
    "pretrain": partial(build_next_token_stage, "pretrain"),
    "long_context": partial(build_next_token_stage, "long_context"),
    "sft": build_sft_stage,
    "distill": build_distill_stage,
    "preference": build_preference_stage,
    "reward": build_reward_stage,
    "grpo": build_grpo_stage,
    "online_dpo": build_online_dpo_stage,
    "ppo": build_ppo_stage,
}

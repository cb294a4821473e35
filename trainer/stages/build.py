"""Stage name -> how it is built; a new stage adds one entry, and its config class to `configs.stages`."""

from __future__ import annotations

from functools import partial

from trainer.stages.base import StageKind
from trainer.stages.distill import build_distill_stage
from trainer.stages.grpo import build_grpo_stage
from trainer.stages.next_token import build_next_token_stage
from trainer.stages.online_dpo import build_online_dpo_stage
from trainer.stages.ppo import build_ppo_stage
from trainer.stages.preference import build_preference_stage
from trainer.stages.reward import build_reward_stage
from trainer.stages.sft import build_sft_stage

STAGES: dict[str, StageKind] = {
    "pretrain": StageKind(partial(build_next_token_stage, "pretrain")),
    "long_context": StageKind(partial(build_next_token_stage, "long_context")),
    "sft": StageKind(build_sft_stage),
    "distill": StageKind(build_distill_stage),
    "preference": StageKind(build_preference_stage),
    "reward": StageKind(build_reward_stage),
    "grpo": StageKind(build_grpo_stage),
    "online_dpo": StageKind(build_online_dpo_stage),
    "ppo": StageKind(build_ppo_stage),
}

"""The config class of each training stage. Torch-free plain data: frozen, unknown keys refused, every field documented.

Reading YAML is `configs.load`, what follows from the values is `configs.plan`, rules across fields `configs.rules`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import model_validator

from configs.roles import CRITIC, REWARD, TEACHER, HeadKind, SecondModel
from configs.sections.base import Section
from configs.sections.checkpoint import CheckpointConfig
from configs.sections.comparisons import ComparisonsSection
from configs.sections.data import DataConfig
from configs.sections.distill import DistillSection
from configs.sections.grpo import GrpoSection
from configs.sections.lora import LoraConfig
from configs.sections.model import ModelConfig
from configs.sections.online_dpo import OnlineDpoSection
from configs.sections.optimizer import OptimizerConfig, ScheduleConfig
from configs.sections.parallel import ParallelConfig
from configs.sections.ppo import PpoSection
from configs.sections.precision import PrecisionConfig
from configs.sections.preference import PreferenceSection
from configs.sections.reward_model import RewardModelSection
from configs.sections.rft import RftSection
from configs.sections.rollout import RolloutSection
from configs.sections.run import LogConfig, RunConfig, SampleConfig
from configs.sections.sft import SftSection
from configs.sections.train import TrainConfig

Split = Literal["train", "validation"]


class Config(Section):
    """What every stage of training has: a YAML file with a `base:` chain, and dotted overrides on the command line."""

    is_training: ClassVar[bool] = True
    """Whether the run changes its model's weights."""
    run: RunConfig = RunConfig()
    model: ModelConfig
    lora: LoraConfig | None = None
    """Train low-rank adapters of a frozen model, and a scalar head, instead of its weights; null for none."""
    parallel: ParallelConfig = ParallelConfig()
    precision: PrecisionConfig = PrecisionConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    sample: SampleConfig = SampleConfig()
    log: LogConfig = LogConfig()

    def sources(self, split: Split) -> Sequence[Any]:
        """Return what the run trains on, or what it is validated on."""
        return self.data.train if split == "train" else self.data.validation

    def source_field(self, split: Split) -> str:
        """Return the field that `sources` are listed in."""
        return f"data.{split}"

    @property
    def head(self) -> HeadKind:
        """The head of the model that the run trains."""
        return "vocabulary"

    @property
    def chat_template(self) -> tuple[str, str | None] | None:
        """The field that names the chat template of a stage of conversations, and its value; None for other stages."""
        return None

    @property
    def second_models(self) -> Mapping[str, SecondModel]:
        """The models that the stage needs beside the policy, by role."""
        return {}

    @property
    def packing(self) -> str:
        """How samples are made of documents (`data.packing`)."""
        return self.data.packing

    def packing_setting(self, packing: str) -> tuple[str, str]:
        """Return the field that chooses `packing`, and the value with which it does."""
        return "data.packing", packing

    @property
    def has_document_mask(self) -> bool:
        """Whether attention and positions stay within documents."""
        return self.data.document_mask


class PretrainConfig(Config):
    """Pretraining: the shared sections are all it has."""


class LongContextConfig(Config):
    """Continuation of a trained model on longer samples: the shared sections, and it begins with weights."""


class SftConfig(Config):
    """Supervised fine-tuning: the shared sections, and conversations in the place of `data`'s sources."""

    sft: SftSection = SftSection()

    def sources(self, split: Split) -> Sequence[Any]:
        """Return the sources of conversations."""
        return self.sft.train if split == "train" else self.sft.validation

    def source_field(self, split: Split) -> str:
        """Return the field of the conversations."""
        return f"sft.{split}"

    @property
    def chat_template(self) -> tuple[str, str | None] | None:
        """The field of the chat template, and its value."""
        return "sft.template", self.sft.template

    @property
    def packing(self) -> str:
        """How rows are made of conversations."""
        return self.sft.rows

    def packing_setting(self, packing: str) -> tuple[str, str]:
        """Return the field that chooses `packing`, and the value with which it does."""
        return "sft.packing", "true" if packing == "best_fit" else "false"

    @property
    def has_document_mask(self) -> bool:
        """Attention stays within conversations."""
        return True


class DistillConfig(SftConfig):
    """Learning from a teacher: the conversations of fine-tuning, or pretraining's text where `sft` names none, whose
    targets are another model's distributions."""

    distill: DistillSection = DistillSection()
    rollout: RolloutSection = RolloutSection()

    @property
    def is_of_text(self) -> bool:
        """Whether `data` names what is read."""
        return bool(self.data.train) and not self.sft.train

    def sources(self, split: Split) -> Sequence[Any]:
        """Return the sources of conversations or of text."""
        return Config.sources(self, split) if self.is_of_text else super().sources(split)

    def source_field(self, split: Split) -> str:
        """Return the field of the sources."""
        return Config.source_field(self, split) if self.is_of_text else super().source_field(split)

    @property
    def chat_template(self) -> tuple[str, str | None] | None:
        """The field of the chat template, and its value; None for text."""
        return None if self.is_of_text else super().chat_template

    @property
    def packing(self) -> str:
        """How rows are made of conversations or of documents."""
        return self.data.packing if self.is_of_text else super().packing

    def packing_setting(self, packing: str) -> tuple[str, str]:
        """Return the field that chooses `packing`, and the value with which it does."""
        return Config.packing_setting(self, packing) if self.is_of_text else super().packing_setting(packing)

    @property
    def has_document_mask(self) -> bool:
        """Whether attention stays within conversations, or documents."""
        return self.data.document_mask if self.is_of_text else True

    @property
    def second_models(self) -> Mapping[str, SecondModel]:
        """The teacher, unless what it says is in a cache."""
        teacher = self.distill.teacher
        return {} if teacher is None else {TEACHER: SecondModel("distill.teacher", teacher)}

    @property
    def longest_prompt(self) -> int:
        """Tokens of a prompt at most, so that a row holds it with any answer; the last token is no input."""
        return self.train.seq_len + 1 - self.rollout.max_new_tokens


class TeacherCacheConfig(DistillConfig):
    """What a model says of conversations, for others to learn from: the run's model is the teacher, none is trained."""

    is_training: ClassVar[bool] = False

    @property
    def second_models(self) -> Mapping[str, SecondModel]:
        """None."""
        return {}

    @model_validator(mode="before")
    @classmethod
    def _train_nothing(cls, fields: Any) -> Any:
        """Let `train.num_steps` be left out: there are none."""
        return without_steps(fields)


class ComparisonsConfig(Config):
    """Learning from compared answers: the shared sections, and comparisons in the place of `data`'s sources."""

    section: ClassVar[str]
    """The name of the section that has them."""

    @property
    def comparisons(self) -> ComparisonsSection:
        """The section that has them."""
        found: ComparisonsSection = getattr(self, self.section)
        return found

    def sources(self, split: Split) -> Sequence[Any]:
        """Return the sources of comparisons."""
        return self.comparisons.train if split == "train" else self.comparisons.validation

    def source_field(self, split: Split) -> str:
        """Return the field of the comparisons."""
        return f"{self.section}.{split}"

    @property
    def chat_template(self) -> tuple[str, str | None]:
        """The field of the chat template, and its value."""
        return f"{self.section}.template", self.comparisons.template

    @property
    def packing(self) -> str:
        """How rows are made of comparisons."""
        return self.comparisons.rows

    @property
    def has_document_mask(self) -> bool:
        """Attention stays within answers."""
        return True


class PreferenceConfig(ComparisonsConfig):
    """Learning from preferences: the shared sections, and a loss of pairs of answers."""

    section: ClassVar[str] = "preference"
    preference: PreferenceSection = PreferenceSection()


class RewardModelConfig(ComparisonsConfig):
    """Training a reward model: the shared sections, pairs of answers, and a scalar head."""

    section: ClassVar[str] = "reward"
    reward: RewardModelSection = RewardModelSection()

    @property
    def head(self) -> HeadKind:
        """A value a token, of which an answer's is its reward."""
        return "scalar"


class GrpoConfig(Config):
    """Reinforcement learning from rewards: the shared sections, prompts in the place of `data`'s sources, rollouts."""

    grpo: GrpoSection = GrpoSection()
    rollout: RolloutSection = RolloutSection()

    def sources(self, split: Split) -> Sequence[Any]:
        """Return the sources of prompts."""
        return self.grpo.prompts if split == "train" else self.grpo.validation

    def source_field(self, split: Split) -> str:
        """Return the field of the prompts."""
        return "grpo.prompts" if split == "train" else "grpo.validation"

    @property
    def chat_template(self) -> tuple[str, str | None]:
        """The field of the chat template, and its value."""
        return "grpo.template", self.grpo.template

    @property
    def packing(self) -> str:
        """How rows are made of rollouts."""
        return "best_fit"

    @property
    def has_document_mask(self) -> bool:
        """Attention stays within rollouts."""
        return True

    @property
    def second_models(self) -> Mapping[str, SecondModel]:
        """The reward model, where there is one."""
        source = self.grpo.reward_model
        if source is None:
            return {}
        return {REWARD: SecondModel("grpo.reward_model.init_from", source.init_from, head="scalar")}

    @property
    def prompts_per_step(self) -> int:
        """Prompts whose groups are the answers of one step."""
        return self.train.global_batch_size * self.grpo.num_minibatches // self.grpo.group_size

    @property
    def longest_prompt(self) -> int:
        """Tokens of a prompt at most, so that a row holds it with any answer; the last token is no input."""
        return self.train.seq_len + 1 - self.rollout.max_new_tokens

    @property
    def keeps_reference(self) -> bool:
        """Whether a copy of the weights that the run starts from lies in the memory of the host."""
        return self.grpo.method.kl_coefficient > 0 and self.lora is None


class PpoConfig(GrpoConfig):
    """Reinforcement learning with a critic: prompts, rewards and rollouts as without, and what PPO makes of them."""

    grpo: GrpoSection = GrpoSection(algorithm="ppo")
    ppo: PpoSection = PpoSection()

    @model_validator(mode="before")
    @classmethod
    def _choose_algorithm(cls, fields: Any) -> Any:
        """Let `grpo.algorithm` be left out: there is one."""
        grpo = fields.get("grpo", {}) if isinstance(fields, dict) else None
        return {**fields, "grpo": {"algorithm": "ppo", **grpo}} if isinstance(grpo, dict) else fields

    @property
    def second_models(self) -> Mapping[str, SecondModel]:
        """The critic, and the reward model where there is one."""
        critic, start = self.ppo.critic, self.checkpoint
        field, place = "ppo.critic.init_from", critic.init_from
        if place is None:
            field = "checkpoint.init_from" if start.init_from is not None else "checkpoint.init_from_hf"
            place = start.init_from or start.init_from_hf or start.resume
        is_start = critic.init_from is None
        own = SecondModel(field, place, head="scalar", optimizer=critic.optimizer, is_start=is_start)
        return {CRITIC: own, **super().second_models}


class RftConfig(GrpoConfig):
    """Rejection sampling: prompts, rewards and rollouts as in reinforcement learning, whose answers become data."""

    is_training: ClassVar[bool] = False
    rft: RftSection = RftSection()

    @model_validator(mode="before")
    @classmethod
    def _train_nothing(cls, fields: Any) -> Any:
        """Let `train.num_steps` be left out: there are none."""
        return without_steps(fields)


def without_steps(fields: Any) -> Any:
    """Return the fields of a config with no steps, unless they say how many."""
    train = fields.get("train", {}) if isinstance(fields, dict) else None
    return {**fields, "train": {"num_steps": 0, **train}} if isinstance(train, dict) else fields


class OnlineDpoConfig(GrpoConfig):
    """Online DPO: prompts, rewards and rollouts as in reinforcement learning, whose answers become pairs."""

    online_dpo: OnlineDpoSection = OnlineDpoSection()

    @property
    def packing(self) -> str:
        """How rows are made of pairs."""
        return "pairs"

    @property
    def longest_prompt(self) -> int:
        """Tokens of a prompt at most, so that a row holds two answers to it; their last tokens are no input."""
        return self.train.seq_len // 2 + 1 - self.rollout.max_new_tokens

    @property
    def keeps_reference(self) -> bool:
        """Whether a copy of the weights that the run starts from lies in the memory of the host."""
        section = self.online_dpo
        return section.method.has_reference and section.reference == "start" and self.lora is None


STAGE_CONFIGS: Mapping[str, type[Config]] = {
    "pretrain": PretrainConfig,
    "long_context": LongContextConfig,
    "sft": SftConfig,
    "distill": DistillConfig,
    "teacher_cache": TeacherCacheConfig,
    "preference": PreferenceConfig,
    "reward": RewardModelConfig,
    "grpo": GrpoConfig,
    "ppo": PpoConfig,
    "rft": RftConfig,
    "online_dpo": OnlineDpoConfig,
}
"""The config class of each stage by its name, which its entry point in `launch/` and its recipes' folder have too."""

WITHOUT_STEPS = tuple(stage for stage, config in STAGE_CONFIGS.items() if not config.is_training)
"""Stages that train nothing: what they leave is data."""

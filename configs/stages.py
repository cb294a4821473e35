"""The config class of each training stage. Torch-free plain data: frozen, unknown keys refused, every field documented.

Reading YAML is `configs.load`, what follows from the values is `configs.plan`, rules across fields `configs.rules`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from configs.sections.base import Section
from configs.sections.checkpoint import CheckpointConfig
from configs.sections.data import DataConfig
from configs.sections.lora import LoraConfig
from configs.sections.model import ModelConfig
from configs.sections.optimizer import OptimizerConfig, ScheduleConfig
from configs.sections.parallel import ParallelConfig
from configs.sections.precision import PrecisionConfig
from configs.sections.run import LogConfig, RunConfig, SampleConfig
from configs.sections.sft import SftSection
from configs.sections.train import TrainConfig


class Config(Section):
    """What every stage of training has: a YAML file with a `base:` chain, and dotted overrides on the command line."""

    run: RunConfig = RunConfig()
    model: ModelConfig
    lora: LoraConfig | None = None
    """Train low-rank adapters of a frozen model instead of its weights; null for none."""
    parallel: ParallelConfig = ParallelConfig()
    precision: PrecisionConfig = PrecisionConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    sample: SampleConfig = SampleConfig()
    log: LogConfig = LogConfig()

    def sources(self, split: Literal["train", "validation"]) -> Sequence[Any]:
        """Return what the run trains on, or what it is validated on."""
        return self.data.train if split == "train" else self.data.validation

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

    def sources(self, split: Literal["train", "validation"]) -> Sequence[Any]:
        """Return the sources of conversations."""
        return self.sft.train if split == "train" else self.sft.validation

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


STAGE_CONFIGS: Mapping[str, type[Config]] = {
    "pretrain": PretrainConfig,
    "long_context": LongContextConfig,
    "sft": SftConfig,
}
"""The config class of each stage by its name, which its entry point in `launch/` and its recipes' folder have too."""

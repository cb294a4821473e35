"""The config class of each training stage. Torch-free plain data: frozen, unknown keys refused, every field documented.

Reading YAML is `configs.load`, what follows from the values is `configs.plan`, rules across fields `configs.rules`.
"""

from __future__ import annotations

from configs.sections.base import Section
from configs.sections.checkpoint import CheckpointConfig
from configs.sections.data import DataConfig
from configs.sections.model import ModelConfig
from configs.sections.optimizer import OptimizerConfig, ScheduleConfig
from configs.sections.parallel import ParallelConfig
from configs.sections.precision import PrecisionConfig
from configs.sections.run import LogConfig, RunConfig, SampleConfig
from configs.sections.train import TrainConfig


class Config(Section):
    """A whole run. One YAML file with a `base:` chain, and dotted overrides on the command line."""

    run: RunConfig = RunConfig()
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    precision: PrecisionConfig = PrecisionConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    sample: SampleConfig = SampleConfig()
    log: LogConfig = LogConfig()

"""Training a reward model: pairs of answers in packed rows, each scored where its last trained token is read."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import torch.distributed as dist

from configs.stages import RewardModelConfig
from parallel.collectives import max_over_ranks
from trainer.data.batch import Batch
from trainer.data.sequences import with_margins
from trainer.engine.build import POLICY
from trainer.engine.engine import Engine
from trainer.engine.forward import forward_values
from trainer.engine.state import StepResult, TrainState
from trainer.evaluate.rewards import RewardEvaluator
from trainer.losses.loss import Loss
from trainer.losses.reward import bradley_terry, centering
from trainer.stages.base import StageContext
from trainer.stages.comparisons import sum_answers, sum_comparisons
from trainer.stages.training import TrainingStage


class RewardObjective:
    """The mean loss of a pair of answers by their rewards; figures by TRL's names."""

    mean_names: tuple[str, ...] = ("accuracy", "margin", "mean_reward")

    def __init__(self, center_rewards_coefficient: float, cp_group: dist.ProcessGroup) -> None:
        self._centering, self._cp_group = center_rewards_coefficient, cp_group
        self.extremes: list[torch.Tensor] = []
        """Of each microbatch the largest of its rewards taken negative, and the largest; minus infinity for none."""

    def forward(self, model: Any, batch: Batch) -> torch.Tensor:
        """Return the values of tokens `[batch, seq]`; hidden states but from the last chunk."""
        return forward_values(model, batch)

    def loss(self, output: torch.Tensor, batch: Batch) -> Loss:
        """Return the summed loss of one microbatch's pairs. Collective: all cp ranks must call this."""
        rewards, is_here = sum_answers(output, batch, self._cp_group)  # one token of an answer has a label
        chosen, rejected = rewards.view(-1, 2).t()
        losses = bradley_terry(chosen, rejected, batch.sequences["margin"])
        if self._centering:
            losses = losses + self._centering * centering(chosen, rejected)
        pairs = rewards.detach().view(-1, 2)
        if len(pairs):  # known without waiting for the device
            counts = (is_here > 0).unsqueeze(-1)
            ends = (torch.where(counts, -pairs, -math.inf).amax(), torch.where(counts, pairs, -math.inf).amax())
            self.extremes.append(torch.stack(ends))
        difference = pairs[:, 0] - pairs[:, 1]
        figures = ((difference > 0).float(), difference, pairs.mean(dim=1))
        weighed = {name: (one, torch.ones_like(one)) for name, one in zip(self.mean_names, figures, strict=True)}
        return sum_comparisons(losses, weighed, is_here)

    def count(self, batch: Batch) -> torch.Tensor:
        """Return the number of pairs whose chosen answer's reward is here."""
        return batch.columns["ends"].sum(dtype=torch.int32)


class RewardStage(TrainingStage):
    """One update a step on the next pairs."""

    objective: RewardObjective

    def step(self, state: TrainState) -> StepResult:
        """Train on the next global batch. Collective: all ranks of the world must call this."""
        self.objective.extremes.clear()
        result = super().step(state)
        found = self.objective.extremes
        own = torch.stack(found).amax(0).tolist() if found else [-math.inf] * 2
        negative, largest = max_over_ranks(own, self._engine.mesh.device)
        return dataclasses.replace(result, metrics={**result.metrics, "min_reward": -negative, "max_reward": largest})


def build_reward_stage(context: StageContext) -> RewardStage:
    """Return the stage that reads packed pairs in order."""
    config, corpus, mesh, engine = context.config, context.corpus, context.mesh, context.models[POLICY]
    assert isinstance(engine, Engine) and isinstance(config, RewardModelConfig)
    objective = RewardObjective(config.reward.center_rewards_coefficient, mesh.cp_group)
    ranks: Any = {"dp_rank": mesh.dp_rank, "dp_size": mesh.dp_size}
    reader = corpus.build_reader(**ranks, finish=with_margins)
    readers = corpus.build_validation_readers(**ranks, finish=with_margins)
    return RewardStage("reward", engine, reader, objective, RewardEvaluator(readers))

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
from trainer.data.sequences import sum_by_sequence, with_margins
from trainer.engine.build import POLICY
from trainer.engine.engine import Engine
from trainer.engine.forward import forward_values
from trainer.engine.state import StepResult, TrainState
from trainer.evaluate.rewards import RewardEvaluator
from trainer.losses.loss import Loss, Mean
from trainer.losses.reward import bradley_terry, centering
from trainer.stages.base import StageContext
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
        """Return the summed loss of one microbatch's pairs. Collective: all cp ranks must call this.

        Every cp rank computes each loss from the rewards that all of them have, with the gradient of its own; its value
        counts where the chosen answer's reward is.
        """
        num_sequences = len(batch.sequences["side"])
        counted = torch.where(batch.loss_mask > 0, output, 0.0)
        own = sum_by_sequence(counted, batch.columns["sequence"], num_sequences)
        whole = own.detach().clone()
        dist.all_reduce(whole, group=self._cp_group)
        chosen, rejected = (whole + (own - own.detach())).view(-1, 2).t()
        is_here = sum_by_sequence(batch.columns["ends"].float(), batch.columns["sequence"], num_sequences)[::2]
        losses = bradley_terry(chosen, rejected, batch.sequences["margin"])
        if self._centering:
            losses = losses + self._centering * centering(chosen, rejected)
        total = (is_here * losses.detach() + (losses - losses.detach())).sum()
        rewards = whole.view(-1, 2)
        if num_sequences:  # known without waiting for the device
            counts = (is_here > 0).unsqueeze(-1)
            ends = (torch.where(counts, -rewards, -math.inf).amax(), torch.where(counts, rewards, -math.inf).amax())
            self.extremes.append(torch.stack(ends))
        difference, both = rewards[:, 0] - rewards[:, 1], rewards.mean(dim=1)
        figures = ((difference > 0).float(), difference, both)
        means = {
            name: Mean((is_here * figure).sum(), is_here.sum())
            for name, figure in zip(self.mean_names, figures, strict=True)
        }
        return Loss(total, means)

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

"""The critic of PPO: what its values make of a step's rollouts, and the objective that it is updated by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from configs.sections.ppo import PpoSection
from trainer.data.batch import Batch
from trainer.engine.forward import forward_values
from trainer.losses.cross_entropy import count_tokens
from trainer.losses.loss import Loss, Mean
from trainer.losses.value import clipped_value_loss
from trainer.rl.advantages import whiten_tokens
from trainer.rl.gae import compute_gae, explain_variance, fit_lambda, lay_rewards
from trainer.rl.rollout import Rollout, Values

VALUES, RETURNS = "values", "returns"
"""Columns of the critic's batches, fp32 `[micro_batch, seq]`: what it said before its update, and what it learns."""


@dataclass(frozen=True)
class Judgement:
    """What a step's rollouts are worth, prediction by prediction; 0 where nothing was drawn."""

    advantages: Values
    returns: Values
    metrics: dict[str, float]


def judge(
    rollouts: Sequence[Rollout], values: Values, divergences: Values | None, coefficient: float, section: PpoSection
) -> Judgement:
    """Return advantages for the policy and returns for the critic, of rollouts that all have a score.

    `values` are the critic's of predictions: of the conversation up to the token before the one that is predicted.
    `divergences`, where they are a part of the reward, are taken from it token by token, times the coefficient.
    """
    if not rollouts:
        return Judgement({}, {}, {})
    drawn = [rollout.trained() for rollout in rollouts]
    lengths = np.array([rollout.num_sampled for rollout in rollouts], dtype=np.int64)
    said = np.concatenate([values[one.key][own] for one, own in zip(rollouts, drawn, strict=True)]).astype(np.float64)
    penalties = None
    if divergences is not None:
        apart = [divergences[one.key][own] for one, own in zip(rollouts, drawn, strict=True)]
        penalties = coefficient * np.concatenate(apart).astype(np.float64)
    scores = np.array([rollout.score for rollout in rollouts], dtype=np.float64)
    rewards = lay_rewards(scores, lengths, penalties)
    lam = section.gae_lambda if section.length_alpha is None else fit_lambda(lengths, section.length_alpha)
    advantages = compute_gae(rewards, said, lengths, section.gamma, lam)
    returns = said + compute_gae(rewards, said, lengths, section.gamma, section.critic_lambda)
    metrics = {"critic/vf_explained_var": explain_variance(said, returns)}
    for name, own in ((VALUES, said), (RETURNS, returns)):
        metrics |= {f"critic/{name}/{kind}": float(getattr(own, kind)()) for kind in ("mean", "max", "min")}
    if section.whiten_advantages:
        advantages = whiten_tokens(advantages)
    return Judgement(_lay(rollouts, advantages, lengths), _lay(rollouts, returns, lengths), metrics)


def _lay(rollouts: Sequence[Rollout], tokens: np.ndarray, lengths: np.ndarray) -> Values:
    parts = np.split(tokens, np.cumsum(lengths)[:-1])
    return {rollout.key: rollout.lay(own) for rollout, own in zip(rollouts, parts, strict=True)}


class ValueObjective:
    """The clipped squared error of values, a mean over the tokens that the policy drew."""

    mean_names: tuple[str, ...] = ("critic/vf_loss", "critic/vf_clipfrac", "critic/vpred_mean")

    def __init__(self, clip: float | None) -> None:
        self._clip = clip

    def forward(self, model: Any, batch: Batch) -> torch.Tensor:
        """Return the values `[batch, seq]`; hidden states but from the last chunk."""
        return forward_values(model, batch)

    def loss(self, output: torch.Tensor, batch: Batch) -> Loss:
        """Return the summed loss of one microbatch."""
        is_trained, columns = batch.loss_mask > 0, batch.columns
        values = torch.where(is_trained, output.float(), 0.0)
        losses, is_clipped = clipped_value_loss(values, columns[VALUES], columns[RETURNS], self._clip)
        losses = torch.where(is_trained, losses, 0.0)
        count = count_tokens(batch.loss_mask)
        figures = (losses.detach(), torch.where(is_trained, is_clipped.float(), 0.0), values.detach())
        means = {name: Mean(one.sum(), count) for name, one in zip(self.mean_names, figures, strict=True)}
        return Loss(losses.sum(), means)

    def count(self, batch: Batch) -> torch.Tensor:
        """Return the number of tokens that the policy drew."""
        return count_tokens(batch.loss_mask)

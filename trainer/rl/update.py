"""A step's rollouts -> the microbatches of its updates, what other passes say of them, and their advantages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from configs.sections.grpo import PolicyMethod
from configs.stages import GrpoConfig
from parallel.collectives import gather_objects
from trainer.data.batch import Batch
from trainer.engine.engine import Engine
from trainer.engine.forward import score_language_model
from trainer.engine.sharded_model import ShardedModel
from trainer.losses.policy import compute_kl
from trainer.model.token_scores import TokenScores
from trainer.rl.advantages import compute_advantages, spread_over_tokens, whiten_tokens
from trainer.rl.objective import SAMPLED, PolicyObjective
from trainer.rl.placement import Placement
from trainer.rl.rollout import Rollout, Values


class Reference(Protocol):
    """Weights that a policy is held to."""

    def in_place(self) -> AbstractContextManager[None]:
        """Compute with them within the context."""
        ...


@dataclass(frozen=True)
class Minibatch:
    """The rollouts of one update and where they lie."""

    rollouts: Sequence[Rollout]
    placement: Placement
    batches: list[Batch]
    """This rank's microbatches, with the columns that weigh tokens."""

    def with_columns(self, columns: Mapping[str, Values]) -> list[Batch]:
        """Return the microbatches with values of their predictions."""
        laid = {
            name: self.placement.column([values[rollout.key] for rollout in self.rollouts])
            for name, values in columns.items()
        }
        return [
            replace(batch, columns={**batch.columns, **{name: column[number] for name, column in laid.items()}})
            for number, batch in enumerate(self.batches)
        ]


def score_rollouts(
    model: ShardedModel, minibatches: Sequence[Minibatch], forward: Callable[[Any, Batch], Any]
) -> Values:
    """Return what a model's forward pass says of every prediction of the rollouts.

    `forward` is as `score_placed` takes it. Collective: all ranks of the world must call this.
    """
    read = score_placed(model, [(one.placement, one.batches) for one in minibatches], forward)
    return {
        rollout.key: own
        for minibatch, columns in zip(minibatches, read, strict=True)
        for rollout, own in zip(minibatch.rollouts, columns, strict=True)
    }


def score_placed(
    model: ShardedModel, placed: Sequence[tuple[Placement, Sequence[Batch]]], forward: Callable[[Any, Batch], Any]
) -> list[list[NDArray[np.floating]]]:
    """Return what a model's forward pass says of every prediction of what lies in each placement's batches, fp32.

    `forward` gives `[micro_batch, seq]`, or `TokenScores`, of which these are the log-probabilities. Collective: all
    ranks of the world must call this.
    """
    scored = [model.score(batches, forward) for _, batches in placed]
    mesh = model.mesh
    own = None
    if mesh.is_last_pp_stage and mesh.tp_rank == 0 and mesh.cp_rank == 0:
        tensors = [[one.log_probs if isinstance(one, TokenScores) else one for one in outputs] for outputs in scored]
        own = [[one.float().cpu().numpy() for one in outputs] for outputs in tensors]
    found = {rank: columns for rank, columns in gather_objects((mesh.dp_rank, own)) if columns is not None}
    return [
        placement.take_back([found[rank][number] for rank in range(mesh.dp_size)])
        for number, (placement, _) in enumerate(placed)
    ]


class PolicyUpdates:
    """Makes minibatches and their columns. Every public method is collective but `cut`."""

    def __init__(self, config: GrpoConfig, engine: Engine, objective: PolicyObjective) -> None:
        self._config, self._engine, self._objective = config, engine, objective
        self.method: PolicyMethod = config.grpo.method

    @property
    def is_divergence_rewarded(self) -> bool:
        """Whether the divergence from the reference is a part of the reward."""
        return self.method.kl_coefficient > 0 and self.method.kl_place == "reward"

    def leave_out_idle(self, rollouts: Sequence[Rollout], advantages: Values) -> tuple[list[Rollout], Values]:
        """Return the rollouts that an update can learn from, and their advantages, so scaled that nothing changes.

        Where all advantages of a rollout are 0, as in a group of one score, its gradient is 0 too, unless there is a
        divergence or an entropy in the loss, or routers are balanced by its tokens. It costs no forward pass then, and
        what the loss is divided by, which counts it no longer, is made good in the advantages of the others. Several
        minibatches are then dealt of the rollouts that stay, and figures of an update are means over these.
        """
        method, model = self.method, self._config.model
        if method.kl_coefficient or method.entropy_bonus or model.moe is not None:
            return list(rollouts), advantages
        useful = [rollout for rollout in rollouts if advantages[rollout.key].any()]
        is_by_token = method.normalisation == "token_mean"
        kept, whole = (
            sum(rollout.num_sampled if is_by_token else 1 for rollout in some) for some in (useful, rollouts)
        )
        return useful, {rollout.key: advantages[rollout.key] * (kept / whole) for rollout in useful}

    def cut(self, rollouts: Sequence[Rollout]) -> list[Minibatch]:
        """Deal rollouts, in order, into `grpo.num_minibatches` of about as many."""
        train, mesh = self._config.train, self._engine.mesh
        minibatches = []
        for part in np.array_split(np.arange(len(rollouts)), self._config.grpo.num_minibatches):
            mine = [rollouts[int(number)] for number in part]
            lengths = [len(rollout.token_ids) - 1 for rollout in mine]
            placement = Placement(lengths, train.seq_len, train.micro_batch_size, mesh)
            batches = [self._objective.finish(batch) for batch in placement.build(mine)]
            minibatches.append(Minibatch(mine, placement, batches))
        return minibatches

    def score(self, minibatches: Sequence[Minibatch], reference: Reference | None = None) -> Values:
        """Return the log-probabilities of what was drawn in the rollouts, by the policy or by its reference.

        What stands for other predictions says nothing. Collective: all ranks of the world must call this.
        """
        temperature = self._config.rollout.temperature

        def forward(model: Any, batch: Batch) -> Any:
            return score_language_model(model, batch, temperature=temperature)

        with nullcontext() if reference is None else reference.in_place():
            return score_rollouts(self._engine, minibatches, forward)

    def divergences(self, rollouts: Sequence[Rollout], old: Values, reference: Values) -> Values:
        """Return the estimated divergence from the reference at each prediction; 0 where nothing was drawn."""
        found = {}
        for rollout in rollouts:
            key, drawn = rollout.key, rollout.trained()
            policy, frozen = (torch.from_numpy(values[key][drawn].astype(np.float64)) for values in (old, reference))
            found[key] = rollout.lay(compute_kl(policy, frozen, self.method.kl_estimator).numpy())
        return found

    def advantages(self, rollouts: Sequence[Rollout], divergences: Values | None = None) -> Values:
        """Return the advantages of the predictions of rollouts that all have a score; 0 where nothing was drawn.

        `divergences` are those of predictions where they are a part of the reward.
        """
        if not rollouts:
            return {}
        method = self.method
        rewards = np.array([rollout.score for rollout in rollouts], dtype=np.float64)
        groups = np.array([rollout.group for rollout in rollouts], dtype=np.int64)
        lengths = np.array([rollout.num_sampled for rollout in rollouts], dtype=np.int64)
        starts = np.cumsum(lengths) - lengths
        penalties = None
        if self.is_divergence_rewarded:
            assert divergences is not None
            drawn = [divergences[rollout.key][rollout.trained()] for rollout in rollouts]
            penalties = method.kl_coefficient * np.concatenate(drawn).astype(np.float64)
            if method.advantage != "batch":
                rewards, penalties = rewards - np.add.reduceat(penalties, starts), None
        spread = spread_over_tokens(compute_advantages(rewards, groups, method.advantage), lengths, penalties)
        if method.advantage in ("batch", "group_mean_batch"):
            spread = whiten_tokens(spread)
        parts = np.split(spread, starts[1:])
        return {rollout.key: rollout.lay(own) for rollout, own in zip(rollouts, parts, strict=True)}

    def with_columns(self, minibatch: Minibatch, columns: Mapping[str, Values]) -> list[Batch]:
        """Return a minibatch's microbatches with values of its predictions, and what generation said of them."""
        sampled = {rollout.key: rollout.lay(rollout.log_probs) for rollout in minibatch.rollouts}
        return minibatch.with_columns({SAMPLED: sampled, **columns})

"""Proximal policy optimization: GRPO's rollouts and updates, with advantages from a critic that learns beside."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from configs.roles import CRITIC, POLICY
from configs.stages import PpoConfig
from trainer.engine.engine import Engine
from trainer.engine.forward import forward_values
from trainer.engine.state import StepResult, TrainState
from trainer.optim.learning_rate import compute_learning_rate
from trainer.rl.critic import RETURNS, VALUES, ValueObjective, judge
from trainer.rl.kl_controller import KlController
from trainer.rl.rollout import Rollout, Values
from trainer.rl.update import score_rollouts
from trainer.stages.base import StageContext
from trainer.stages.grpo import GrpoStage, UpdatePlan, open_policy_answers, train_on


@dataclass(frozen=True)
class CriticPlan(UpdatePlan):
    """What the updates of both models are made of."""

    critic_columns: Mapping[str, Values] = field(default_factory=dict)
    """Of the critic's batches."""


class PpoStage(GrpoStage):
    """One step: answers to the next prompts, their rewards, and the updates of the critic and of the policy."""

    name = "ppo"

    def __init__(self, critic: Engine, *shared: Any) -> None:
        """`shared` are the arguments of `GrpoStage`."""
        super().__init__(*shared)
        config = self._config
        assert isinstance(config, PpoConfig)
        self._ppo, self._critic = config.ppo, critic
        self._value_objective = ValueObjective(config.ppo.critic.value_clip)
        self._controller = KlController(config.grpo.method.kl_coefficient, config.ppo.adaptive_kl)
        self._is_critics_fault = False
        self.parts = {**self.parts, CRITIC: critic}

    def describe_fault(self) -> str:
        """Return what made the last step non-finite, and in which model. Collective: all ranks of the world."""
        if not self._is_critics_fault:
            return super().describe_fault()
        return f"critic: {self._critic.describe_fault()}; lower ppo.critic.optimizer.lr"

    def state_dict(self) -> Mapping[str, Any]:
        """Return the cursor of the prompts and the coefficient of the divergence."""
        return {**super().state_dict(), "kl_controller": self._controller.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set both."""
        super().load_state_dict(state)
        self._controller.load_state_dict(state["kl_controller"])

    def _prepare(self, rollouts: Sequence[Rollout]) -> CriticPlan:
        """Return what the updates of both models are made of."""
        updates, coefficient = self._updates, self._controller.coefficient
        _, trained = self._choose(rollouts)
        minibatches = updates.cut(trained)
        old, reference = self._score(minibatches)
        values = score_rollouts(self._critic, minibatches, forward_values)
        divergences = None
        if updates.is_divergence_rewarded:
            assert old is not None and reference is not None
            divergences = updates.divergences(trained, old, reference)
        judged = judge(trained, values, divergences, coefficient, self._ppo)
        columns = self._columns(judged.advantages, old, reference)
        learnt = {VALUES: values, RETURNS: judged.returns}
        return CriticPlan(minibatches, columns, judged.advantages, divergences, coefficient, judged.metrics, learnt)

    def _update(self, plan: UpdatePlan, state: TrainState) -> StepResult:
        """Update the critic, and then, but in the first steps that are its alone, the policy."""
        config, critic = self._config, self._ppo.critic
        assert isinstance(plan, CriticPlan)
        started = time.perf_counter()
        rate = compute_learning_rate(state.step, config.train.num_steps, critic.optimizer, config.schedule)
        laid = [minibatch.with_columns(plan.critic_columns) for minibatch in plan.minibatches]
        learnt = train_on(self._critic, laid * config.grpo.num_epochs, self._value_objective, rate)
        seconds = time.perf_counter() - started
        self._is_critics_fault = learnt.is_fault
        figures = {
            **learnt.metrics,
            "critic/grad_norm": learnt.grad_norm,
            "critic/lr": learnt.learning_rate,
            "timing_s/update_critic": seconds,
        }
        if learnt.is_fault or state.step < critic.warmup_steps:
            nothing = dict.fromkeys(("forward_backward", "optimizer"), 0.0)
            return replace(learnt, metrics=figures, phase_seconds={**nothing, "critic": seconds})
        result = super()._update(plan, state)
        figures |= self._adapt(plan)
        return replace(
            result,
            is_applied=result.is_applied and (learnt.is_applied or learnt.is_empty),
            is_overflow_expected=result.is_overflow_expected or learnt.is_overflow_expected,
            metrics={**result.metrics, **figures},
            phase_seconds={**result.phase_seconds, "critic": seconds},
        )

    def _adapt(self, plan: UpdatePlan) -> dict[str, float]:
        """Move the coefficient of a divergence in the rewards, and return what it was and how far answers diverged."""
        if plan.divergences is None:
            return {}
        apart = [float(own.sum()) for own in plan.divergences.values()]
        mean = float(np.mean(apart)) if apart else 0.0
        self._controller.update(mean, len(apart))
        return {"objective/kl": mean, "actor/reward_kl_penalty_coeff": plan.kl_coefficient}


def build_ppo_stage(context: StageContext) -> PpoStage:
    """Return the stage with its prompts open and its rewards running. Raises BadInput for what cannot be."""
    config, models = context.config, context.models
    engine, critic = models[POLICY], models[CRITIC]
    assert isinstance(engine, Engine) and isinstance(critic, Engine) and isinstance(config, PpoConfig)
    return PpoStage(critic, config, engine, *open_policy_answers(config, models, context.corpus))

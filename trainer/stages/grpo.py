"""Reinforcement learning from rewards that can be computed: answers, scores, advantages, updates, on one engine."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from configs.roles import POLICY, REWARD
from configs.stages import GrpoConfig, Split
from parallel.watch.phases import phase
from trainer.data.batch import Batch
from trainer.data.chat.encode import ChatEncoder
from trainer.data.chat.prompts import PromptFile, PromptReader
from trainer.data.chat.template import load_template
from trainer.data.corpus import Corpus
from trainer.engine.engine import Engine
from trainer.engine.objective import Objective
from trainer.engine.parts import Checkpointed
from trainer.engine.sharded_model import ShardedModel
from trainer.engine.sharded_state import RandomGenerators
from trainer.engine.state import StepResult, TrainState
from trainer.environments.answering import EnvironmentPool
from trainer.environments.environment import Environment, load_environment
from trainer.environments.scoring import ENVIRONMENT, RewardPool
from trainer.evaluate.answers import ScoredAnswer
from trainer.evaluate.validation import VALIDATION_SCORE, Evaluation
from trainer.optim.learning_rate import compute_learning_rate
from trainer.rl.collect import Collector, Seconds, count_cores, scores_here
from trainer.rl.gate import check_agreement, default_tolerance
from trainer.rl.metrics import combine, describe_rewards, describe_rollouts, describe_work, find_useful_groups
from trainer.rl.objective import ADVANTAGES, OLD, REFERENCE, PolicyObjective
from trainer.rl.reference import AdapterlessReference, ReferenceWeights, open_reference
from trainer.rl.reward_model import RewardModel
from trainer.rl.rollout import Rollout, Values
from trainer.rl.talk import begin_conversation
from trainer.rl.update import Minibatch, PolicyUpdates
from trainer.stages.base import StageContext

log = logging.getLogger(__name__)

_HUGE = 1e6
"""Advantages of rewards that anyone means to give are far below this."""


@dataclass(frozen=True)
class UpdatePlan:
    """What the updates of a step are made of."""

    minibatches: Sequence[Minibatch]
    columns: Mapping[str, Values]
    """Of the policy's batches."""
    advantages: Values
    """Of all rollouts that have a score."""
    divergences: Values | None = None
    """Of these, where they are a part of the reward."""
    kl_coefficient: float = 0.0
    """What they are multiplied by there."""
    metrics: Mapping[str, float] = field(default_factory=dict)


class GrpoStage:
    """One step: groups of answers to the next prompts, their rewards, and the updates that they are worth."""

    name = "grpo"

    def __init__(
        self,
        config: GrpoConfig,
        engine: Engine,
        reader: PromptReader,
        validation: Sequence[PromptFile],
        collector: Collector,
    ) -> None:
        self._config, self._engine = config, engine
        self._reader, self._validation, self._collector = reader, validation, collector
        method, mesh = config.grpo.method, engine.mesh
        self._objective = PolicyObjective(
            method,
            temperature=config.rollout.temperature,
            max_new_tokens=config.rollout.max_new_tokens,
            cp_group=mesh.cp_group,
        )
        self._updates = PolicyUpdates(config, engine, self._objective)
        parts: dict[str, Checkpointed] = {POLICY: engine, "rng": RandomGenerators(mesh)}
        self._reference: ReferenceWeights | AdapterlessReference | None = None
        if method.kl_coefficient:
            self._reference = open_reference(engine, "grpo.kl.coefficient", "0")
            if isinstance(self._reference, ReferenceWeights):
                parts["reference"] = self._reference
        self.parts: Mapping[str, Checkpointed] = parts
        self._is_through_gate = False
        self._largest_advantage = 0.0
        """Of the last step, by its absolute value."""

    def start(self, state: TrainState) -> None:
        """Remember the weights that the policy is held to, unless a checkpoint has brought them. Collective."""
        if isinstance(self._reference, ReferenceWeights) and not self._reference.is_known:
            self._reference.remember()

    def step(self, state: TrainState) -> StepResult:
        """Answer, score and update. Collective: all ranks of the world must call this."""
        started, seconds = time.perf_counter(), Seconds()
        step = state.step + 1
        rollouts, replaced = self._collect(step, seconds)
        everything = [*rollouts, *replaced]
        tell_failures(step, everything)
        scoring = time.perf_counter()
        with phase("score"):
            plan = self._prepare(rollouts)
        seconds_score = time.perf_counter() - scoring
        advantages, divergences = plan.advantages, plan.divergences
        self._largest_advantage = max((float(abs(one).max()) for one in advantages.values()), default=0.0)
        result = self._update(plan, state)
        phases = {
            "generate": seconds.generate, "reward": seconds.reward, "score": seconds_score, **result.phase_seconds,
        }  # fmt: skip
        rest = time.perf_counter() - started - sum(phases.values())
        return replace(
            result,
            num_samples=len(everything),
            metrics={
                **result.metrics,
                **plan.metrics,
                **describe_rollouts(everything, advantages),
                **describe_rewards(everything if divergences is None else rollouts, divergences, plan.kl_coefficient),
                **describe_work(result.num_tokens, phases, seconds.reports),
                "rollout/num_prompts_too_long": float(self._reader.num_too_long),
            },
            phase_seconds={"data": rest, **phases},
            rollouts=[self._record(step, one, advantages) for one in everything],
        )

    def evaluate(self) -> Evaluation:
        """Return the mean score of likeliest answers to each source's first prompts. Collective: all ranks."""
        return evaluate_prompts(self._collector, self._validation, self._config.grpo.num_validation_prompts)

    def describe_fault(self) -> str:
        """Return what made the last step non-finite. Collective: all ranks of the world must call this."""
        found = self._engine.describe_fault()
        if self._largest_advantage < _HUGE:
            return found
        return f"{found}; its advantages reach {self._largest_advantage:.2g}: lower the weights of grpo.rewards"

    def state_dict(self) -> Mapping[str, Any]:
        """Return the cursor of the prompts; everything else of a step follows from its number."""
        return {"prompts": self._reader.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set the cursor of the prompts."""
        self._reader.load_state_dict(state["prompts"])

    def close(self) -> None:
        """End the processes that score."""
        self._collector.close()

    @property
    def _is_off_policy(self) -> bool:
        """Whether some update of a step meets a policy that is not the one that gave the answers."""
        return self._config.grpo.num_epochs * self._config.grpo.num_minibatches > 1

    def _collect(self, step: int, seconds: Seconds) -> tuple[list[Rollout], list[Rollout]]:
        """Return a step's rollouts, and those of groups that were replaced, which are not trained.

        Groups of equal scores are replaced as often as `num_refills` says; those of the last round stay.
        """
        wanted, refills = self._config.prompts_per_step, self._config.grpo.method.num_refills
        num_groups = 0
        kept: list[Rollout] = []
        replaced: list[Rollout] = []
        num_missing = wanted
        for refill in range(refills + 1):
            rollouts = self._collector.collect(self._reader.draw(num_missing), step, num_groups, seconds)
            is_last = refill == refills
            useful = {one.group for one in rollouts} if is_last else find_useful_groups(rollouts)
            num_groups += num_missing
            kept += [rollout for rollout in rollouts if rollout.group in useful]
            replaced += [rollout for rollout in rollouts if rollout.group not in useful]
            num_missing -= len(useful)
            if not num_missing:
                break
            if not is_last:
                log.info(
                    "step %d: %d of %d groups teach nothing (equal scores), and are replaced", step, num_missing, wanted
                )
        return kept, replaced

    def _choose(self, rollouts: Sequence[Rollout]) -> tuple[list[Rollout], list[Rollout]]:
        """Return the rollouts that have a score, and those of them that are trained."""
        scored = [rollout for rollout in rollouts if rollout.score is not None]
        return scored, [one for one in scored if self._config.grpo.cut_answers == "train" or one.finish != "length"]

    def _prepare(self, rollouts: Sequence[Rollout]) -> UpdatePlan:
        """Return what the updates of a step are made of."""
        updates = self._updates
        scored, trained = self._choose(rollouts)
        if updates.is_divergence_rewarded:
            minibatches = updates.cut(trained)
            old, reference = self._score(minibatches)
            assert old is not None and reference is not None
            divergences = updates.divergences(scored, old, reference)
            advantages = laid = updates.advantages(scored, divergences)
        else:
            divergences, advantages = None, updates.advantages(scored)
            trained, laid = updates.leave_out_idle(trained, advantages)
            minibatches = updates.cut(trained)
            old, reference = self._score(minibatches)
        columns, coefficient = self._columns(laid, old, reference), self._config.grpo.method.kl_coefficient
        return UpdatePlan(minibatches, columns, advantages, divergences, coefficient)

    def _columns(self, advantages: Values, old: Values | None, reference: Values | None) -> Mapping[str, Values]:
        """Return the columns of the policy's batches."""
        columns: dict[str, Values] = {ADVANTAGES: advantages}
        if old is not None and self._is_off_policy:
            columns[OLD] = old
        if reference is not None and not self._updates.is_divergence_rewarded:
            columns[REFERENCE] = reference
        return columns

    def _score(self, minibatches: Sequence[Minibatch]) -> tuple[Values | None, Values | None]:
        """Return log-probabilities by the policy and by its reference, as far as they are needed.

        Raises BadInput where generation and training disagree before the first update of this start.
        """
        grpo, precision = self._config.grpo, self._config.precision
        needs_old = self._is_off_policy or self._updates.is_divergence_rewarded
        old = self._updates.score(minibatches) if needs_old or not self._is_through_gate else None
        rollouts = [rollout for minibatch in minibatches for rollout in minibatch.rollouts]
        if not self._is_through_gate and old is not None and rollouts:
            difference = check_agreement(
                rollouts, old, grpo.gate_tolerance or default_tolerance(precision), self._collector.spell
            )
            log.info("log-probabilities of generation and of training are %.2g nats apart on average", difference)
            self._is_through_gate = True
        reference = self._updates.score(minibatches, self._reference) if self._reference is not None else None
        return old if needs_old else None, reference

    def _update(self, plan: UpdatePlan, state: TrainState) -> StepResult:
        """Make the updates of a step; a number that is not finite ends them."""
        config = self._config
        rate = compute_learning_rate(state.step, config.train.num_steps, config.optimizer, config.schedule)
        laid = [self._updates.with_columns(minibatch, plan.columns) for minibatch in plan.minibatches]
        return train_on(self._engine, laid * config.grpo.num_epochs, self._objective, rate)

    def _record(self, step: int, rollout: Rollout, advantages: Values) -> Mapping[str, Any]:
        drawn = advantages[rollout.key][rollout.trained()] if rollout.key in advantages else None
        return rollout.record(step, self._collector.spell, None if drawn is None else float(drawn.mean()))


def train_on(
    engine: Engine, updates: Sequence[Sequence[Batch]], objective: Objective, learning_rate: float
) -> StepResult:
    """Make updates of one step, up to a number that is not finite, and return them as one result. Collective."""
    results: list[StepResult] = []
    with engine.on_device(for_updates=True):
        for batches in updates:
            results.append(engine.train_step(batches, objective, learning_rate))
            if results[-1].is_fault:
                break
    return combine(results)


def tell_failures(step: int, rollouts: Sequence[Rollout]) -> None:
    """Warn of answers without a score, with the first reason, and where none has one, with what would work."""
    failed = [rollout for rollout in rollouts if rollout.score is None]
    if not failed:
        return
    reasons = [f"{name}: {fault}" for rollout in failed for name, fault in rollout.faults.items()]
    why = reasons[0] if reasons else "no reward applies to them: all return None"
    works = ""
    if len(failed) == len(rollouts):
        works = "; nothing can be learnt: grpo.rewards need function(reply) that returns a number within its time_limit"
        if ENVIRONMENT in failed[0].faults:
            works = "; nothing can be learnt: grpo.environment must return a Turn within grpo.environment_time_limit"
    log.warning("step %d: %d of %d answers have no score (%s)%s", step, len(failed), len(rollouts), why, works)


def evaluate_prompts(collector: Collector, files: Sequence[PromptFile], num_prompts: int) -> Evaluation:
    """Return the mean score of likeliest answers to the first prompts of each file. Collective: all ranks."""
    values: dict[str, float] = {}
    answers: list[ScoredAnswer] = []
    for file in files:
        name = file.name
        prompts = file.first(num_prompts)
        rollouts = collector.answer_greedily(prompts)
        scores = [rollout.score for rollout in rollouts if rollout.score is not None]
        values[VALIDATION_SCORE + name] = sum(scores) / len(scores) if scores else math.nan
        for reward in sorted({reward for rollout in rollouts for reward in rollout.rewards}):
            found = [value for one in rollouts if (value := one.rewards.get(reward)) is not None]
            values[f"validation_{reward}/{name}"] = sum(found) / len(found) if found else math.nan
        answers += [
            ScoredAnswer(name, collector.spell(prompt.token_ids), rollout.texts[-1], rollout.score, rollout.rewards)
            for prompt, rollout in zip(prompts, rollouts, strict=True)
        ]
    return Evaluation(values, answers)


def build_grpo_stage(context: StageContext) -> GrpoStage:
    """Return the stage with its prompts open and its rewards running. Raises BadInput for what cannot be."""
    config, engine = context.config, context.models[POLICY]
    assert isinstance(engine, Engine) and isinstance(config, GrpoConfig)
    return GrpoStage(config, engine, *open_policy_answers(config, context.models, context.corpus))


def open_policy_answers(
    config: GrpoConfig, models: Mapping[str, ShardedModel], corpus: Corpus
) -> tuple[PromptReader, list[PromptFile], Collector]:
    """Return the reader of prompts, the prompts of validation, and what answers and scores. Raises BadInput."""
    grpo = config.grpo
    encoder = open_encoder(config, corpus)
    environment = None if grpo.environment is None else load_environment(grpo.environment)
    files = open_prompts(config, "train", encoder, environment)
    validation = open_prompts(config, "validation", encoder, environment)
    reader = PromptReader(files, [source.weight for source in grpo.prompts], config.run.seed)
    return reader, validation, open_collector(config, models, encoder, (*files, *validation))


def open_prompts(
    config: GrpoConfig, split: Split, encoder: ChatEncoder, environment: Environment | None
) -> list[PromptFile]:
    """Open the prompts of a split, as the environment begins them where there is one. Raises BadInput."""
    parse = None if environment is None else partial(begin_conversation, environment, seed=config.run.seed)
    return [
        PromptFile(source, f"{config.source_field(split)}[{number}]", encoder, config.longest_prompt, parse)
        for number, source in enumerate(config.sources(split))
    ]


def open_encoder(config: GrpoConfig, corpus: Corpus) -> ChatEncoder:
    """Return what makes tokens of prompts. Raises BadInput for a template that cannot be."""
    tokenizer = corpus.tokenizer
    assert tokenizer is not None  # the config check asks for one
    template = load_template(config.grpo.template, tokenizer.directory, "grpo.template")
    return ChatEncoder(template, tokenizer, field="grpo.template")


def open_collector(
    config: GrpoConfig,
    models: Mapping[str, ShardedModel],
    encoder: ChatEncoder,
    files: Sequence[PromptFile],
) -> Collector:
    """Return what answers prompts, with rewards and environment running where this rank scores. Raises BadInput."""
    grpo, pool, environment = config.grpo, None, None
    num_workers, policy = grpo.num_reward_workers or count_cores(), models[POLICY]
    if grpo.rewards and scores_here(policy):
        pool = RewardPool(grpo.rewards, num_workers)
        pool.check([row for file in files for _, row in file.rows], config.rollout.max_new_tokens)
    if grpo.environment is not None and scores_here(policy):
        environment = EnvironmentPool(grpo.environment, grpo.environment_time_limit, num_workers)
        environment.load()
    scorer = None if grpo.reward_model is None else RewardModel(config, models[REWARD], encoder)
    return Collector(config, policy, encoder, pool, environment, scorer)

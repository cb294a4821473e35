"""Online DPO: rounds of the policy's own answers, pairs of the best and the worst, and updates, on one engine."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from configs.errors import BadInput
from configs.stages import OnlineDpoConfig
from parallel.watch.phases import phase
from trainer.data.blend import Blend
from trainer.data.chat.prompts import PromptFile, PromptReader
from trainer.data.packed_source import PairedSource
from trainer.data.reader import BatchReader, ValidationReader
from trainer.data.sequences import with_sequences
from trainer.engine.build import POLICY
from trainer.engine.engine import Engine
from trainer.engine.parts import Checkpointed
from trainer.engine.sharded_state import RandomGenerators
from trainer.engine.state import StepResult, TrainState
from trainer.evaluate.validation import Evaluation
from trainer.optim.learning_rate import compute_learning_rate
from trainer.rl.collect import Collector, Seconds
from trainer.rl.metrics import describe_rewards, describe_rollouts, describe_work
from trainer.rl.pairs import Paired, RoundPairs, pair_best_and_worst
from trainer.rl.reference import AdapterlessReference, ReferenceWeights, open_reference
from trainer.rl.reference_scores import ReferenceScores
from trainer.rl.rollout import Rollout
from trainer.stages.base import StageContext
from trainer.stages.grpo import evaluate_prompts, open_policy_answers, tell_failures
from trainer.stages.preference import PreferenceObjective

log = logging.getLogger(__name__)

_MOST_DRAWS = 10  # of a round's prompts, where their groups give no pair at all


@dataclasses.dataclass(frozen=True)
class _Begun:
    """What the beginning of a round took and gave."""

    rollouts: list[Rollout]
    paired: Paired
    seconds: Seconds
    seconds_score: float


class OnlineDpoStage:
    """One step: an update by pairs; the first one of a round draws and scores the answers that these are made of."""

    name = "online_dpo"

    def __init__(
        self,
        config: OnlineDpoConfig,
        engine: Engine,
        prompts: PromptReader,
        validation: Sequence[PromptFile],
        collector: Collector,
    ) -> None:
        self._config, self._engine = config, engine
        self._prompts, self._validation, self._collector = prompts, validation, collector
        section, mesh = config.online_dpo, engine.mesh
        self._scores = ReferenceScores(mesh, "online_dpo.loss")
        self._objective = PreferenceObjective(section.method, self._scores, mesh.cp_group)
        self._round = RoundPairs(mesh, self._scores if section.method.has_reference else None)
        self._reader: BatchReader | None = None
        parts: dict[str, Checkpointed] = {POLICY: engine, "rng": RandomGenerators(mesh), "round": self._round}
        self._reference: ReferenceWeights | AdapterlessReference | None = None
        if section.method.has_reference and section.reference == "start":
            self._reference = open_reference(engine, "online_dpo.reference", "round")
            if isinstance(self._reference, ReferenceWeights):
                parts["reference"] = self._reference
        self.parts: Mapping[str, Checkpointed] = parts

    def start(self, state: TrainState) -> None:
        """Remember the weights that the policy is held to, unless a checkpoint has brought them. Collective."""
        if isinstance(self._reference, ReferenceWeights) and not self._reference.is_known:
            self._reference.remember()

    def step(self, state: TrainState) -> StepResult:
        """Update, after beginning a round where one is due. Collective: all ranks of the world must call this."""
        started, config = time.perf_counter(), self._config
        is_due = self._reader is None or state.step % config.online_dpo.steps_per_round == 0
        begun = self._begin_round(state.step + 1) if is_due else None
        assert self._reader is not None
        with phase("data"):
            batches = self._reader.read_step()
        rate = compute_learning_rate(state.step, config.train.num_steps, config.optimizer, config.schedule)
        result = self._engine.train_step(batches, self._objective, rate)
        phases = dict(result.phase_seconds)
        if begun is not None:
            seconds = begun.seconds
            phases = {
                "generate": seconds.generate, "reward": seconds.reward, "score": begun.seconds_score, **phases,
            }  # fmt: skip
        phases = {"data": time.perf_counter() - started - sum(phases.values()), **phases}
        result = dataclasses.replace(result, phase_seconds=phases)
        return result if begun is None else self._report(result, begun, state.step + 1)

    def evaluate(self) -> Evaluation:
        """Return the mean score of likeliest answers to each source's first prompts. Collective: all ranks."""
        return evaluate_prompts(self._collector, self._validation, self._config.grpo.num_validation_prompts)

    def describe_fault(self) -> str:
        """Return what made the last step non-finite. Collective: all ranks of the world must call this."""
        return self._engine.describe_fault()

    def state_dict(self) -> Mapping[str, Any]:
        """Return the cursors of the prompts and, within a round, of its pairs."""
        pairs = self._reader.state_dict() if self._reader is not None else None
        return {"prompts": self._prompts.state_dict(), "pairs": pairs}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set both cursors; the pairs themselves are a part of the checkpoint."""
        self._prompts.load_state_dict(state["prompts"])
        if state["pairs"] is not None:
            self._reader = self._open_reader()
            self._reader.load_state_dict(state["pairs"])

    def close(self) -> None:
        """End what reads ahead, and the processes that score."""
        if self._reader is not None:
            self._reader.close()
        self._collector.close()

    def _begin_round(self, step: int) -> _Begun:
        """Answer the next prompts, pair the answers, and score the pairs by the reference."""
        section, seconds = self._config.online_dpo, Seconds()
        rollouts, paired = self._draw(step, seconds)
        tell_failures(step, rollouts)
        log.info(
            "step %d: a round begins with %d pairs; %d groups are ties, %d have less than two answers to compare",
            *(step, len(paired.pairs), paired.num_ties, paired.num_short),
        )
        if self._reader is not None:
            self._reader.close()
        self._round.hold(paired.pairs)
        scoring = time.perf_counter()
        if section.method.has_reference:
            with phase("score"), nullcontext() if self._reference is None else self._reference.in_place():
                self._scores.remember(self._engine, [self._open_whole_reader()])
        self._reader = self._open_reader()
        return _Begun(rollouts, paired, seconds, time.perf_counter() - scoring)

    def _draw(self, step: int, seconds: Seconds) -> tuple[list[Rollout], Paired]:
        """Return a round's answers and their pairs, of which there is at least one. Raises BadInput."""
        count, takes_cut = self._config.online_dpo.prompts_per_round, self._config.grpo.cut_answers == "train"
        rollouts: list[Rollout] = []
        for number in range(_MOST_DRAWS):
            rollouts += self._collector.collect(self._prompts.draw(count), step, number * count, seconds)
            paired = pair_best_and_worst(rollouts, takes_cut=takes_cut)
            if paired.pairs:
                return rollouts, paired
            log.warning("step %d: none of %d groups gives a pair; others are drawn", step, (number + 1) * count)
        raise BadInput(
            f"grpo.rewards: {_MOST_DRAWS * count} groups of answers in a row, those of step {step}, are each of one "
            "score, so that there is nothing to learn; give rewards that tell answers apart, a larger grpo.group_size "
            "or rollout.temperature, or harder prompts (the last checkpoint is whole)"
        )

    def _open_reader(self) -> BatchReader:
        """Return what reads this rank's share of the round's pairs, packed, in an order of its own."""
        dataset, train, mesh = self._round.dataset, self._config.train, self._engine.mesh
        assert dataset is not None
        return BatchReader(
            Blend([PairedSource(dataset, train.seq_len, self._config.run.seed)], [1.0]),
            micro_batch_size=train.micro_batch_size,
            dp_rank=mesh.dp_rank,
            dp_size=mesh.dp_size,
            global_batch_size_at=lambda _: train.global_batch_size,
            vocab_size=self._config.model.vocab_size,
            prefetch_steps=self._config.data.prefetch_steps,
            finish=self._objective.finish,
        )

    def _open_whole_reader(self) -> ValidationReader:
        """Return what reads this rank's share of all pairs of the round once."""
        dataset, train, mesh = self._round.dataset, self._config.train, self._engine.mesh
        assert dataset is not None
        return ValidationReader(
            dataset,
            seq_len=train.seq_len,
            num_samples=dataset.num_documents,
            micro_batch_size=train.micro_batch_size,
            dp_rank=mesh.dp_rank,
            dp_size=mesh.dp_size,
            vocab_size=self._config.model.vocab_size,
            packing=PairedSource.packing,
            finish=with_sequences,
        )

    def _report(self, result: StepResult, begun: _Begun, step: int) -> StepResult:
        """Return the result of a round's first step with what its beginning says."""
        rollouts, sides = begun.rollouts, begun.paired.sides
        return dataclasses.replace(
            result,
            metrics={
                **result.metrics,
                **describe_rollouts(rollouts, None),
                **describe_rewards(rollouts, None, 0.0),
                **begun.paired.describe(),
                **describe_work(result.num_tokens, result.phase_seconds, begun.seconds.reports),
                "rollout/num_prompts_too_long": float(self._prompts.num_too_long),
            },
            rollouts=[
                {**one.record(step, self._collector.spell, None), "side": sides.get(one.key)} for one in rollouts
            ],
        )


def build_online_dpo_stage(context: StageContext) -> OnlineDpoStage:
    """Return the stage with its prompts open and its rewards running. Raises BadInput for what cannot be."""
    config, engine = context.config, context.models[POLICY]
    assert isinstance(engine, Engine) and isinstance(config, OnlineDpoConfig)
    return OnlineDpoStage(config, engine, *open_policy_answers(config, context.models, context.corpus))

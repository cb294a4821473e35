"""Prompts -> rollouts: replies from the engine, what an environment makes of them, scores; the same on every rank."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch.distributed as dist

from configs.sections.rollout import RolloutSection
from configs.stages import GrpoConfig
from parallel.collectives import gather_objects, on_all_ranks
from parallel.watch.phases import phase
from trainer.data.chat.encode import ChatEncoder
from trainer.data.chat.prompts import Prompt
from trainer.engine.sharded_model import ShardedModel
from trainer.environments.answering import EnvironmentPool
from trainer.environments.rewards.reply import Reply
from trainer.environments.scoring import ENVIRONMENT, REWARD_MODEL, RewardPool, Score
from trainer.generate.generator import EngineGenerator
from trainer.generate.prompts import end_tokens
from trainer.generate.report import GenerationReport
from trainer.generate.rows import Completion
from trainer.generate.sampling import Sampling
from trainer.generate.stops import Decode
from trainer.rl.reward_model import RewardModel
from trainer.rl.rollout import Rollout
from trainer.rl.talk import Talk, spoken

Result = TypeVar("Result")


@dataclass
class Seconds:
    """What collecting took, in seconds of this rank's clock."""

    generate: float = 0.0
    reward: float = 0.0
    """Of the environment and of the rewards."""
    reports: list[GenerationReport] = field(default_factory=list)
    """Of each call of the generator."""


class Collector:
    """Answers prompts with the policy and has the answers scored."""

    def __init__(
        self,
        config: GrpoConfig,
        model: ShardedModel,
        encoder: ChatEncoder,
        pool: RewardPool | None,
        environment: EnvironmentPool | None = None,
        reward_model: RewardModel | None = None,
    ) -> None:
        """`pool` and `environment` work on the ranks of which `scores_here` is true; the others have none."""
        self._config, self._model, self._encoder = config, model, encoder
        self._pool, self._environment, self._reward_model = pool, environment, reward_model
        self._generator = open_generator(config.rollout, model, self.spell)
        self._sampling = choose_sampling(config.rollout, encoder, config.run.seed)
        tokenizer, behaviour = encoder.tokenizer, encoder.behaviour
        end_id = tokenizer.backend.token_to_id(behaviour.end_token or behaviour.eos_token)
        self._end_id = tokenizer.eod_id if end_id is None else end_id

    def collect(self, prompts: Sequence[Prompt], step: int, first_group: int, seconds: Seconds) -> list[Rollout]:
        """Return the group of each prompt, `grpo.group_size` rollouts each, numbered from `first_group` on.

        Collective: all ranks of the world must call this.
        """
        sampling = replace(self._sampling, num_samples=self._config.grpo.group_size)
        return self._collect(prompts, sampling, step, first_group, seconds)

    def answer_greedily(self, prompts: Sequence[Prompt]) -> list[Rollout]:
        """Return the likeliest answer to each prompt. Collective: all ranks of the world must call this."""
        sampling = replace(self._sampling, temperature=0.0, top_k=None, top_p=1.0)
        return self._collect(prompts, sampling, 0, 0, Seconds())

    def close(self) -> None:
        """End the processes that score and answer."""
        for pool in (self._pool, self._environment):
            if pool is not None:
                pool.close()

    def spell(self, ids: Sequence[int]) -> str:
        """Return the text of tokens, special ones spelled out."""
        return self._encoder.tokenizer.backend.decode(list(ids), skip_special_tokens=False)

    def _collect(
        self, prompts: Sequence[Prompt], sampling: Sampling, step: int, first_group: int, seconds: Seconds
    ) -> list[Rollout]:
        talks = [
            Talk.begin(prompt, first_group + number, sample)
            for number, prompt in enumerate(prompts)
            for sample in range(sampling.num_samples)
        ]
        with self._model.merged_adapter():
            keys: list[tuple[int, ...]] = [(step, first_group + number) for number in range(len(prompts))]
            self._reply(talks, [prompt.token_ids for prompt in prompts], sampling, keys, seconds)
            for turn in range(1, self._config.grpo.max_turns):
                going_on = [talk for talk in talks if not talk.is_over]
                if not going_on:
                    break
                once = replace(sampling, num_samples=1)
                keys = [(step, talk.group, talk.sample, turn) for talk in going_on]
                self._reply(going_on, [talk.token_ids for talk in going_on], once, keys, seconds)
        started = time.perf_counter()
        with phase("reward"):
            scores = self._score(talks, sampling)
        seconds.reward += time.perf_counter() - started
        return [as_rollout(talk, score) for talk, score in zip(talks, scores, strict=True)]

    def _reply(
        self,
        talks: Sequence[Talk],
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        keys: Sequence[Sequence[int]],
        seconds: Seconds,
    ) -> None:
        """Add a reply of the policy to each conversation, and what the environment answers."""
        started = time.perf_counter()
        with phase("generate"):
            completions = self._generator.generate(prompts, sampling, keys=keys)
        for talk, completion in zip(talks, completions, strict=True):
            talk.add_reply(completion, self._text_of(completion))
        answered = time.perf_counter()
        seconds.generate += answered - started
        if self._generator.last_report is not None:
            seconds.reports.append(self._generator.last_report)
        self._answer(talks, sampling)
        seconds.reward += time.perf_counter() - answered

    def _answer(self, talks: Sequence[Talk], sampling: Sampling) -> None:
        """Add what follows the last replies: what the environment says, or nothing."""
        if self._config.grpo.environment is None:
            for talk in talks:
                talk.end()
            return
        turns = self._shared(talks, sampling, None if self._environment is None else self._environment.answer)
        room = self._config.longest_prompt
        for talk, turn in zip(talks, turns, strict=True):
            talk.add_turn(turn, self._encoder, self._end_id, room)

    def _text_of(self, completion: Completion) -> str:
        return spoken(completion, self.spell, self._config.rollout.stop_strings)

    def _score(self, talks: Sequence[Talk], sampling: Sampling) -> list[Score]:
        if not self._config.grpo.rewards:
            scores = [Score(0.0, {}) for _ in talks]
        else:
            scores = self._shared(talks, sampling, None if self._pool is None else self._pool.score)
        source = self._config.grpo.reward_model
        if self._reward_model is None or source is None:
            return scores
        values = self._reward_model.score([talk.as_conversation() for talk in talks])
        return [_with_value(score, value, source.weight) for score, value in zip(scores, values, strict=True)]

    def _shared(
        self, talks: Sequence[Talk], sampling: Sampling, work: Callable[[list[Reply]], list[Result]] | None
    ) -> list[Result]:
        """Return what `work` makes of the last replies, each on the first rank of one replica; the others have none.

        Collective: all ranks of the world must call this.
        """
        group = self._model.mesh.dp_cp_group
        mine = range(dist.get_rank(group), len(talks), dist.get_world_size(group))

        def share() -> list[tuple[int, Result]]:
            if work is None:
                return []
            replies = [talks[number].as_reply(sampling.max_new_tokens) for number in mine]
            return list(zip(mine, work(replies), strict=True))

        found = dict(pair for part in gather_objects(on_all_ranks(share)) for pair in part)
        return [found[number] for number in range(len(talks))]


def open_generator(rollout: RolloutSection, model: ShardedModel, spell: Decode) -> EngineGenerator:
    """Return what draws answers, within the bounds that the config sets."""
    cache = None if rollout.cache_gib is None else int(rollout.cache_gib * 2**30)
    return EngineGenerator(model, spell, max_rows=rollout.max_rows, cache_bytes=cache)


def choose_sampling(rollout: RolloutSection, encoder: ChatEncoder, seed: int) -> Sampling:
    """Return how one answer to a prompt is drawn: as the config says, up to a token that ends the turn."""
    return Sampling(
        rollout.max_new_tokens,
        rollout.temperature,
        rollout.top_k,
        rollout.top_p,
        stop_tokens=end_tokens(encoder),
        stop_strings=rollout.stop_strings,
        seed=seed,
    )


def scores_here(model: ShardedModel) -> bool:
    """Return whether this rank is the one of its replica that scores."""
    return model.mesh.tp_rank == 0 and model.mesh.is_first_pp_stage


def count_cores() -> int:
    """Return this rank's share of the cores of its host, for the processes that score: at least one."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, len(os.sched_getaffinity(0)) // local)


def _with_value(score: Score, value: float | str, weight: float) -> Score:
    """Return a score with the value of a reward model in it, or with the reason why there is none."""
    if isinstance(value, str):
        return Score(None, {**score.parts, REWARD_MODEL: None}, {**score.faults, REWARD_MODEL: value})
    total = score.total
    if not score.faults:
        total = (total or 0.0) + weight * value
    return Score(total, {**score.parts, REWARD_MODEL: value}, score.faults)


def as_rollout(talk: Talk, score: Score) -> Rollout:
    """Return a conversation with its score: what those rewards that apply and its environment gave together."""
    parts, faults = dict(score.parts), dict(score.faults)
    total, given = score.total, sum(talk.rewards)
    if talk.rewards:
        parts[ENVIRONMENT] = given
        total = None if score.faults else (total or 0.0) + given
    if talk.fault is not None:
        total, faults[ENVIRONMENT] = None, talk.fault
    return Rollout(
        source=talk.prompt.source,
        row=talk.prompt.row,
        group=talk.group,
        sample=talk.sample,
        token_ids=talk.token_ids,
        is_sampled=talk.is_sampled,
        log_probs=talk.log_probs,
        finish=talk.finish,
        texts=tuple(talk.texts),
        score=total,
        rewards=parts,
        faults=faults,
    )

"""Prompts -> rollouts: answers from the engine, each scored once, the same on every rank."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch.distributed as dist

from configs.stages import GrpoConfig
from parallel.collectives import gather_objects, on_all_ranks
from trainer.data.chat.messages import CallForm, to_openai
from trainer.data.chat.prompts import Prompt
from trainer.data.tokenizer import Tokenizer
from trainer.engine.engine import Engine
from trainer.environments.rewards.reply import Reply
from trainer.environments.scoring import RewardPool, Score
from trainer.generate.generator import EngineGenerator
from trainer.generate.report import GenerationReport
from trainer.generate.rows import Completion
from trainer.generate.sampling import Sampling
from trainer.rl.rollout import Rollout


@dataclass
class Seconds:
    """What collecting took, in seconds of this rank's clock."""

    generate: float = 0.0
    reward: float = 0.0
    reports: list[GenerationReport] = field(default_factory=list)
    """Of each call of the generator."""


class Collector:
    """Answers prompts with the policy and has the answers scored."""

    def __init__(
        self, config: GrpoConfig, engine: Engine, tokenizer: Tokenizer, stop_tokens: Sequence[int], pool: RewardPool | None
    ) -> None:
        """`pool` scores on the first rank of each replica of the model, and is None on the others."""
        self._config, self._engine, self._tokenizer, self._pool = config, engine, tokenizer, pool
        self._stop_tokens = tuple(stop_tokens)
        cache = config.rollout.cache_gib
        self._generator = EngineGenerator(
            engine, _spell(tokenizer), max_rows=config.rollout.max_rows,
            cache_bytes=None if cache is None else int(cache * 2**30),
        )  # fmt: skip

    def collect(self, prompts: Sequence[Prompt], step: int, first_group: int, seconds: Seconds) -> list[Rollout]:
        """Return the group of each prompt, `grpo.group_size` rollouts each, numbered from `first_group` on.

        Collective: all ranks of the world must call this.
        """
        rollout, config = self._config.rollout, self._config
        sampling = Sampling(
            rollout.max_new_tokens, rollout.temperature, rollout.top_k, rollout.top_p,
            stop_tokens=self._stop_tokens, stop_strings=rollout.stop_strings, num_samples=config.grpo.group_size,
            seed=config.run.seed,
        )  # fmt: skip
        keys = [(step, first_group + number) for number in range(len(prompts))]
        return self._answer(prompts, sampling, keys, first_group, seconds)

    def answer_greedily(self, prompts: Sequence[Prompt]) -> list[Rollout]:
        """Return the likeliest answer to each prompt. Collective: all ranks of the world must call this."""
        sampling = Sampling(
            self._config.rollout.max_new_tokens, 0.0, stop_tokens=self._stop_tokens,
            stop_strings=self._config.rollout.stop_strings,
        )  # fmt: skip
        keys = [(number,) for number in range(len(prompts))]
        return self._answer(prompts, sampling, keys, 0, Seconds())

    def close(self) -> None:
        """End the processes that score."""
        if self._pool is not None:
            self._pool.close()

    def _answer(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        keys: Sequence[Sequence[int]],
        first_group: int,
        seconds: Seconds,
    ) -> list[Rollout]:
        started = time.perf_counter()
        with self._engine.merged_adapter():
            completions = self._generator.generate([prompt.token_ids for prompt in prompts], sampling, keys=keys)
        generated = time.perf_counter()
        texts = [self._tokenizer.decode(_spoken(one)) for one in completions]
        scores = self._score([self._reply(prompts[one.prompt], text, one, sampling) for one, text in zip(completions, texts, strict=True)])
        seconds.generate += generated - started
        seconds.reward += time.perf_counter() - generated
        if self._generator.last_report is not None:
            seconds.reports.append(self._generator.last_report)
        return [
            _rollout(prompts[one.prompt], first_group, one, text, score)
            for one, text, score in zip(completions, texts, scores, strict=True)
        ]

    def _reply(self, prompt: Prompt, text: str, completion: Completion, sampling: Sampling) -> Reply:
        return Reply(
            text=text,
            row=prompt.columns,
            messages=to_openai(prompt.conversation.messages, CallForm()),
            num_tokens=len(completion.token_ids),
            max_new_tokens=sampling.max_new_tokens,
            is_cut=completion.finish == "length",
        )

    def _score(self, replies: Sequence[Reply]) -> list[Score]:
        """Score replies, each on the first rank of one replica. Collective: all ranks of the world must call this."""
        mesh = self._engine.mesh
        replica, num_replicas = dist.get_rank(mesh.dp_cp_group), dist.get_world_size(mesh.dp_cp_group)
        mine = range(replica, len(replies), num_replicas)

        def score() -> list[tuple[int, Score]]:
            if self._pool is None:
                return []
            return list(zip(mine, self._pool.score([replies[number] for number in mine]), strict=True))

        found = dict(pair for part in gather_objects(on_all_ranks(score)) for pair in part)
        return [found[number] for number in range(len(replies))]


def scores_here(engine: Engine) -> bool:
    """Return whether this rank is the one of its replica that scores."""
    return engine.mesh.tp_rank == 0 and engine.mesh.is_first_pp_stage


def count_cores(engine: Engine) -> int:
    """Return this rank's share of the cores of its host, for the processes that score: at least one."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, len(os.sched_getaffinity(0)) // local)


def _spell(tokenizer: Tokenizer) -> Callable[[Sequence[int]], str]:
    return lambda ids: tokenizer.backend.decode(list(ids), skip_special_tokens=False)


def _spoken(completion: Completion) -> list[int]:
    """Return the tokens of an answer but the one that stopped it."""
    return completion.token_ids[:-1] if completion.finish == "stop_token" else completion.token_ids


def _rollout(prompt: Prompt, first_group: int, completion: Completion, text: str, score: Score) -> Rollout:
    num_prompt, num_drawn = len(prompt.token_ids), len(completion.token_ids)
    return Rollout(
        source=prompt.source,
        row=prompt.row,
        group=first_group + completion.prompt,
        sample=completion.sample,
        token_ids=[*prompt.token_ids, *completion.token_ids],
        is_sampled=[False] * num_prompt + [True] * num_drawn,
        log_probs=list(completion.full_logprobs),
        finish=completion.finish,
        texts=(text,),
        score=score.total,
        rewards=score.parts,
        faults=score.faults,
    )

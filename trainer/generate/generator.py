"""Generates with the training engine and a key-value cache, on any layout: prompts of token ids -> answers.

Every replica of the model (one for each dp and cp rank) answers its share of the prompts, with a limited number of rows
in its cache at once; where a row has ended, the next one that waits comes in.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.distributed as dist

from configs.errors import BadInput
from configs.plan.kv_cache import rows_that_fit, slot_length
from parallel.collectives import (
    from_first_tp_rank,
    from_last_pp_stage,
    gather_objects,
    gather_over_tp,
    max_over_stage,
)
from trainer.data.batch import copy_to
from trainer.engine.sharded_model import ShardedModel
from trainer.generate.passes import num_microbatches, prompt_pass, token_pass
from trainer.generate.report import GenerationReport, ReplicaReport
from trainer.generate.rows import Completion, Row, Slots, deal
from trainer.generate.sampling import Sampling, check_keys, draw_tokens, row_random
from trainer.generate.stops import Decode, find_stop_string
from trainer.model.attention.cache import CachedTokens, KeyValueCache
from trainer.model.build import attending_with_cache
from trainer.model.packed_weights import packing_weights

MAX_ROWS = 64
_PROMPT_TOKENS = 8192  # of the prompts that are computed in one pass: its activations
OnToken = Callable[[int, int, int], None]


class Generator(Protocol):
    """Whatever answers prompts: the engine, or a server of its weights."""

    last_report: GenerationReport | None
    """Of the last call."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        on_token: OnToken | None = None,
        keys: Sequence[Sequence[int]] | None = None,
        expected_lengths: Sequence[float] | None = None,
    ) -> list[Completion]:
        """Return `sampling.num_samples` answers to each prompt, in the order of prompts, then of samples."""


class EngineGenerator:
    """Answers with a model of the engine. Its weights are read as they are at each call."""

    def __init__(
        self,
        model: ShardedModel,
        decode: Decode | None = None,
        *,
        max_rows: int = MAX_ROWS,
        cache_bytes: int | None = None,
    ) -> None:
        """Bound what a replica has in its cache at once: rows, and, where `cache_bytes` is given, bytes on each rank.

        A cache of r rows of at most n tokens takes r * n * layers/pp * groups/tp * (dim of keys + of values) numbers
        while a call lasts. `decode`, ids -> text with special tokens, finds stop strings.
        """
        if max_rows < 1:
            raise BadInput(f"max_rows: {max_rows} rows can generate nothing; a value that would work: {MAX_ROWS}")
        self._model, self._decode, self._max_rows, self._cache_bytes = model, decode, max_rows, cache_bytes
        self.last_report: GenerationReport | None = None

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        on_token: OnToken | None = None,
        keys: Sequence[Sequence[int]] | None = None,
        expected_lengths: Sequence[float] | None = None,
    ) -> list[Completion]:
        """Return `sampling.num_samples` answers to each prompt, in order, on every rank; `last_report` says what it
        took.

        An answer does not depend on the others, nor, but for rounding, on the layout: a prompt's random numbers come
        from its key, its number where `keys` is not given. `expected_lengths`, tokens of an answer to each prompt, the
        limit where not given, are what replicas share the work by. `on_token(prompt, sample, id)` is told every token
        at once, on all ranks of the replica that draws it: rank 0's, of a prompt alone. Raises BadInput. Collective:
        all ranks of the world must call this.
        """
        limits = self._check(prompts, sampling)
        keys = [(number,) for number in range(len(prompts))] if keys is None else keys
        check_keys(keys, len(prompts))
        answers = _expected(limits, expected_lengths)
        lengths, mesh = [len(prompt) for prompt in prompts], self._model.mesh
        replica, num_replicas = dist.get_rank(mesh.dp_cp_group), dist.get_world_size(mesh.dp_cp_group)
        rows = [
            Row(prompt, sample, prompts[prompt], limits[prompt], row_random(sampling, keys[prompt], sample))
            for prompt, sample in deal(lengths, answers, sampling.num_samples, num_replicas, replica)
        ]
        report = self._answer(rows, sampling, on_token, replica)
        is_first = mesh.tp_rank == 0 and mesh.is_first_pp_stage
        everywhere = gather_objects(([row.completion() for row in rows], report) if is_first else None)
        found = [one for one in everywhere if one is not None]
        self.last_report = GenerationReport(tuple(sorted((one[1] for one in found), key=lambda one: one.replica)))
        completions = [completion for one in found for completion in one[0]]
        return sorted(completions, key=lambda one: (one.prompt, one.sample))

    def _answer(self, rows: Sequence[Row], sampling: Sampling, on_token: OnToken | None, replica: int) -> ReplicaReport:
        """Generate this replica's rows to their ends; nothing of the cache outlives this."""
        model = self._model
        model.finish_parameter_gather()
        longest = max((len(row.prompt_ids) + row.limit for row in rows), default=1)
        num_slots = min(self._max_rows, len(rows))
        if self._cache_bytes is not None:
            num_slots = min(num_slots, rows_that_fit(model.config, self._cache_bytes, longest))
        cache = KeyValueCache(num_slots, slot_length(longest))
        pack = model.mesh.platform.pack_weight
        with (
            attending_with_cache(model.chunks, model.config, model.mesh),
            packing_weights(model.chunks, pack) as see_tokens,
        ):
            generation = _Generation(model, rows, cache, sampling, self._decode, on_token, see_tokens)
            generation.run()
        return ReplicaReport(
            replica,
            generation.num_prompt_tokens,
            sum(len(row.token_ids) for row in rows),
            generation.num_passes,
            num_slots,
            cache.num_bytes,
            generation.seconds,
        )

    def _check(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[int]:
        """Refuse what the model cannot take; return the most new tokens of each prompt.

        All ranks have the same prompts and see the same.
        """
        model = self._model.config.model
        context, vocab_size = model.max_position_embeddings, model.vocab_size
        if sampling.stop_strings and self._decode is None:
            raise BadInput("stop_strings: need a tokenizer to be found with; give stop_tokens, or a tokenizer")
        for number, prompt in enumerate(prompts):
            if not 0 < len(prompt) < context:
                raise BadInput(
                    f"prompt {number}: {len(prompt)} tokens; with model.max_position_embeddings={context} a prompt has "
                    f"1 to {context - 1}"
                )
            wrong = next((one for one in prompt if not 0 <= one < vocab_size), None)
            if wrong is not None:
                raise BadInput(f"prompt {number}: token {wrong} is not one of the model's, 0 to {vocab_size - 1}")
        limits = [min(sampling.max_new_tokens, context - len(prompt)) for prompt in prompts]
        if self._cache_bytes is not None and prompts:
            longest = max(len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True))
            rows_that_fit(self._model.config, self._cache_bytes, longest)
        return limits


def _expected(limits: Sequence[int], expected_lengths: Sequence[float] | None) -> list[float]:
    """Return the tokens expected of an answer to each prompt, which are no more than its limit."""
    if expected_lengths is None:
        return list(limits)
    if len(expected_lengths) != len(limits):
        raise BadInput(f"expected_lengths: {len(expected_lengths)} for {len(limits)} prompts; give one for each")
    wrong = next((number for number, one in enumerate(expected_lengths) if not one >= 0), None)
    if wrong is not None:
        raise BadInput(
            f"expected_lengths: {expected_lengths[wrong]} for prompt {wrong} is no number of tokens; a value that "
            "would work: 0"
        )
    return [min(limit, expected) for limit, expected in zip(limits, expected_lengths, strict=True)]


class _Generation:
    """One replica's rows on their way from the prompt to the end."""

    def __init__(
        self,
        model: ShardedModel,
        rows: Sequence[Row],
        cache: KeyValueCache,
        sampling: Sampling,
        decode: Decode | None,
        on_token: OnToken | None,
        see_tokens: Callable[[int], None],
    ) -> None:
        self._model, self._mesh, self._sampling = model, model.mesh, sampling
        self._decode, self._on_token, self._cache = decode, on_token, cache
        self._see_tokens = see_tokens
        self._slots = Slots(rows, cache.num_slots)
        self._stops = frozenset(sampling.stop_tokens)
        self._first_logits: dict[int, torch.Tensor] = {}
        """On the last pipeline stage, `[vocab/tp]` after a prompt of which further rows wait."""
        # Where tp ranks share the tokens each takes as many, and Transformer Engine's FP8 wants multiples of 16.
        multiple = model.mesh.tp_size if model.config.parallel.sp else 1
        self._multiple = multiple * (16 if model.config.precision.fp8 is not None else 1)
        self.num_prompt_tokens, self.num_passes, self.seconds = 0, 0, 0.0

    def run(self) -> None:
        """Generate until all rows of all replicas that share experts have ended; `seconds` are those of the own."""
        started = time.perf_counter()
        is_busy = True
        while is_busy:
            has_own = bool(self._slots.active or self._slots.waiting)
            is_busy = self._step()
            if has_own:
                self.seconds = time.perf_counter() - started

    def _step(self) -> bool:
        """Let waiting rows in, draw one token for every row, and return whether there was anything to do."""
        num_old = len(self._slots.active)
        joining = self._slots.take(_PROMPT_TOKENS)
        sources, new = self._plan_prompts(num_old)
        num_new, num_running = self._agree(len(new), num_old)
        logits = []
        if num_running:
            parts = num_microbatches(num_running, self._mesh)
            old = self._slots.active[:num_old]
            passes = token_pass(old, self._cache, self._mesh, num_parts=parts, multiple=self._multiple)
            self._see_tokens(len(passes[0].ids))
            logits.append(self._compute(passes))
        if num_new:
            parts = num_microbatches(num_new, self._mesh)
            passes = prompt_pass(new, self._cache, self._mesh, num_parts=parts, multiple=self._multiple)
            self._keep(new, self._compute(passes))
            self.num_prompt_tokens += sum(len(row.prompt_ids) for _, row in new)
        if joining:
            logits.append(self._join(joining, num_old, sources))
        if self._slots.active:
            self._draw([one for one in logits if one is not None])
        for last, place in self._slots.drop_finished():
            if last != place:
                self._cache.copy(last, place, self._slots.active[place].num_cached)
        return bool(num_new or num_running)

    def _compute(self, passes: Sequence[CachedTokens]) -> torch.Tensor | None:
        self.num_passes += 1
        return self._model.compute_next_logits(passes)

    def _plan_prompts(self, num_old: int) -> tuple[dict[int, int], list[tuple[int, Row]]]:
        """Return the slots that have, or will have, the prompts of joining rows, and what must be computed for that."""
        active = self._slots.active
        sources = {row.prompt: slot for slot, row in enumerate(active[:num_old]) if row.prompt in self._first_logits}
        new = []
        for slot in range(num_old, len(active)):
            if active[slot].prompt not in sources:
                sources[active[slot].prompt] = slot
                new.append((slot, active[slot]))
        return sources, new

    def _agree(self, num_new: int, num_old: int) -> list[int]:
        """Return the most prompts and rows of any replica that has a part of the experts: all take part in passes."""
        if self._mesh.ep_size == 1:
            return [num_new, num_old]
        return max_over_stage([num_new, num_old], self._mesh)

    def _keep(self, new: Sequence[tuple[int, Row]], logits: torch.Tensor | None) -> None:
        """Remember the logits after prompts, `[prompts, vocab/tp]`; stages without logits remember the prompts."""
        for place, (_, row) in enumerate(new):
            self._first_logits[row.prompt] = torch.empty(0) if logits is None else logits[place]

    def _join(self, joining: Sequence[Row], first: int, sources: dict[int, int]) -> torch.Tensor:
        """Give rows, which have the slots from `first` on, their prompts' keys, and return the logits that follow."""
        for slot, row in enumerate(joining, first):
            if sources[row.prompt] != slot:
                self._cache.copy(sources[row.prompt], slot, len(row.prompt_ids))
        logits = torch.stack([self._first_logits[row.prompt] for row in joining])
        waiting = self._slots.waiting[0].prompt if self._slots.waiting else None  # rows of a prompt wait together
        self._first_logits = {prompt: one for prompt, one in self._first_logits.items() if prompt == waiting}
        return logits

    def _draw(self, logits: Sequence[torch.Tensor]) -> None:
        """Draw a token for each active row on one rank of the replica's last stage, and add it on all."""
        rows, mesh = self._slots.active, self._mesh
        numbers = [row.random.random() for row in rows] if self._sampling.temperature > 0 else []
        drawn = torch.empty(3 if self._sampling.leaves_out else 2, len(rows), dtype=torch.float64, device=mesh.device)
        if mesh.is_last_pp_stage:
            joined = logits[0] if len(logits) == 1 else torch.cat(list(logits))
            whole = gather_over_tp(joined, mesh)[:, : self._model.config.model.vocab_size]
            if mesh.tp_rank == 0:
                uniforms = copy_to(torch.tensor(numbers, dtype=torch.float64), mesh.device)
                found = draw_tokens(whole.float(), self._sampling, uniforms)
                drawn = torch.stack([one.double() for one in found[: len(drawn)]])
            from_first_tp_rank(drawn, mesh)
        tokens, log_probs, *full = from_last_pp_stage(drawn, mesh).tolist()
        for row, log_prob in zip(rows, *full, strict=True) if full else ():
            row.full_logprobs.append(log_prob)
        for row, token, log_prob in zip(rows, tokens, log_probs, strict=True):
            self._add(row, int(token), log_prob)

    def _add(self, row: Row, token: int, log_prob: float) -> None:
        row.token_ids.append(token)
        row.logprobs.append(log_prob)
        if self._on_token is not None:
            self._on_token(row.prompt, row.sample, token)
        if token in self._stops:
            row.finish = "stop_token"
        elif self._decode and find_stop_string(row.token_ids, self._sampling.stop_strings, self._decode):
            row.finish = "stop_string"
        elif len(row.token_ids) == row.limit:
            row.finish = "length"

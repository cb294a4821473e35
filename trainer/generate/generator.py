"""Generates with the training engine and a key-value cache, on any layout: prompts of token ids -> answers.

Every replica of the model (one for each dp and cp rank) answers its share of the prompts, with a limited number of rows
in its cache at once; where a row has ended, the next one that waits comes in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.distributed as dist

from configs.errors import BadInput
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
from trainer.generate.rows import Completion, Row, Slots, deal
from trainer.generate.sampling import Sampling, draw_tokens, row_random
from trainer.generate.stops import Decode, find_stop_string
from trainer.model.attention.cache import KeyValueCache
from trainer.model.build import attending_with_cache

MAX_ROWS = 64
_PROMPT_TOKENS = 8192  # of the prompts that are computed in one pass: its activations
_LENGTH_MULTIPLE = 64  # so that caches of about one length have tables of angles of one length
OnToken = Callable[[int, int, int], None]


class Generator(Protocol):
    """Whatever answers prompts."""

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Completion]:
        """Return `sampling.num_samples` answers to each prompt, in the order of prompts, then of samples."""


class EngineGenerator:
    """Answers with a model of the engine. Its weights are read as they are at each call."""

    def __init__(self, model: ShardedModel, decode: Decode | None = None, *, max_rows: int = MAX_ROWS) -> None:
        """`max_rows` bounds the cache of each replica; `decode`, ids -> text with special tokens, finds stop strings.

        A cache of r rows of at most n tokens takes r * n * layers/pp * groups/tp * (dim of keys + of values) numbers.
        """
        if max_rows < 1:
            raise BadInput(f"max_rows: {max_rows} rows can generate nothing; a value that would work: {MAX_ROWS}")
        self._model, self._decode, self._max_rows = model, decode, max_rows

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, on_token: OnToken | None = None
    ) -> list[Completion]:
        """Return `sampling.num_samples` answers to each prompt, in order, on every rank.

        An answer does not depend on the others, nor, but for rounding, on the layout. `on_token(prompt, sample, id)` is
        told every token at once, on all ranks of the replica that draws it: rank 0's, of a prompt alone. Raises
        BadInput. Collective: all ranks of the world must call this.
        """
        self._check(prompts, sampling)
        model, mesh = self._model, self._model.mesh
        model.finish_parameter_gather()
        lengths = [len(prompt) for prompt in prompts]
        replica, num_replicas = dist.get_rank(mesh.dp_cp_group), dist.get_world_size(mesh.dp_cp_group)
        context = model.config.model.max_position_embeddings
        rows = [
            Row(
                prompt,
                sample,
                prompts[prompt],
                min(sampling.max_new_tokens, context - lengths[prompt]),
                row_random(sampling, prompt, sample),
            )
            for prompt, sample in deal(lengths, sampling.num_samples, num_replicas, replica)
        ]
        with attending_with_cache(model.chunks, model.config, mesh):
            _Generation(model, rows, self._max_rows, sampling, self._decode, on_token).run()
        is_first = mesh.tp_rank == 0 and mesh.is_first_pp_stage
        everywhere = gather_objects([row.completion() for row in rows] if is_first else [])
        completions = [one for part in everywhere for one in part]
        return sorted(completions, key=lambda one: (one.prompt, one.sample))

    def _check(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
        """Refuse what the model cannot take; all ranks have the same prompts and see the same."""
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


class _Generation:
    """One replica's rows on their way from the prompt to the end."""

    def __init__(
        self,
        model: ShardedModel,
        rows: Sequence[Row],
        max_rows: int,
        sampling: Sampling,
        decode: Decode | None,
        on_token: OnToken | None,
    ) -> None:
        self._model, self._mesh, self._sampling = model, model.mesh, sampling
        self._decode, self._on_token = decode, on_token
        num_slots = min(max_rows, len(rows))
        longest = max((len(row.prompt_ids) + row.limit for row in rows), default=1)
        self._cache = KeyValueCache(num_slots, -(-longest // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE)
        self._slots = Slots(rows, num_slots)
        self._stops = frozenset(sampling.stop_tokens)
        self._first_logits: dict[int, torch.Tensor] = {}
        """On the last pipeline stage, `[vocab/tp]` after a prompt of which further rows wait."""
        # Where tp ranks share the tokens each takes as many, and Transformer Engine's FP8 wants multiples of 16.
        multiple = model.mesh.tp_size if model.config.parallel.sp else 1
        self._multiple = multiple * (16 if model.config.precision.fp8 is not None else 1)

    def run(self) -> None:
        """Generate until all rows of all replicas that share experts have ended."""
        while self._step():
            pass

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
            logits.append(
                self._model.compute_next_logits(
                    token_pass(old, self._cache, self._mesh, num_parts=parts, multiple=self._multiple)
                )
            )
        if num_new:
            parts = num_microbatches(num_new, self._mesh)
            passes = prompt_pass(new, self._cache, self._mesh, num_parts=parts, multiple=self._multiple)
            self._keep(new, self._model.compute_next_logits(passes))
        if joining:
            logits.append(self._join(joining, num_old, sources))
        if self._slots.active:
            self._draw([one for one in logits if one is not None])
        for last, place in self._slots.drop_finished():
            if last != place:
                self._cache.copy(last, place, self._slots.active[place].num_cached)
        return bool(num_new or num_running)

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
        drawn = torch.empty(2, len(rows), dtype=torch.float64, device=mesh.device)
        if mesh.is_last_pp_stage:
            joined = logits[0] if len(logits) == 1 else torch.cat(list(logits))
            whole = gather_over_tp(joined, mesh)[:, : self._model.config.model.vocab_size]
            if mesh.tp_rank == 0:
                uniforms = copy_to(torch.tensor(numbers, dtype=torch.float64), mesh.device)
                tokens, log_probs = draw_tokens(whole.float(), self._sampling, uniforms)
                drawn = torch.stack([tokens.double(), log_probs.double()])
            from_first_tp_rank(drawn, mesh)
        tokens, log_probs = from_last_pp_stage(drawn, mesh).tolist()
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

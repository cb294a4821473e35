"""A model sharded over one mesh: forward passes without gradients, logits, weights in and out. No optimizer, no files.

Frozen models (a reference, a teacher, a reward model) are of this class; the trained one, `Engine`, is one more of it.
Every public method is collective: all ranks of the world must call it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from configs.errors import BadInput
from configs.roles import HeadKind
from configs.stages import Config
from parallel.collectives import any_rank, from_last_pp_stage, gather_over_cp, gather_over_tp
from parallel.mesh import Mesh
from parallel.schedule import run_schedule
from trainer.data.batch import Batch, share_of
from trainer.engine.forward import forward_cached
from trainer.engine.fp8_history import build_history_state, load_history, request_history_state
from trainer.engine.parts import SavedState
from trainer.engine.sharded_state import (
    build_model_state,
    build_trained_state,
    load_model_state,
    load_trained_state,
)
from trainer.engine.turns import Turns
from trainer.model.attention.cache import CachedTokens
from trainer.model.divergence import TopK
from trainer.model.dynamic_rope import rotated_at
from trainer.model.fp8.attach import Fp8State
from trainer.model.lora.adapter import Adapter
from trainer.model.token_scores import TokenScores


def _on_device[**Args, Result](method: Callable[Args, Result]) -> Callable[Args, Result]:
    """Let a method of a model have its weights on the device."""

    @functools.wraps(method)
    def with_weights(*args: Args.args, **kwargs: Args.kwargs) -> Result:
        model: Any = args[0]
        with model.on_device():
            return method(*args, **kwargs)

    return with_weights


class ShardedModel:
    """The model chunks of this rank and what they compute."""

    is_trained = False
    """Whether it has an optimizer, so that weights need not be what they are to be yet."""

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        modules: list[Any],
        fp8: Fp8State | None = None,
        adapter: Adapter | None = None,
        head: HeadKind = "vocabulary",
    ) -> None:
        """`modules` are what the schedule runs, one a virtual pipeline stage: bare chunks, or their replicas.

        With an `adapter` the model's own weights are frozen, and what is saved and resumed are the adapters alone, and
        a scalar head.
        """
        self.config = config
        self.mesh = mesh
        self.modules = modules
        self.fp8 = fp8
        self.adapter = adapter
        self.head = head
        self._measured_peak = 0
        self._weights = Turns(self._find_weights, mesh.platform, is_constant=not self.is_trained)

    @property
    def chunks(self) -> list[Any]:
        """The bare model chunks of this rank."""
        return self.modules

    @property
    def num_bytes(self) -> int:
        """Bytes of this rank's part of the model, wherever they are."""
        return self._weights.num_bytes

    @property
    def peak_bytes(self) -> int:
        """The most that the device held while this model computed; where that is not known, its own bytes."""
        return self._measured_peak or self.num_bytes

    @contextmanager
    def _measuring(self) -> Iterator[None]:
        """Take note of the most that the device holds within the context."""
        with self.mesh.platform.measure_peak() as found:
            yield
        self._measured_peak = max(self._measured_peak, *found, 0)

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Have the weights on the device within the context, where they are anyway unless they rest on the host.

        Every method that computes does so itself; around several of them it saves copying. May be nested.
        """
        with self._weights.here():
            yield

    def rest_on_host(self, *, with_weights: bool) -> None:
        """Keep the memory of updates, and with it the weights or not, on the host but while they are computed with."""
        if with_weights:
            self.finish_parameter_gather()
            self._weights.rest_on_host()

    def _find_weights(self) -> Iterator[torch.Tensor]:
        """Yield what is sent to the host as weights, and free what was made of them."""
        if self.fp8 is not None:
            self.fp8.free_weights()
        return self._tensors()

    def _tensors(self) -> Iterator[torch.Tensor]:
        """Yield the parameters and buffers of this rank."""
        for chunk in self.chunks:
            yield from (parameter.data for parameter in chunk.parameters())
            yield from chunk.buffers()

    @torch.no_grad()
    @_on_device
    def score(self, batches: Sequence[Batch], forward: Callable[[Any, Batch], Any]) -> list[Any]:
        """Return what `forward(model, batch)` gives for each microbatch: on the last pipeline stage, elsewhere nothing.

        That is a tensor `[micro_batch, seq, ...]`, or `TokenScores` or `TopK` of such, here whole on all cp ranks. It
        becomes a column of its batch, for the objective of another model.
        """
        self._set_training(False)

        def gather(output: torch.Tensor) -> torch.Tensor:
            return gather_over_cp(output, self.mesh)

        def forward_step(microbatches: Iterator[Batch], model: Any) -> tuple[Any, Callable[..., Any]]:
            output = forward(model, next(microbatches).to(self.mesh.device))
            # Megatron-Core looks at the tensor's device where there are experts.
            shown = output.log_probs if isinstance(output, TokenScores | TopK) else output
            return shown, lambda shown, non_loss_data: output

        with self._measuring():
            outputs = self._run(forward_step, self._shares(batches), forward_only=True, collect_outputs=True)
        return [output.map(gather) if isinstance(output, TokenScores | TopK) else gather(output) for output in outputs]

    @torch.no_grad()
    @_on_device
    def compute_logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the fp32 logits `[batch, seq, vocab_size]` of `tokens [batch, seq]` on every rank, padding cut off."""
        self._set_training(False)
        batch, seq_len = tokens.shape
        # cp and sp split the sequence; causal attention does not see what is appended.
        multiple = self.mesh.tp_size * (2 * self.mesh.cp_size if self.mesh.cp_size > 1 else 1)
        padded_len = math.ceil(seq_len / multiple) * multiple
        padded = torch.nn.functional.pad(tokens, (0, padded_len - seq_len))
        positions = torch.arange(padded_len).expand(batch, -1)
        whole = Batch(padded, padded, positions, torch.zeros(padded.shape))
        share = share_of(whole, self.mesh.cp_rank, self.mesh.cp_size).to(self.mesh.device)

        def forward_step(microbatches: Iterator[Any], model: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
            next(microbatches)
            return model(share.tokens, share.position_ids, None), _hand_over

        with rotated_at(seq_len, self.chunks):
            outputs = run_schedule(
                forward_step,
                # The interleaved schedule wants a multiple of pp microbatches; the result of one is kept.
                [None] * (self.mesh.pp_size if self.mesh.vpp_size > 1 else 1),
                self.modules,
                seq_len=padded_len,
                micro_batch_size=batch,
                forward_only=True,
                collect_outputs=True,
            )
        vocab_size = self.config.model.vocab_size
        logits = torch.empty(batch, seq_len, vocab_size, device=self.mesh.device)
        if self.mesh.is_last_pp_stage:
            logits = gather_over_cp(gather_over_tp(outputs[0].float(), self.mesh), self.mesh)
            logits = logits[:, :seq_len, :vocab_size].contiguous()
        return from_last_pp_stage(logits, self.mesh)

    @torch.no_grad()
    @_on_device
    def compute_next_logits(self, microbatches: Sequence[CachedTokens]) -> torch.Tensor | None:
        """Return the logits `[wanted, vocab/tp]` after the tokens of equally long microbatches, which the cache keeps.

        On the last pipeline stage, of all microbatches together and as they are, padding of the vocabulary included;
        elsewhere None. Collective within a replica; where experts lie on several ranks, on all of these.
        """
        self._set_training(False)

        def forward_step(remaining: Iterator[CachedTokens], model: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
            return forward_cached(model, next(remaining)), _hand_over

        outputs = run_schedule(
            forward_step,
            microbatches,
            self.modules,
            seq_len=len(microbatches[0].ids) * self.mesh.cp_size,  # each cp rank has all tokens of rows of its own
            micro_batch_size=1,
            forward_only=True,
            collect_outputs=True,
        )
        if len(outputs) == 1:
            return outputs[0]
        return torch.cat(outputs) if outputs else None

    def finish_parameter_gather(self) -> None:
        """Wait until every rank holds the same weights, which models that are not trained always do."""

    def sharded_state(self, saved: SavedState | None) -> dict[str, Any]:
        """Return the weights, or what is trained beside frozen ones, and FP8 history to save.

        Given what a checkpoint holds, return what to load of it.
        """
        history = None if self.fp8 is None else self.fp8.history
        if saved is None:
            fp8 = build_history_state(history, self.mesh)
        else:
            fp8 = request_history_state(history, self.mesh, saved)
        if self.adapter is not None:
            return build_trained_state(self.adapter, self.chunks, self.mesh, self.head) | {"fp8": fp8}
        return build_model_state(self.chunks, self.mesh) | {"fp8": fp8}

    def load(self, loaded: dict[str, Any]) -> None:
        """Put in place what was asked for by `sharded_state`."""
        if self.adapter is None:
            self.load_weights(loaded)
        else:
            load_trained_state(self.adapter, self.chunks, loaded)
        load_history(None if self.fp8 is None else self.fp8.history, loaded.get("fp8", {}))

    def load_weights(self, loaded: dict[str, Any]) -> None:
        """Put the weights of every chunk in place; an adapter stays as it is."""
        load_model_state(self.chunks, loaded)
        if self.fp8 is not None:
            self.fp8.weights_changed()

    @contextmanager
    def merged_adapter(self) -> Iterator[None]:
        """Compute with merged weights within the context, as for generation; nothing is trained meanwhile.

        Without an adapter nothing happens.
        """
        if self.adapter is None:
            yield
            return
        with self.on_device(), self.adapter.merged():
            if self.fp8 is not None:
                self.fp8.weights_changed()
            yield
        if self.fp8 is not None:
            self.fp8.weights_changed()

    def weights_loaded(self) -> None:
        """Let everything that was made from the weights be made anew; to be called when others were put in place.

        Raises BadInput where fp16 cannot hold them.
        """
        self._weights.changed()
        if self.config.precision.compute == "fp16":
            parameters = [parameter for chunk in self.chunks for parameter in chunk.parameters()]
            if any_rank(not all(bool(torch.isfinite(one).all()) for one in parameters), self.mesh.device):
                raise BadInput(
                    "precision.compute: fp16 cannot hold these weights, which go beyond 65504 or are not finite; a "
                    "value that would work: bf16"
                )
        if self.fp8 is not None:
            self.fp8.weights_changed()

    def close(self) -> None:
        """Let go of what keeps this process from building another model; this one is then unusable."""
        self.modules = []

    def _set_training(self, is_training: bool) -> None:
        for module in self.modules:
            if module.training != is_training:  # the walk over all submodules takes longer than some kernels
                module.train(is_training)

    def _shares(self, batches: Sequence[Batch]) -> list[Batch]:
        """Return this rank's part of the rows that cp ranks share."""
        return [share_of(batch, self.mesh.cp_rank, self.mesh.cp_size) for batch in batches]

    def _run(
        self, forward_step: Any, batches: Sequence[Batch], *, forward_only: bool, collect_outputs: bool = False
    ) -> list[Any]:
        rows, seq_len = batches[0].tokens.shape[0], batches[0].tokens.shape[1] * self.mesh.cp_size
        is_packed = batches[0].documents is not None
        return run_schedule(
            forward_step,
            batches,
            self.modules,
            seq_len=rows * seq_len if is_packed else seq_len,
            micro_batch_size=1 if is_packed else rows,
            forward_only=forward_only,
            collect_outputs=collect_outputs,
        )


def _hand_over(output: torch.Tensor, non_loss_data: bool = False) -> torch.Tensor:
    """Return the model's output itself where the schedule asks for a loss."""
    return output

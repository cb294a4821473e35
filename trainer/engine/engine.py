"""Model + optimizer on one mesh: the training step, evaluation, logits. The only caller of the schedule.

Knows no stage by name and no files. Every public method is collective: all ranks of the world must call it.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from configs.errors import BadInput
from configs.stages import Config
from parallel.collectives import any_rank, from_last_pp_stage, gather_over_tp, sum_over_microbatch_ranks
from parallel.mesh import Mesh
from parallel.replicate import gather_parameters, resolve_overlap
from parallel.schedule import finalize_gradients, run_schedule
from trainer.data.batch import Batch
from trainer.engine.objective import Objective
from trainer.engine.state import StepResult, TrainState
from trainer.losses.loss import Loss
from trainer.model.fp8.attach import Fp8State
from trainer.model.router_losses import read_router_losses
from trainer.optim.learning_rate import compute_learning_rate
from trainer.optim.update import set_learning_rate, update_weights


@dataclass
class MicrobatchReport:
    """This rank's losses of the last step by microbatch, for finding the cause of a non-finite one."""

    sample_ids: list[tuple[int, ...]] = field(default_factory=list)
    losses: list[torch.Tensor] = field(default_factory=list)


# What every stage reports; its own metrics come beside these.
RESERVED_SUMS = ("total", "num_tokens", "num_samples")


class Engine:
    """One sharded model with its optimizer; every stage of training runs on it."""

    def __init__(
        self, config: Config, mesh: Mesh, replicas: list[Any], optimizer: Any, fp8: Fp8State | None = None
    ) -> None:
        self.config = config
        self.mesh = mesh
        self.replicas = replicas
        self.optimizer = optimizer
        self.fp8 = fp8
        self.report = MicrobatchReport()
        self._connect()

    @property
    def chunks(self) -> list[Any]:
        """The bare model chunks of this rank, without the data-parallel wrapper."""
        return [replica.module for replica in self.replicas]

    def train_step(self, batches: Sequence[Batch], stage: Objective, state: TrainState) -> StepResult:
        """Forward, backward, reduce, clip and update on this rank's microbatches of one global batch."""
        started = time.perf_counter()
        for replica in self.replicas:
            replica.train()
            replica.zero_grad_buffer()
        self.optimizer.zero_grad()
        losses = self._run(batches, stage, forward_only=False)
        sums = self._sum_losses(losses, batches, stage)
        loss, num_tokens = sums["total"], int(sums["num_tokens"])
        self.mesh.platform.synchronize()
        forward_done = time.perf_counter()
        learning_rate = compute_learning_rate(
            state.step, self.config.train.num_steps, self.config.optimizer, self.config.schedule
        )
        set_learning_rate(self.optimizer, learning_rate)
        update = update_weights(
            self.optimizer, self.config, self.mesh, is_loss_finite=math.isfinite(loss) and num_tokens > 0
        )
        if self.fp8 is not None:
            self.fp8.close_step(is_applied=update.is_applied)
        per_token = 1.0 / max(num_tokens, 1)
        return StepResult(
            loss=loss * per_token,
            num_tokens=num_tokens,
            num_samples=int(sums["num_samples"]),
            grad_norm=update.grad_norm,
            learning_rate=learning_rate,
            is_applied=update.is_applied,
            is_overflow_expected=update.is_overflow_expected,
            loss_scale=update.loss_scale,
            metrics={
                **{name: value * per_token for name, value in sums.items() if name not in RESERVED_SUMS},
                **read_router_losses(self.config.model, self.mesh, len(batches)),
            },
            phase_seconds={
                "forward_backward": forward_done - started,
                "optimizer": time.perf_counter() - forward_done,
            },
        )

    @torch.no_grad()
    def eval_step(self, batches: Sequence[Batch], stage: Objective) -> dict[str, float]:
        """Return the summed loss, counted tokens and further sums of one global batch, without gradients."""
        for replica in self.replicas:
            replica.eval()
        return self._sum_losses(self._run(batches, stage, forward_only=True), batches, stage)

    @torch.no_grad()
    def compute_logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the fp32 logits `[batch, seq, vocab_size]` of `tokens [batch, seq]` on every rank, padding cut off."""
        for replica in self.replicas:
            replica.eval()
        batch, seq_len = tokens.shape
        # sp splits the sequence over tp; causal attention does not see what is appended.
        padded_len = math.ceil(seq_len / self.mesh.tp_size) * self.mesh.tp_size
        padded = torch.nn.functional.pad(tokens, (0, padded_len - seq_len)).to(self.mesh.device)
        positions = torch.arange(padded_len, device=self.mesh.device).expand(batch, -1)

        def forward_step(microbatches: Iterator[Any], model: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
            next(microbatches)
            return model(padded, positions, None), lambda output, non_loss_data=False: output

        outputs = run_schedule(
            forward_step,
            # The interleaved schedule wants a multiple of pp microbatches; the result of one is kept.
            [None] * (self.mesh.pp_size if self.mesh.vpp_size > 1 else 1),
            self.replicas,
            seq_len=padded_len,
            micro_batch_size=batch,
            forward_only=True,
            collect_outputs=True,
        )
        vocab_size = self.config.model.vocab_size
        logits = torch.empty(batch, seq_len, vocab_size, device=self.mesh.device)
        if self.mesh.is_last_pp_stage:
            logits = gather_over_tp(outputs[0].float(), self.mesh)[:, :seq_len, :vocab_size].contiguous()
        return from_last_pp_stage(logits, self.mesh)

    def finish_parameter_gather(self) -> None:
        """Wait until every rank holds the updated weights; needed before anything but a forward pass reads them."""
        gather_parameters(self.replicas)

    def weights_loaded(self) -> None:
        """Let everything that was made from the weights be made anew; to be called when others were put in place.

        Raises BadInput where fp16 cannot hold them. Collective: all ranks of the world must call this.
        """
        if self.config.precision.compute == "fp16":
            parameters = [parameter for chunk in self.chunks for parameter in chunk.parameters()]
            if any_rank(not all(bool(torch.isfinite(one).all()) for one in parameters), self.mesh.device):
                raise BadInput(
                    "precision.compute: fp16 cannot hold these weights, which go beyond 65504 or are not finite; a "
                    "value that would work: bf16"
                )
        self.optimizer.reload_model_params()
        if self.fp8 is not None:
            self.fp8.weights_changed()

    def close(self) -> None:
        """Let go of the process groups, so that the same process can build another engine; this one is then unusable.

        Autograd keeps the replicas alive through their hooks, in C++ where Python's collector cannot see the ring.
        """
        for replica in self.replicas:
            vars(replica).clear()

    def _connect(self) -> None:
        """Give Megatron-Core's schedule and gradient finisher what they look for in the model's config."""
        transformer = self.chunks[0].config
        transformer.grad_scale_func = self.optimizer.scale_loss
        transformer.finalize_model_grads_func = finalize_gradients()
        if resolve_overlap(self.config.parallel, self.mesh.platform.overlaps_communication).grad_reduce:
            single = len(self.replicas) == 1
            no_syncs = [replica.no_sync for replica in self.replicas]
            grad_syncs = [replica.start_grad_sync for replica in self.replicas]
            transformer.no_sync_func = no_syncs[0] if single else no_syncs
            if self.mesh.pp_size > 1:
                transformer.grad_sync_func = grad_syncs[0] if single else grad_syncs

    def _run(self, batches: Sequence[Batch], stage: Objective, *, forward_only: bool) -> list[dict[str, torch.Tensor]]:
        """Run the schedule and return one dict of sums per microbatch (on the last pipeline stage, else empty)."""
        self.report = MicrobatchReport()

        def forward_step(microbatches: Iterator[Batch], model: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
            batch = next(microbatches).to(self.mesh.device)
            return stage.forward(model, batch), functools.partial(self._loss, stage, batch)

        rows, seq_len = batches[0].tokens.shape
        is_packed = batches[0].cu_seqlens is not None
        return run_schedule(
            forward_step,
            batches,
            self.replicas,
            seq_len=rows * seq_len if is_packed else seq_len,
            micro_batch_size=1 if is_packed else rows,
            forward_only=forward_only,
        )

    def _loss(self, stage: Objective, batch: Batch, output: torch.Tensor) -> tuple[Any, ...]:
        """Return (summed loss, tokens, sums to report) as the schedule wants them."""
        loss: Loss = stage.loss(output, batch)
        total = loss.total.detach()
        self.report.sample_ids.append(batch.sample_ids)
        self.report.losses.append(total)
        return loss.total, loss.num_tokens, {"total": total, "num_tokens": loss.num_tokens, **loss.metrics}

    def _sum_losses(
        self, losses: list[dict[str, torch.Tensor]], batches: Sequence[Batch], stage: Objective
    ) -> dict[str, float]:
        """Return the sums over all microbatches and ranks, the same on every rank; waits for them."""
        names = ["total", "num_tokens", *stage.metric_names]
        local = torch.zeros(len(names) + 1, dtype=torch.float64, device=self.mesh.device)
        if losses:
            local[:-1] = torch.stack([torch.stack([row[name].double() for name in names]) for row in losses]).sum(0)
            # cp ranks share their samples, so each counts its part of them.
            num_samples = sum(1 for batch in batches for sample in batch.sample_ids if sample >= 0)
            local[-1] = num_samples / self.mesh.cp_size
        summed = sum_over_microbatch_ranks(local, self.mesh).tolist()
        return dict(zip([*names, "num_samples"], summed, strict=True))

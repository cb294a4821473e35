"""A trained model: the training step, sums of losses, faults. The only caller of the optimizer.

Knows no stage by name and no files. Every public method is collective: all ranks of the world must call it.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from configs.plan.derive import layer_windows
from configs.stages import Config, HeadKind
from parallel.collectives import sum_over_microbatch_ranks
from parallel.mesh import Mesh
from parallel.replicate import free_gradients, gather_parameters, resolve_overlap, restore_gradients
from parallel.schedule import finalize_gradients
from parallel.watch.phases import phase
from trainer.data.batch import Batch
from trainer.engine.faults import MicrobatchReport, describe_fault
from trainer.engine.objective import Objective
from trainer.engine.optimizer_state import build_optimizer_state, fit_optimizer_state, widen_weights
from trainer.engine.parts import SavedState
from trainer.engine.sharded_model import ShardedModel
from trainer.engine.sharded_state import copy_to_host, with_key_prefix
from trainer.engine.state import StepResult
from trainer.engine.sums import BatchSums, add_up, count_ahead
from trainer.engine.turns import Turns, distinct_storages
from trainer.model.fp8.attach import Fp8State
from trainer.model.lora.adapter import Adapter
from trainer.model.router_biases import RouterBiases
from trainer.model.router_losses import read_router_losses, router_loss_names, scale_router_losses
from trainer.optim.update import UpdateResult, set_rates, update_weights


class Engine(ShardedModel):
    """One sharded model with its optimizer; every stage of training runs on it."""

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        replicas: list[Any],
        optimizer: Any,
        fp8: Fp8State | None = None,
        adapter: Adapter | None = None,
        head: HeadKind = "vocabulary",
        key_prefix: str = "",
    ) -> None:
        """`key_prefix` begins its keys in checkpoints, where it is not the only trained model."""
        super().__init__(config, mesh, replicas, fp8, adapter, head)
        self._key_prefix = key_prefix
        self._update_memory = Turns(self._find_update_memory, mesh.platform, is_constant=False)
        self._keeps_gradients = False
        self.optimizer = optimizer
        self._report = MicrobatchReport()
        self._connect()

    is_trained = True

    @property
    def chunks(self) -> list[Any]:
        """The bare model chunks of this rank, without the data-parallel wrapper."""
        return [replica.module for replica in self.modules]

    def train_step(self, batches: Sequence[Batch], objective: Objective, learning_rate: float) -> StepResult:
        """Forward, backward, reduce, clip and update on this rank's microbatches of one global batch.

        Where nothing of the batch counts, or a number is not finite, the weights stay as they are.
        """
        with self.on_device(for_updates=True):
            return self._train_step(batches, objective, learning_rate)

    def _train_step(self, batches: Sequence[Batch], objective: Objective, learning_rate: float) -> StepResult:
        started = time.perf_counter()
        batches = self._shares(batches)
        self._set_training(True)
        biases = RouterBiases(self.chunks, self.config.model)
        for replica in self.modules:
            replica.zero_grad_buffer()
        self.optimizer.zero_grad()
        if router_loss_names(self.config.model):
            ahead = count_ahead(batches, objective, self.mesh)
            scale_router_losses(self.chunks, self.optimizer.scale_loss, ahead)
        with phase("forward_backward"):
            sums = self._forward(batches, objective, forward_only=False)
            self.mesh.platform.synchronize()
        forward_done = time.perf_counter()
        set_rates(self.optimizer, learning_rate, self.config.optimizer.weight_decay)
        with phase("optimizer"):
            update = self._update(sums)
            self._keeps_gradients = not update.is_applied  # for `describe_fault`
            if not update.is_applied:
                biases.restore()
            self.mesh.platform.synchronize()
        return StepResult(
            loss=sums.mean,
            count=sums.count,
            num_tokens=sums.num_tokens,
            num_input_tokens=sums.num_input_tokens,
            num_attended_pairs=sums.num_attended_pairs,
            num_samples=sums.num_samples,
            grad_norm=update.grad_norm,
            learning_rate=learning_rate,
            is_applied=update.is_applied,
            is_overflow_expected=update.is_overflow_expected,
            loss_scale=update.loss_scale,
            next_loss_scale=update.next_loss_scale,
            metrics={**sums.means, **read_router_losses(self.config.model, self.mesh, len(batches))},
            phase_seconds={
                "forward_backward": forward_done - started,
                "optimizer": time.perf_counter() - forward_done,
            },
        )

    @torch.no_grad()
    def sum_losses(self, batches: Sequence[Batch], objective: Objective) -> BatchSums:
        """Return the loss and further figures of one global batch, without gradients."""
        self._set_training(False)
        with self.on_device():
            return self._forward(self._shares(batches), objective, forward_only=True)

    def describe_fault(self) -> str:
        """Return which ranks and data made the last step non-finite."""
        with self.on_device(for_updates=True):
            return describe_fault(self._report, self.modules, self.mesh)

    @contextmanager
    def on_device(self, *, for_updates: bool = False) -> Iterator[None]:
        """Have the weights on the device within the context, and on request what updates need beside them."""
        with super().on_device():
            if not for_updates:
                yield
                return
            with self._update_memory.here():
                restore_gradients(self.modules)
                yield
            if self._update_memory.is_away and not self._keeps_gradients:
                free_gradients(self.modules)

    def rest_on_host(self, *, with_weights: bool) -> None:
        """Keep gradients, main weights and moments, and with them the weights or not, on the host but in their turns.

        The gradients are not kept at all.
        """
        self._update_memory.rest_on_host()
        free_gradients(self.modules)
        super().rest_on_host(with_weights=with_weights)

    def _find_update_memory(self) -> list[torch.Tensor]:
        """Return main weights and moments, where they are not the weights themselves."""
        weights = distinct_storages(self._tensors())
        tensors = [
            tensor
            for part in self.optimizer.chained_optimizers
            if not part.is_stub_optimizer
            for group in part.optimizer.param_groups
            for parameter in group["params"]
            for tensor in (parameter.data, *part.optimizer.state.get(parameter, {}).values())
            if isinstance(tensor, torch.Tensor) and tensor.device == self.mesh.device
        ]
        return [tensor for tensor in tensors if tensor.untyped_storage()._cdata not in weights]

    def sharded_state(self, saved: SavedState | None) -> dict[str, Any]:
        """Return weights, FP8 history and optimizer state to save, or, given what a checkpoint holds, to load of it.

        What is saved of a model that rests on the host are copies there; to load, it is to be held on the device.
        """
        if saved is None:
            with self.on_device(for_updates=True):
                self.finish_parameter_gather()
                state = self._own_state(None)
                return copy_to_host(state) if self._update_memory.rests_on_host else state
        return self._own_state(saved.under(self._key_prefix))

    def _own_state(self, saved: SavedState | None) -> dict[str, Any]:
        state = super().sharded_state(saved)
        weights = {name: value for name, value in state.items() if name != "fp8"}
        optimizer = build_optimizer_state(self.optimizer, weights, saved)
        if saved is not None:
            widen_weights(weights, saved)
        return with_key_prefix(state | {"optimizer": optimizer}, self._key_prefix)

    def load(self, loaded: dict[str, Any]) -> None:
        """Put in place what was asked for by `sharded_state`."""
        super().load(loaded)
        weights = {
            parameter: loaded[f"model{index}"].get(name, parameter.data)
            for index, chunk in enumerate(self.chunks)
            for name, parameter in chunk.named_parameters()
        }
        self.optimizer.load_state_dict(fit_optimizer_state(self.optimizer, loaded["optimizer"], weights))

    def finish_parameter_gather(self) -> None:
        """Wait until every rank holds the updated weights; needed before anything but a forward pass reads them."""
        if not self._weights.is_away:  # else they were, when they were sent
            gather_parameters(self.modules)

    @contextmanager
    def merged_adapter(self) -> Iterator[None]:
        """Compute with merged weights within the context; every rank has the updated adapters first."""
        self.finish_parameter_gather()
        with super().merged_adapter():
            yield

    def weights_loaded(self) -> None:
        """Let what was made from the weights be made anew, the optimizer's main copy too."""
        with self.on_device(for_updates=True):
            super().weights_loaded()
            self.optimizer.reload_model_params()

    def close(self) -> None:
        """Let go of the process groups, so that the same process can build another engine; this one is then unusable.

        Autograd keeps the replicas alive through their hooks, in C++ where Python's collector cannot see the ring.
        """
        for replica in self.modules:
            vars(replica).clear()
        super().close()

    def _connect(self) -> None:
        """Give Megatron-Core's schedule and gradient finisher what they look for in the model's config."""
        transformer = self.chunks[0].config
        transformer.grad_scale_func = self.optimizer.scale_loss
        transformer.finalize_model_grads_func = finalize_gradients()
        if resolve_overlap(self.config.parallel, self.mesh.platform.overlaps_communication).grad_reduce:
            single = len(self.modules) == 1
            no_syncs = [replica.no_sync for replica in self.modules]
            grad_syncs = [replica.start_grad_sync for replica in self.modules]
            transformer.no_sync_func = no_syncs[0] if single else no_syncs
            if self.mesh.pp_size > 1:
                transformer.grad_sync_func = grad_syncs[0] if single else grad_syncs

    def _update(self, sums: BatchSums) -> UpdateResult:
        """Apply the gradients, unless there is nothing to learn from or something is not finite."""
        if sums.count == 0:
            scale = float(self.optimizer.get_loss_scale())
            update = UpdateResult(False, 0.0, scale, scale, is_overflow_expected=False)
        else:
            update = update_weights(self.optimizer, self.config, self.mesh, is_loss_finite=math.isfinite(sums.mean))
        if self.fp8 is not None:
            self.fp8.close_step(is_applied=update.is_applied)
        return update

    def _forward(self, batches: Sequence[Batch], objective: Objective, *, forward_only: bool) -> BatchSums:
        """Run the schedule and return the sums over all microbatches and ranks; waits for them."""
        self._report = MicrobatchReport()

        def forward_step(microbatches: Iterator[Batch], model: Any) -> tuple[Any, Callable[..., Any]]:
            batch = next(microbatches).to(self.mesh.device)
            return objective.forward(model, batch), functools.partial(self._loss, objective, batch)

        rows = self._run(forward_step, batches, forward_only=forward_only)
        local = add_up(rows, batches, objective.mean_names, self.mesh, layer_windows(self.config.model))
        return BatchSums.from_vector(sum_over_microbatch_ranks(local, self.mesh), objective.mean_names)

    def _loss(self, objective: Objective, batch: Batch, output: Any) -> tuple[Any, ...]:
        """Return (summed loss, divisor, figures to report) as the schedule wants them."""
        loss, count = objective.loss(output, batch), objective.count(batch)
        total = loss.total.detach()
        self._report.sample_ids.append(batch.sample_ids)
        self._report.losses.append(total)
        means = [part for name in objective.mean_names for part in (loss.means[name].total, loss.means[name].count)]
        return loss.total, count, [total, count, *means]

"""What happens around a step, in one fixed order: faults, evaluation, stop requests, checkpoints, log.

Every method is collective: all ranks of the world must call it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping

from configs.errors import NonFinite
from configs.stages import Config
from parallel.collectives import max_over_ranks
from parallel.mesh import Mesh
from parallel.watch.phases import phase
from trainer.checkpoint.layout import BEST, best_checkpoint, checkpoints_dir, step_of
from trainer.checkpoint.save import CheckpointWriter
from trainer.engine.sharded_model import ShardedModel
from trainer.engine.state import StepResult, TrainState
from trainer.evaluate.validation import VALIDATION_LOSS, VALIDATION_PERPLEXITY, VALIDATION_SCORE
from trainer.report.reporter import Reporter
from trainer.run.directory import RunLock
from trainer.run.signals import StopSignals
from trainer.run.stragglers import StragglerReport
from trainer.stages.base import Stage

log = logging.getLogger(__name__)
_SHARES = ("validation_accuracy/", "validation_exact_answers/", "validation_rewards/accuracies/")


class Hooks:
    """All that happens around a step."""

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        stage: Stage,
        *,
        reporter: Reporter,
        checkpoints: CheckpointWriter,
        signals: StopSignals,
        lock: RunLock,
        stragglers: StragglerReport,
        models: Mapping[str, ShardedModel],
    ) -> None:
        """The memory of `models`, by role, is reported where there are several."""
        self._config = config
        self._mesh = mesh
        self._stage = stage
        self._reporter = reporter
        self._checkpoints = checkpoints
        self._signals = signals
        self._lock = lock
        self._stragglers = stragglers
        self._models = dict(models) if len(models) > 1 else {}
        self._has_told_memory = False
        self._first_validation: dict[str, float] = {}
        self._last_validation: dict[str, float] = {}
        self._last_validation_step = -1

    def on_start(self, state: TrainState) -> TrainState:
        """Measure the validation loss before the first step of a run; return the state with what it has found."""
        if state.step == 0 and self._config.train.num_steps > 0:
            if self._config.sources("validation"):
                log.info("step 0: validation before the first step is under way")
            self._first_validation = self._evaluate(state)
            self._reporter.write_start(state.step, self._first_validation)
            state = _after_validation(state, self._first_validation)
        self._vote()
        if self.is_patience_over(state):
            log.info("step %d: train.patience has ended this run; a larger one lets it go on", state.step)
        elif state.step < self._config.train.num_steps and not self.stop_requested():
            log.info("step %d is under way, the first of this start", state.step + 1)
        return state

    def stop_requested(self) -> bool:
        """Return whether any rank has been asked to save and exit."""
        return self._signals.is_agreed

    def is_patience_over(self, state: TrainState) -> bool:
        """Return whether validation has not improved for so long that the run ends."""
        patience = self._config.train.patience
        return patience is not None and state.num_stale_validations >= patience

    def after_step(self, state: TrainState, result: StepResult) -> TrainState:
        """Report faults, evaluate, log and save after a step; return the state with what validation has found."""
        self._lock.check()
        if not result.is_applied:
            self._report_skip(state, result)
        train = self._config.train
        is_last = state.step == train.num_steps
        extras: dict[str, float] = {}
        if is_last or (train.eval_every is not None and state.step % train.eval_every == 0):
            extras = self._evaluate(state)
            state = _after_validation(state, extras)
        extras |= self._stragglers.after_step(state.step)
        started = time.perf_counter()
        is_any_rank_writing, extras["peak_memory_gb"] = self._vote()
        extras |= self._measure_models()
        self._checkpoints.publish_if_written(is_any_rank_writing=is_any_rank_writing)
        save_every = self._config.checkpoint.save_every
        # Weights that give non-finite losses must not push the last good ones out of the retention.
        is_due = save_every is not None and state.step % save_every == 0 and state.num_nonfinite_in_a_row == 0
        if is_due or (train.patience is not None and state.best_step == state.step):
            with phase("save"):
                self._checkpoints.save(state, self._stage)
        extras["seconds_checkpoint"] = time.perf_counter() - started
        self._reporter.write(state, result, extras)
        if not self._config.checkpoint.async_save:  # a run that continues from a step has the rows up to it
            self._checkpoints.finish()
        if state.num_nonfinite_in_a_row >= train.max_nonfinite_steps:
            culprits = self._stage.describe_fault()
            self._checkpoints.finish()
            self._reporter.close()
            raise NonFinite(
                f"{state.num_nonfinite_in_a_row} steps in a row, up to step {state.step}, had a non-finite loss or "
                f"gradient and were skipped ({culprits}); lower optimizer.lr, or look at that data"
            )
        if self.is_patience_over(state) and not is_last:
            log.info(
                "step %d: the last %d validations were not below %.4f; the run ends here (train.patience)",
                state.step,
                state.num_stale_validations,
                state.lowest_validation_loss,
            )
        return state

    def on_end(self, state: TrainState) -> None:
        """Save where the run is, unless that has been done, and wait until it is on disk."""
        self._lock.check()
        with phase("save"):
            if self._checkpoints.last_saved_step != state.step:
                self._checkpoints.save(state, self._stage)
            self._checkpoints.finish()
        self._reporter.close()
        self._tell_best(state)
        for name, first in self._first_validation.items():
            if name.startswith((VALIDATION_LOSS, VALIDATION_SCORE)) and self._last_validation_step == state.step:
                log.info("%s: %.4f before training, %.4f after", name, first, self._last_validation[name])

    def _tell_best(self, state: TrainState) -> None:
        """Say where the weights with the lowest validation loss are, of a run that keeps them."""
        if self._config.train.patience is None or state.best_step is None:
            return
        run_dir = str(self._config.run.dir)
        best = best_checkpoint(run_dir)
        if state.best_step == 0:
            where = "those that the run began with"
        elif best is not None and step_of(best) == state.best_step:
            where = f"kept as {checkpoints_dir(run_dir) / BEST}"
        else:  # it was reached without train.patience, or the run has gone back to before a better one
            where = "no longer there: its checkpoint was not kept"
        loss = state.lowest_validation_loss
        log.info("lowest validation loss %.4f after step %d, whose weights are %s", loss, state.best_step, where)

    def _vote(self) -> tuple[bool, float]:
        """Agree, in one reduction a step, on stopping; return whether any rank is writing and the peak memory in GB."""
        mesh = self._mesh
        mine = (self._signals.is_received, self._checkpoints.is_writing, mesh.platform.peak_memory_bytes() / 1e9)
        is_stop, is_writing, peak_memory = max_over_ranks(mine, mesh.device)
        self._signals.is_agreed = self._signals.is_agreed or bool(is_stop)
        return bool(is_writing), peak_memory

    def _measure_models(self) -> dict[str, float]:
        """Return the peak memory of each of several models in GB, on the rank that has most, and tell it once."""
        if not self._models:
            return {}
        peaks = max_over_ranks([model.peak_bytes / 1e9 for model in self._models.values()], self._mesh.device)
        found = dict(zip(self._models, peaks, strict=True))
        if not self._has_told_memory:
            self._has_told_memory = True
            turns = "by turns" if self._config.parallel.offload_models else "all on the device"
            told = ", ".join(f"{role} {peak:.3g} GB" for role, peak in found.items())
            log.info("peak memory by model, on the fullest rank of each: %s (%s)", told, turns)
        return {f"peak_memory_gb/{role}": peak for role, peak in found.items()}

    def _evaluate(self, state: TrainState) -> dict[str, float]:
        with phase("evaluate"):
            evaluation = self._stage.evaluate()
        values = evaluation.values
        self._reporter.write_answers(state.step, evaluation.answers)
        self._last_validation, self._last_validation_step = values, state.step
        for name, value in values.items():
            perplexity = values.get(name.replace(VALIDATION_LOSS, VALIDATION_PERPLEXITY, 1))
            if name.startswith(VALIDATION_LOSS) and perplexity is not None:
                log.info("step %d: %s %.4f (perplexity %.2f)", state.step, name, value, perplexity)
            elif name.startswith(_SHARES):
                log.info("step %d: %s %.1f %%", state.step, name, 100 * value)
            elif not name.startswith(VALIDATION_PERPLEXITY):
                log.info("step %d: %s %.4g", state.step, name, value)
        return values

    def _report_skip(self, state: TrainState, result: StepResult) -> None:
        if result.is_empty:
            log.warning("step %d: nothing of its batch counts in the loss; no update was made", state.step)
            return
        if result.is_overflow_expected:
            log.info(
                "step %d: fp16 overflow at loss scale %g; update skipped, scale now %g",
                state.step,
                result.loss_scale,
                result.next_loss_scale,
            )
            return
        log.warning(
            "step %d: non-finite (loss %s, gradient norm %s); update skipped on all ranks: %s",
            state.step,
            result.loss,
            result.grad_norm,
            self._stage.describe_fault(),
        )


def _after_validation(state: TrainState, values: dict[str, float]) -> TrainState:
    """Return the state with the mean loss over the sources of a validation, if there are any."""
    losses = [value for name, value in values.items() if name.startswith(VALIDATION_LOSS)]
    return state.after_validation(sum(losses) / len(losses)) if losses else state

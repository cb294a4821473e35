"""Step results -> rows for metrics.jsonl, TensorBoard and the live line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from configs.plan.flops import model_flops
from configs.stages import Config
from parallel.mesh import Mesh
from trainer.engine.state import StepResult, TrainState
from trainer.report.live import LiveLine
from trainer.report.sinks import MetricsWriter

if TYPE_CHECKING:
    from trainer.evaluate.answers import Spoken


class Reporter:
    """Turns step results into rows for metrics.jsonl, TensorBoard and the live line; writes on rank 0 alone."""

    def __init__(self, config: Config, mesh: Mesh, writer: MetricsWriter | None, live: LiveLine | None) -> None:
        self._config = config
        self._mesh = mesh
        self._writer = writer
        self._live = live
        self._peaks = dict(mesh.platform.peak_tflops())
        if config.log.device_peak_tflops is not None:
            self._peaks["bf16"] = config.log.device_peak_tflops

    def write_start(self, step: int, values: Mapping[str, float]) -> None:
        """Write what was measured before the first step; metrics.jsonl has rows of steps alone."""
        if self._writer is not None:
            self._writer.write_start(step, values)

    def write(self, state: TrainState, result: StepResult, extras: Mapping[str, float]) -> None:
        """Write one step's row; `extras` are further columns, such as validation losses."""
        if self._writer is None or self._live is None:
            return
        seconds = sum(result.phase_seconds.values())
        config = self._config
        counts = (result.num_input_tokens, result.num_attended_pairs)
        flops = model_flops(config.model, *counts, config.lora, config.head)
        tflops = flops / seconds / self._mesh.world_size / 1e12
        row = {
            "step": state.step,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": result.learning_rate,
            "num_tokens": result.num_tokens,
            "tokens_per_second": result.num_input_tokens / seconds,
            "seconds": seconds,
            "num_input_tokens": result.num_input_tokens,
            "counted_tokens_per_second": result.num_tokens / seconds,
            **{f"seconds_{name}": value for name, value in result.phase_seconds.items()},
            "tflops_per_device": tflops,
            **{f"mfu_{number_format}": tflops / peak for number_format, peak in self._peaks.items()},
            "consumed_samples": state.consumed_samples,
            "consumed_tokens": state.consumed_tokens,
            "num_skipped_steps": state.num_skipped_steps,
            "num_empty_steps": state.num_empty_steps,
            **result.metrics,
            **extras,
        }
        if self._config.precision.compute == "fp16":
            row["loss_scale"] = result.loss_scale
        self._writer.write(row)
        if result.rollouts:
            self._writer.write_rollouts(state.step, result.rollouts)
        self._live.update(row)

    def write_answers(self, step: int, answers: Sequence[Spoken]) -> None:
        """Write down what the model says after a step."""
        if self._writer is not None and answers:
            self._writer.write_answers(step, answers)

    def close(self) -> None:
        """Close files and the live line."""
        if self._writer is not None:
            self._writer.close()
        if self._live is not None:
            self._live.close()

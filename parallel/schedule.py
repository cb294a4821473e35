"""The one call into Megatron-Core's pipeline schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

ForwardStep = Callable[[Iterator[Any], Any], tuple[Any, Callable[..., Any]]]


def run_schedule(
    forward_step: ForwardStep,
    batches: Sequence[Any],
    chunks: list[Any],
    *,
    seq_len: int,
    micro_batch_size: int,
    forward_only: bool = False,
    collect_outputs: bool = False,
) -> list[Any]:
    """Run all microbatches through the pipeline and return what `forward_step`'s second result returned for each.

    `seq_len` and `micro_batch_size` are those of one microbatch, tokens and rows. The list is empty on every rank
    but the last pipeline stage's. With `collect_outputs` the model's outputs themselves are collected.
    Collective: all ranks of the world must call this.
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func

    iterators = [iter(batches) for _ in chunks]
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=len(batches),
        seq_length=seq_len,
        micro_batch_size=micro_batch_size,
        forward_only=forward_only,
        collect_non_loss_data=collect_outputs,
    )


def finalize_gradients() -> Callable[..., None]:
    """Return Megatron-Core's gradient finisher: reductions over dp, sp and tied embeddings, division by all tokens."""
    from megatron.core.distributed import finalize_model_grads

    return finalize_model_grads

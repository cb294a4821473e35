"""Wraps model chunks in Megatron-Core's DistributedDataParallel: gradient buffers, reduction, parameter gather."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from configs.sections.parallel import ParallelConfig
from configs.stages import Config
from parallel.precision import gathers_fp8


@dataclass(frozen=True)
class Overlap:
    """Which data-parallel communication runs beside compute."""

    grad_reduce: bool
    param_gather: bool


def resolve_overlap(parallel: ParallelConfig, is_overlapping: bool) -> Overlap:
    """Return the configured overlap, or what the platform does well where the config says nothing."""
    grad_reduce = is_overlapping if parallel.overlap_grad_reduce is None else parallel.overlap_grad_reduce
    param_gather = grad_reduce if parallel.overlap_param_gather is None else parallel.overlap_param_gather
    return Overlap(grad_reduce, param_gather)


def replicate(chunks: list[Any], config: Config, *, is_overlapping: bool) -> list[Any]:
    """Return the chunks wrapped for data parallelism with sharded fp32 gradient reduction (ZeRO-1).

    Collective: all ranks of each data-parallel group must call this; rank 0's weights are broadcast in it.
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    # It remarks on every start that it computes a layout itself, which is what it is for.
    logging.getLogger("megatron.core.distributed.distributed_data_parallel").setLevel(logging.ERROR)
    overlap = resolve_overlap(config.parallel, is_overlapping)
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=overlap.grad_reduce,
        overlap_param_gather=overlap.param_gather,
        average_in_collective=False,
        fp8_param_gather=gathers_fp8(config.precision),
    )
    replicas = [
        DistributedDataParallel(config=chunk.config, ddp_config=ddp_config, module=chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]
    for replica in replicas:
        replica.broadcast_params()
    return replicas


def gather_parameters(replicas: list[Any]) -> None:
    """Finish a parameter gather that overlaps the next forward pass, before anything else reads the weights.

    Collective: all ranks of each data-parallel group must call this.
    """
    for replica in replicas:
        if replica.ddp_config.overlap_param_gather:
            replica.start_param_sync(force_sync=True)


def free_gradients(replicas: list[Any]) -> None:
    """Free the memory of the gradient buffers; their contents are lost."""
    with _quiet():
        for replica in replicas:
            replica.offload_grad_buffers(synchronize=False, empty_cache=False)


def restore_gradients(replicas: list[Any]) -> None:
    """Give the gradient buffers that were freed their memory again, as zeros; others stay as they are."""
    with _quiet():
        for replica in replicas:
            replica.restore_grad_buffers(synchronize=False)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Do not tell that Megatron-Core uses a deprecated name of torch."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="TypedStorage is deprecated")
        yield

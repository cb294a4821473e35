"""The `parallel` section: sizes of the axes. Torch-free plain data; rules are in `configs.rules.layout`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from configs.sections.base import Count, PositiveInt, Section


class ParallelConfig(Section):
    """Sizes of the parallel axes; the data-parallel size is what remains of the world."""

    tp: Count = 1
    """Tensor-parallel size."""
    pp: Count = 1
    """Pipeline-parallel size."""
    vpp: Count = 1
    """Virtual pipeline stages (model chunks) per rank; 1 is plain 1F1B, more is the interleaved schedule."""
    cp: Count = 1
    """Context-parallel size: ranks that share one sequence."""
    cp_attention: Literal["auto", "te", "ring", "all_gather", "ulysses", "hierarchical"] = "auto"
    """How they share attention; auto is Transformer Engine's ring where that is installed, else `ring`."""
    cp_inner: Annotated[int, Field(ge=2)] | None = None
    """hierarchical only: neighbouring ranks that exchange heads; rings go across such neighbourhoods."""
    ep: Count = 1
    """Expert-parallel size: ranks that share a layer's experts, taken from dp*cp*tp / etp."""
    etp: Count | None = None
    """Tensor-parallel size inside each expert; default `tp`."""
    sp: bool = False
    """Megatron sequence parallelism: split norms and dropouts along the sequence over the tp ranks."""
    num_layers_in_first_pp_stage: PositiveInt | None = None
    """Layers of the first pipeline stage when uneven; default an even split."""
    num_layers_in_last_pp_stage: PositiveInt | None = None
    """Layers of the last pipeline stage when uneven; default an even split."""
    vocabulary_counts_as_layers: bool = False
    """Divide the layers over the model chunks as if embedding and output layer were one layer each."""
    overlap_grad_reduce: bool | None = None
    """Reduce gradients while the backward pass runs; default true on CUDA, false on CPU."""
    overlap_param_gather: bool | None = None
    """Gather updated parameters while the forward pass runs; default true on CUDA, false on CPU."""
    offload_models: bool = False
    """Keep in the host's memory what is not computed with: gradients, main weights and moments but in updates, and
    models beside the policy whole but in their turns. The numbers stay the same."""
    preflight: bool | None = None
    """Before training see whether all hosts agree, add up right over every axis, write run.dir and tell the same time;
    default true on several hosts, false on one."""
    timeout_seconds: Annotated[int, Field(ge=1, le=7 * 24 * 3600)] = 600
    """Seconds a collective may wait before the run ends with exit code 5; after three quarters of them it is said which
    rank did not come."""

"""What is replaced so that Megatron-Core 0.19 runs on CPU, as tables of target, replacement and reason.

Two kinds, both free in the training step: names of `torch` replaced once by functions for the CPU, and string
constants ("cuda") replaced once in the compiled code of Megatron-Core functions. Applied by `CpuPlatform.activate`
alone; what is replaced on every platform is in `trainer.engine.kernels`. For megatron-core 0.19.2 and torch 2.11.0.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from parallel.platform import gloo_collectives, gloo_groups
from parallel.platform.late_imports import SYMBOLIC_SHAPES, import_late
from parallel.replaced_names import NamePatch, replace_names, resolve

CPU = torch.device("cpu")


class _NoStream:
    """Stands for a CUDA stream: on CPU everything runs in order, so waiting is already done."""

    device = CPU

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def _done(self, *args: Any, **kwargs: Any) -> _NoStream:
        return self

    wait_stream = wait_event = record_event = synchronize = record = wait = _done

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: object) -> float:
        return 0.0

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return (0, 0)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _NoStream)

    def __hash__(self) -> int:
        return 0


_ONLY_STREAM = _NoStream()


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _get_rng_state(device: object = None, clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, device: object = None, graph_safe: bool = False) -> None:
    torch.set_rng_state(new_state)


def _leave_eager(model: Any = None, **kwargs: Any) -> Any:
    """Stand for `torch.compile`, as a function and as a decorator with arguments."""
    return model if model is not None else lambda decorated: decorated


@dataclass(frozen=True)
class ConstantPatch:
    """String constants replaced in the code of one function: `target` is `module:dotted.name`."""

    target: str
    why: str


NAME_PATCHES: tuple[NamePatch, ...] = (
    NamePatch(
        "torch:compile",
        _leave_eager,
        "Megatron-Core decorates small functions at import: 4 s of imports a process and a minute of C++ at first use",
    ),
    *(
        NamePatch(
            f"torch.optim:Optimizer.{name}",
            inspect.unwrap(getattr(torch.optim.Optimizer, name)),
            "kept from the compiler by importing it: 2.4 s at the first optimizer",
        )
        for name in ("add_param_group", "load_state_dict", "state_dict", "zero_grad")
    ),
    NamePatch("torch.cuda:current_device", lambda: CPU, "passed as `device=` to tensor constructors everywhere"),
    NamePatch("torch.cuda:synchronize", _nothing, "called around pipeline communication"),
    NamePatch("torch.cuda:current_stream", lambda device=None: _ONLY_STREAM, "gradient reduction, MoE dispatch"),
    NamePatch("torch.cuda:default_stream", lambda device=None: _ONLY_STREAM, "activation recomputation"),
    NamePatch("torch.cuda:stream", lambda stream: contextlib.nullcontext(stream), "gradient reduction, MoE dispatch"),
    NamePatch("torch.cuda:Stream", _NoStream, "MoE dispatch creates one in its constructor"),
    NamePatch("torch.cuda:Event", _NoStream, "pipeline and MoE overlap"),
    NamePatch("torch.cuda:is_current_stream_capturing", lambda: False, "asked before graph-only branches"),
    NamePatch("torch.cuda:manual_seed", torch.manual_seed, "the RNG tracker seeds its states"),
    NamePatch("torch.cuda:get_rng_state", _get_rng_state, "the RNG tracker keeps states"),
    NamePatch("torch.cuda:set_rng_state", _set_rng_state, "the RNG tracker restores states"),
    NamePatch("torch.cuda.nvtx:range_push", _nothing, "profiler ranges of the layers"),
    NamePatch("torch.cuda.nvtx:range_pop", _nothing, "profiler ranges of the layers"),
    NamePatch("torch:Tensor.cuda", lambda self, *args, **kwargs: self, "scalars moved to the device"),
    NamePatch("torch.nn:Module.cuda", lambda self, *args, **kwargs: self, "modules moved to the device"),
    NamePatch("torch.distributed:all_gather", gloo_collectives.all_gather, "gloo wants equal sizes (experts x etp)"),
    NamePatch("torch.distributed:reduce_scatter", gloo_collectives.reduce_scatter, "gloo has no list form"),
    NamePatch("torch.distributed:all_to_all_single", gloo_collectives.all_to_all_single, "gloo wants split lists"),
    NamePatch("torch.distributed:new_group", gloo_groups.new_group, "Megatron-Core makes 21 groups for one rank"),
    NamePatch(
        "megatron.core.tensor_parallel.random:_get_cuda_rng_state", _get_rng_state, "reads the CUDA generator directly"
    ),
    NamePatch(
        "megatron.core.tensor_parallel.random:_set_cuda_rng_state", _set_rng_state, "sets the CUDA generator directly"
    ),
)

_LITERAL = 'writes `device="cuda"` as a literal'
_TYPE_NAME = "compares `Tensor.type()` with `torch.cuda.*Tensor`"
_OPTIMIZER = "megatron.core.optimizer"
CONSTANT_PATCHES: tuple[ConstantPatch, ...] = (
    ConstantPatch("megatron.core.pipeline_parallel.schedules:forward_backward_no_pipelining", _LITERAL),
    ConstantPatch("megatron.core.pipeline_parallel.schedules:forward_backward_pipelining_with_interleaving", _LITERAL),
    ConstantPatch(
        "megatron.core.pipeline_parallel.schedules:forward_backward_pipelining_without_interleaving", _LITERAL
    ),
    ConstantPatch(f"{_OPTIMIZER}.grad_scaler:MegatronGradScaler.__init__", _LITERAL),
    ConstantPatch(f"{_OPTIMIZER}.grad_scaler:DynamicGradScaler.__init__", _LITERAL),
    ConstantPatch(f"{_OPTIMIZER}.optimizer:MixedPrecisionOptimizer.__init__", _LITERAL),
    ConstantPatch(f"{_OPTIMIZER}.optimizer:FP32Optimizer.__init__", _LITERAL),
    ConstantPatch(f"{_OPTIMIZER}.clip_grads:get_grad_norm_fp32", _LITERAL),
    ConstantPatch(f"{_OPTIMIZER}.clip_grads:clip_grad_by_total_norm_fp32", _LITERAL + "; " + _TYPE_NAME),
    ConstantPatch(f"{_OPTIMIZER}.clip_grads:count_zeros_fp32", _LITERAL),
    ConstantPatch(
        f"{_OPTIMIZER}.distrib_optimizer:DistributedOptimizer._build_model_and_main_param_groups", _TYPE_NAME
    ),
    ConstantPatch("megatron.core.distributed.param_and_grad_buffer:_ParamAndGradBuffer.__init__", _LITERAL),
)


def replace_constants(value: Any) -> Any:
    """Return a code constant with device strings of CUDA turned into those of the CPU, in nested tuples too."""
    if value == "cuda" and isinstance(value, str):
        return "cpu"
    if isinstance(value, str) and value.startswith("torch.cuda.") and value.endswith("Tensor"):
        return value.replace("torch.cuda.", "torch.")
    if isinstance(value, tuple):
        return tuple(replace_constants(item) for item in value)
    if isinstance(value, types.CodeType):
        return value.replace(co_consts=replace_constants(value.co_consts))
    return value


def _underlying_function(value: Any) -> types.FunctionType:
    """Return the plain function below decorators such as `torch.no_grad()`."""
    while True:
        if isinstance(value, (classmethod, staticmethod, types.MethodType)):
            value = value.__func__
        elif hasattr(value, "__wrapped__"):
            value = value.__wrapped__
        else:
            return value


@functools.cache
def apply_cpu_patches() -> None:
    """Apply both tables once in this process; imports Megatron-Core, after torch's names are replaced."""
    import_late(SYMBOLIC_SHAPES)
    replace_names(NAME_PATCHES)
    for constant_patch in CONSTANT_PATCHES:
        function = _underlying_function(resolve(constant_patch.target)[2])
        function.__code__ = replace_constants(function.__code__)


def stale_patches() -> Iterator[str]:
    """Yield the targets that are gone or hold no CUDA constant; meaningful before `apply_cpu_patches` alone."""
    for patch in NAME_PATCHES:
        try:
            resolve(patch.target)
        except AttributeError:
            yield patch.target
    for constant_patch in CONSTANT_PATCHES:
        try:
            code = _underlying_function(resolve(constant_patch.target)[2]).__code__
        except AttributeError:
            yield constant_patch.target
            continue
        if replace_constants(code) == code:
            yield constant_patch.target

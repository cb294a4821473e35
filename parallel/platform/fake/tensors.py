"""Tensors without data on a GPU that is not there: devices, formats and shapes are as on one, nothing is computed.

What fake tensors cannot answer is answered here; what the host reads from the device is counted, for there it waits.
"""

from __future__ import annotations

import collections
import contextlib
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from parallel.platform.fake.collectives import replace_collectives

READS: collections.Counter[str] = collections.Counter()
"""How often the host waited for the device, by the innermost function of ours or Megatron-Core's."""
ROUTED = {"tokens": 256}
"""Tokens of a microbatch times the experts of each: what a case of experts spreads evenly."""
_ROOT = Path(__file__).resolve().parents[3]
_TYPE_NAMES = {torch.float32: "Float", torch.float16: "Half", torch.bfloat16: "BFloat16"}


class Watch(TorchDispatchMode):
    """Answers what fake tensors cannot: values that the host reads, and an operation whose fake version is wrong."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        aten = torch.ops.aten
        if operation is aten._local_scalar_dense.default:
            if args[0].device.type != "cuda":
                with contextlib.suppress(DataDependentOutputException):
                    return operation(*args, **kwargs)  # a constant
            _record_read(args[0])
            return True if args[0].dtype is torch.bool else 0.0  # all is finite; no loss, no norm, no vote
        if operation is aten._to_copy.default and torch.device(kwargs.get("device") or "cuda").type == "cpu":
            _record_read(args[0])
        if operation is aten.addmm.dtype_out:  # torch 2.11's fake version takes the format for `beta`
            total, left, right, dtype = args
            assert kwargs["out"] is total and total.dtype == dtype == torch.float32 and total.is_contiguous()
            assert left.dtype == right.dtype and left.dtype in (torch.float16, torch.bfloat16)
            assert (left.shape[0], right.shape[1]) == tuple(total.shape) and left.shape[1] == right.shape[0]
            assert {one.device.type for one in args[:3]} == {"cuda"}
            return total
        return operation(*args, **kwargs)


class NoKernel:
    """Stand for a Triton kernel, which needs data."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **options: None


def is_on_device(tensor: torch.Tensor) -> bool:
    """Return whether a tensor lives on the fake GPU."""
    return tensor.device.type == "cuda"


def replace_functions() -> None:
    """Put stand-ins into torch, before Megatron-Core takes functions of it by name."""
    replace_collectives()
    plain_type, plain_numpy = torch.Tensor.type, torch.Tensor.numpy

    def type_name(self: torch.Tensor, *args: Any, **options: Any) -> Any:
        is_question = not args and not options and self.device.type == "cuda" and self.dtype in _TYPE_NAMES
        return f"torch.cuda.{_TYPE_NAMES[self.dtype]}Tensor" if is_question else plain_type(self, *args, **options)

    def to_numpy(self: torch.Tensor, **options: Any) -> Any:
        return _spread_evenly(self) if isinstance(self, FakeTensor) else plain_numpy(self, **options)

    replacements: list[tuple[Any, str, Any]] = [
        (torch.nn.Module, "to", _move),
        (torch.Tensor, "pin_memory", lambda self: self),
        (torch.Tensor, "type", type_name),
        (torch.Tensor, "numpy", to_numpy),
        (FakeTensor, "tolist", lambda self: _spread_evenly(self).tolist()),
        (torch.cuda, "synchronize", _record_wait),
    ]
    for owner, name, replacement in replacements:
        setattr(owner, name, replacement)


def _record_read(tensor: torch.Tensor) -> None:
    if tensor.device.type == "cuda":
        _record_wait()


def _record_wait(*unused: Any) -> None:
    frames = [frame for frame in traceback.extract_stack() if _is_ours(frame.filename)]
    READS[f"{Path(frames[-1].filename).stem}.{frames[-1].name}"] += 1


def _is_ours(path: str) -> bool:
    """Return whether a file is of the product or of Megatron-Core."""
    inside = Path(path).is_relative_to(_ROOT) and not Path(path).is_relative_to(_ROOT / ".venv")
    return "megatron" in path or (inside and "fake" not in path and "tests" not in path and "rehearse" not in path)


def _move(module: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """Stand for `Module.to`, which cannot exchange fake parameters."""
    for part in module.modules():
        for name, old in part._parameters.items():
            if old is not None and old.device != device:
                new = torch.nn.Parameter(old.detach().to(device))
                vars(new).update({key: value for key, value in vars(old).items() if key not in vars(new)})
                part._parameters[name] = new
        part._buffers.update({name: value.to(device) for name, value in part._buffers.items() if value is not None})
    return module


def _spread_evenly(tensor: torch.Tensor) -> Any:
    """Return what the host reads of a vector: the tokens of a microbatch spread evenly over experts or ranks."""
    _record_read(tensor)
    total = ROUTED["tokens"] if not tensor.is_floating_point() else tensor.numel()
    return np.full(tuple(tensor.shape), total // max(1, tensor.numel()), dtype=np.int64)

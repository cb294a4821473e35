"""Bytes that live on the device while a rank is rehearsed, by what they are."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from parallel.platform.fake.tensors import is_on_device


class Memory(TorchDispatchMode):
    """Counts the bytes of the storages that live on the device; logits by the width of a tensor."""

    def __init__(self, vocabulary_part: int | None = None) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self.logits = self.logits_at_peak = 0
        self._vocabulary_part = vocabulary_part
        self._known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = operation(*args, **(kwargs or {}))
        for one in tree_leaves(outputs):
            if isinstance(one, torch.Tensor) and is_on_device(one):
                self._count(one)
        return outputs

    def start(self) -> None:
        """Forget the peak: what comes now counts."""
        self.peak, self.logits_at_peak = self.bytes, self.logits

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        self._known[storage] = True
        size = storage.nbytes()
        is_logits = tensor.ndim > 1 and tensor.shape[-1] == self._vocabulary_part
        self.bytes += size
        self.logits += size * is_logits
        if self.bytes > self.peak:
            self.start()
        weakref.finalize(storage, self._forget, size, is_logits)

    def _forget(self, size: int, is_logits: bool) -> None:
        self.bytes -= size
        self.logits -= size * is_logits


def state_bytes(engine: Any) -> dict[str, int]:
    """Return the bytes of an engine's weights, gradients and optimizer state, without what pads their buffers."""
    parameters = [parameter for chunk in engine.chunks for parameter in chunk.parameters()]
    gradients = [parameter.main_grad for parameter in parameters if getattr(parameter, "main_grad", None) is not None]
    return {
        "weights": sum(map(_size, parameters)),
        "gradients": sum(map(_size, gradients)),
        "optimizer": sum(map(_size, _optimizer_tensors(engine.optimizer))),
    }


def _optimizer_tensors(optimizer: Any) -> Iterator[torch.Tensor]:
    """Yield the main weights, where the model's are not in fp32, and the moments."""
    for part in optimizer.chained_optimizers:
        if getattr(part, "is_stub_optimizer", False):
            continue
        for group in part.shard_fp32_from_float16_groups:
            yield from group
        for state in part.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, torch.Tensor) and is_on_device(value))


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()

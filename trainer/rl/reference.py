"""The frozen weights that a policy is held to: a copy on the host, or the model without its adapter."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from configs.errors import BadInput
from trainer.engine.engine import Engine
from trainer.engine.parts import SavedState
from trainer.engine.sharded_state import build_adapter_state, build_model_state, copy_state, load_model_state

_PREFIX = "reference."


class ReferenceWeights:
    """A copy of a policy's weights in the memory of the host, which takes their place for a forward pass.

    Of a policy that is trained by LoRA it is the adapter's matrices alone: what is under them never changes.
    As a part of checkpoints it makes a run whole by itself: where the policy once started from need not be there.
    """

    def __init__(self, engine: Engine, field: str = "grpo.kl.coefficient", works: str = "0") -> None:
        """Keep nothing yet; `remember` does. For messages: the field that asks for it, and its value that does not."""
        self._engine, self._field, self._works = engine, field, works
        self._kept: dict[torch.Tensor, torch.Tensor] = {}

    @property
    def is_known(self) -> bool:
        """Whether there is a reference."""
        return bool(self._kept)

    def remember(self) -> None:
        """Make the present weights the reference. Collective: all ranks of the world must call this."""
        self._engine.finish_parameter_gather()
        is_pinned = self._engine.mesh.device.type != "cpu"
        self._kept = {tensor: _copy(tensor, is_pinned) for tensor in self._tensors()}

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Compute with the reference within the context; the policy's weights come back unchanged.

        Collective: all ranks of the world must call this.
        """
        engine = self._engine
        engine.finish_parameter_gather()
        policy = {tensor: tensor.clone() for tensor in self._kept}
        self._put(self._kept)
        try:
            yield
        finally:
            self._put(policy)

    def sharded_state(self, saved: SavedState | None) -> dict[str, Any]:
        """Return the reference as shards under keys of their own: copies, which nothing changes meanwhile.

        Raises BadInput where it is to be loaded from a checkpoint that has none.
        """
        if saved is not None and not any(key.startswith(_PREFIX) for key in saved.shapes):
            raise BadInput(
                f"{self._field}: the checkpoint that is resumed has no reference, as its run needed none; "
                f"a value that would work: {self._works} (or begin under another run.name from its weights with "
                "checkpoint.init_from)"
            )
        engine = self._engine
        with self.in_place():
            if engine.adapter is not None:
                return copy_state(build_adapter_state(engine.adapter, engine.mesh), _PREFIX)
            return copy_state(build_model_state(engine.chunks, engine.mesh), _PREFIX)

    def load(self, loaded: dict[str, Any]) -> None:
        """Make what was saved the reference. Collective: all ranks of the world must call this."""
        engine = self._engine
        policy = {tensor: tensor.clone() for tensor in self._tensors()}
        weights = {name.removeprefix(_PREFIX): shards for name, shards in loaded.items()}
        if engine.adapter is not None:
            engine.adapter.load([weights[f"model{index}"] for index in range(len(engine.chunks))])
        else:
            load_model_state(engine.chunks, weights)
        self.remember()
        self._put(policy)

    def _put(self, values: dict[torch.Tensor, torch.Tensor]) -> None:
        for tensor, value in values.items():
            tensor.copy_(value, non_blocking=True)
        if self._engine.fp8 is not None:
            self._engine.fp8.weights_changed()

    def _tensors(self) -> list[torch.Tensor]:
        """Return everything of the model that a forward pass without gradients reads and training changes.

        That is weights and buffers, or an adapter's matrices.
        """
        chunks, adapter = self._engine.chunks, self._engine.adapter
        if adapter is not None:
            found = [adapter.matrices(index).values() for index in range(len(chunks))]
            return [getattr(module, matrix).data for chunk in found for module, matrix in chunk]
        weights = [parameter.data for chunk in chunks for parameter in chunk.parameters()]
        return weights + [buffer for chunk in chunks for buffer in chunk.buffers() if buffer.is_floating_point()]


class AdapterlessReference:
    """The frozen model under an adapter that began as nothing: what it computes with the adapter switched off."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def in_place(self) -> contextlib.AbstractContextManager[None]:
        """Compute without the adapter within the context."""
        assert self._engine.adapter is not None
        return self._engine.adapter.disabled()


def open_reference(engine: Engine, field: str, works: str) -> ReferenceWeights | AdapterlessReference:
    """Return what the policy is held to that the run starts from; `field` and `works` as of `ReferenceWeights`.

    An adapter that begins with another's weights (`lora.init_from`) is a part of it, as in TRL.
    """
    lora = engine.config.lora
    if engine.adapter is not None and (lora is None or lora.init_from is None):
        return AdapterlessReference(engine)
    return ReferenceWeights(engine, field, works)


def _copy(tensor: torch.Tensor, is_pinned: bool) -> torch.Tensor:
    """Return a copy in the memory of the host."""
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=is_pinned)
    return copy.copy_(tensor)

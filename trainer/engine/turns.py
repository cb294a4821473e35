"""Memory of the device that is lent by turns: contents go to the host's memory, the device's is freed, and comes back.

What is freed is the storage under the tensors, so that every view of it, Megatron-Core's too, is valid again then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch

from parallel.platform.base import Platform


class Turns:
    """The storages of some tensors: always on the device, or, once they `rest_on_host`, only within `here`."""

    def __init__(self, find: Callable[[], Iterable[torch.Tensor]], platform: Platform, *, is_constant: bool) -> None:
        """`find` returns the tensors as they are then; constant ones are copied to the host once, until `changed`."""
        self._find, self._platform, self._is_constant = find, platform, is_constant
        self._depth = 0
        self.is_away = False
        """Whether the memory is on the host now."""
        self._copies: dict[int, tuple[torch.UntypedStorage, torch.Tensor]] = {}
        """By storage: itself, and its contents in (pinned) host memory, which is kept for the next turn."""
        self._is_copied = False
        self.rests_on_host = False

    @property
    def num_bytes(self) -> int:
        """Bytes of the storages, wherever they are."""
        if self.is_away:
            return sum(copy.numel() for _, copy in self._copies.values())
        return sum(storage.nbytes() for storage in distinct_storages(self._find()).values())

    def rest_on_host(self) -> None:
        """Keep the memory on the host from now on, but within `here`."""
        self.rests_on_host = True
        if not self._depth:
            self._send()

    def changed(self) -> None:
        """Take note that constant tensors have other contents."""
        self._is_copied = False

    @contextmanager
    def here(self) -> Iterator[None]:
        """Have the memory on the device within the context, which may be nested."""
        self._depth += 1
        if self.is_away:
            self._bring()
        try:
            yield
        finally:
            self._depth -= 1
        if self.rests_on_host and not self._depth:  # not after a failure: what waits for a lost rank waits for ever
            self._send()

    def _send(self) -> None:
        storages = distinct_storages(self._find())
        copies = {}
        for key, storage in storages.items():
            _, copy = self._copies.get(key, (storage, None))
            if copy is None or copy.numel() != storage.nbytes():
                copy = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=storage.device.type != "cpu")
                self._is_copied = False
            copies[key] = storage, copy
        self._copies = copies
        if not (self._is_constant and self._is_copied):
            for storage, copy in copies.values():
                copy.copy_(_bytes_of(storage), non_blocking=True)
        self._platform.synchronize()
        for storage in storages.values():
            storage.resize_(0)
        self.is_away = self._is_copied = True

    def _bring(self) -> None:
        for storage, copy in self._copies.values():
            storage.resize_(copy.numel())
            _bytes_of(storage).copy_(copy, non_blocking=True)
        self.is_away = False


def distinct_storages(tensors: Iterable[torch.Tensor]) -> dict[int, torch.UntypedStorage]:
    """Return the storages under tensors, each once, by an identity that lasts as long as they do; no empty ones."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage._cdata: storage for storage in storages if storage.nbytes()}


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    """Return a storage's contents as a tensor of its own bytes."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)

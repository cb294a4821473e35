"""Counts the bytes that attention hands to the collectives of torch.distributed, forward and backward apart."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from configs.plan.context_bytes import SentBytes

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

_CALLERS = "trainer.model.attention"


class AttentionTraffic:
    """While entered, counts what this rank sends to other ranks from `trainer/model/attention`, and from nowhere else.

    An exchange among n ranks counts (n-1)/n of its whole tensor, a message all of it. What autograd calls is backward.
    """

    def __init__(self) -> None:
        """Nothing sent yet."""
        self.sent = SentBytes(0, 0)
        self._sizes: dict[str, Callable[..., float]] = {
            "batch_isend_irecv": _of_messages,
            "all_to_all_single": lambda received, sent, group: _of_exchange(sent, group),
            "all_gather_into_tensor": lambda gathered, mine, group: _of_exchange(gathered, group),
            "reduce_scatter_tensor": lambda mine, parts, group: _of_exchange(parts, group),
        }
        self._originals: dict[str, Callable[..., Any]] = {}

    def __enter__(self) -> AttentionTraffic:
        import torch.distributed as dist

        for name, size in self._sizes.items():
            self._originals[name] = getattr(dist, name)
            setattr(dist, name, self._counting(self._originals[name], size))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        import torch.distributed as dist

        for name, original in self._originals.items():
            setattr(dist, name, original)

    def _counting(self, original: Callable[..., Any], size: Callable[..., float]) -> Callable[..., Any]:
        import torch

        def counted(*arguments: Any, **options: Any) -> Any:
            if sys._getframe(1).f_globals["__name__"].startswith(_CALLERS):
                sent = size(*arguments, **options)
                is_backward = torch._C._current_autograd_node() is not None
                self.sent += SentBytes(0, sent) if is_backward else SentBytes(sent, 0)
            return original(*arguments, **options)

        return counted


def _of_messages(operations: list[dist.P2POp]) -> float:
    import torch.distributed as dist

    return sum(operation.tensor.nbytes for operation in operations if operation.op is dist.isend)


def _of_exchange(whole: torch.Tensor, group: dist.ProcessGroup) -> float:
    return whole.nbytes * (group.size() - 1) / group.size()

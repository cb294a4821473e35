"""Do ranks that share a group ask for the same collectives in the same order, and is every send received?

Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, zip_longest
from typing import Protocol

_UNEVEN = "all_to_all"
"""Its sizes may differ between ranks."""


class AnyCall(Protocol):
    """A collective, send or receive that a rank asked for (`parallel.platform.fake.collectives.Call`)."""

    @property
    def operation(self) -> str: ...
    @property
    def group(self) -> tuple[int, ...]: ...
    @property
    def name(self) -> str: ...
    @property
    def num_elements(self) -> int: ...
    @property
    def dtype(self) -> str: ...
    @property
    def peer(self) -> int | None: ...


def compare_ranks(calls: Mapping[int, Sequence[AnyCall]]) -> Iterator[str]:
    """Yield the first mismatch of each group that two of the ranks share, and of each pair's sends and receives."""
    for one, other in combinations(sorted(calls), 2):
        groups = {call.group: call.name for call in calls[one] if call.peer is None and other in call.group}
        groups |= {call.group: call.name for call in calls[other] if call.peer is None and one in call.group}
        for group, name in groups.items():
            shared = [
                [call for call in calls[rank] if call.group == group and call.peer is None] for rank in (one, other)
            ]
            what = f"group {name or 'without a name'} of {len(group)} ranks"
            yield from _first_difference(one, other, shared[0], shared[1], what)
        for source, target in ((one, other), (other, one)):
            sent = [call for call in calls[source] if call.operation == "send" and call.peer == target]
            received = [call for call in calls[target] if call.operation == "receive" and call.peer == source]
            yield from _first_difference(source, target, sent, received, "sends and receives between them")


def count_shared(calls: Mapping[int, Sequence[AnyCall]]) -> int:
    """Return how many calls of some two of the ranks can be compared."""
    return sum(
        (call.peer is None and other in call.group) or call.peer == other
        for one, other in combinations(sorted(calls), 2)
        for call in calls[one]
    )


def _first_difference(
    one: int, other: int, first: Sequence[AnyCall], second: Sequence[AnyCall], what: str
) -> Iterator[str]:
    for number, (left, right) in enumerate(zip_longest(first, second), start=1):
        if left is None or right is None or _shape(left) != _shape(right):
            yield f"ranks {one} and {other}, {what}: call {number} is {_text(left)} on {one}, {_text(right)} on {other}"
            return


def _shape(call: AnyCall) -> tuple[object, ...]:
    operation = "send" if call.peer is not None else call.operation
    return (operation, call.dtype) if operation == _UNEVEN else (operation, call.dtype, call.num_elements)


def _text(call: AnyCall | None) -> str:
    return "nothing" if call is None else f"{call.operation} of {call.num_elements:,} {call.dtype}"

"""Ranks that share a group are compared call by call, and sends with receives; the first mismatch is named."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.rehearse.compare import compare_ranks, count_shared


@dataclass(frozen=True)
class Call:
    operation: str
    group: tuple[int, ...] = (0, 1)
    name: str = "TENSOR"
    num_elements: int = 8
    dtype: str = "bfloat16"
    peer: int | None = None


REDUCE, GATHER = Call("all_reduce"), Call("all_gather")


def test_the_same_calls_agree() -> None:
    calls = {0: [REDUCE, GATHER], 1: [REDUCE, GATHER]}
    assert list(compare_ranks(calls)) == []
    assert count_shared(calls) == 2


def test_another_order_is_named_with_its_first_place() -> None:
    (found,) = compare_ranks({0: [REDUCE, REDUCE, GATHER], 1: [REDUCE, GATHER, REDUCE]})
    assert found == (
        "ranks 0 and 1, group TENSOR of 2 ranks: call 2 is all_reduce of 8 bfloat16 on 0, all_gather of 8 bfloat16 on 1"
    )


def test_a_missing_call_another_size_and_another_format_are_found() -> None:
    for other in (
        [REDUCE],
        [REDUCE, Call("all_gather", num_elements=9)],
        [REDUCE, Call("all_gather", dtype="float32")],
    ):
        assert len(list(compare_ranks({0: [REDUCE, GATHER], 1: other}))) == 1
    (found,) = compare_ranks({0: [REDUCE], 1: []})
    assert found.endswith("call 1 is all_reduce of 8 bfloat16 on 0, nothing on 1")


def test_only_calls_of_shared_groups_are_compared_and_each_group_by_itself() -> None:
    data = Call("all_reduce", group=(0, 2), name="DATA")
    assert list(compare_ranks({0: [REDUCE, data], 1: [REDUCE], 2: [data]})) == []
    # between two groups there is no order to compare here
    other = Call("all_gather", group=(0, 1, 2), name="WORLD")
    assert list(compare_ranks({0: [REDUCE, other], 1: [other, REDUCE]})) == []


def test_uneven_exchanges_may_differ_in_size() -> None:
    assert list(compare_ranks({0: [Call("all_to_all", num_elements=3)], 1: [Call("all_to_all", num_elements=5)]})) == []


def test_every_send_is_received_in_order() -> None:
    sends = [Call("send", num_elements=size, peer=1) for size in (8, 16)]
    receives = [Call("receive", num_elements=size, peer=0) for size in (8, 16)]
    assert list(compare_ranks({0: sends, 1: receives})) == []
    (found,) = compare_ranks({0: sends, 1: receives[::-1]})
    assert found.startswith("ranks 0 and 1, sends and receives between them: call 1 is send of 8 bfloat16 on 0")
    (found,) = compare_ranks({0: sends, 1: receives[:1]})
    assert "call 2 is send of 16 bfloat16 on 0, nothing on 1" in found

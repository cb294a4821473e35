"""Verdicts on made-up worlds, without processes."""

from __future__ import annotations

import dataclasses
import json

import pytest

from parallel.watch.flight import with_flight
from parallel.watch.reports import (
    GroupCall,
    Rank,
    Report,
    ReportFile,
    describe_stack,
    lengthen,
    parse_report,
    read_ranks,
    read_report,
    shorten,
    write_ranks,
)
from parallel.watch.verdict import judge

RANKS = [Rank(rank, f"node{rank // 2}", f"tp {rank % 2}/2, pp {rank // 2}/2") for rank in range(4)]
WORLD, TP0, TP1 = (0, 1, 2, 3), (0, 1), (2, 3)


def sum_over(axis, ranks, number, op="all_reduce"):
    return GroupCall(op, axis, f"{axis}{ranks[0]}", ranks, number)


def message(op, peer):
    return GroupCall(op, "pp", "pp0", (0, 2), 0, peer)


def at_work(rank, phase="forward_backward", state="running", **begun):
    return Report(RANKS[rank], state, 7, phase, 9.0, 9.0, begun=begun)


def waits(rank, call, phase="forward_backward", **begun):
    begun = begun or {call.group: call.number}
    return Report(RANKS[rank], "running", 7, phase, 9.0, 9.0, waits_in=call, wait_seconds=9.0, begun=begun)


def verdict(*reports, **options):
    return judge(RANKS, {one.rank.rank: one for one in reports}, **options)


def test_the_rank_that_is_at_work_is_named_at_the_end_of_the_chain():
    """Rank 3 computes; its tp partner waits for it, and the stage before for that partner."""
    tp = sum_over("tp", TP1, 41)
    reports = [
        waits(0, message("recv", 2)),
        waits(1, sum_over("tp", TP0, 50), tp0=50),
        waits(2, tp),
        at_work(3, tp2=40),
    ]
    reports[0] = dataclasses.replace(reports[0], begun={"tp0": 49})
    found = verdict(*reports)
    assert (found.kind, found.culprits, found.waiting, found.ends_run) == ("rank", (3,), 3, True)
    assert found.sentence == (
        "rank 3 (tp 1/2, pp 1/2) on node1, for 9 s in forward_backward of step 7, did not arrive at all_reduce number "
        "41 of the tp group, in which 1 rank waits and 2 in others"
    )


@pytest.mark.parametrize(
    ("report", "said"),
    [
        (None, "rank 2 (tp 0/2, pp 1/2) on node1, of which nothing was heard, did not arrive"),
        (at_work(2, state="stopped"), "rank 2 (tp 0/2, pp 1/2) on node1, whose process is stopped by a signal in"),
        (at_work(2, state="ended"), "rank 2 (tp 0/2, pp 1/2) on node1, whose process ended in forward_backward of"),
        (at_work(2, state="silent"), "rank 2 (tp 0/2, pp 1/2) on node1, of whose host nothing is heard any more"),
    ],
    ids=["no report", "stopped", "ended", "silent"],
)
def test_who_is_gone_is_named_before_who_is_late_for_it(report, said):
    everybody = sum_over("world", WORLD, 5)
    reports = [waits(0, everybody), at_work(1, world0=4), waits(3, everybody)]
    found = verdict(*reports, *([report] if report else []))
    assert found.sentence.startswith(said)
    assert found.culprits == (2,) and found.waiting == 2


def test_a_rank_that_waits_and_is_stopped_is_named():
    everybody = sum_over("world", WORLD, 5)
    reports = [waits(rank, everybody) for rank in range(4)]
    found = verdict(*reports[:3], dataclasses.replace(reports[3], state="stopped"))
    assert found.culprits == (3,)


def test_a_rank_that_may_take_long_is_told_and_waited_for():
    """Waiting in the control group for a rank that writes a checkpoint is no hang; in a step, or stopped, it is."""
    control = sum_over("control", WORLD, 3)
    others = [waits(rank, control) for rank in range(3)]
    assert verdict(*others, at_work(3, "save", control0=2)).kind == "patience"
    assert not verdict(*others, at_work(3, "save", control0=2)).ends_run
    assert verdict(*others, at_work(3, "optimizer", control0=2)).ends_run
    assert verdict(*others, at_work(3, "save", state="stopped", control0=2)).ends_run
    assert verdict(waits(0, sum_over("world", WORLD, 9)), *others[1:], at_work(3, "save", control0=2)).ends_run


@pytest.mark.parametrize("is_late", [True, False], ids=["one late", "both waiting for an instant"])
def test_a_replica_whose_answers_are_longer_is_waited_for(is_late):
    """Of tp 2, dp 2: its ranks wait for each other for an instant at every token; the others in the control group."""
    control, tp = sum_over("control", WORLD, 3), sum_over("tp", TP0, 900)
    others = [waits(rank, control, "generate") for rank in (2, 3)]
    instant = [
        dataclasses.replace(waits(rank, tp, "generate", control0=2, tp0=900), wait_seconds=0.01) for rank in (0, 1)
    ]
    if is_late:
        instant[1] = at_work(1, "generate", control0=2, tp0=899)
    assert verdict(*instant, *others, limit_seconds=8.0).kind == "patience"
    hung = dataclasses.replace(instant[0], wait_seconds=8.5)
    found = verdict(hung, at_work(1, "generate", control0=2, tp0=899), *others, limit_seconds=8.0)
    assert (found.kind, found.culprits) == ("rank", (1,))
    assert verdict(*(instant if is_late else instant[:1]), *others).ends_run  # nothing is known of a limit


def test_who_has_just_arrived_at_last_is_no_broken_link():
    everybody = sum_over("world", WORLD, 5)
    reports = [waits(rank, everybody) for rank in range(4)]
    reports[3] = dataclasses.replace(reports[3], wait_seconds=0.1)
    assert verdict(*reports, limit_seconds=8.0).kind == "nothing"


def test_what_the_host_waits_for_stays_where_its_device_waits_for_nothing():
    report = waits(0, sum_over("control", WORLD, 3), "generate")
    assert with_flight(report, {"entries": []}, []).waits_in == report.waits_in


def test_different_orders_and_broken_links_are_told_apart():
    odd = verdict(*(waits(rank, sum_over("world", WORLD, 5)) for rank in range(3)),
                  waits(3, sum_over("world", WORLD, 5, "broadcast")))  # fmt: skip
    assert (odd.kind, odd.culprits) == ("order", (3,))
    link = verdict(*(waits(rank, sum_over("world", WORLD, 5)) for rank in range(4)))
    assert (link.kind, link.culprits) == ("connection", (0, 2))
    assert link.sentence.startswith(
        "nothing passes between the hosts node0 and node1: rank 0 (tp 0/2, pp 0/2) on node0 "
    )
    facing = verdict(waits(0, message("recv", 2)), waits(2, message("recv", 0)))
    assert facing.kind == "connection"


def test_a_wait_that_has_ended_meanwhile_is_no_hang():
    everybody = sum_over("world", WORLD, 5)
    reports = [waits(rank, everybody) for rank in range(3)]
    assert verdict(*reports, at_work(3), limit_seconds=10.0).kind == "nothing"
    assert verdict(*(at_work(rank) for rank in range(4))).kind == "nothing"
    assert verdict(*(at_work(rank, state="done") for rank in range(4))).kind == "nothing"


def test_a_killed_rank_of_which_nobody_waits_is_named():
    found = verdict(*(at_work(rank, state="done") for rank in range(3)), at_work(3, state="ended"))
    assert found.culprits == (3,) and found.sentence.endswith("has gone")


def test_reports_are_read_as_they_were_written(tmp_path):
    """Also over a longer one, beside one that is cut off, and without the list of ranks."""
    file = ReportFile(tmp_path, 1)
    file.write(waits(1, sum_over("world", WORLD, 5), phase="optimizer"))
    report = at_work(1, tp0=3)
    file.write(report)
    assert read_report(tmp_path, 1) == report
    (tmp_path / "rank_2.json").write_text('{"rank": {"ra')
    assert read_report(tmp_path, 2) is None and read_report(tmp_path, 3) is None
    assert read_ranks(tmp_path) == [RANKS[1]]
    write_ranks(tmp_path, RANKS)
    assert read_ranks(tmp_path) == RANKS
    whole = waits(0, message("send", 2))
    assert parse_report(whole.as_json()) == whole


def test_ranks_of_large_groups_are_written_short():
    for ranks in ((0, 8, 16, 24), (5,), (0, 1, 4), tuple(range(16384))):
        assert lengthen(json.loads(json.dumps(shorten(ranks)))) == ranks
    assert len(json.dumps(shorten(tuple(range(16384))))) < 50


def test_the_innermost_place_of_ours_is_found_in_stacks():
    text = (
        'Thread 0x1 (most recent call first):\n  File "/x/parallel/watch/watch.py", line 3 in _listen\n\n'
        'Current thread 0x2 (most recent call first):\n  File "/lib/torch/nn.py", line 9 in linear\n'
        '  File "/x/trainer/model/norm.py", line 4 in forward\n  File "/x/launch/main.py", line 1 in main\n'
    )
    assert describe_stack(text) == "trainer/model/norm.py:4 in forward"
    assert describe_stack("") == ""

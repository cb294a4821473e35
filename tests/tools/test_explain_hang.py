"""explain_hang: the verdict from what ranks have left, of killed runs, with files missing, with flight recorders."""

from __future__ import annotations

import dataclasses
import json
import pickle

import pytest

from parallel.watch.reports import GroupCall, Rank, Report, ReportFile, write_ranks
from parallel.watch.verdict import Verdict, write_verdict
from tools.explain_hang import main

RANKS = [Rank(rank, f"node{rank // 2}", f"dp {rank}/4") for rank in range(4)]
WORLD = GroupCall("all_reduce", "world", "0", (0, 1, 2, 3), 12)
NOW = 1_800_000_000.0


def left(rank, *, waits, state="ended"):
    call = WORLD if waits else None
    return Report(RANKS[rank], state, 4, "optimizer", 3.0, 3.0, None, call, 3.0, {"0": 12 if waits else 11},
                  written_at=NOW)  # fmt: skip


@pytest.fixture
def run_dir(tmp_path):
    """Return a run that was killed from outside on its second start while rank 2 did not arrive."""
    for attempt in (1, 2):
        folder = tmp_path / "logs" / f"attempt_{attempt}" / "watch"
        folder.mkdir(parents=True)
        write_ranks(folder, RANKS)
        for rank in range(4):
            ReportFile(folder, rank).write(left(rank, waits=rank != (2 if attempt == 2 else 0)))
    return tmp_path


def explained(run_dir, capsys, code=0):
    assert main([str(run_dir), "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_a_run_killed_from_outside_is_explained(run_dir, capsys):
    assert main([str(run_dir)]) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    assert first == (
        "rank 2 (dp 2/4) on node1, for 3 s in optimizer of step 4, did not arrive at all_reduce number 12 of the world "
        "group, in which 3 ranks wait"
    )
    assert "rank 3 (dp 3/4) on node1: ended, optimizer of step 4, waits 3 s in all_reduce" in "".join(rest)
    assert explained(run_dir / "logs" / "attempt_1", capsys)["culprits"][0]["rank"] == 0


def test_files_of_other_ranks_may_be_missing_or_damaged(run_dir, capsys):
    folder = run_dir / "logs" / "attempt_2" / "watch"
    (folder / "rank_0.json").unlink()
    (folder / "rank_3.json").write_text("{")
    found = explained(run_dir, capsys)
    assert [one["rank"] for one in found["culprits"]] == [2] and found["without_report"] == [0, 3]
    # Other JSON than a report's, and the list of ranks without any.
    whole = json.loads((folder / "rank_1.json").read_text())
    for text in ("3", "null", '"x"', "[]", json.dumps({**whole, "wait_seconds": "x"})):
        (folder / "rank_3.json").write_text(text)
        (folder / "verdict.json").write_text(text)
        assert explained(run_dir, capsys)["without_report"] == [0, 3], text
    (folder / "ranks.json").write_text("[]")
    (folder / "rank_x.json").write_text("{}")
    assert [one["rank"] for one in explained(run_dir, capsys)["culprits"]] == [2]
    write_ranks(folder, RANKS)
    (folder / "verdict.json").unlink()
    (folder / "rank_2.json").unlink()
    found = explained(run_dir, capsys)
    assert [one["rank"] for one in found["culprits"]] == [0, 2, 3] and "of which nothing was heard" in found["sentence"]


def test_the_verdict_of_the_run_itself_stands(run_dir, capsys):
    write_verdict(run_dir / "logs" / "attempt_2" / "watch", "0.1", Verdict("rank", "rank 1 did it", (1,), 3))
    found = explained(run_dir, capsys)
    assert found["sentence"] == "rank 1 did it" and found["is_as_given_by_the_run"]


def entry(record, seq, *, is_over, age, name="0", op="nccl:all_reduce", is_p2p=False):
    return {
        "record_id": record, "process_group": (name, "default_pg"), "collective_seq_id": seq, "p2p_seq_id": seq,
        "profiling_name": op, "time_created_ns": int((NOW - age) * 1e9), "retired": is_over,
        "state": "completed" if is_over else "scheduled", "is_p2p": is_p2p,
    }  # fmt: skip


@pytest.mark.parametrize("form", ["ours", "torch's"])
def test_flight_recorders_tell_what_is_not_over_on_the_device(run_dir, capsys, form):
    """The hosts wait for their devices: rank 1's has not begun what the others' wait in, though its host queued it."""
    folder = run_dir / "logs" / "attempt_2" / "watch"
    groups = {"0": {"name": "0", "desc": "default_pg", "ranks": "[0, 1, 2, 3]"}}
    for rank in range(4):
        at_work = left(rank, waits=False, state="running")
        ReportFile(folder, rank).write(dataclasses.replace(at_work, idle_seconds=300.0))
        entries = [entry(1, 70, is_over=True, age=400)]
        if rank != 1:
            entries += [entry(2, 71, is_over=False, age=300), entry(3, 72, is_over=False, age=300)]
        dump = {"version": "2.10", "pg_config": groups, "entries": entries}
        if form == "ours":
            (folder / f"rank_{rank}.flight.json").write_text(json.dumps(dump))
        else:
            (folder / f"nccl_trace_rank_{rank}").write_bytes(pickle.dumps(dump, protocol=2))
    found = explained(run_dir, capsys)
    assert found["sentence"] == (
        "rank 1 (dp 1/4) on node0, for 300 s in optimizer of step 4, did not arrive at all_reduce number 71 of the "
        "default_pg group, in which 3 ranks wait"
    )


def test_a_pickle_that_names_a_class_is_not_read(run_dir, capsys):
    folder = run_dir / "logs" / "attempt_2" / "watch"
    (folder / "nccl_trace_rank_1").write_bytes(pickle.dumps(RANKS[0]))
    assert explained(run_dir, capsys)["culprits"][0]["rank"] == 2


def test_what_is_no_hang_and_what_is_no_run(run_dir, tmp_path, capsys):
    folder = run_dir / "logs" / "attempt_2" / "watch"
    for rank in range(4):
        ReportFile(folder, rank).write(left(rank, waits=False, state="done"))
    assert explained(run_dir, capsys, code=1)["kind"] == "nothing"
    empty = tmp_path / "empty"
    empty.mkdir()
    assert main([str(empty)]) == 2
    assert "holds no logs/attempt_N/watch" in capsys.readouterr().err

"""The bench of context parallelism: it runs, counts what the formula says, and complains of what is not so."""

import json
import re
from types import SimpleNamespace

import pytest

from tests import forked
from tools.bench import context_parallel
from tools.bench.context_parallel import main, measure_layout, methods_of
from tools.bench.context_report import LIMIT_LENGTH, collect_complaints, summarize
from tools.bench.launching import RunFailed


def row(cp, method, peaks, seconds, seq_len=LIMIT_LENGTH, **fields):
    sent = [8.0] * cp if method else [0.0] * cp
    return {
        "cp": cp, "method": method, "seq_len": seq_len, "loss": 2.0, "peak_bytes": peaks, "processor_seconds": seconds,
        "forward_bytes": sent, "backward_bytes": sent, "planned_bytes": (sent[0], sent[0]), "state_bytes": 0,
    } | fields  # fmt: skip


ALONE = row(1, None, [100], [10.0])


def test_layouts():
    assert [methods_of(cp) for cp in (1, 2)] == [[None], ["ring", "all_gather", "ulysses"]]
    assert methods_of(4) == ["ring", "all_gather", "ulysses", "hierarchical"]


def test_figures_are_of_the_fullest_rank_and_of_all_ranks_time():
    rounds = [row(2, "ring", [50, 52], [5.0, 6.0]), row(2, "ring", [54, 40], [5.5, 6.5])]
    (one,) = summarize(rounds)
    assert (one.layout, one.peak_bytes, one.processor_seconds, one.sent_bytes) == ("cp2 ring", 53, 11.5, 16)


@pytest.mark.parametrize(
    "two, complaint",
    [
        (row(2, "ring", [55, 50], [5.7, 5.8]), None),
        (row(2, "ring", [56, 50], [5.7, 5.8]), "memory of a rank is 0.560 of cp1's, over the limit of 0.55"),
        (row(2, "ring", [55, 50], [5.8, 5.8]), "processor time is 1.160 of cp1's, over the limit of 1.15"),
        (row(2, "ring", [55, 50], [5.7, 5.8], forward_bytes=[8.0, 9.0]), r"sent \[\(8.0, 8.0\), \(9.0, 8.0\)\], not"),
        (row(2, "ring", [55, 50], [5.7, 5.8], loss=2.1), "loss 2.1, not 2.0"),
    ],
)
def test_complaints(two, complaint):
    found = list(collect_complaints([ALONE, two]))
    assert len(found) == (complaint is not None)
    assert complaint is None or re.search(complaint, found[0])


@pytest.mark.parametrize("words", [["--lengths", "1002"], ["--cp", "8"], ["--rounds", "0"]])
def test_bad_numbers_are_refused(words, capsys):
    with pytest.raises(SystemExit) as error:
        main(words)
    assert error.value.code == 2 and "for example" in capsys.readouterr().err


@pytest.fixture
def forked_ranks(monkeypatch):
    monkeypatch.setattr(context_parallel, "subprocess", SimpleNamespace(Popen=forked.Popen))


def test_a_tiny_bench_finds_nothing_to_complain_of(forked_ranks, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(context_parallel, "SETTINGS", (*context_parallel.SETTINGS, "model.num_layers=1"))
    assert main(["--lengths", "256,512", "--cp", "1,2", "--rounds", "1", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "context_parallel_cpu.json").read_text())["rows"]
    assert [(one["cp"], one["method"], one["seq_len"]) for one in rows] == [
        (cp, method, length) for cp in (1, 2) for method in methods_of(cp) for length in (256, 512)
    ]
    assert all(min(one["peak_bytes"]) > 2**20 and min(one["processor_seconds"]) > 0 for one in rows)
    assert (tmp_path / "context_parallel_cpu.svg").read_text().startswith("<?xml")
    assert "cp2 ulysses" in capsys.readouterr().out


def test_a_failed_run_is_one_sentence(forked_ranks, monkeypatch, tmp_path):
    monkeypatch.setattr(context_parallel, "SETTINGS", (*context_parallel.SETTINGS, "parallel.nonsense=1"))
    with pytest.raises(RunFailed, match="cp2 ring ended with exit code 1: .*nonsense"):
        measure_layout(2, "ring", [256], tmp_path)

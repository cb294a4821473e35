"""Preflight at the start of a run: what it refuses, before anything is written."""

import pytest

from configs.errors import ExitCode

RANK_1 = "rank 1 (tp 1/2, cp 0/1, dp 0/1, pp 0/1, ep 0/1) on "


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("wrong_sums", ": 2,097,152 numbers of a sum over its tp group came out wrong; "),
        ("other_torch", " has 1.13.1, where 1 of 2 ranks have "),
        ("full_disk_on_a_host", " cannot write to "),
    ],
)
def test_what_must_not_be_is_named_by_rank_and_host_and_nothing_is_written(train, tmp_path, fault, said):
    code, sentence = train(2, "parallel.tp=2", "parallel.preflight=true", fault=fault)
    assert code == ExitCode.BAD_INPUT
    assert sentence.startswith("preflight: ") and RANK_1 in sentence and said in sentence
    assert not (tmp_path / "run").exists()


def test_where_rank_0_cannot_write_nobody_looks_for_its_file(train):
    code, sentence = train(2, "parallel.tp=2", "parallel.preflight=true", fault="full_disk_where_rank_0_is")
    assert code == ExitCode.BAD_INPUT
    assert "rank 0 (" in sentence and " cannot write to " in sentence and "does not see" not in sentence


def test_a_run_with_preflight_has_the_losses_of_one_without(train, tmp_path):
    for name, wanted in (("with", "true"), ("without", "false")):
        options = ("parallel.tp=2", "train.num_steps=2", f"run.dir={tmp_path}/{name}", f"parallel.preflight={wanted}")
        assert train(2, *options)[0] == ExitCode.DONE
    logs = {name: (tmp_path / name / "logs" / "attempt_1" / "rank_0.log").read_text() for name in ("with", "without")}
    assert "preflight: 2 ranks on 1 host(s) agree" in logs["with"] and "preflight: " not in logs["without"]
    rows = [(tmp_path / name / "metrics.jsonl").read_text().split("grad_norm")[0] for name in logs]
    assert rows[0] == rows[1]
    assert not list((tmp_path / "with").glob(".preflight*"))

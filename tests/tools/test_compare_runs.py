"""compare_runs: verdicts, tolerances, missing steps, non-finite values and bad input, by exit code and text."""

import json

import pytest

from tools.compare_runs import main, relative_difference, sparkline


def write_run(folder, losses, first_step=1):
    folder.mkdir()
    rows = [
        {"step": step, "loss": loss, "grad_norm": 1.0, "lr": 0.1} for step, loss in enumerate(losses, start=first_step)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def test_identical_runs(tmp_path, capsys):
    a, b = write_run(tmp_path / "a", [3.0, 2.0, 1.0]), write_run(tmp_path / "b", [3.0, 2.0, 1.0])
    assert main([a, b]) == 0
    assert "identical bit for bit over 3 steps: loss, grad_norm" in capsys.readouterr().out


def test_the_last_bit_counts_unless_rtol_is_given(tmp_path, capsys):
    a, b = write_run(tmp_path / "a", [3.0, 2.0]), write_run(tmp_path / "b", [3.0, 2.0000000000000004])
    assert main([a, b]) == 1
    assert "step 2: 2.0 against 2.0000000000000004" in capsys.readouterr().out
    assert main([a, b, "--rtol", "1e-12"]) == 0
    assert main([a, b, "--keys", "lr"]) == 0


@pytest.mark.parametrize("rtol", ["nan", "-1", "inf", "x"])
def test_a_tolerance_that_is_none_is_refused(tmp_path, rtol):
    """With nan nothing would be beyond it."""
    a, b = write_run(tmp_path / "a", [3.0, 2.0]), write_run(tmp_path / "b", [3.0, 9.0])
    with pytest.raises(SystemExit) as ended:
        main([a, b, "--rtol", rtol])
    assert ended.value.code == 2


def test_a_missing_step_is_a_difference(tmp_path, capsys):
    a, b = write_run(tmp_path / "a", [3.0, 2.0, 1.0]), write_run(tmp_path / "b", [3.0, 2.0])
    assert main([a, b]) == 1
    assert "1 steps are in one run only, the first is step 3 in A" in capsys.readouterr().out


def test_a_skipped_step_equals_another_skipped_step_but_no_number(tmp_path):
    a, b = write_run(tmp_path / "a", [3.0, None]), write_run(tmp_path / "b", [3.0, None])
    assert main([a, b]) == 0
    c = write_run(tmp_path / "c", [3.0, 2.0])
    assert main([a, c, "--rtol", "0.5"]) == 1


def test_bad_input_is_one_sentence_and_code_two(tmp_path, capsys):
    good = write_run(tmp_path / "good", [1.0])
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    twice = tmp_path / "twice.jsonl"
    twice.write_text('{"step": 1}\n{"step": 1}\n')
    far = write_run(tmp_path / "far", [1.0], first_step=9)
    for words, sentence in [
        ([good, str(tmp_path / "absent")], "no such file"),
        ([good, str(broken)], "broken.jsonl:2: not a JSON object"),
        ([str(twice), good], "step 1 occurs twice"),
        ([good, far], "no step in common"),
        ([good, good, "--keys", "losss"], "keys that would work: grad_norm, loss, lr"),
    ]:
        assert main(words) == 2
        captured = capsys.readouterr()
        assert sentence in captured.err and captured.out == ""


@pytest.mark.parametrize(("a", "b", "expected"), [(1.0, 1.0, 0.0), (0.0, 0.0, 0.0), (1.0, 2.0, 0.5), (-1.0, 1.0, 2.0)])
def test_relative_difference(a, b, expected):
    assert relative_difference(a, b) == relative_difference(b, a) == expected


def test_sparkline_spans_the_scale_and_never_exceeds_its_width():
    assert sparkline([0.0, 1.0, None], 0.0, 1.0) == "▁█!"
    assert len(sparkline([float(value) for value in range(1000)], 0.0, 999.0)) == 60

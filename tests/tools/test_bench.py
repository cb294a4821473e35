"""The benchmark: the clock measures what lies between its ticks, pairs make ratios, the loops do the same work."""

import json

import pytest

from tools.bench.clock import StepClock
from tools.bench.report import describe_verdict, write_report
from tools.bench.throughput import Case, RunFailed, compare, main, run_once
from tools.made_up_data import write_made_up_dataset

CASES = (Case("1 rank", 1, (), ("fit", "bare", "hf")),)


def row(loop, number, speed, loss=2.0):
    figures = {"tokens_per_second": speed, "processor_seconds_per_step": 100 / speed, "loss": loss}
    return {"layout": "1 rank", "round": number, "loop": loop, **figures}


def rows_of(fit, bare, hf):
    # backwards, as odd rounds are run: pairs must be found by round, not by order
    rows = [row("fit", number, speed) for number, speed in enumerate(fit)]
    rows += [row("bare", number, bare[number]) for number in reversed(range(len(bare)))]
    return rows + [row("hf", number, speed, loss=None) for number, speed in enumerate(hf)]


def test_the_clock_counts_whole_steps_after_the_warmup(monkeypatch):
    now = iter(float(second) for second in (10, 17))
    monkeypatch.setattr("tools.bench.clock.time.perf_counter", lambda: next(now))
    waits = []
    clock = StepClock(2, 3, lambda: waits.append(1))
    assert clock.total_steps == 6
    for _ in range(5):
        clock.tick()
    with pytest.raises(RuntimeError, match="took 5 steps, 6"):
        _ = clock.seconds
    clock.tick()
    assert clock.seconds == 7.0 and len(waits) == 2


def test_ratios_are_made_pair_by_pair():
    # every pair says 0.9, although the machine's speed changed by the factor ten between rounds
    bare, hf = compare(rows_of([90.0, 900.0, 9.0], [100.0, 1000.0, 10.0], [45.0, 450.0, 4.5]), CASES)
    assert bare["num_pairs"] == 3 and bare["ours"] == {"median": 90.0, "min": 9.0, "max": 900.0}
    assert bare["ratio"] == pytest.approx({"median": 0.9, "min": 0.9, "max": 0.9}) and bare["cost"] == pytest.approx(
        0.1
    )
    assert bare["is_same_loss"] is True and bare["processor_ratio"]["median"] == pytest.approx(1 / 0.9)
    assert hf["ratio"]["median"] == pytest.approx(2.0) and hf["is_same_loss"] is None


def test_verdicts():
    def verdict(fit, bare):
        return describe_verdict(compare(rows_of(fit, bare, [1.0]), CASES)[0])

    assert verdict([98.0], [100.0]) == "costs 2.0%, within the limit of 3%"
    assert verdict([96.0], [100.0]) == "costs 4.0%, over the limit of 3%"
    assert verdict([101.0], [100.0]) == "costs 0.0%, within the limit of 3%"
    rows = rows_of([98.0], [100.0], [1.0])
    rows[0]["loss"] = 2.1
    assert describe_verdict(compare(rows, CASES)[0]) == "not comparable: the losses differ"


def test_the_report_is_json_with_everything_measured(tmp_path):
    rows = rows_of([98.0], [100.0], [50.0])
    write_report(tmp_path / "new" / "r.json", {"device": "x"}, 10, compare(rows, CASES), rows)
    content = json.loads((tmp_path / "new" / "r.json").read_text())
    assert content["runs"] == rows and content["num_steps"] == 10 and content["machine"] == {"device": "x"}
    assert [one["other"] for one in content["comparisons"]] == ["bare", "hf"]


def test_bad_numbers_are_refused(capsys):
    with pytest.raises(SystemExit) as error:
        main(["--rounds", "0"])
    assert error.value.code == 2 and "--rounds 5" in capsys.readouterr().err


@pytest.mark.slow
def test_a_failed_run_is_one_sentence(tmp_path):
    with pytest.raises(RunFailed, match="fit on 1 rank ended with exit code"):
        run_once(Case("1 rank", 1, ("parallel.nonsense=1",), ("fit",)), "fit", 1, tmp_path / "none", tmp_path / "run")


@pytest.mark.slow
def test_the_loops_do_the_same_work(tmp_path):
    tiny = ("model.num_layers=1", "model.hidden_size=64", "model.ffn_hidden_size=64", "train.seq_len=64")
    case = Case("1 rank", 1, ("parallel.tp=1", *tiny), ("fit", "bare", "hf"))
    write_made_up_dataset(tmp_path / "tokens", num_tokens=20_000, vocab_size=4096)
    runs = {loop: run_once(case, loop, 2, tmp_path / "tokens", tmp_path / loop) for loop in case.loops}
    assert runs["fit"].loss == pytest.approx(runs["bare"].loss, rel=1e-6) and runs["hf"].loss is None
    assert all(run.tokens_per_second > 0 for run in runs.values())

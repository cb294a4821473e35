"""The benchmark: runs take turns, step pairs make ratios, the loops do the same work."""

import json
import subprocess
import threading
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest

from configs.sections.sft import ConversationSource
from tests import forked
from tools.bench import throughput
from tools.bench.chats import TAGGED_CHATML, write_pairs, write_tokenizer
from tools.bench.clock import RunReport, StepClock
from tools.bench.compare import Measure, bootstrap_interval, compare
from tools.bench.launching import RunFailed
from tools.bench.report import describe_verdict, write_report
from tools.bench.sft import SIDES, measure_tokenising
from tools.bench.throughput import Case, main, measure_case
from tools.bench.turns import Conductor, Turns
from tools.made_up_data import write_made_up_dataset
from trainer.data.chat.encode import ChatEncoder
from trainer.data.chat.forms import parse_conversation
from trainer.data.chat.template import load_template
from trainer.data.tokenizer import load_tokenizer


def measure(loop, seconds, loss=2.0):
    report = RunReport(loop, tokens_per_step=100, processor_seconds_per_step=sum(seconds), loss=loss, device="x")
    return Measure("1 rank", report, seconds)


def run_loop(directory, name, rank, num_steps, log):
    """A loop that notes its steps, of one warm-up and `num_steps` measured ones, and one after them."""
    clock = StepClock(1, num_steps, lambda: None, Turns(directory, name, rank))
    for step in range(clock.total_steps):
        clock.tick()
        log.append((step, name, rank))
    assert clock.processor_seconds >= 0


def test_runs_take_turns_and_then_go_free(tmp_path):
    log = []
    with Conductor(tmp_path, ["a", "b"], 2, check=lambda: None) as conductor:
        loops = [
            threading.Thread(target=run_loop, args=(tmp_path, name, rank, 2, log)) for name in "ab" for rank in (0, 1)
        ]
        for loop in loops:
            loop.start()
        rounds = [conductor.take_round(is_backwards=number == 1) for number in range(3)]
        assert [(step, name) for step, name, _ in log] == [
            (step, name) for step, names in enumerate(("ab", "ba", "ab")) for name in names for _ in (0, 1)
        ]
        conductor.release()
        for loop in loops:
            loop.join()
    assert all(set(one) == {"a", "b"} and min(one.values()) > 0 for one in rounds)
    assert sorted(log[12:]) == [(3, name, rank) for name in "ab" for rank in (0, 1)]


def test_a_run_that_ends_early_ends_the_waiting(tmp_path):
    def check():
        raise RunFailed("it ended")

    with Conductor(tmp_path, ["a"], 1, check) as conductor, pytest.raises(RunFailed, match="it ended"):
        conductor.take_round(is_backwards=False)


def test_a_loop_that_stops_early_has_no_figures(tmp_path):
    with Conductor(tmp_path, ["a"], 1, check=lambda: None) as conductor:
        clock = StepClock(0, 3, lambda: None, Turns(tmp_path, "a", 0))
        conductor.release()
        clock.tick()
        with pytest.raises(RuntimeError, match="took 1 steps, 4"):
            _ = clock.processor_seconds


def test_ratios_are_made_step_by_step():
    # every pair says 0.9, although the machine's speed changed by the factor ten between steps
    bare, hf = compare(
        [
            measure("fit", [10.0, 1.0, 100.0]),
            measure("bare", [9.0, 0.9, 90.0]),
            measure("hf", [20.0, 2.0, 200.0], loss=None),
        ]
    )
    assert bare["num_pairs"] == 3 and bare["ours"] == 10.0 and bare["theirs"] == pytest.approx(100 / 9)
    assert bare["ratio"] == pytest.approx({"median": 0.9, "low": 0.9, "high": 0.9})
    assert bare["cost"] == pytest.approx(0.1) and bare["processor_ratio"] == pytest.approx(1 / 0.9)
    assert bare["is_same_loss"] is True
    assert hf["ratio"]["median"] == pytest.approx(2.0) and hf["is_same_loss"] is None


def test_speeds_are_compared_by_token():
    # the same seconds, and of the other loop's tokens half: twice its speed, and half its processor time a token
    other = measure("trl", [2.0, 4.0], loss=None)
    other = Measure(other.layout, replace(other.report, tokens_per_step=50), other.step_seconds)
    [one] = compare([measure("fit", [2.0, 4.0]), other])
    assert one["ratio"]["median"] == 2.0 and one["processor_ratio"] == 0.5


def test_tokens_are_counted_in_measured_steps_alone(tmp_path):
    with Conductor(tmp_path, ["a"], 1, check=lambda: None) as conductor:
        clock = StepClock(1, 2, lambda: None, Turns(tmp_path, "a", 0))
        counts = iter([100, 7, 8, 200])
        for _ in range(clock.total_steps):
            conductor.release()
            clock.tick()
            clock.count(next(counts))
    assert clock.tokens_per_step == 7.5


def test_the_interval_narrows_with_the_number_of_steps():
    def width(count):
        low, high = bootstrap_interval([0.9 + 0.2 * (number % 11) / 10 for number in range(count)])
        assert 0.9 <= low <= 1.0 <= high <= 1.1
        return high - low

    assert width(1100) < width(22)


def test_verdicts():
    def verdict(ours, theirs, loss=2.0):
        return describe_verdict(compare([measure("fit", [ours]), measure("bare", [theirs], loss)])[0])

    assert verdict(100.0, 98.0) == "costs 2.0%, within the limit of 3%"
    assert verdict(100.0, 96.0) == "costs 4.0%, over the limit of 3%"
    assert verdict(100.0, 101.0) == "costs 0.0%, within the limit of 3%"
    assert verdict(100.0, 98.0, loss=2.1) == "not comparable: the losses differ"


def test_the_report_is_json_with_everything_measured(tmp_path):
    measures = [measure("fit", [1.0]), measure("bare", [1.0]), measure("hf", [2.0])]
    rows = [asdict(one) for one in measures]
    write_report(tmp_path / "new" / "r.json", {"device": "x"}, compare(measures), rows)
    content = json.loads((tmp_path / "new" / "r.json").read_text())
    assert content["runs"] == rows and content["machine"] == {"device": "x"}
    assert [one["other"] for one in content["comparisons"]] == ["bare", "hf"]


def test_bad_numbers_are_refused(capsys):
    with pytest.raises(SystemExit) as error:
        main(["--steps", "1"])
    assert error.value.code == 2 and "--steps 20" in capsys.readouterr().err


def start(command, **options):
    """Start a loop of ours in a fork, and Hugging Face's, which knows no patches for the CPU, as it is."""
    kind = forked if command[1:4] == forked.LAUNCHER else subprocess
    return kind.Popen(command, **options)


@pytest.fixture
def forked_loops(monkeypatch):
    monkeypatch.setattr(throughput, "subprocess", SimpleNamespace(Popen=start))


@pytest.mark.slow
def test_a_failed_run_is_one_sentence(forked_loops, tmp_path):
    case = Case("1 rank", 1, ("parallel.nonsense=1",), ("fit",))
    with pytest.raises(RunFailed, match="fit on 1 rank ended with exit code 1: .*nonsense"):
        measure_case(case, 1, tmp_path / "none")


@pytest.mark.slow
def test_the_loops_do_the_same_work(forked_loops, tmp_path):
    tiny = ("model.num_layers=1", "model.hidden_size=64", "model.ffn_hidden_size=64", "train.seq_len=64")
    case = Case("1 rank", 1, ("parallel.tp=1", *tiny), ("fit", "bare", "hf"))
    write_made_up_dataset(tmp_path / "tokens", num_tokens=20_000, vocab_size=4096)
    fit, bare, hf = measure_case(case, 2, tmp_path / "tokens")
    assert fit.report.loss == pytest.approx(bare.report.loss, rel=1e-6) and hf.report.loss is None
    assert all(len(run.step_seconds) == 2 and min(run.step_seconds) > 0 for run in (fit, bare, hf))


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """A file of chats and a tokenizer with ChatML's tokens."""
    folder = tmp_path_factory.mktemp("chats")
    rows = [
        [{"role": "user", "content": f"What is {number}?"}, {"role": "assistant", "content": "It is one. " * number}]
        for number in range(1, 60)
    ]
    file = folder / "chats.jsonl"
    file.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    write_tokenizer(file, folder / "tokenizer", 320)
    return file, folder / "tokenizer", rows


def test_the_tagged_template_gives_our_mask(chats):
    import transformers

    file, tokenizer, rows = chats
    theirs = transformers.AutoTokenizer.from_pretrained(str(tokenizer))
    ours = ChatEncoder(load_template("chatml", tokenizer), load_tokenizer(tokenizer))
    for row in rows[:5]:
        made = theirs.apply_chat_template(
            row, chat_template=TAGGED_CHATML, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        [sample] = ours.encode(parse_conversation({"messages": row}, ConversationSource(path="x")))
        assert made["input_ids"] == sample.input_ids and made["assistant_masks"] == sample.loss_mask
        assert 0 < sum(sample.loss_mask) < len(sample.loss_mask)


@pytest.mark.slow
def test_both_tokenise_the_same(chats):
    figures = measure_tokenising(chats[0], chats[1], num_rounds=1, num_processes=1)
    assert all(figures[side]["megabytes_per_second"] > 0 for side in SIDES)


@pytest.mark.slow
def test_fine_tuning_loops_train_as_many_tokens(forked_loops, chats, tmp_path):
    tiny = ("model.num_layers=1", "model.hidden_size=64", "model.ffn_hidden_size=64", "train.global_batch_size=4")
    overrides = ("parallel.tp=1", f"data.tokenizer={chats[1]}", *tiny)
    fit, trl = measure_case(Case("SFT", 1, overrides, ("fit", "trl"), stage="sft"), 2, chats[0])
    for run in (fit, trl):  # rows of 256, hardly any place of them empty
        assert 0.9 * 4 * 256 < run.report.tokens_per_step < 4 * 256 and len(run.step_seconds) == 2


@pytest.mark.slow
def test_loops_of_preferences_train_as_many_tokens(forked_loops, chats, tmp_path):
    tiny = ("model.num_layers=1", "model.hidden_size=64", "model.ffn_hidden_size=64", "train.global_batch_size=4")
    overrides = ("parallel.tp=1", f"data.tokenizer={chats[1]}", "train.seq_len=512", *tiny)
    write_pairs(tmp_path / "pairs.jsonl", 40, length=30)  # some 200 tokens each
    case = Case("DPO", 1, overrides, ("fit", "trl_dpo"), stage="preference")
    fit, trl = measure_case(case, 2, tmp_path / "pairs.jsonl")
    for run in (fit, trl):
        assert 0.6 * 4 * 512 < run.report.tokens_per_step < 4 * 512 and len(run.step_seconds) == 2

"""What a policy answered, looked at: figures by hand, samples in order, one row over time, the page, bad input."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import pytest

from configs.errors import ExitCode
from tools.view_rollouts import main
from trainer.report.rollouts import write_rollouts
from trainer.report.sinks import MetricsWriter

NASTY = "<script>alert('1')</script> & \x1b[31mred"


def rollout(step: int, group: int, sample: int, score: float | None, **more: object) -> dict:
    """Return a rollout as GRPO writes it; group 0 of step 2 answers row 7, every other group a row of its own."""
    fields = {
        "step": step, "source": "train", "row": 7 if group == 0 else 10 * step + group, "group": group,
        "sample": sample, "prompt": f"<|im_start|>question {step}.{group}",
        "answers": [f"answer {step}.{group}.{sample}"],
        "score": score, "rewards": {"exact": score}, "faults": {}, "advantage": None if score is None else score - 0.5,
        "finish": "stop_token", "num_prompt_tokens": 4, "num_sampled_tokens": 3,
    }  # fmt: skip
    return {**fields, **more}


@pytest.fixture
def run(tmp_path):
    """Return a run of the steps 1, 2 and 4: in step 2 a group of equal scores, a failure and a cut answer."""
    write_rollouts(tmp_path, 1, [rollout(1, 0, sample, 0.0) for sample in range(2)])
    second = [rollout(2, 1, sample, 0.25 * sample, num_sampled_tokens=sample + 1) for sample in range(5)]
    second += [
        rollout(2, 0, 0, 1.0, answers=[NASTY], prompt=NASTY, finish="length", num_sampled_tokens=20),
        rollout(
            2,
            0,
            1,
            None,
            faults={"exact": "ValueError: no"},
            num_sampled_tokens=5,
            answers=["turn 1", "turn 2"],
            observations=["<tool> 3"],
        ),
        rollout(2, 0, 2, 1.0, num_sampled_tokens=0),
    ]
    write_rollouts(tmp_path, 2, second)
    write_rollouts(tmp_path, 4, [rollout(4, 1, 0, 1.0)])
    return tmp_path


def see(capsys, *words: object) -> list[str]:
    assert main([*map(str, words)]) == ExitCode.DONE
    return capsys.readouterr().out.splitlines()


def test_figures_of_each_step_are_those_of_a_hand(run, capsys):
    lines = see(capsys, run)
    table = [line.split() for line in lines[-4:]]
    assert table[0] == ["step", "rollouts", "score", "exact", "tokens", "cut", "groups", "equal", "failed"]
    assert table[1] == ["1", "2", "0.000", "0.000", "3.0", "0%", "1", "1", "0"]
    assert table[2] == ["2", "8", "0.643", "0.643", "5.0", "12%", "2", "1", "1"]  # (0 + .25 + .5 + .75 + 3) / 7, 40 / 8
    assert table[3] == ["4", "1", "1.000", "1.000", "3.0", "0%", "1", "1", "0"]
    assert "answer 4.1.0" in lines and "step 4  train:41  group 1  sample 0" in lines[1]


def test_samples_go_from_the_most_to_the_least(run, capsys):
    def samples(*words: object) -> list[str]:
        titles = [line for line in see(capsys, run, "--step", 2, *words) if line.startswith("step 2  ")]
        return [title.split("group ")[1].split("  score")[0].replace("  sample ", ".") for title in titles]

    assert samples("--limit", 9) == ["1.4", "0.0", "0.2", "1.3", "1.2", "1.1", "1.0", "0.1"]  # the failed one last
    assert samples("--limit", 2) == ["1.4", "0.1"] and len(samples()) == 5
    assert samples("--sort", "length", "--limit", 1) == ["0.0"]
    assert samples("--group", 1, "--sort", "advantage") == ["1.4", "1.3", "1.2", "1.1", "1.0"]
    shuffled = samples("--sort", "random", "--limit", 8)
    assert shuffled == samples("--sort", "random", "--limit", 8) != sorted(shuffled) and len(set(shuffled)) == 8


def test_a_row_is_followed_over_the_steps(run, capsys):
    lines = see(capsys, run, "--row", "train:7")
    assert [line.split("  group")[0] for line in lines if line.startswith("step ") and "sample" in line] == [
        "step 1  train:7", "step 1  train:7", "step 2  train:7", "step 2  train:7",
    ]  # fmt: skip
    assert (
        lines.count("<|im_start|>question 1.0") == 1
        and "turn 1,<tool> 3,turn 2" in ",".join(lines)
        and "exact: ValueError: no" in lines
    )
    assert not any("\x1b" in line for line in lines) and any("\\x1b[31mred" in line for line in lines)


class Page(HTMLParser):
    """Collects scripts, samples and their text, and whatever would be fetched."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.samples: list[tuple[str, str]] = []
        self.fetched: list[str] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.fetched += [name for name, _ in attrs if name in ("src", "href", "action") or name.startswith("on")]
        if tag == "article":
            self.samples.append((dict(attrs)["data-step"], dict(attrs)["data-score"]))

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_stands_alone_and_escapes_everything(run, capsys, tmp_path):
    out = tmp_path / "page.html"
    assert f"{out}: 11 samples" in see(capsys, run, "--html", out)
    text = out.read_text()
    page = Page(text)
    assert page.tags.count("script") == 1 and page.tags.count("polyline") == 2 and not page.fetched
    assert "http" not in text and text.count("<svg") == 1
    assert page.samples.count(("2", "1.0")) == 0 and page.samples.count(("2", "1")) == 3 and ("2", "") in page.samples
    assert [piece for piece in page.text if "alert" in piece] == [NASTY, NASTY]  # prompt and answer, as they were
    assert page.tags.count("option") == 4 and "score 0.000" in text


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["nowhere"], "nowhere: no such file or directory; give a run"),
        (["."], ".: has no rollouts/step_*.jsonl; give a run"),
        (["run", "--step", "3"], "--step: 3 is not there; there are 1 to 2, 4"),
        (["run", "--group", "5"], "--group: the step has no group 5; it has 1"),
        (["run", "--row", "train:9"], "--row: train:9 was not answered; there are its rows 7, 21, 41"),
        (["run", "--row", "test:7", "--step", "1"], "test:7 was not answered in step 1; there are the sources train"),
        (["cut.jsonl"], "cut.jsonl:2: not JSON ("),
        (["list.jsonl"], "list.jsonl:1: not a JSON object"),
        (["other.jsonl"], "other.jsonl:1: rewards is missing"),
        (["wrong.jsonl"], "wrong.jsonl:1: score is not what a rollout has"),
        (["empty.jsonl"], "empty.jsonl: holds no rollout"),
        (["run", "--html", "nowhere/page.html"], "nowhere/page.html: cannot be written"),
    ],
)
def test_bad_input_is_one_sentence(run, tmp_path, monkeypatch, capsys, words, named):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "rollouts").rename(tmp_path / "run" / "rollouts")
    row = rollout(1, 0, 0, 1.0)
    (tmp_path / "cut.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row)[:50])
    (tmp_path / "list.jsonl").write_text("[1]\n")
    (tmp_path / "other.jsonl").write_text(json.dumps({key: row[key] for key in row if key != "rewards"}) + "\n")
    (tmp_path / "wrong.jsonl").write_text(json.dumps({**row, "score": "high"}) + "\n")
    (tmp_path / "empty.jsonl").write_text("\n")
    assert main(words) == ExitCode.BAD_INPUT
    said = capsys.readouterr()
    assert named in said.err and said.err.count("\n") == 1 and not said.out


@pytest.mark.parametrize(
    ("words", "named"),
    [(["--row", "train"], "'train' is no SOURCE:ROW"), (["--limit", "0"], "--limit: 0 is less than 1")],
)
def test_options_that_mean_nothing_are_refused(run, capsys, words, named):
    with pytest.raises(SystemExit) as refusal:
        main([str(run), *words])
    assert refusal.value.code == ExitCode.BAD_INPUT and named in capsys.readouterr().err


def test_a_run_that_went_back_shows_one_course(run, capsys):
    MetricsWriter(run, tensorboard=False, resume_step=2).close()
    assert [line.split()[0] for line in see(capsys, run)[-3:]] == ["step", "1", "2"]

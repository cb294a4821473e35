"""Scaling tests: what a sweep becomes, what is computed of hand-made runs in closed form, what is named as missing."""

from __future__ import annotations

import json
import math
import select
import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest
import yaml

from configs.errors import BadInput
from tools import scaling
from tools.scaling_figures import compute_rows, describe_failure, measure
from tools.scaling_report import main as report_main
from tools.scaling_sweep import plan_points, read_sweep, read_sweep_dir, write_sweep

ROOT = Path(__file__).resolve().parents[2]
SWEEP = {
    "recipe": str(ROOT / "configs/demo/pretrain.yaml"),
    "num_steps": 12,
    "num_warmup": 2,
    "settings": ["data.validation=[]"],
    "ranks": [1, 2, 4],
    "layouts": {"dp": {"tp": 1, "pp": 1}, "tp2": {"tp": 2, "pp": 1, "ranks": [2]}},
    "weak": {"batch_per_rank": 4},
    "strong": {"global_batch_size": 16},
}


@pytest.fixture
def write(tmp_path):
    """Return a function that writes a sweep with some fields changed and returns its path."""

    def write_file(**changes):
        path = tmp_path / "sweep.yaml"
        fields = {name: value for name, value in (SWEEP | changes).items() if value is not None}
        path.write_text(yaml.safe_dump(fields))
        return path

    return write_file


@pytest.fixture
def sweep_dir(tmp_path, write):
    """Return the directory of a sweep whose runs are still to be made by hand."""
    sweep, folder = read_sweep(write()), tmp_path / "runs"
    write_sweep(sweep, plan_points(sweep, folder, None), folder)
    return folder


def add_run(folder, name, seconds, tokens, num_steps=12, **columns):
    """Make a run by hand: the first two steps are slow, the others take `seconds` with a spread of 10 %."""
    (folder / name).mkdir()
    rows = []
    for step in range(1, num_steps + 1):
        own = 100.0 if step <= 2 else seconds * (1 + 0.1 * math.copysign((step - 7.5) ** 2 / 20.25, step - 7.5))
        rows.append({"step": step, "seconds": own, "num_input_tokens": tokens, "peak_memory_gb": 1.0 + step} | columns)
    (folder / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_points_of_weak_and_strong_scaling(sweep_dir, write):
    points = {point.name: point for point in plan_points(read_sweep(write()), sweep_dir, None)}
    assert {name: point.kinds for name, point in points.items()} == {
        "dp_1ranks_batch4": ("weak",),
        "dp_1ranks_batch16": ("strong",),
        "dp_2ranks_batch8": ("weak",),
        "tp2_2ranks_batch8": ("weak",),
        "dp_2ranks_batch16": ("strong",),
        "tp2_2ranks_batch16": ("strong",),
        "dp_4ranks_batch16": ("weak", "strong"),  # one run serves both
    }
    overrides = points["tp2_2ranks_batch8"].overrides
    assert {"parallel.tp=2", "parallel.pp=1", "train.global_batch_size=8", "train.num_steps=12"} <= set(overrides)
    assert f"run.dir={sweep_dir / 'tp2_2ranks_batch8'}" in overrides and "data.validation=[]" in overrides
    nodes = plan_points(read_sweep(write(ranks=None, nodes=[2], layouts={"dp": {}})), sweep_dir, 8)
    assert [(point.name, point.num_ranks, point.num_nodes) for point in nodes] == [
        ("dp_2nodes_batch16", 16, 2),
        ("dp_2nodes_batch64", 16, 2),
    ]


def test_efficiency_in_closed_form(sweep_dir, write):
    """Where a share s cannot be divided, N ranks take s + (1 - s)/N of the time (Amdahl): 1/(1 + s(N - 1))."""
    sweep, serial = read_sweep(write()), 0.25
    shares = {"mfu_bf16": 0.4, "mfu_fp8": 0.2}  # rows of a GPU that has both peaks
    for ranks in (1, 2, 4):
        add_run(sweep_dir, f"dp_{ranks}ranks_batch16", 8 * (serial + (1 - serial) / ranks), 16 * 256, **shares)
    for ranks in (1, 2):
        add_run(sweep_dir, f"dp_{ranks}ranks_batch{4 * ranks}", 2.0 + 0.5 * (ranks - 1), 4 * ranks * 256)
    points = plan_points(sweep, sweep_dir, None)
    measured = [one for one in (measure(sweep, sweep_dir, point) for point in points) if not isinstance(one, str)]
    strong = compute_rows("strong", measured)
    assert [row.efficiency for row in strong] == pytest.approx([1 / (1 + serial * (ranks - 1)) for ranks in (1, 2, 4)])
    first = strong[0].measured
    assert first.tokens_per_second == pytest.approx(16 * 256 / 8) and first.step_seconds == pytest.approx(8)
    assert first.fastest_seconds < 8 < first.slowest_seconds and first.slowest_seconds < 8 * 1.1
    assert (first.mfu_bf16, first.peak_memory_gb) == (0.4, 13.0)
    weak = compute_rows("weak", measured)
    # the run on 4 ranks serves both: 16 samples in 8 * (1/4 + 3/16) s
    assert [row.efficiency for row in weak] == pytest.approx([1, 2.0 / 2.5, (4 * 256 / 3.5) / (4 * 256 / 2.0)])


def test_the_fastest_on_the_fewest_ranks_is_what_others_are_compared_with(sweep_dir, write):
    sweep = read_sweep(write())
    add_run(sweep_dir, "dp_2ranks_batch8", 2.0, 800)
    add_run(sweep_dir, "tp2_2ranks_batch8", 4.0, 800)
    rows = compute_rows("weak", [measure(sweep, sweep_dir, one) for one in plan_points(sweep, sweep_dir, None)[2:4]])
    assert {row.measured.point.layout: row.efficiency for row in rows} == {"dp": 1.0, "tp2": 0.5}


def test_missing_and_failed_runs_are_named_with_the_reason(sweep_dir, capsys):
    add_run(sweep_dir, "dp_1ranks_batch4", 2.0, 1024)
    add_run(sweep_dir, "dp_2ranks_batch8", 2.0, 2048, num_steps=5)
    (sweep_dir / "dp_2ranks_batch8" / "metrics.jsonl").open("a").write('{"step": 6, "sec')  # as a kill leaves it
    (sweep_dir / "dp_2ranks_batch8.json").write_text('{"exit_code": 5}')
    (sweep_dir / "dp_2ranks_batch8.log").write_text("step 5\na rank was killed by signal 9 (SIGKILL)\nbye\n")
    (sweep_dir / "tp2_2ranks_batch8.json").write_text('{"job": "17"}')
    jobs = sweep_dir / "tp2_2ranks_batch16" / "logs" / "slurm"
    jobs.mkdir(parents=True)
    (sweep_dir / "tp2_2ranks_batch16.json").write_text('{"job": "18"}')
    (jobs / "18.log").write_text("No space left on device: an error <b>\nended with exit code 2\n")
    assert report_main([str(sweep_dir)]) == 1
    shown = capsys.readouterr().out
    assert "dp_2ranks_batch8: no figures: took 5 of 12 steps; exit code 5: a rank was killed by signal 9" in shown
    assert "tp2_2ranks_batch8: no figures: took no step; job 17 waits, or was cancelled" in shown
    assert "tp2_2ranks_batch16: no figures: took no step; exit code 2: No space left on device: an error <b>" in shown
    assert "dp_4ranks_batch16: no figures: has not begun" in shown
    page = (sweep_dir / "report.html").read_text()
    assert "exit code 5" in page and "an error &lt;b&gt;" in page and "data:image/png;base64,iVBOR" in page
    assert (sweep_dir / "scaling_weak.png").read_bytes().startswith(b"\x89PNG")
    assert not (sweep_dir / "scaling_strong.png").exists()
    assert report_main([str(sweep_dir), "--json"]) == 1
    content = json.loads(capsys.readouterr().out)
    assert [row["efficiency"] for row in content["scaling"]["weak"]] == [1.0]
    assert len(content["without_figures"]) == 6


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"recipe": "configs/none.yaml"}, "recipe: configs/none.yaml does not exist, seen from"),
        ({"steps": 3}, "steps: unknown field; the fields are recipe"),
        ({"num_steps": 0}, "num_steps: input should be greater than or equal to 1"),
        ({"num_warmup": 12}, "num_warmup: 12 of 12 steps leave none to measure; a value that would work: 3"),
        ({"weak": None, "strong": None}, "neither weak nor strong scaling is asked for"),
        ({"nodes": [1]}, "give either ranks"),
        ({"layouts": {"a/b": {"ranks": [0]}}}, "layouts.a/b.ranks: [0] is no list of numbers of ranks"),
        ({"layouts": {"a": {"ranks": []}}}, "layouts.a.ranks: [] is no list of numbers of ranks"),
        ({"layouts": {"a": {"nodes": [4]}}}, "layouts.a.nodes: the sweep's numbers are ranks"),
        ({"layouts": {"": {}}}, "layouts.: is part of the names of directories"),
        ({"layouts": {"a": {"train.x": date(2026, 1, 1)}}}, "layouts.a.train.x: 2026-01-01 is neither text nor number"),
        ({"layouts": {"a": {"train.num_steps": 9}}}, "layouts.a: train.num_steps is set by num_steps"),
        ({"settings": ["train.global_batch_size=9"]}, "settings: train.global_batch_size is set by weak and strong"),
        ({"ranks": []}, "ranks: there is none"),
        ({"stage": "rft"}, "stage: 'rft' takes no steps"),
    ],
)
def test_wrong_fields_are_sentences(write, changes, sentence):
    with pytest.raises(BadInput) as refused:
        read_sweep(write(**changes))
    assert sentence in str(refused.value) and "sweep.yaml: " in str(refused.value)


def test_a_batch_that_is_no_whole_number(write, tmp_path):
    with pytest.raises(BadInput, match=r"batch_per_rank: 1 ranks would have 0\.5 samples; a value that would work: 1"):
        plan_points(read_sweep(write(weak={"batch_per_rank": 0.5})), tmp_path, None)


def test_a_directory_holds_one_sweep(sweep_dir, write, tmp_path):
    more = read_sweep(write(ranks=[1, 2, 4, 8]))
    write_sweep(more, plan_points(more, sweep_dir, None), sweep_dir)
    other = read_sweep(write(num_steps=13))
    with pytest.raises(BadInput, match=r"holds another sweep, which differs in num_steps.*such as --out .*runs-2"):
        write_sweep(other, plan_points(other, sweep_dir, None), sweep_dir)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").touch()
    with pytest.raises(BadInput, match="holds no sweep but something else"):
        write_sweep(more, [], tmp_path / "full")
    with pytest.raises(BadInput, match=r"holds no sweep\.json; give the directory of a sweep"):
        read_sweep_dir(tmp_path / "none")


RUNNING = """
import functools, os, subprocess, sys
from tools.scaling import _end_with
end = functools.partial(_end_with, os.getpid())
run = subprocess.Popen([sys.executable, "-c", "print(1, flush=True); input()"], preexec_fn=end)
run.wait()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="what ends a process with its parent is Linux's")
def test_a_run_ends_with_a_command_that_is_killed():
    """Its output closes when it does: else it would go on, and slow down the runs of the next command."""
    command = [sys.executable, "-c", RUNNING]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as sweeping:
        assert sweeping.stdout.readline() == b"1\n"
        sweeping.kill()
        assert select.select([sweeping.stdout], [], [], 10)[0] and sweeping.stdout.read() == b""


STUB = """
import sys
words = sys.argv[1:]
if "parallel.tp=2" in words and "--dry-run" in words and BAD:
    sys.exit("parallel.tp: does not fit")
if "--dry-run" not in words:
    print("job", len(words) + int(words[words.index("--nodes") + 1]))
    if "train.global_batch_size=16" in words:
        sys.exit("no more jobs today: an error")
"""


@pytest.mark.parametrize("is_bad", [False, True])
def test_points_are_submitted_as_jobs(write, tmp_path, monkeypatch, capsys, is_bad):
    """With a stand-in for launch/slurm.py, which takes and refuses jobs."""
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "slurm.py").write_text(STUB.replace("BAD", str(is_bad)))
    (tmp_path / "site.yaml").write_text("gpus_per_node: 0\nranks_per_node: 2\n")
    (tmp_path / "cluster.yaml").write_text("base: site.yaml\n")
    monkeypatch.setattr(scaling, "ROOT", tmp_path)
    path = write(ranks=None, nodes=[1, 2], layouts={"dp": {}, "tp2": {"tp": 2, "nodes": [1]}})
    out = tmp_path / "out"
    code = scaling.main([str(path), "--cluster", str(tmp_path / "cluster.yaml"), "--out", str(out)])
    shown = capsys.readouterr()
    if is_bad:
        assert code == 2 and not out.exists()
        assert shown.err.strip() == "error: parallel.tp: does not fit (in tp2_1nodes_batch8, tp2_1nodes_batch16)"
        return
    assert code == 1
    assert "dp_1nodes_batch8: submitted as job" in shown.out
    assert "dp_2nodes_batch16: not submitted: exit code 1: no more jobs today: an error" in shown.out
    assert json.loads((out / "dp_1nodes_batch8.json").read_text()).keys() == {"job"}


def test_a_log_without_words_of_errors_gives_its_last_line(sweep_dir, write):
    point = plan_points(read_sweep(write()), sweep_dir, None)[0]
    (sweep_dir / f"{point.name}.log").write_text("one\n\ntwo\n")
    (sweep_dir / f"{point.name}.json").write_text('{"exit_code": 1}')
    assert describe_failure(sweep_dir, point) == "exit code 1: two"


@pytest.mark.slow
def test_a_small_sweep_runs_goes_on_and_survives_a_failure(write, tmp_path, capfd, monkeypatch):
    from tools.made_up_data import write_made_up_dataset

    write_made_up_dataset(tmp_path / "tokens", num_tokens=20_000, vocab_size=4000)
    settings = [
        "data.tokenizer=null", f"data.train=[{{path: {tmp_path}/tokens}}]", "data.validation=[]", "sample.prompts=[]",
        "schedule.warmup_steps=0", "train.seq_len=32", "train.micro_batch_size=1", "model.num_layers=2",
    ]  # fmt: skip
    layouts, out = {"dp": {"tp": 1, "pp": 1}, "tp2": {"tp": 2, "pp": 1, "ranks": [2]}}, tmp_path / "sweep"
    wrong = write(settings=settings, layouts={"pp3": {"pp": 3}}, ranks=[1, 2])
    assert scaling.main([str(wrong), "--local", "--out", str(out)]) == 2 and not out.exists()
    errors = capfd.readouterr().err
    assert "world size 1 is no multiple" in errors and "world size 2 is no multiple" in errors
    path = write(
        settings=settings,
        num_steps=4,
        num_warmup=1,
        ranks=[1],
        layouts=layouts,
        weak={"batch_per_rank": 4},
        strong=None,
    )
    command = [str(path), "--local", "--out", str(out)]
    write_sweep(read_sweep(path), plan_points(read_sweep(path), out, None), out)
    in_the_way = out / "dp_1ranks_batch4" / "metrics.jsonl"
    in_the_way.mkdir(parents=True)
    monkeypatch.setenv("SHARDWRIGHT_PLATFORM", "cpu")
    assert scaling.main(command) == 1
    shown = capfd.readouterr().out
    assert "dp_1ranks_batch4: failed: exit code" in shown and "tp2_2ranks_batch8: done" in shown
    in_the_way.rmdir()
    assert scaling.main(command) == 0
    shown = capfd.readouterr().out
    assert "dp_1ranks_batch4: done" in shown and "tp2_2ranks_batch8: has its 4 steps" in shown
    assert not (out / "tp2_2ranks_batch8" / "checkpoints").exists()
    assert report_main([str(out), "--json"]) == 0
    rows = json.loads(capfd.readouterr().out)["scaling"]["weak"]
    assert [(row["ranks"], row["layout"]) for row in rows] == [(1, "dp"), (2, "tp2")] and rows[0]["efficiency"] == 1.0

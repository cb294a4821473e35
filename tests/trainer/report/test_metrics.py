"""metrics.jsonl is continuous over resumes and kills; TensorBoard purges; the live line degrades to plain lines."""

import errno
import io
import json
import logging
import math
import re

import pytest
from rich.console import Console

from trainer.report.live import LiveLine, format_duration
from trainer.report.log import add_rank_file, next_attempt, start_console
from trainer.report.sinks import STEP_KEYS, MetricsWriter, drop_rows_after


def row(step, loss=2.0, **extras):
    values = {"loss": loss, "grad_norm": 1.0, "lr": 1e-3, "num_tokens": 64, "tokens_per_second": 10.0, "seconds": 0.1}
    return {"step": step, **values, **extras}


def write_steps(run_dir, steps, resume_step=0, loss=2.0):
    writer = MetricsWriter(run_dir, tensorboard=False, resume_step=resume_step)
    for step in steps:
        writer.write(row(step, loss))
    writer.close()


def read_rows(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_stable_keys_come_first_whatever_the_order_given(tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=False, resume_step=0)
    writer.write({"memory_bytes": 5, **dict(reversed(row(1).items()))})
    assert tuple(read_rows(tmp_path)[0]) == (*STEP_KEYS, "memory_bytes")  # before close: each line is flushed
    with pytest.raises(KeyError):
        writer.write({"step": 2, "loss": 1.0})


def test_a_resumed_run_replaces_the_rows_beyond_its_checkpoint(tmp_path):
    write_steps(tmp_path, range(1, 8), loss=2.0)
    write_steps(tmp_path, range(6, 9), resume_step=5, loss=1.0)
    rows = read_rows(tmp_path)
    assert [one["step"] for one in rows] == list(range(1, 9))
    assert [one["loss"] for one in rows] == [2.0] * 5 + [1.0] * 3


def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path):
    write_steps(tmp_path, [1, 2])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    assert drop_rows_after(tmp_path / "metrics.jsonl", 3) == 1
    assert [one["step"] for one in read_rows(tmp_path)] == [1, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_nothing_to_drop_leaves_the_file_untouched(tmp_path):
    write_steps(tmp_path, [1, 2])
    before = (tmp_path / "metrics.jsonl").stat()
    assert drop_rows_after(tmp_path / "metrics.jsonl", 2) == 0
    assert (tmp_path / "metrics.jsonl").stat().st_ino == before.st_ino


def test_values_survive_bit_for_bit_and_non_finite_is_null(tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=False, resume_step=0)
    writer.write(row(1, loss=math.pi / 3))
    writer.write(row(2, loss=math.nan))
    first, second = read_rows(tmp_path)
    assert first["loss"] == math.pi / 3
    assert second["loss"] is None
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_tensorboard_hides_what_a_resume_trains_again(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resume_step, steps, loss in [(0, range(1, 6), 2.0), (3, range(4, 7), 1.0)]:
        writer = MetricsWriter(tmp_path, tensorboard=True, resume_step=resume_step)
        for step in steps:
            writer.write(row(step, loss))
        writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        *[(step, 2.0) for step in (1, 2, 3)],
        *[(step, 1.0) for step in (4, 5, 6)],
    ]
    assert "step" not in events.Tags()["scalars"]


@pytest.mark.parametrize("more", [{}, {"critic/score/mean": 0.484375}])
def test_the_live_line_fits_a_narrow_terminal(monkeypatch, more):
    narrow = Console(file=io.StringIO(), force_terminal=True, width=80)
    monkeypatch.setattr("trainer.report.live.console", narrow)
    line = LiveLine(100_000, start_step=99_000)
    line.update(row(99_001) | {"tokens_per_second": 1_234_567.0} | more)
    shown = line._progress.get_renderable()
    text = narrow.render_lines(shown, pad=False)
    line.close()
    assert len(text) == 1
    said = "".join(segment.text for segment in text[0])
    assert "left" in said and ("score 0.484" if more else "loss 2.0000") in said


def test_off_a_terminal_the_live_line_is_a_plain_line_for_the_first_and_every_log_every_steps(caplog):
    with caplog.at_level(logging.INFO, logger="trainer.report.live"):
        line = LiveLine(10, log_every=4)
        for step in range(1, 11):
            line.update(row(step, **({"critic/score/mean": 0.25} if step > 4 else {})))
        line.close()
    assert "score" not in caplog.messages[1] and "score 0.250  loss 2.0000  grad norm" in caplog.messages[2]
    assert [re.match(r"step +(\d+)/10", message).group(1) for message in caplog.messages] == ["1", "4", "8", "10"]
    assert "loss 2.0000" in caplog.messages[0] and "10 tokens/s" in caplog.messages[0]
    assert "0s left" in caplog.messages[-1]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0s"), (42, "42s"), (187, "3m07s"), (18540, "5h09m"), (187200, "2d04h"), (-3, "0s")]
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text


@pytest.fixture
def clean_logging():
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    for handler in set(root.handlers) - set(handlers):
        root.removeHandler(handler)
    for handler in handlers:
        root.addHandler(handler)
    root.setLevel(level)
    logging.captureWarnings(False)


def test_the_rank_file_holds_everything_and_the_console_our_messages(tmp_path, capsys, clean_logging):
    start_console(0)
    logging.getLogger("megatron.core").warning("library note")
    logging.getLogger("trainer.run").info("building the model")
    path = add_rank_file(tmp_path, next_attempt(tmp_path), 0)
    logging.getLogger("trainer.run").info("built")
    assert path == tmp_path / "logs" / "attempt_1" / "rank_0.log"
    written = path.read_text()
    assert all(words in written for words in ("library note", "building the model", "built"))
    shown = capsys.readouterr().out
    assert "building the model" in shown and "library note" not in shown


class FullDisk(io.StringIO):
    name = "output.txt"

    def write(self, text):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_under_the_log_is_told_once_without_a_traceback(tmp_path, capsys, monkeypatch, clean_logging):
    folder = tmp_path / "logs" / "attempt_1"
    folder.mkdir(parents=True)
    (folder / "rank_0.log").symlink_to("/dev/full")
    start_console(0)
    add_rank_file(tmp_path, 1, 0)
    for _ in range(3):
        logging.getLogger("trainer.run").info("built")
    captured = capsys.readouterr()
    assert captured.out.count("built") == 3
    said = f"{folder / 'rank_0.log'}: cannot be written (no space left on device); its messages are lost\n"
    assert captured.err == said
    monkeypatch.setattr("sys.stdout", FullDisk())
    start_console(0)
    for _ in range(3):
        logging.getLogger("trainer.run").info("built")
    assert capsys.readouterr().err == said.replace(str(folder / "rank_0.log"), "output.txt")


def test_an_error_of_ours_in_a_message_keeps_its_traceback(tmp_path, capsys, clean_logging):
    start_console(0)
    logging.getLogger("trainer.run").info("%d", "no number")
    assert "Traceback" in capsys.readouterr().err


def test_other_ranks_speak_only_of_errors(capsys, clean_logging):
    start_console(2)
    logging.getLogger("trainer.run").info("building the model")
    logging.getLogger("trainer.run").error("no more memory")
    captured = capsys.readouterr()
    assert captured.out == "" and "rank 2: no more memory" in captured.err
    assert "building" not in captured.err


def test_attempts_count_on(tmp_path):
    assert next_attempt(tmp_path) == 1
    for name in ("attempt_1", "attempt_12", "attempt_x"):
        (tmp_path / "logs" / name).mkdir(parents=True)
    assert next_attempt(tmp_path) == 13


def test_what_is_left_is_of_steps_alone_whatever_lay_between_them(caplog):
    with caplog.at_level(logging.INFO, logger="trainer.report.live"):
        line = LiveLine(1001)
        line.update(row(1) | {"seconds": 2.0})
        line.close()
    assert "33m20s left" in caplog.messages[0]

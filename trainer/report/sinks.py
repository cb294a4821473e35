"""What is measured, written down: one row a step to `metrics.jsonl` and TensorBoard. Rank 0 only.

A sink takes rows and knows nothing of where they come from; a further tracker is a further `Sink`.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from trainer.report.rollouts import drop_rollouts_after, write_rollouts

if TYPE_CHECKING:
    from trainer.evaluate.answers import Spoken


_SHOWN_ANSWERS = 16
STEP_KEYS = ("step", "loss", "grad_norm", "lr", "num_tokens", "tokens_per_second", "seconds")
"""Keys of every row, in this order; scripts rely on them. Extras follow."""


class Sink(Protocol):
    """Somewhere rows go."""

    def write(self, row: Mapping[str, float]) -> None:
        """Take one step's row; `row["step"]` counts from 1."""
        ...

    def close(self) -> None:
        """Write down whatever is still held."""
        ...


class MetricsWriter:
    """Writes each step's row to every sink of the run directory."""

    def __init__(self, run_dir: Path, *, tensorboard: bool, resume_step: int) -> None:
        """Open the sinks to go on after `resume_step` (0 for a fresh run): rows of later steps are dropped.

        So are the rollouts of a run that goes back; where none has begun, those in the directory are not its own.
        """
        self._run_dir = run_dir
        if resume_step > 0:
            drop_rollouts_after(run_dir, resume_step)
        self._sinks: list[Sink] = [JsonLines(run_dir / "metrics.jsonl", resume_step)]
        if tensorboard:
            self._sinks.append(TensorBoard(run_dir / "tensorboard", resume_step))

    def write(self, row: Mapping[str, float]) -> None:
        """Write one step's row, the stable keys first. Raises KeyError when one of `STEP_KEYS` is missing."""
        ordered = {key: row[key] for key in STEP_KEYS}
        ordered.update({key: value for key, value in row.items() if key not in ordered})
        for sink in self._sinks:
            sink.write(ordered)

    def write_start(self, step: int, values: Mapping[str, float]) -> None:
        """Write what was measured before a step was taken, which has no row in metrics.jsonl."""
        for sink in self._sinks:
            if not isinstance(sink, JsonLines):
                sink.write({"step": step, **values})

    def write_answers(self, step: int, answers: Sequence[Spoken]) -> None:
        """Write the answers given after a step: all to `answers/step_*.jsonl`, a few to TensorBoard."""
        path = self._run_dir / "answers" / f"step_{step:08d}.jsonl"
        path.parent.mkdir(exist_ok=True)
        lines = (json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in answers)
        path.write_text("".join(lines), encoding="utf-8")
        for sink in self._sinks:
            if isinstance(sink, TensorBoard):
                sink.write_text(step, "answers", _as_markdown(answers[:_SHOWN_ANSWERS]))

    def write_rollouts(self, step: int, rollouts: Sequence[Mapping[str, Any]]) -> None:
        """Write what was generated in a step to `rollouts/step_*.jsonl`."""
        write_rollouts(self._run_dir, step, rollouts)

    def close(self) -> None:
        """Close every sink."""
        for sink in self._sinks:
            sink.close()


class JsonLines:
    """One JSON object a line and step; a value that is not finite is written as null, since JSON has no NaN."""

    def __init__(self, path: Path, resume_step: int) -> None:
        """Open `path` for appending after dropping rows of steps beyond `resume_step`."""
        drop_rows_after(path, resume_step)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: Mapping[str, float]) -> None:
        """Append one line and hand it to the operating system, so that a killed run has lost nothing."""
        self._file.write(json.dumps({key: _finite_or_none(value) for key, value in row.items()}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoard:
    """TensorBoard event files; a resumed run hides the events its predecessor wrote beyond the checkpoint."""

    def __init__(self, folder: Path, resume_step: int) -> None:
        """Open an event file in `folder`; events of steps beyond `resume_step` in older files are purged."""
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        is_resumed = folder.exists()
        self._writer = EventFileWriter(str(folder), flush_secs=10)
        if is_resumed:
            self._add(resume_step + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, row: Mapping[str, float]) -> None:
        """Add one scalar a key under the row's step, all in one event: the library opens its file for each."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=key, simple_value=value) for key, value in row.items() if key != "step"]
        self._add(int(row["step"]), summary=Summary(value=values))

    def write_text(self, step: int, tag: str, text: str) -> None:
        """Add a text, in Markdown, under a step."""
        from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.compat.proto.types_pb2 import DT_STRING

        kind = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        content = TensorProto(dtype=DT_STRING, string_val=[text.encode()])
        self._add(step, summary=Summary(value=[Summary.Value(tag=tag, metadata=kind, tensor=content)]))

    def _add(self, step: int, **content: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._writer.add_event(Event(wall_time=time.time(), step=step, **content))

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


def _as_markdown(answers: Sequence[Spoken]) -> str:
    """Return answers as blocks of code, which show what is in them as it is."""
    return "\n\n".join(f"{one.source}\n```\n{one.prompt}\n>>> {one.answer}\n```" for one in answers)


def drop_rows_after(path: Path, step: int) -> int:
    """Drop rows of steps beyond `step`, and a last line that was cut short; return how many lines went.

    The file is replaced as a whole, so a kill at any moment leaves either the old or the new one.
    """
    if not path.exists():
        return 0
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    kept = [line for line in lines if _step_of(line) <= step]
    if len(kept) < len(lines):
        temporary = path.with_suffix(".jsonl.tmp")
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    return len(lines) - len(kept)


def _step_of(line: str) -> float:
    """Return the step of a row, infinite for a line that is not one."""
    try:
        row = json.loads(line) if line.endswith("\n") else None
    except json.JSONDecodeError:
        return math.inf
    return row["step"] if isinstance(row, dict) and isinstance(row.get("step"), int) else math.inf


def _finite_or_none(value: float) -> float | None:
    return None if isinstance(value, float) and not math.isfinite(value) else value

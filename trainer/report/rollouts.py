"""The files `rollouts/step_*.jsonl` of a run, an object a rollout: written whole, and read back. Torch-free."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from configs.errors import BadInput, in_one_line

FOLDER = "rollouts"
_NUMBER = (int, float)
_KINDS: Mapping[str, tuple[type, ...]] = {
    "step": (int,), "source": (str,), "row": (int,), "group": (int,), "sample": (int,), "prompt": (str,),
    "answers": (list,), "score": (*_NUMBER, type(None)), "rewards": (dict,), "faults": (dict,),
    "advantage": (*_NUMBER, type(None)), "finish": (str,), "num_prompt_tokens": (int,), "num_sampled_tokens": (int,),
}  # fmt: skip
"""What `trainer.rl.rollout.Rollout.record` has, and the types of it; `observations`, a list too, came later."""


def write_rollouts(run_dir: Path, step: int, rollouts: Sequence[Mapping[str, Any]]) -> None:
    """Write what was generated in a step, in the place of what an earlier start wrote; a kill leaves all or nothing."""
    path = run_dir / FOLDER / f"step_{step:08d}.jsonl"
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix(".jsonl.tmp")
    lines = (json.dumps(one, ensure_ascii=False) + "\n" for one in rollouts)
    temporary.write_text("".join(lines), encoding="utf-8")
    os.replace(temporary, path)


def list_rollouts(run_dir: Path) -> list[Path]:
    """Return a run's files of rollouts in the order of their steps; none where it has none."""
    return sorted((run_dir / FOLDER).glob("step_*.jsonl"), key=lambda path: (len(path.name), path.name))


def read_rollouts(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rollouts of a file, in order. Raises BadInput naming file and line of what is none."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise BadInput(
                    f"{path}:{number}: not JSON ({in_one_line(error)}); take the line out, or the file away"
                ) from error
            if not isinstance(row, dict):
                raise BadInput(f"{path}:{number}: not a JSON object; give a file of a run's {FOLDER}/ folder")
            wrong = next((name for name, kinds in _KINDS.items() if not isinstance(row.get(name, ...), kinds)), None)
            if wrong is not None:
                state = "is not what a rollout has" if wrong in row else "is missing"
                raise BadInput(f"{path}:{number}: {wrong} {state}; give a file of a run's {FOLDER}/ folder")
            yield row


def drop_rollouts_after(run_dir: Path, step: int) -> None:
    """Remove the files of steps beyond `step`: of a course of training that is given up."""
    for path in list_rollouts(run_dir):
        if int(path.stem.removeprefix("step_")) > step:
            path.unlink()

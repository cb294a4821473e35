"""The benchmark's table and its JSON file. Torch-free; measures nothing."""

from __future__ import annotations

import datetime
import json
import os
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "megatron-core", "transformers", "accelerate")
LIMIT = 0.03
"""Share of the bare loop's speed that ours may cost."""
NAMES = {
    "bare": "bare megatron-core loop",
    "hf": "Hugging Face Trainer",
    "trl": "TRL's SFTTrainer, packed",
    "trl_dpo": "TRL's DPOTrainer",
    "trl_grpo": "TRL's GRPOTrainer",
}


def describe_machine(device: str, load_before: float, packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """Return device, versions, date and the load averages (1 minute, processes) before and after the runs."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device,
        "processor": _processor(),
        "python": sys.version.split()[0],
        "versions": {name: version(name) for name in packages},
        "load_average_before": load_before,
        "load_average_after": os.getloadavg()[0],
    }


def write_report(
    path: Path,
    machine: Mapping[str, Any],
    comparisons: Sequence[Mapping[str, Any]],
    measures: Sequence[Mapping[str, Any]],
) -> None:
    """Write everything measured, atomically."""
    content = {"machine": machine, "limit": LIMIT, "comparisons": comparisons, "runs": measures}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def print_report(machine: Mapping[str, Any], comparisons: Sequence[Mapping[str, Any]]) -> None:
    """Print the comparisons as a table: medians, the ratio step by step with its interval, and what it means."""
    from rich.console import Console
    from rich.table import Table

    title = f"tokens/s, median step (95 % interval); {machine['processor']}, {machine['device']}"
    table = Table(title=title, title_justify="left")
    for column in ("layout", "against", "steps", "ours", "theirs", "ours / theirs", "processor time", "verdict"):
        table.add_column(column)
    for one in comparisons:
        table.add_row(
            one["layout"],
            NAMES[one["other"]],
            str(one["num_pairs"]),
            f"{one['ours']:,.0f}",
            f"{one['theirs']:,.0f}",
            "{median:.3f} ({low:.3f}-{high:.3f})".format(**one["ratio"]),
            f"{one['processor_ratio']:.3f}",
            describe_verdict(one),
        )
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)


def describe_verdict(comparison: Mapping[str, Any]) -> str:
    """Return in words what a comparison says: our cost against the limit, or the speed-up over a rival."""
    if comparison["is_same_loss"] is False:
        return "not comparable: the losses differ"
    if comparison["other"] != "bare":
        return f"{comparison['ratio']['median']:.2f} times its speed"
    cost = max(comparison["cost"], 0.0)
    return f"costs {cost:.1%}, {'within' if cost <= LIMIT else 'over'} the limit of {LIMIT:.0%}"


def _processor() -> str:
    """Return the processor's name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "unknown processor"
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "unknown processor"

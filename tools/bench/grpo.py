"""Measure reinforcement learning: seconds of a GRPO step of ours against TRL's `GRPOTrainer`, step by step in turns.

Run: OMP_NUM_THREADS=1 python tools/bench/grpo.py [--steps 12] [--out FILE.json]   (`make bench`)
On made-up questions, both on one rank of the CPU, with the demo's model, Dr. GRPO's loss and one update a step: 32
answers in groups of 8, of up to 64 tokens. Weights are random, so that hardly an answer ends before the limit.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: the packages are beside tools/, which Python puts first
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.bench.chats import write_chats, write_tokenizer
from tools.bench.compare import compare
from tools.bench.report import PACKAGES, describe_machine, print_report
from tools.bench.throughput import NUM_WARMUP, ROOT, Case, RunFailed, measure_case
from tools.console import Progress, end_process, run_command
from tools.outputs import check_file
from tools.paths import path_argument

_VOCABULARY = 4096
_OVERRIDES = (
    "parallel.tp=1", "train.global_batch_size=32", "train.micro_batch_size=4", "train.seq_len=256",
    "grpo.algorithm=dr_grpo", "grpo.group_size=8", "grpo.num_reward_workers=1", "rollout.max_new_tokens=64",
)  # fmt: skip


def measure_all(num_steps: int) -> dict[str, Any]:
    """Measure both and print them. Raises RunFailed."""
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        chats, tokenizer = Path(name) / "chats.jsonl", Path(name) / "tokenizer"
        write_chats(chats)
        write_tokenizer(chats, tokenizer, _VOCABULARY)
        overrides = (*_OVERRIDES, f"data.tokenizer={tokenizer}")
        case = Case("GRPO, 1 rank", 1, overrides, ("fit", "trl_grpo"), stage="grpo")
        with Progress(case.layout, NUM_WARMUP + num_steps) as progress:
            measures = measure_case(case, num_steps, chats, progress)
    machine = describe_machine(measures[0].report.device, load_before, (*PACKAGES, "trl"))
    comparisons = compare(measures)
    print_report(machine, comparisons)
    return {"machine": machine, "comparisons": comparisons, "runs": [asdict(measure) for measure in measures]}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(prog="grpo.py", description="Our GRPO step against TRL's.")
    parser.add_argument("--steps", type=int, default=12, metavar="N", help="measured steps of each loop (default 12)")
    default_out = ROOT / "tools" / "bench" / "results" / "grpo_cpu.json"
    parser.add_argument("--out", type=path_argument, default=default_out, metavar="FILE", help="result file")
    arguments = parser.parse_args(argv)
    if arguments.steps < 2:
        parser.error("--steps must be at least 2, for example --steps 12")

    def command() -> None:
        check_file(arguments.out)
        figures = measure_all(arguments.steps)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")

    try:
        return run_command(command)
    except RunFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    end_process(main)

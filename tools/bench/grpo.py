"""Measure reinforcement learning: seconds of a GRPO step against TRL's `GRPOTrainer`, and what a step is made of.

Run: OMP_NUM_THREADS=1 python tools/bench/grpo.py [--steps 12] [--out FILE.json]   (`make bench`)
On made-up questions, step by step in turns on one rank of the CPU each, with the demo's model, Dr. GRPO's loss and one
update a step: 32 answers in groups of 8, of up to 64 tokens. Weights are random, so that hardly an answer ends before
the limit. The shares of a step are of a run of its own on two replicas (DP2), whose answers end at a letter.
"""

from __future__ import annotations

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
from tools.bench.launching import launch_stage, run_comparison
from tools.bench.report import PACKAGES, describe_machine, print_report
from tools.bench.throughput import CONFIG, NUM_WARMUP, Case, measure_case
from tools.console import Progress, end_process

_VOCABULARY = 4096
_OVERRIDES = (
    "parallel.tp=1", "train.global_batch_size=32", "train.micro_batch_size=4", "train.seq_len=256",
    "grpo.algorithm=dr_grpo", "grpo.group_size=8", "grpo.num_reward_workers=1", "rollout.max_new_tokens=64",
)  # fmt: skip


_PHASES = ("generate_sequences", "reward", "score", "update_actor")


def measure_shares(num_steps: int, chats: Path, tokenizer: str, run_dir: Path) -> dict[str, float]:
    """Return which share of a step each phase takes on two replicas, and how long each of these waits in generation.

    The waiting is a share of the generation's time. `tokenizer` is the override that names it. Raises RunFailed.
    """
    seed = run_dir.with_name("seed")
    nothing = (
        "parallel.tp=1", "parallel.pp=1", "data.train=[]", "data.validation=[]", "sample.prompts=[]",
        "train.num_steps=0", "schedule.warmup_steps=0", "train.eval_every=null",
    )  # fmt: skip
    launch_stage("seed", "pretrain", 1, str(CONFIG), *nothing, tokenizer, f"run.dir={seed}")
    uneven = ("rollout.stop_strings=[k]", f"train.num_steps={NUM_WARMUP + num_steps}")
    stage, *words = Case("dp2", 2, (*_OVERRIDES, tokenizer, *uneven), (), stage="grpo").words(chats, run_dir)
    launch_stage("shares of a step", stage, 2, *words, f"checkpoint.init_from={seed}")
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for line in lines if "timing_s/step" in (row := json.loads(line))][NUM_WARMUP:]
    whole = sum(row["timing_s/step"] for row in rows)
    shares = {phase: sum(row[f"timing_s/{phase}"] for row in rows) / whole for phase in _PHASES}
    shares["other"] = 1 - sum(shares.values())
    for replica in range(2):
        name = f"rollout/idle_share/dp_{replica}"
        shares[f"idle_dp_{replica}"] = sum(row[name] for row in rows) / len(rows)
    shares["seconds"] = whole / len(rows)
    return shares


def print_shares(shares: dict[str, float]) -> None:
    """Print them in two lines."""
    parts = ", ".join(f"{phase} {shares[phase]:.0%}" for phase in (*_PHASES, "other"))
    print(f"a step on dp2 takes {shares['seconds']:.2f} s: {parts}")
    idle = ", ".join(f"dp {replica} {shares[f'idle_dp_{replica}']:.0%}" for replica in range(2))
    print(f"idle in generation, waiting for the slowest replica: {idle}")


def measure_all(num_steps: int) -> dict[str, Any]:
    """Measure both and print them. Raises RunFailed."""
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        chats, tokenizer = Path(name) / "chats.jsonl", Path(name) / "tokenizer"
        write_chats(chats)
        write_tokenizer(chats, tokenizer, _VOCABULARY)
        named = f"data.tokenizer={tokenizer}"
        case = Case("GRPO, 1 rank", 1, (*_OVERRIDES, named), ("fit", "trl_grpo"), stage="grpo")
        with Progress(case.layout, NUM_WARMUP + num_steps) as progress:
            measures = measure_case(case, num_steps, chats, progress)
        shares = measure_shares(num_steps, chats, named, Path(name) / "shares")
    machine = describe_machine(measures[0].report.device, load_before, (*PACKAGES, "trl"))
    comparisons = compare(measures)
    print_report(machine, comparisons)
    print_shares(shares)
    runs = [asdict(measure) for measure in measures]
    return {"machine": machine, "comparisons": comparisons, "shares": shares, "runs": runs}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    return run_comparison(argv, "grpo", "Our GRPO step against TRL's.", 12, measure_all)


if __name__ == "__main__":
    end_process(main)

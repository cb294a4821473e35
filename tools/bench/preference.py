"""Measure learning from preferences: tokens/s of our DPO against TRL's `DPOTrainer`.

Run: python tools/bench/preference.py [--steps 40] [--out FILE.json]   (`make bench`)
On made-up pairs, step by step in turns on one rank of the CPU each, with the demo's model: answers as they are, most
short and some long, and answers of one length. Both read what the reference says of an answer, which they computed
before the first step; tokens are those of both answers with their prompts, and no padding, which is TRL's own affair.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: the packages are beside tools/, which Python puts first
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.bench.chats import write_chats, write_pairs, write_tokenizer
from tools.bench.compare import compare
from tools.bench.launching import run_comparison
from tools.bench.report import PACKAGES, describe_machine, print_report
from tools.bench.throughput import NUM_WARMUP, Case, measure_case
from tools.console import Progress, end_process

_VOCABULARY = 4096
_NUM_PAIRS = 800
_LENGTH = 400  # characters of answers that need hardly any padding
_OVERRIDES = (
    "parallel.tp=1", "train.seq_len=512", "train.global_batch_size=4", "train.micro_batch_size=2",
    "preference.sft_weight=0",
)  # fmt: skip


def measure_all(num_steps: int, num_pairs: int = _NUM_PAIRS) -> dict[str, Any]:
    """Measure both and print them. Raises RunFailed."""
    load_before, measures = os.getloadavg()[0], []
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        chats, tokenizer = Path(name) / "chats.jsonl", Path(name) / "tokenizer"
        write_chats(chats)
        write_tokenizer(chats, tokenizer, _VOCABULARY)
        overrides = (*_OVERRIDES, f"data.tokenizer={tokenizer}")
        for title, length in (("DPO, 1 rank", None), ("DPO, 1 rank, alike long", _LENGTH)):
            pairs = Path(name) / f"pairs_{length}.jsonl"
            write_pairs(pairs, num_pairs, length)
            case = Case(title, 1, overrides, ("fit", "trl_dpo"), stage="preference")
            with Progress(title, NUM_WARMUP + num_steps) as progress:
                measures += measure_case(case, num_steps, pairs, progress)
    machine = describe_machine(measures[0].report.device, load_before, (*PACKAGES, "trl"))
    comparisons = compare(measures)
    print_report(machine, comparisons)
    return {"machine": machine, "comparisons": comparisons, "runs": [asdict(measure) for measure in measures]}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    return run_comparison(argv, "preference", "Our DPO against TRL's.", 40, measure_all)


if __name__ == "__main__":
    end_process(main)
